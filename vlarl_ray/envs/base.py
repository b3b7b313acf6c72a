"""What a simulator must offer: a `Suite` (tasks and initial states, cheap) and a `SimEnv` (one episode at a time)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from vlarl_ray.types import Observation, Split, StepResult, TaskSpec


@runtime_checkable
class SimEnv(Protocol):
    """One simulator. It runs any task of its suite, renders only in `reset` and `observe`, and never auto-resets."""

    action_dim: int
    proprio_dim: int

    def reset(self, task: TaskSpec) -> Observation:
        """Start the episode of `task`; the same (task_id, split, init_state_id) gives the same bits every time."""
        ...

    def step(self, action: Float32[np.ndarray, " D"]) -> StepResult:
        """Advance one env step without rendering. Actions are in [-1, 1]; what lies outside is clipped."""
        ...

    def observe(self) -> Observation:
        """Render the current state: called once per decision, not once per env step."""
        ...

    def expert_action(self) -> Float32[np.ndarray, " D"]:
        """Action of the scripted expert in the current state.

        Raises:
            NotImplementedError: If the suite has no expert.
        """
        ...

    def close(self) -> None:
        """Free the simulator and its renderer."""
        ...


@runtime_checkable
class Suite(Protocol):
    """A family of tasks with numbered initial states, split in training and held-out ones."""

    name: str
    task_ids: Sequence[str]
    proprio_dim: int

    def instruction(self, task_id: str) -> str:
        """The sentence the policy is given."""
        ...

    def num_init_states(self, task_id: str, split: Split) -> int:
        """How many initial states the split holds; ids are 0..n-1."""
        ...

    def init_state_hash(self, task_id: str, split: Split, init_state_id: int) -> str:
        """Digest of the initial state: equal digests are equal episodes under a greedy policy."""
        ...

    def make_env(self) -> SimEnv:
        """Build one simulator; simulators of one `Suite` object may share renderers, so use them from one thread."""
        ...
