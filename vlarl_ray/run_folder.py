"""Which folder a run writes to, and whether that folder is free."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlarl_ray.config import ExperimentConfig
from vlarl_ray.config_checks import Problem

CONFIG_FILE = "config.json"

MAY_CHANGE_ON_RESUME = ("run_dir", "num_iterations", "max_rl_seconds", "cluster", "metrics", "checkpoint")
"""What does not change the course of a run, or only its end."""


def run_dir_of(config: ExperimentConfig) -> str:
    """Name the run folder: `run_dir`, or its default `runs/<name>-seed<seed>`."""
    return config.run_dir if config.run_dir is not None else f"runs/{config.name}-seed{config.seed}"


def check_run_dir(config: ExperimentConfig, *, resume: bool) -> list[Problem]:
    """Find out whether `config` may write to its run folder.

    Args:
        config: The run to start.
        resume: Whether to go on with a run that is there; otherwise the folder must hold none.
    """
    run_dir = run_dir_of(config)
    path = Path(run_dir) / CONFIG_FILE
    if not path.is_file():
        return []
    try:
        saved = json.loads(path.read_bytes())
    except ValueError:
        saved = None
    if not isinstance(saved, dict):
        return [_problem(run_dir, f"its {CONFIG_FILE} is damaged; choose another --run-dir")]
    current = json.loads(json.dumps(dataclasses.asdict(config)))
    free = {*MAY_CHANGE_ON_RESUME, *(["model"] if config.policy is not None else [])}  # the policy brings its model
    changed = [path for path in _differences(saved, current) if path.split(".")[0] not in free]
    if changed:
        listed = ", ".join(changed[:6]) + (f" and {len(changed) - 6} more" if len(changed) > 6 else "")
        advice = "choose another --run-dir, or give the run's own configuration"
        return [_problem(run_dir, f"holds a run with another configuration ({listed} differ); {advice}")]
    if not resume:
        return [_problem(run_dir, "holds this run already; add --resume to go on with it, or choose another --run-dir")]
    return []


def _problem(run_dir: str, advice: str) -> Problem:
    return Problem(("run_dir",), f"run_dir = {run_dir!r}: {advice}.")


def _differences(left: Mapping[str, Any], right: Mapping[str, Any], prefix: str = "") -> list[str]:
    paths = []
    for key in [*left, *(key for key in right if key not in left)]:
        one, other = left.get(key), right.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            paths += _differences(one, other, f"{prefix}{key}.")
        elif one != other or (key in left) != (key in right):
            paths.append(prefix + key)
    return paths
