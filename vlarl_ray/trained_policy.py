"""Take the trained policy out of a run: as a policy folder, merged, or as adapters that PEFT loads onto the base."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlarl_ray.checkpoint import Checkpoint, CheckpointError, is_checkpoint, load, load_latest
from vlarl_ray.config import ExperimentConfig
from vlarl_ray.config_loader import config_from_json
from vlarl_ray.models.lora import CRITIC, POLICY, official_name, save_adapter
from vlarl_ray.models.policy import copy_policy, policy_weights
from vlarl_ray.models.policy_export import export_policy
from vlarl_ray.models.weight_files import WeightFiles
from vlarl_ray.run_folder import CONFIG_FILE
from vlarl_ray.weights.merge import merge
from vlarl_ray.weights.update import WeightUpdate


def save_trained_policy(policy_dir: Path, update: WeightUpdate, folder: Path) -> Path:
    """Merge an update into the policy that training started from, in fp32 and tensor by tensor, and save the result.

    Args:
        policy_dir: Policy folder of version 0.
        update: Weights of the last version.
        folder: Policy folder to write.

    Raises:
        ValueError: If the update names a tensor that the policy lacks.
    """
    return copy_policy(
        policy_dir,
        folder,
        merged_tensors(policy_weights(policy_dir), update),
        metadata={"policy_version": update.version},
    )


def merged_tensors(weights: WeightFiles, update: WeightUpdate) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a policy with an update in it, one at a time.

    Those that change are in fp32, as bf16 would round much of a small change away; the others stay as they are stored.

    Raises:
        ValueError: If the update names a tensor that is not among `weights`.
    """
    unknown = sorted((update.adapters.keys() | update.tensors.keys()) - weights.keys())
    if unknown:
        raise ValueError(f"the update holds {', '.join(unknown)}, which the policy lacks; it is of another policy.")
    for name, tensor in weights.read_rows(dict.fromkeys(weights, slice(None))):
        changes = name in update.adapters or name in update.tensors
        # as servers merge it, to the bit
        yield name, merge(name, tensor, update, dtype=torch.float32) if changes else tensor


def export_checkpoint(source: Path, folder: Path) -> Path:
    """Merge a checkpoint's adapters into the policy its run started from, and write that in the published layout.

    Args:
        source: Folder of a checkpoint, in the `checkpoints` of its run.
        folder: See `export_policy`, errors too.

    Raises:
        CheckpointError: If the checkpoint is not intact.
    """
    checkpoint, cfg, policy_dir = _trained(source)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as partial:
        merged = save_trained_policy(policy_dir, _update(checkpoint, cfg), Path(partial))
        return export_policy(merged, folder)


def export_adapter(source: Path, folder: Path) -> Path:
    """Write a run's adapters as `peft.PeftModel.from_pretrained` reads them, and its heads beside them.

    Those of a separate critic go into `critic`, where PEFT puts a second adapter. `adapter_config.json` names the
    policy that they adapt: the published checkpoint that the run started from, or else the run's own policy folder.

    Args:
        source: Run folder, whose newest checkpoint is taken, or the folder of a checkpoint.
        folder: To write; must not exist or be empty.

    Raises:
        FileExistsError: If there is something in `folder`.
        CheckpointError: If there is no checkpoint, or none that is intact.
        ValueError: If the run trains without adapters.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; name a new folder, so that files of two policies do not mix.")
    checkpoint, cfg, policy_dir = _trained(source)
    update = _update(checkpoint, cfg)
    if not update.adapters:
        raise ValueError(f"{source} was trained whole (learner.train = full), so it has no adapters; omit --adapter.")
    base = json.loads((policy_dir / "config.json").read_text()).get("weights_of") or str(policy_dir.resolve())
    heads = {name: torch.from_numpy(tensor) for name, tensor in update.tensors.items()}
    critic = _adapters(checkpoint.arrays["parameters"], CRITIC)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as partial:
        new = Path(partial) / folder.name
        save_adapter(new, _tensors(update.adapters), heads, cfg.learner.lora, base=base)
        if critic:
            save_adapter(new / CRITIC, _tensors(critic), {}, cfg.learner.lora, base=base)
        new.rename(folder)
    return folder


def _trained(source: Path) -> tuple[Checkpoint, ExperimentConfig, Path]:
    """Read a checkpoint, or a run's newest, the run's config, and where the policy is that the run started from."""
    run_dir = source.absolute().parent.parent if is_checkpoint(str(source)) else source
    path = run_dir / CONFIG_FILE
    if not (path.exists() and (run_dir / "policy").is_dir()):
        raise FileNotFoundError(
            f"{source} belongs to no run: {run_dir} holds no {CONFIG_FILE} and policy; name a run folder, or a "
            "checkpoint in the `checkpoints` of one."
        )
    checkpoint = load_latest(str(run_dir)) if run_dir is source else load(str(source))
    if checkpoint is None:
        raise CheckpointError(f"{source} holds no checkpoint yet; train the policy first.")
    return checkpoint, config_from_json(path.read_text()), run_dir / "policy"


def _update(checkpoint: Checkpoint, cfg: ExperimentConfig) -> WeightUpdate:
    """What a checkpoint's learner would publish."""
    parameters = checkpoint.arrays["parameters"]
    whole = {official_name(n): p for n, p in parameters.items() if ".lora_A." not in n and ".lora_B." not in n}
    return WeightUpdate(
        version=checkpoint.state["version"],
        lora_scale=cfg.learner.lora.alpha / cfg.learner.lora.rank,
        adapters=_adapters(parameters, POLICY),
        tensors=whole,
    )


def _adapters(parameters: Mapping[str, np.ndarray], adapter: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(A, B) of one adapter by the official name of the weight they adapt."""
    first, second = (f".lora_{part}.{adapter}.weight" for part in "AB")
    modules = [name.removesuffix(first) for name in parameters if name.endswith(first)]
    return {f"{m}.weight": (parameters[m + first], parameters[m + second]) for m in modules}


def _tensors(adapters: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (torch.from_numpy(a), torch.from_numpy(b)) for name, (a, b) in adapters.items()}
