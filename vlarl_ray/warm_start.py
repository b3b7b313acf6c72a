"""From nothing to a policy that can be improved: scripted demonstrations, then supervised fine-tuning."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vlarl_ray.config import ExperimentConfig
from vlarl_ray.demos.collect import collect_demonstrations
from vlarl_ray.demos.store import Demonstration, load_demonstrations
from vlarl_ray.envs.base import Suite

_LOG = logging.getLogger(__name__)


def demonstrations(cfg: ExperimentConfig, suite: Suite, run_dir: Path) -> list[Demonstration]:
    """Load the demonstrations of `demos.path`, or collect them into the run folder (once)."""
    path = Path(cfg.demos.path) if cfg.demos.path is not None else run_dir / "demos"
    if cfg.demos.path is None:
        collect_demonstrations(cfg.env, cfg.demos, seed=cfg.seed, path=path, num_processes=2)
    return load_demonstrations(path, suite=suite.name, task_ids=suite.task_ids, env=cfg.env)


def fine_tuned_policy(cfg: ExperimentConfig, suite: Suite, demos: list[Demonstration], run_dir: Path) -> Path:
    """Fine-tune a new policy on demonstrations and save it, unless the run folder holds it already.

    Returns:
        The policy folder, `<run_dir>/policy`.
    """
    folder = run_dir / "policy"
    if (folder / "model.safetensors").exists():
        return folder
    # torch is imported late: a run that starts from a checkpoint never needs it in the driver's start-up.
    from vlarl_ray.models import new_policy
    from vlarl_ray.sft import run_sft

    instructions = [suite.instruction(task_id) for task_id in suite.task_ids]
    env = cfg.env
    trained_on = {
        "suite": env.suite,
        "camera": env.camera,
        "image_size": env.image_size,
        "render_profile": env.render_profile,
    }
    model = new_policy(cfg.model, instructions, cfg.seed, metadata=trained_on)
    run_sft(model, demos, cfg.sft, chunk_length=cfg.model.chunk_length, seed=cfg.seed, log=_LOG.info)
    model.save(folder)
    return folder


def expert_steps(demos: list[Demonstration]) -> tuple[float, Mapping[str, float]]:
    """Mean env steps to success of the scripted expert: over all demonstrations, and by task."""
    by_task: dict[str, list[int]] = {}
    for demo in demos:
        by_task.setdefault(demo.task_id, []).append(len(demo.actions))
    return float(np.mean([n for steps in by_task.values() for n in steps])), {
        task: float(np.mean(steps)) for task, steps in by_task.items()
    }
