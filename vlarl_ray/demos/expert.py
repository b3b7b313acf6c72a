"""How good the scripted expert is where the policy is evaluated: the reference for success and steps to success."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vlarl_ray.config import EnvConfig
from vlarl_ray.envs import make_suite, single_task
from vlarl_ray.envs.base import SimEnv
from vlarl_ray.files import write_whole
from vlarl_ray.types import TaskSpec


@dataclass(frozen=True)
class ExpertReference:
    """The noise-free expert on held-out initial states."""

    success_rate: float
    steps_to_success: float | None
    """Mean first successful env step over successes; None without any."""
    steps_to_success_per_task: Mapping[str, float]


def expert_reference(env: EnvConfig, *, states_per_task: int, path: Path) -> ExpertReference | None:
    """Run the expert from the held-out initial states, once per run folder.

    Args:
        env: Suite and horizon.
        states_per_task: Held-out initial states, from 0 on: those of the evaluation.
        path: JSON file that keeps the result.

    Returns:
        None if the suite has no expert.
    """
    if not path.exists():
        # A process of its own, as the driver should not hold a GL context.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            measured = pool.submit(measure_expert, env, states_per_task).result()
        write_whole(path, json.dumps(None if measured is None else asdict(measured)))
    stored = json.loads(path.read_text(encoding="utf-8"))
    return None if stored is None else ExpertReference(**stored)


def measure_expert(env: EnvConfig, states_per_task: int) -> ExpertReference | None:
    """Run the expert in this process, without drawing more than each episode's first frame."""
    suite = make_suite(env)
    simulator = suite.make_env()
    steps: dict[str, list[int]] = {}
    try:
        for task_id in suite.task_ids:
            tasks = [
                single_task(suite, task_id, state, "eval", max_env_steps=env.max_env_steps)
                for state in range(states_per_task)
            ]
            found = [first_success(simulator, task) for task in tasks]
            steps[task_id] = [step for step in found if step is not None]
    except NotImplementedError:
        return None
    finally:
        simulator.close()
    successes = [step for found in steps.values() for step in found]
    return ExpertReference(
        success_rate=len(successes) / (states_per_task * len(suite.task_ids)),
        steps_to_success=float(np.mean(successes)) if successes else None,
        steps_to_success_per_task={task_id: float(np.mean(found)) for task_id, found in steps.items() if found},
    )


def first_success(simulator: SimEnv, task: TaskSpec) -> int | None:
    """Env step (1-based) at which the expert first succeeds; None if it does not within the horizon."""
    simulator.reset(task)
    for step in range(1, task.max_env_steps + 1):
        if simulator.step(simulator.expert_action()).success:
            return step
    return None
