"""Meta-World as a `Suite`: any MT1, MT10 or MT50 task, numbered initial states in two disjoint splits."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from vlarl_ray.envs.gl import GLUnavailableError, activate_gl
from vlarl_ray.envs.metaworld_instructions import INSTRUCTIONS
from vlarl_ray.metaworld_tasks import ACTION_DIM, CAMERAS, MAX_ENV_STEPS, MT50, expand_tasks
from vlarl_ray.registry import suggest
from vlarl_ray.types import Observation, Split, StepResult, TaskSpec

_LOG = logging.getLogger(__name__)

_PROPRIO_DIM = 4
"""Hand position (m) and gripper opening (0 closed, 1 open): the first entries of Meta-World's observation."""


class MetaWorldSuite:
    """Meta-World tasks; simulators of one suite share a renderer and a pool of simulators, so use them from one thread.

    Args:
        tasks: Names as `window-open-v3`; `mt10` and `mt50` stand for the sets.
        image_size: Side of the frames, pixels.
        camera: Camera of the scene, or several: an observation has a frame of each, upright.
        render_profile: `fast` (some 80 times cheaper at 64 pixels without a GPU) or `full` (Meta-World's own look).
        gl_backend: `auto`, `egl` or `osmesa`.
        train_seed: Seed of the set of 50 goals to train on.
        eval_seed: Seed of the set of 50 held-out goals; goals that are in both count as held out.
        num_train_sets: Train on the goals of this many consecutive seeds, 50 each.
        camera_position_m: Move the (first) camera here, keeping its direction; for instance nearer.
        egl_device_id: EGL device assigned to this process.
        accept_software_gl: Draw on the CPU even though the machine has a GPU.

    Raises:
        ValueError: If a task or camera is unknown, or the seeds of the splits overlap.
    """

    name = "metaworld"
    proprio_dim = _PROPRIO_DIM

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        image_size: int = 64,
        camera: str | Sequence[str] = "corner2",
        render_profile: Literal["fast", "full"] = "fast",
        gl_backend: Literal["auto", "egl", "osmesa"] = "auto",
        train_seed: int = 42,
        eval_seed: int = 1042,
        num_train_sets: int = 1,
        camera_position_m: Sequence[float] | None = None,
        egl_device_id: int | None = None,
        accept_software_gl: bool = False,
    ) -> None:
        self.task_ids: tuple[str, ...] = _checked_tasks(tasks)
        self._cameras = (camera,) if isinstance(camera, str) else tuple(camera)
        _check_camera(self._cameras, render_profile)
        _check_seeds(train_seed, eval_seed, num_train_sets)
        self._arguments: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self._seeds: dict[Split, list[int]] = {
            "train": [train_seed + index for index in range(num_train_sets)],
            "eval": [eval_seed],
        }
        self._goals: dict[str, dict[Split, list[Float64[np.ndarray, " G"]]]] = {}
        self._renderer: Any = None
        self._gl_error: GLUnavailableError | None = None
        try:
            self._backend = activate_gl(gl_backend, egl_device_id=egl_device_id, accept_software=accept_software_gl)
        except GLUnavailableError as error:
            # Goals need no picture: a machine that only schedules may do without. Building a simulator raises it.
            _LOG.warning("%s", error)
            self._gl_error = error
            os.environ.setdefault("MUJOCO_GL", "disable")
        from vlarl_ray.envs.metaworld_simulation import SimulationPool

        self.pool = SimulationPool(camera=self._cameras[0], camera_position_m=camera_position_m)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the arguments, for processes that build their own."""
        return functools.partial(MetaWorldSuite, **self._arguments), ()

    @property
    def settings(self) -> dict[str, Any]:
        """What frames and initial states depend on; recorded with demonstrations."""
        names = ("image_size", "camera", "render_profile", "train_seed", "eval_seed", "num_train_sets")
        position = self._arguments["camera_position_m"]
        return {
            **{name: self._arguments[name] for name in names},
            "camera_position_m": None if position is None else [float(x) for x in position],
        }

    def instruction(self, task_id: str) -> str:
        """The sentence the policy is given."""
        self._check_task(task_id)
        return INSTRUCTIONS[task_id]

    def num_init_states(self, task_id: str, split: Split) -> int:
        """How many goals the split holds: 50, less those of the training set that are held out."""
        return len(self._split_goals(task_id)[split])

    def init_state_hash(self, task_id: str, split: Split, init_state_id: int) -> str:
        """Digest of task and goal."""
        return goal_digest(task_id, self.goal(task_id, split, init_state_id))

    def goal(self, task_id: str, split: Split, init_state_id: int) -> Float64[np.ndarray, " G"]:
        """Meta-World's random vector of one initial state: positions of object, goal or both, m.

        Raises:
            ValueError: If there is no such initial state.
        """
        goals = self._split_goals(task_id)[split]
        if not 0 <= init_state_id < len(goals):
            raise ValueError(
                f"init_state_id = {init_state_id}: the {split} split of {task_id} holds 0..{len(goals) - 1}."
            )
        return goals[init_state_id]

    def make_env(self) -> MetaWorldEnv:
        """Build one simulator.

        Raises:
            GLUnavailableError: If this machine cannot draw.
        """
        if self._gl_error is not None:
            raise self._gl_error
        return MetaWorldEnv(self)

    def draw(self, simulation: Any) -> UInt8[np.ndarray, "V H W 3"]:
        """Draw one of the suite's simulators (the GL context is made at the first call)."""
        if self._renderer is None:
            from vlarl_ray.envs.rendering import DrawSettings, FrameRenderer

            size, profile = self._arguments["image_size"], self._arguments["render_profile"]
            self._renderer = FrameRenderer(self._backend, DrawSettings(size, self._cameras, profile))
        return self._renderer.draw(simulation.scene_file, simulation.model, simulation.data)

    def close(self) -> None:
        """Free the renderer; a later frame makes a new one."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _split_goals(self, task_id: str) -> dict[Split, list[Float64[np.ndarray, " G"]]]:
        self._check_task(task_id)
        if task_id not in self._goals:
            simulation = self.pool.borrow(task_id)
            drawn = {
                split: [g for s in seeds for g in simulation.sample_goals(s)] for split, seeds in self._seeds.items()
            }
            self.pool.give_back(simulation)
            held_out = _distinct(task_id, drawn["eval"], without=frozenset())
            train = _distinct(task_id, drawn["train"], without=frozenset(held_out))
            self._goals[task_id] = {"train": list(train.values()), "eval": list(held_out.values())}
        return self._goals[task_id]

    def _check_task(self, task_id: str) -> None:
        if task_id not in self.task_ids:
            raise ValueError(
                f"task {task_id!r} is not in this suite; {suggest(task_id, self.task_ids)}; add it to env.tasks."
            )


class MetaWorldEnv:
    """One simulator of a `MetaWorldSuite`; it borrows the physics of whatever task it is reset to."""

    action_dim = ACTION_DIM
    proprio_dim = _PROPRIO_DIM

    def __init__(self, suite: MetaWorldSuite) -> None:
        from vlarl_ray.envs.rendering import FrameGuard

        self.suite = suite
        self.simulation: Any = None
        self._new_guard = FrameGuard
        self._guard = FrameGuard()
        self._task_id = self._instruction = ""
        self._num_decisions = 0
        self._expert: Any = None

    def reset(self, task: TaskSpec) -> Observation:
        """Start the episode of `task`; the same (task_id, split, init_state_id) gives the same bits every time.

        Raises:
            ValueError: If the suite has no such task or initial state, or `max_env_steps` exceeds Meta-World's 500.
        """
        if task.max_env_steps > MAX_ENV_STEPS:
            raise ValueError(
                f"env.max_env_steps = {task.max_env_steps}: Meta-World allows at most {MAX_ENV_STEPS}; lower it."
            )
        goal = self.suite.goal(task.task_id, task.split, task.init_state_id)
        if self.simulation is None or self._task_id != task.task_id:
            self.close()
            self.simulation = self.suite.pool.borrow(task.task_id)
        self._task_id, self._instruction = task.task_id, task.instruction
        self._num_decisions, self._guard = 0, self._new_guard()
        self.simulation.reset(goal)
        return self.observe()

    def step(self, action: Float32[np.ndarray, " D"]) -> StepResult:
        """Advance one env step without rendering. Actions are in [-1, 1]; what lies outside is clipped.

        Meta-World neither terminates an episode nor, within `max_env_steps`, truncates it.

        Raises:
            ValueError: If the action has another shape, or is not finite.
        """
        if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
            raise ValueError(
                f"action = {action.tolist()} in {self._task_id}: must be {ACTION_DIM} finite numbers, xyz and gripper."
            )
        reward, success = self._running().step(np.clip(action, -1.0, 1.0))
        return StepResult(terminated=False, truncated=False, success=success, reward=reward)

    def observe(self) -> Observation:
        """Render the current state.

        Raises:
            RuntimeError: If the frame is all black, or frozen while the robot moves.
        """
        simulation = self._running()
        images = self.suite.draw(simulation)
        proprio = simulation.observation[:_PROPRIO_DIM].astype(np.float32)
        self._guard.check(images, proprio[:3], task_id=self._task_id, decision=self._num_decisions)
        self._num_decisions += 1
        return Observation(images=images, proprio=proprio, instruction=self._instruction)

    def expert_action(self) -> Float32[np.ndarray, " D"]:
        """Action of Meta-World's scripted policy in the current state, clipped to [-1, 1]."""
        simulation = self._running()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it warns that its gains may need clipping; we clip
            from metaworld.policies import ENV_POLICY_MAP

            if self._expert is None or self._expert[0] != self._task_id:
                self._expert = (self._task_id, ENV_POLICY_MAP[self._task_id]())
            action = self._expert[1].get_action(simulation.observation)
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def close(self) -> None:
        """Give the borrowed physics back; the renderer stays with the suite."""
        if self.simulation is not None:
            self.suite.pool.give_back(self.simulation)
            self.simulation = None

    def _running(self) -> Any:
        if self.simulation is None:
            raise RuntimeError("this simulator has no episode; call reset(task) first.")
        return self.simulation


def goal_digest(task_id: str, goal: Float64[np.ndarray, " G"]) -> str:
    """Digest of task and goal; equal digests are equal initial states."""
    return hashlib.sha256(task_id.encode() + b"\0" + (goal + 0.0).astype("<f8").tobytes()).hexdigest()[:32]


def _distinct(
    task_id: str, goals: Sequence[Float64[np.ndarray, " G"]], *, without: frozenset[str]
) -> dict[str, Float64[np.ndarray, " G"]]:
    by_digest = {goal_digest(task_id, goal): goal for goal in reversed(goals)}
    order = dict.fromkeys(goal_digest(task_id, goal) for goal in goals)
    return {digest: by_digest[digest] for digest in order if digest not in without}


def _checked_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    names = expand_tasks(tasks)
    if not names:
        raise ValueError("env.tasks is empty; name at least one task, for instance 'reach-v3', or 'mt10'.")
    for name in names:
        if name not in MT50:
            raise ValueError(f"env.tasks: {name!r} is no Meta-World task; {suggest(name, [*MT50, 'mt10', 'mt50'])}.")
    return tuple(dict.fromkeys(names))


def _check_camera(cameras: Sequence[str], render_profile: str) -> None:
    if not cameras:
        raise ValueError(f"env.camera = []: must name at least one of {', '.join(CAMERAS)}.")
    for camera in cameras:
        if camera not in CAMERAS:
            raise ValueError(f"env.camera = {camera!r} is unknown; {suggest(camera, CAMERAS)}.")
    if render_profile not in ("fast", "full"):
        raise ValueError(f"env.render_profile = {render_profile!r}: must be 'fast' or 'full'.")


def _check_seeds(train_seed: int, eval_seed: int, num_train_sets: int) -> None:
    if num_train_sets < 1:
        raise ValueError(f"env.options num_train_sets = {num_train_sets}: must be at least 1.")
    if train_seed <= eval_seed < train_seed + num_train_sets:
        raise ValueError(
            f"env.eval_seed = {eval_seed} is one of the {num_train_sets} training seeds from env.train_seed = "
            f"{train_seed}; take a seed outside them, so that held-out goals are not trained on."
        )
