"""A 2-D reach task that costs microseconds: the same protocol as a robot suite, with a known optimum.

A disc moves in the unit square by at most `STEP` per axis and step, and succeeds within `RADIUS` of a cross. Tasks
differ in how actions map to motion, which only the instruction tells; `impossible` never succeeds.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from vlarl_ray.registry import suggest
from vlarl_ray.types import Observation, Split, StepResult, TaskSpec

STEP = 0.1
RADIUS = 0.08

_MOTIONS: Mapping[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "reach-a": ((1, 0), (0, 1)),
    "reach-b": ((-1, 0), (0, -1)),
    "reach-c": ((0, 1), (1, 0)),
    "reach-d": ((0, -1), (-1, 0)),
    "impossible": ((1, 0), (0, 1)),
}
_INSTRUCTIONS: Mapping[str, str] = {
    "reach-a": "reach the cross",
    "reach-b": "reach the cross with mirrored controls",
    "reach-c": "reach the cross with swapped controls",
    "reach-d": "reach the cross with swapped and mirrored controls",
    "impossible": "reach the moon",
}


class ToySuite:
    """2-D reach tasks: `reach-a` to `reach-d`, and `impossible`.

    Args:
        tasks: Task ids.
        image_size: Side of the frames, pixels.
        camera: Any name; there is one view.
        render_profile: Recorded; there is one look.
        gl_backend: Not needed, frames are drawn with numpy.
        train_seed: Seed of the training initial states.
        eval_seed: Seed of the held-out ones.
        num_train_states: Training initial states. A policy that sees a few dozen goals learns those, and not to look.
        num_eval_states: Held-out initial states.
    """

    name = "toy"
    proprio_dim = 2

    def __init__(
        self,
        tasks: Sequence[str] = ("reach-a",),
        *,
        image_size: int = 64,
        camera: str | Sequence[str] = "above",
        render_profile: str = "fast",
        gl_backend: str = "auto",
        train_seed: int = 42,
        eval_seed: int = 1042,
        num_train_states: int = 2000,
        num_eval_states: int = 50,
    ) -> None:
        for task in tasks:
            if task not in _MOTIONS:
                raise ValueError(f"env.tasks: {task!r} is no toy task; {suggest(task, _MOTIONS)}.")
        if not isinstance(camera, str) and len(camera) != 1:
            raise ValueError(f"env.camera = {list(camera)}: the toy has one view; give one name, whatever it is.")
        if train_seed == eval_seed:
            raise ValueError(
                f"env.eval_seed = {eval_seed} equals env.train_seed; take another, the splits must differ."
            )
        self.task_ids: tuple[str, ...] = tuple(tasks)
        self.image_size = image_size
        self._arguments: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("self", "__class__", "task")}
        self._states: dict[Split, Float64[np.ndarray, "N 4"]] = {
            "train": _initial_states(train_seed, num_train_states),
            "eval": _initial_states(eval_seed, num_eval_states),
        }

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the arguments, for processes that build their own."""
        return functools.partial(ToySuite, **self._arguments), ()

    @property
    def settings(self) -> dict[str, Any]:
        """What frames and initial states depend on; recorded with demonstrations."""
        return {
            name: self._arguments[name]
            for name in (
                "image_size",
                "camera",
                "render_profile",
                "train_seed",
                "eval_seed",
                "num_train_states",
                "num_eval_states",
            )
        }

    def instruction(self, task_id: str) -> str:
        """The sentence the policy is given."""
        return _INSTRUCTIONS[task_id]

    def num_init_states(self, task_id: str, split: Split) -> int:
        """`num_train_states`, or `num_eval_states`."""
        del task_id
        return len(self._states[split])

    def init_state_hash(self, task_id: str, split: Split, init_state_id: int) -> str:
        """Digest of task, start and cross."""
        return hashlib.sha256(task_id.encode() + self.init_state(split, init_state_id).tobytes()).hexdigest()[:32]

    def init_state(self, split: Split, init_state_id: int) -> Float64[np.ndarray, " 4"]:
        """Disc xy and cross xy of one initial state.

        Raises:
            ValueError: If there is no such initial state.
        """
        if not 0 <= init_state_id < len(self._states[split]):
            raise ValueError(
                f"init_state_id = {init_state_id}: the {split} split holds 0..{len(self._states[split]) - 1}."
            )
        return self._states[split][init_state_id]

    def make_env(self) -> ToyEnv:
        """Build one simulator."""
        return ToyEnv(self)


class ToyEnv:
    """One disc and one cross."""

    action_dim = 2
    proprio_dim = 2

    def __init__(self, suite: ToySuite) -> None:
        self.suite = suite
        self._task_id = self._instruction = ""
        self._x = self._y = self._goal_x = self._goal_y = 0.0
        self._motion = _MOTIONS["reach-a"]

    def reset(self, task: TaskSpec) -> Observation:
        """Put disc and cross where the initial state says.

        Raises:
            ValueError: If the suite has no such task or initial state.
        """
        if task.task_id not in self.suite.task_ids:
            raise ValueError(
                f"task {task.task_id!r} is not in this suite; {suggest(task.task_id, self.suite.task_ids)}."
            )
        state = self.suite.init_state(task.split, task.init_state_id)
        self._x, self._y, self._goal_x, self._goal_y = state.tolist()
        self._task_id, self._instruction, self._motion = task.task_id, task.instruction, _MOTIONS[task.task_id]
        return self.observe()

    def step(self, action: Float32[np.ndarray, " D"]) -> StepResult:
        """Move the disc. Actions are in [-1, 1]; what lies outside is clipped.

        Raises:
            ValueError: If the action has another shape, or is not finite.
        """
        u, v = (float(a) for a in action) if action.shape == (2,) else (math.nan, math.nan)
        if not (math.isfinite(u) and math.isfinite(v)):
            raise ValueError(f"action = {action.tolist()} in {self._task_id}: must be 2 finite numbers.")
        u, v = min(max(u, -1.0), 1.0), min(max(v, -1.0), 1.0)
        (xu, xv), (yu, yv) = self._motion
        self._x = min(max(self._x + STEP * (xu * u + xv * v), 0.0), 1.0)
        self._y = min(max(self._y + STEP * (yu * u + yv * v), 0.0), 1.0)
        distance = math.hypot(self._goal_x - self._x, self._goal_y - self._y)
        success = self._task_id != "impossible" and distance <= RADIUS
        return StepResult(terminated=False, truncated=False, success=success, reward=-distance)

    def observe(self) -> Observation:
        """Draw the current state."""
        return Observation(
            images=_draw(self.suite.image_size, (self._x, self._y), (self._goal_x, self._goal_y)),
            proprio=np.array([self._x, self._y], dtype=np.float32),
            instruction=self._instruction,
        )

    def expert_action(self) -> Float32[np.ndarray, " D"]:
        """Largest step straight to the cross: optimal, see `optimal_num_steps`."""
        delta = np.array([self._goal_x - self._x, self._goal_y - self._y]) / STEP
        return np.clip(np.array(self._motion).T @ delta, -1.0, 1.0).astype(np.float32)

    def close(self) -> None:
        """Free nothing."""


def optimal_num_steps(init_state: Float64[np.ndarray, " 4"]) -> int:
    """Fewest env steps from disc to cross: the first at which some point within `RADIUS` is in reach of both axes.

    After n steps the disc reaches any point of a square of half side `n * STEP` (the cross lies inside the walls), so
    the optimum is the first n for which the nearest point of that square is near enough.

    Example:
        >>> optimal_num_steps(np.array([0.2, 0.5, 0.8, 0.5]))
        6
    """
    gap_x, gap_y = abs(init_state[2] - init_state[0]), abs(init_state[3] - init_state[1])
    num_steps = 1
    while math.hypot(max(gap_x - num_steps * STEP, 0.0), max(gap_y - num_steps * STEP, 0.0)) > RADIUS:
        num_steps += 1
    return num_steps


def _initial_states(seed: int, count: int) -> Float64[np.ndarray, "N 4"]:
    """Discs and crosses at least 0.3 apart and away from the walls."""
    rng = np.random.default_rng(seed)
    states: list[np.ndarray] = []
    while len(states) < count:
        state = rng.uniform(0.1, 0.9, size=4)
        if math.hypot(state[2] - state[0], state[3] - state[1]) >= 0.3:
            states.append(state)
    return np.array(states)


def _draw(size: int, disc: tuple[float, float], cross: tuple[float, float]) -> UInt8[np.ndarray, "1 H W 3"]:
    """Red square disc and green cross on grey; y points up."""
    frame = np.full((1, size, size, 3), 60, dtype=np.uint8)
    arm = max(1, size // 16)
    row, column = round((1 - cross[1]) * (size - 1)), round(cross[0] * (size - 1))
    frame[0, row, max(0, column - arm) : column + arm + 1] = (0, 220, 0)
    frame[0, max(0, row - arm) : row + arm + 1, column] = (0, 220, 0)
    row, column = round((1 - disc[1]) * (size - 1)), round(disc[0] * (size - 1))
    half = max(1, size // 24)
    frame[0, max(0, row - half) : row + half + 1, max(0, column - half) : column + half + 1] = (230, 40, 40)
    return frame
