"""What vLLM loads through the entry point `vllm.general_plugins`: our model class under a name of its own.

`register` runs in the driver and in every process of an engine, so it is cheap, may run twice, and touches no device.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal

ARCHITECTURE = "VlarlOpenVLAForActionPrediction"
MODEL_TYPE = "vlarl_openvla"
"""Not `openvla`: vLLM has a config and a model of that name, for 224-pixel towers of timm's only."""
ENGINE_OF = "VLARL_RAY_ENGINE_OF"
"""Environment variable of the processes of our engines: other users of vLLM load this plug-in too."""
_PR_SET_PDEATHSIG = 1
"""Of Linux's `prctl`."""


def register() -> None:
    """Make the config and model known to transformers and vLLM; tie processes of our engines to their parent."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from vlarl_ray.inference.vllm_hf_config import VlarlOpenVLAConfig

    AutoConfig.register(MODEL_TYPE, VlarlOpenVLAConfig, exist_ok=True)
    if ENGINE_OF in os.environ:
        die_with_parent()
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # as text: the processes of an engine are spawned, and import it only where they build the model
        ModelRegistry.register_model(ARCHITECTURE, "vlarl_ray.inference.vllm_model:VlarlOpenVLAForActionPrediction")


def die_with_parent() -> None:
    """End this process when the one that spawned it ends; nothing in a process that multiprocessing did not spawn.

    vLLM's engine outlives a parent that is killed: on a GPU it would keep the memory that its successor needs.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent.pid:  # it ended before that
        os.kill(os.getpid(), signal.SIGKILL)
