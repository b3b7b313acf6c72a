"""One simulator running one episode, decision by decision; and the record it leaves."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int32, Num

from vlarl_ray.envs.base import SimEnv
from vlarl_ray.rewards.sparse import sparse_rewards
from vlarl_ray.types import EpisodeTiming, Observation, TaskSpec, Trajectory


@dataclass(frozen=True)
class EpisodeFailure:
    """An episode that did not finish; it is redone with the same identity and seed."""

    task: TaskSpec
    reason: str
    worker: int = -1


class Episode:
    """Runs `task` on `env`: `observation` asks for a chunk, `execute` takes it, `is_over` ends it.

    A chunk stops at the first success (unless the task runs to the horizon) and at `max_env_steps`; its unexecuted
    tail is masked in the record.
    """

    def __init__(self, env: SimEnv, task: TaskSpec) -> None:
        self.env = env
        self.task = task
        self._render_s = self._physics_s = self._inference_s = 0.0
        start = time.process_time()
        self.observation: Observation = env.reset(task)
        self._reset_s = time.process_time() - start
        self._observations = [self.observation]
        self._tokens: list[Int32[np.ndarray, " L"]] = []
        self._logprobs: list[Float32[np.ndarray, " L"]] = []
        self._versions: list[int] = []
        self._executed: list[Float32[np.ndarray, "K D"]] = []
        self._successes: list[list[bool]] = []
        self._tokens_of_chunk = False
        self._num_steps = 0
        self._terminated = self._truncated = False

    @property
    def is_over(self) -> bool:
        """Whether the episode was terminated or truncated."""
        return self._terminated or self._truncated

    @property
    def num_decisions(self) -> int:
        """Chunks executed so far."""
        return len(self._tokens)

    def execute(
        self,
        actions: Float32[np.ndarray, "K D"],
        tokens: Num[np.ndarray, " L"],
        logprobs: Float32[np.ndarray, " L"],
        *,
        policy_version: int,
        inference_cpu_s: float,
        tokens_of_chunk: bool = False,
    ) -> None:
        """Step the simulator through one chunk without rendering, then render once."""
        start = time.process_time()
        executed = np.zeros_like(actions)
        successes: list[bool] = []
        for k, action in enumerate(actions):
            result = self.env.step(action)
            executed[k] = np.clip(action, -1.0, 1.0)
            successes.append(result.success)
            self._num_steps += 1
            self._terminated = result.terminated or (result.success and self.task.stop_on_success)
            self._truncated = not self._terminated and (result.truncated or self._num_steps >= self.task.max_env_steps)
            if self.is_over:
                break
        self._physics_s += time.process_time() - start
        start = time.process_time()
        self.observation = self.env.observe()
        self._render_s += time.process_time() - start
        self._inference_s += inference_cpu_s
        self._observations.append(self.observation)
        self._tokens.append(tokens)
        self._logprobs.append(logprobs)
        self._versions.append(policy_version)
        self._tokens_of_chunk = tokens_of_chunk
        self._executed.append(executed)
        self._successes.append(successes)

    def record(self, worker: int) -> Trajectory:
        """Assemble the trajectory of a finished episode; `frames` is the array itself."""
        chunk_length = self._executed[0].shape[0]
        num_env_steps = np.array([len(steps) for steps in self._successes], dtype=np.int32)
        flat = np.concatenate([np.array(steps, dtype=bool) for steps in self._successes])
        first = int(flat.argmax()) + 1 if flat.any() else None
        return Trajectory(
            task=self.task,
            frames=np.stack([o.images for o in self._observations]),
            proprio=np.stack([o.proprio for o in self._observations]),
            tokens=np.stack(self._tokens),
            behaviour_logprobs=np.stack(self._logprobs),
            policy_versions=np.array(self._versions, dtype=np.int32),
            rewards=sparse_rewards(self._successes, chunk_length),
            num_env_steps=num_env_steps,
            executed_actions=np.stack(self._executed),
            terminated=self._terminated,
            truncated=self._truncated,
            success=first is not None,
            success_at_last_step=bool(flat[-1]),
            first_success_env_step=first,
            worker=worker,
            timing=EpisodeTiming(self._reset_s, self._physics_s, self._render_s, self._inference_s),
            tokens_of_chunk=self._tokens_of_chunk,
        )
