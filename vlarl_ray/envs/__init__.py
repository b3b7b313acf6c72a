"""Simulators: build a suite from its config, one simulator for a notebook, one task by hand."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from vlarl_ray.config import EnvConfig
from vlarl_ray.envs.base import SimEnv, Suite
from vlarl_ray.registry import SUITES, resolve
from vlarl_ray.types import Split, TaskSpec

__all__ = ["SimEnv", "Suite", "make_env", "make_suite", "shared_init_states", "single_task"]

_SUITE_FIELDS = ("tasks", "image_size", "camera", "render_profile", "gl_backend", "train_seed", "eval_seed")


def make_suite(config: EnvConfig, *, egl_device_id: int | None = None) -> Suite:
    """Build the suite a config describes.

    Args:
        config: Suite, tasks and cameras; `options` go to the suite as further keyword arguments.
        egl_device_id: EGL device this process was assigned; given only to suites that take one.

    Raises:
        ValueError: If the suite is unknown, or does not take one of the options.
    """
    suite_class = resolve(SUITES, config.suite, what="env.suite")
    arguments: dict[str, Any] = {name: getattr(config, name) for name in _SUITE_FIELDS} | dict(config.options)
    if config.assets is not None:
        arguments["assets"] = config.assets
    accepted = inspect.signature(suite_class).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    unknown = [] if takes_any else sorted(set(arguments) - set(accepted))
    if unknown:
        options = sorted(set(accepted) - set(_SUITE_FIELDS))
        raise ValueError(f"env.options: suite {config.suite!r} takes no {unknown}; it takes {options or 'no options'}.")
    if egl_device_id is not None and (takes_any or "egl_device_id" in accepted):
        arguments["egl_device_id"] = egl_device_id
    return suite_class(**arguments)


def make_env(suite: str = "metaworld", *, task: str | Sequence[str], **settings: Any) -> SimEnv:
    """Build one simulator, for a notebook or a test; fields that are not given have their defaults.

    Args:
        suite: Registered name, or `my_package.my_env:MySuite`.
        task: Task id, or several.
        settings: Other fields of `EnvConfig`; what is none of them goes into `options`.

    Example:
        >>> env = make_env("toy", task="reach-a", image_size=32)
        >>> env.reset(single_task(env.suite, "reach-a")).images.shape
        (1, 32, 32, 3)
    """
    known = {field.name for field in fields(EnvConfig)}
    options = {name: value for name, value in settings.items() if name not in known}
    given = {name: value for name, value in settings.items() if name in known}
    given["options"] = {**given.get("options", {}), **options}
    config = EnvConfig(suite=suite, tasks=(task,) if isinstance(task, str) else tuple(task), **given)
    return make_suite(config).make_env()


def single_task(
    suite: Suite,
    task_id: str,
    init_state_id: int = 0,
    split: Split = "train",
    *,
    seed: int = 0,
    max_env_steps: int = 160,
    temperature: float = 1.0,
    stop_on_success: bool = True,
) -> TaskSpec:
    """Describe one episode, for use without a run.

    Args:
        suite: Suite of the task; simulators of built-in suites carry theirs as `env.suite`.
        task_id: One of `suite.task_ids`.
        init_state_id: Below `suite.num_init_states(task_id, split)`.
        split: `train` or `eval`.
        seed: What a policy's sampling noise derives from.
        max_env_steps: Where the episode is truncated, by whoever runs it.
        temperature: Sampling temperature; 0 is greedy.
        stop_on_success: End the episode at its first success.
    """
    return TaskSpec(
        run_id="single",
        iteration=0,
        slot=0,
        group_id=0,
        suite=suite.name,
        task_id=task_id,
        instruction=suite.instruction(task_id),
        init_state_id=init_state_id,
        split=split,
        seed=seed,
        policy_version=0,
        max_env_steps=max_env_steps,
        temperature=temperature,
        stop_on_success=stop_on_success,
    )


def shared_init_states(suite: Suite) -> frozenset[tuple[str, str]]:
    """Return the (task id, digest) pairs that are in both splits: the intersection an evaluation must report (F69)."""

    def digests(split: Split) -> frozenset[tuple[str, str]]:
        return frozenset(
            (task_id, suite.init_state_hash(task_id, split, state))
            for task_id in suite.task_ids
            for state in range(suite.num_init_states(task_id, split))
        )

    return digests("train") & digests("eval")
