"""Which folder a run writes to, whether that folder is free, and that one process at a time writes to it."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlarl_ray.config import ExperimentConfig
from vlarl_ray.config_checks import Problem

CONFIG_FILE = "config.json"

MAY_CHANGE_ON_RESUME = (
    "run_dir",
    "num_iterations",
    "max_rl_seconds",
    "max_rl_env_steps",
    "cluster",
    "metrics",
    "checkpoint",
)
"""What does not change the course of a run, or only its end. (`num_iterations` does where learning rates follow it.)"""


LOCK_FILE = ".lock"


class RunFolderBusyError(ValueError):
    """Another process writes to the run folder."""


@contextmanager
def sole_writer(run_dir: str | Path) -> Iterator[None]:
    """Hold the run folder, which is made if it is not there; the system lets it go when the process ends, however.

    Raises:
        RunFolderBusyError: If another process holds it.
    """
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise RunFolderBusyError(
                f"run_dir = {str(run_dir)!r}: another process writes to it ({owner}); wait for it or stop it, or "
                "choose another --run-dir."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


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
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        return [_problem(run_dir, f"{there} cannot be written to; choose another --run-dir")]
    saved = _saved_config(path)
    if saved is None:
        return []
    if not saved:
        return [_problem(run_dir, f"its {CONFIG_FILE} is damaged; choose another --run-dir")]
    current = _as_json(config)
    free = {*MAY_CHANGE_ON_RESUME, *(["model"] if config.policy is not None else [])}  # the policy brings its model
    if config.learner.final_learning_rate_fraction < 1:  # the schedule is stretched over the planned iterations
        free -= {"num_iterations"}
    changed = [path for path in _differences(saved, current) if path.split(".")[0] not in free]
    if changed:
        listed = ", ".join(changed[:6]) + (f" and {len(changed) - 6} more" if len(changed) > 6 else "")
        advice = "choose another --run-dir, or give the run's own configuration"
        return [_problem(run_dir, f"holds a run with another configuration ({listed} differ); {advice}")]
    if not resume:
        return [_problem(run_dir, "holds this run already; add --resume to go on with it, or choose another --run-dir")]
    return []


def _add_new_fields(saved: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Give a config of an earlier version the fields that came later, at their defaults, as it ran with those."""
    for key, default in defaults.items():
        if key not in saved:
            saved[key] = default
        elif isinstance(default, dict) and isinstance(saved[key], dict):
            _add_new_fields(saved[key], default)


def check_evaluation_dir(config: ExperimentConfig) -> list[Problem]:
    """Find out whether an evaluation belongs into its run folder: that of no run, or of one on the same env.

    Args:
        config: The evaluation.
    """
    run_dir = run_dir_of(config)
    saved = _saved_config(Path(run_dir) / CONFIG_FILE)
    if not saved:
        return []
    changed = _differences(saved["env"], _as_json(config)["env"], "env.")
    if changed:
        advice = "give the run's own preset and overrides, or choose another --run-dir for this evaluation"
        return [_problem(run_dir, f"holds a run on another env ({', '.join(changed)} differ); {advice}")]
    return []


def _as_json(config: ExperimentConfig) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _saved_config(path: Path) -> dict[str, Any] | None:
    """Read a run's config, with the defaults of fields it lacks; None if there is none, empty if it is damaged."""
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_bytes())
    except ValueError:
        return {}
    if not isinstance(saved, dict):
        return {}
    _add_new_fields(saved, _as_json(ExperimentConfig()))
    return saved


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
