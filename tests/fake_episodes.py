"""Small real episodes without a simulator."""

import hashlib
import math

import numpy as np

from vlarl_ray.config import MetricsConfig
from vlarl_ray.types import EpisodeTiming, TaskSpec, Trajectory

TASKS = ("drawer-close-v3", "window-open-v3", "button-press-topdown-v3")
QUIET = MetricsConfig(tensorboard=False, progress=False)


class FakeSuite:
    """Initial states that are nothing but their digests."""

    def __init__(self, *, num_train=20, num_eval=50, shared=()):
        self._num = {"train": num_train, "eval": num_eval}
        self._shared = set(shared)

    def num_init_states(self, task_id, split):
        return self._num[split]

    def init_state_hash(self, task_id, split, init_state_id):
        where = "both" if init_state_id in self._shared else split
        return hashlib.sha256(f"{task_id}/{where}/{init_state_id}".encode()).hexdigest()[:16]


def make_task(task_id=TASKS[0], **changes):
    fields = {
        "run_id": "run", "iteration": 0, "slot": 0, "group_id": 0, "suite": "fake", "task_id": task_id,
        "instruction": task_id, "init_state_id": 0, "split": "train", "seed": 2**63 + 5, "policy_version": 0,
        "max_env_steps": 20, "temperature": 1.0,
    }  # fmt: skip
    return TaskSpec(**{**fields, **changes})


def make_trajectory(task=None, *, first_success=None, chunk_length=5, frames=None, timing=None, **changes):
    """An episode that ends at its first success, or at the horizon."""
    task = task or make_task()
    env_steps = first_success or task.max_env_steps
    decisions = math.ceil(env_steps / chunk_length)
    num_env_steps = np.full(decisions, chunk_length, np.int32)
    num_env_steps[-1] = env_steps - chunk_length * (decisions - 1)
    rewards = np.zeros((decisions, chunk_length), np.float32)
    if first_success:
        rewards[-1, num_env_steps[-1] - 1] = 1.0
    fields = {
        "task": task,
        "frames": frames,
        "proprio": np.zeros((decisions + 1, 3), np.float32),
        "tokens": np.zeros((decisions, 4 * chunk_length), np.int32),
        "behaviour_logprobs": np.zeros((decisions, 4 * chunk_length), np.float32),
        "policy_versions": np.full(decisions, task.policy_version, np.int32),
        "rewards": rewards,
        "num_env_steps": num_env_steps,
        "executed_actions": np.zeros((decisions, chunk_length, 4), np.float32),
        "terminated": first_success is not None,
        "truncated": first_success is None,
        "success": first_success is not None,
        "success_at_last_step": first_success is not None,
        "first_success_env_step": first_success,
        "worker": 1,
        "timing": timing or EpisodeTiming(0.01, 0.02, 0.03, 0.04),
    }
    return Trajectory(**{**fields, **changes})


def make_evaluation(tasks=TASKS, states=4, *, success=lambda task, state: True, step=11, **changes):
    """Every task x state once; `success` says which of them succeed."""
    return [
        make_trajectory(
            make_task(task, split="eval", init_state_id=s, slot=s, temperature=0.0, **changes),
            first_success=step if success(task, s) else None,
        )
        for task in tasks
        for s in range(states)
    ]


def moving_square(num_frames, size=64, hue=0):
    """`u8[S+1, 1, H, W, 3]`: a square that crosses a gradient."""
    ramp = np.linspace(60, 200, size).astype(np.uint8)
    frames = np.repeat(np.stack([ramp[None, :] * np.ones((size, 1), np.uint8)] * 3, -1)[None], num_frames, 0)
    for index in range(num_frames):
        left = int((size - 12) * index / max(1, num_frames - 1))
        frames[index, size // 2 - 6 : size // 2 + 6, left : left + 12] = np.roll([220, 60, 40], hue)
    return frames[:, None]
