"""Run scripted experts from training initial states and keep the successful episodes.

Data flow: each process takes a share of the tasks -> a file per task in a temporary folder -> one rename to the final
name. What an episode holds depends on (seed, task, initial state, attempt) alone, not on the number of processes.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vlarl_ray.config import DemosConfig, EnvConfig
from vlarl_ray.demos.store import Demonstration, env_settings, read_settings, write_demonstrations
from vlarl_ray.envs import make_suite, single_task
from vlarl_ray.envs.base import SimEnv, Suite
from vlarl_ray.types import TaskSpec

_LOG = logging.getLogger(__name__)

_NOISY_PASSES = 8
"""Times the training initial states are gone through where noise makes every attempt another one."""


def collect_demonstrations(
    env: EnvConfig,
    demos: DemosConfig,
    *,
    seed: int,
    path: Path,
    num_processes: int = 1,
    progress: Callable[[str, int], None] | None = None,
) -> Path:
    """Collect `episodes_per_task` successful episodes of every task into a new store, or reuse an equal one.

    Args:
        env: Suite, tasks, cameras; `max_env_steps` ends an attempt.
        demos: How many, and with how much action noise.
        seed: Seed of the order of initial states and of the noise.
        path: Folder to write; it appears only when it is complete.
        num_processes: Processes that share the tasks. They are spawned, as a GL context does not survive a fork.
        progress: Called with a task and its number of episodes when the task is done.

    Returns:
        `path`.

    Raises:
        ValueError: If `path` holds something else, the suite has no expert, or a task has too few successes.
    """
    suite = make_suite(env)
    settings = _settings(env, demos, seed, suite.task_ids)
    if path.exists():
        _check_same(path, settings)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.mkdir()
    try:
        for task_id, num_episodes in _collect_all(env, suite, settings, temporary, num_processes):
            _LOG.info("collected %d demonstrations of %s", num_episodes, task_id)
            if progress is not None:
                progress(task_id, num_episodes)
        try:
            temporary.rename(path)
        except OSError:
            _check_same(path, settings)  # another process finished the same collection first
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def run_expert(env: SimEnv, task: TaskSpec, *, action_noise: float, rng: np.random.Generator) -> Demonstration:
    """Run the scripted expert until its first success or `task.max_env_steps`, drawing every env step."""
    observation = env.reset(task)
    observations, actions, success = [observation], [], False
    while not success and len(actions) < task.max_env_steps:
        expert = env.expert_action()
        noise = rng.normal(0.0, action_noise, size=expert.shape) if action_noise > 0 else 0.0
        action = np.clip(expert + noise, -1.0, 1.0).astype(np.float32)
        result = env.step(action)
        actions.append(action)
        observations.append(env.observe())
        success = result.success
        if result.terminated or result.truncated:
            break
    return Demonstration(
        task_id=task.task_id,
        instruction=task.instruction,
        init_state_id=task.init_state_id,
        frames=np.stack([o.images for o in observations]),
        proprio=np.stack([o.proprio for o in observations]),
        actions=np.stack(actions),
        success=success,
    )


def _settings(env: EnvConfig, demos: DemosConfig, seed: int, task_ids: Sequence[str]) -> dict[str, Any]:
    return {
        **env_settings(env),
        "tasks": list(task_ids),
        "max_env_steps": env.max_env_steps,
        "episodes_per_task": demos.episodes_per_task,
        "action_noise": demos.action_noise,
        "seed": seed,
    }


def _check_same(path: Path, settings: dict[str, Any]) -> None:
    stored = read_settings(path)
    different = sorted(name for name in settings | stored if settings.get(name) != stored.get(name))
    if different:
        name = different[0]
        raise ValueError(
            f"{path} holds demonstrations of other settings: {different}; {name} is {stored.get(name)!r} there and "
            f"{settings.get(name)!r} here. Remove the folder, or name it in demos.path to use it as it is."
        )


def _collect_all(
    env: EnvConfig, suite: Suite, settings: dict[str, Any], folder: Path, num_processes: int
) -> Iterator[tuple[str, int]]:
    task_ids = list(suite.task_ids)
    num_processes = min(num_processes, len(task_ids))
    if num_processes <= 1:
        yield from _collect_tasks(suite, settings, task_ids, folder)
        return
    shares = [task_ids[index::num_processes] for index in range(num_processes)]
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(_collect_share, env, settings, share, folder) for share in shares]:
            yield from done.result()


def _collect_share(
    env: EnvConfig, settings: dict[str, Any], task_ids: list[str], folder: Path
) -> list[tuple[str, int]]:
    return list(_collect_tasks(make_suite(replace(env, tasks=tuple(task_ids))), settings, task_ids, folder))


def _collect_tasks(
    suite: Suite, settings: dict[str, Any], task_ids: Sequence[str], folder: Path
) -> Iterator[tuple[str, int]]:
    simulator = suite.make_env()
    try:
        for task_id in task_ids:
            episodes = _successes(suite, simulator, settings, task_id)
            yield task_id, write_demonstrations(folder / f"{task_id}.parquet", episodes, settings=settings)
    except NotImplementedError as error:
        raise ValueError(
            f"suite {suite.name!r} has no scripted expert, so no demonstrations can be collected; "
            "give recorded ones in demos.path, or start from a policy (policy: <folder>)."
        ) from error
    finally:
        simulator.close()


def _successes(suite: Suite, simulator: SimEnv, settings: dict[str, Any], task_id: str) -> Iterator[Demonstration]:
    wanted, noise = settings["episodes_per_task"], settings["action_noise"]
    rng = np.random.default_rng([settings["seed"], zlib.crc32(task_id.encode())])
    num_states = suite.num_init_states(task_id, "train")
    num_found = num_tried = 0
    for _ in range(_NOISY_PASSES if noise > 0 else 1):
        for state in rng.permutation(num_states):
            task = single_task(
                suite, task_id, int(state), "train", seed=settings["seed"], max_env_steps=settings["max_env_steps"]
            )
            demonstration = run_expert(simulator, task, action_noise=noise, rng=rng)
            num_tried += 1
            if demonstration.success:
                num_found += 1
                yield demonstration
            if num_found == wanted:
                return
    more = "less demos.action_noise" if noise > 0 else "set demos.action_noise > 0 to try each state several times"
    raise ValueError(
        f"demos.episodes_per_task = {wanted}: the expert of {task_id} succeeded in {num_found} of {num_tried} attempts "
        f"within env.max_env_steps = {settings['max_env_steps']}, from {num_states} training initial states; ask for "
        f"fewer, allow more steps, or {more}."
    )
