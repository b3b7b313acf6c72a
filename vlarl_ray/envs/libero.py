"""LIBERO as five `Suite`s: initial states drawn for training, the published ones held out, any of its cameras.

Needs `requirements-libero.lock` and LIBERO's assets; without them everything works that builds no simulator.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from vlarl_ray.envs.gl import activate_gl
from vlarl_ray.envs.libero_simulation import LiberoSimulation, assets_folder, package_folder, read_init_states
from vlarl_ray.libero_tasks import (
    ACTION_DIM,
    CAMERAS,
    NUM_INIT_STATES,
    PROTOCOLS,
    TASKS,
    expand_tasks,
    instruction_of,
)
from vlarl_ray.registry import suggest
from vlarl_ray.types import Observation, Split, StepResult, TaskSpec

_COLLISION_GEOMS = 0


class LiberoSuite:
    """Tasks of one LIBERO suite; simulators of one suite share a renderer, so use them from one thread.

    Held-out initial states are the 50 that come with LIBERO, as in published evaluations. Training ones are drawn from
    the regions that the task describes, as the others once were: a state is not trained on and evaluated on.

    Args:
        tasks: Names as `turn_on_the_stove`; `all` stands for the suite.
        image_size: Side of the frames, pixels.
        camera: Camera of the scene, or several: an observation has a frame of each.
        render_profile: `fast` (no shadows, reflections, multisampling) or `full` (LIBERO's own look, to the bit).
        gl_backend: `auto`, `egl` or `osmesa`.
        train_seed: Seed that training initial states are drawn with.
        eval_seed: Held-out state i has its fixtures placed by seed `eval_seed + i`; the stored states leave them open.
        num_train_states: Training initial states of a task.
        protocol: `openvla` or `quest`: what frames, proprioception and gripper mean to the policy.
        assets: Folder of LIBERO's assets; None looks where LIBERO does.
        egl_device_id: EGL device assigned to this process.
        accept_software_gl: Draw on the CPU even though the machine has a GPU.

    Raises:
        ValueError: If a task, camera or protocol is unknown.
    """

    name = ""

    def __init__(
        self,
        tasks: Sequence[str] = ("all",),
        *,
        image_size: int = 256,
        camera: str | Sequence[str] = "agentview",
        render_profile: Literal["fast", "full"] = "fast",
        gl_backend: Literal["auto", "egl", "osmesa"] = "auto",
        train_seed: int = 42,
        eval_seed: int = 1042,
        num_train_states: int = NUM_INIT_STATES,
        protocol: str = "openvla",
        assets: str | None = None,
        egl_device_id: int | None = None,
        accept_software_gl: bool = False,
    ) -> None:
        self._arguments: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.task_ids = _checked_tasks(self.name, tasks)
        self._cameras = _checked_cameras(camera)
        if protocol not in PROTOCOLS:
            raise ValueError(f"env.options.protocol = {protocol!r} is unknown; {suggest(protocol, PROTOCOLS)}.")
        if num_train_states < 1:
            raise ValueError(f"env.options.num_train_states = {num_train_states}: must be at least 1.")
        self.protocol = PROTOCOLS[protocol]
        self.proprio_dim = self.protocol.proprio_dim
        self._renderer: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the arguments, for processes that build their own."""
        return functools.partial(type(self), **self._arguments), ()

    def instruction(self, task_id: str) -> str:
        """The sentence the policy is given."""
        self._check_task(task_id)
        return instruction_of(task_id)

    def num_init_states(self, task_id: str, split: Split) -> int:
        """`num_train_states`, or the 50 that come with LIBERO."""
        self._check_task(task_id)
        return NUM_INIT_STATES if split == "eval" else self._arguments["num_train_states"]

    def init_state_hash(self, task_id: str, split: Split, init_state_id: int) -> str:
        """Digest of task and initial state; a drawn state is known by its seed."""
        seed, state = self.init_state(task_id, split, init_state_id)
        content = f"drawn with {seed}".encode() if state is None else state.astype("<f8").tobytes()
        return hashlib.sha256(task_id.encode() + b"\0" + content).hexdigest()[:32]

    def init_state(
        self, task_id: str, split: Split, init_state_id: int
    ) -> tuple[int, Float64[np.ndarray, " S"] | None]:
        """Return the seed of one initial state, and LIBERO's stored state where it is held out.

        Raises:
            LiberoUnavailableError: If the state is a stored one, and LIBERO is not installed.
            ValueError: If there is no such initial state.
        """
        count = self.num_init_states(task_id, split)
        if not 0 <= init_state_id < count:
            raise ValueError(f"init_state_id = {init_state_id}: the {split} split of {task_id} holds 0..{count - 1}.")
        if split == "eval":
            return self._arguments["eval_seed"] + init_state_id, read_init_states(self.name, task_id)[init_state_id]
        entropy = [self._arguments["train_seed"], TASKS[self.name].index(task_id), init_state_id]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0]), None

    def make_env(self) -> LiberoEnv:
        """Build one simulator.

        Raises:
            GLUnavailableError: If this machine cannot draw.
            LiberoUnavailableError: If LIBERO or its assets are missing.
        """
        package_folder()
        assets_folder(self._arguments["assets"])
        self._activate_gl()
        return LiberoEnv(self)

    def simulate(self, task: TaskSpec) -> LiberoSimulation:
        """Build the simulator of one episode, at its start."""
        self._activate_gl()  # before MuJoCo is imported
        seed, state = self.init_state(task.task_id, task.split, task.init_state_id)
        assets = assets_folder(self._arguments["assets"])
        return LiberoSimulation(
            self.name, task.task_id, assets=assets, seed=seed, init_state=state, protocol=self.protocol
        )

    def draw(self, simulation: LiberoSimulation) -> UInt8[np.ndarray, "V H W 3"]:
        """Draw one of the suite's simulators (the GL context is made at the first call)."""
        if self._renderer is None:
            from vlarl_ray.envs.rendering import DrawSettings, FrameRenderer

            settings = DrawSettings(
                self._arguments["image_size"],
                self._cameras,
                self._arguments["render_profile"],
                thin_meshes=False,  # bowls and plates would lose their shape
                orientation="rotated180" if self.protocol.is_rotated else "bottom-up",
                hidden_geom_groups=(_COLLISION_GEOMS,),
            )
            self._renderer = FrameRenderer(self._activate_gl(), settings)
        return self._renderer.draw(simulation.scene_id, simulation.model, simulation.seen)

    def close(self) -> None:
        """Free the renderer; a later frame makes a new one."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _activate_gl(self) -> str:
        return activate_gl(
            self._arguments["gl_backend"],
            egl_device_id=self._arguments["egl_device_id"],
            accept_software=self._arguments["accept_software_gl"],
        )

    def _check_task(self, task_id: str) -> None:
        if task_id not in self.task_ids:
            raise ValueError(
                f"task {task_id!r} is not in this suite; {suggest(task_id, self.task_ids)}; add it to env.tasks."
            )


class LiberoSpatial(LiberoSuite):
    """The same bowl and plate in other places."""

    name = "libero_spatial"


class LiberoObject(LiberoSuite):
    """The same movement with other objects."""

    name = "libero_object"


class LiberoGoal(LiberoSuite):
    """The same scene with other goals."""

    name = "libero_goal"


class Libero10(LiberoSuite):
    """Long tasks in many scenes (LIBERO-Long)."""

    name = "libero_10"


class Libero90(LiberoSuite):
    """Short tasks in many scenes."""

    name = "libero_90"


class LiberoEnv:
    """One simulator of a `LiberoSuite`."""

    action_dim = ACTION_DIM

    def __init__(self, suite: LiberoSuite) -> None:
        self.suite = suite
        self.proprio_dim = suite.proprio_dim
        self.simulation: LiberoSimulation | None = None
        self._task_id = self._instruction = ""
        self._num_decisions = 0
        self._guard: Any = None

    def reset(self, task: TaskSpec) -> Observation:
        """Start the episode of `task`, settled; the same (task_id, split, init_state_id) gives the same bits.

        Raises:
            LiberoUnavailableError: If the assets lack something that the task needs.
            ValueError: If the suite has no such task or initial state.
        """
        self.close()
        self.simulation = self.suite.simulate(task)
        from vlarl_ray.envs.rendering import FrameGuard

        self._task_id, self._instruction = task.task_id, task.instruction
        self._num_decisions, self._guard = 0, FrameGuard()
        return self.observe()

    def step(self, action: Float32[np.ndarray, " D"]) -> StepResult:
        """Advance one env step without rendering. Actions are in [-1, 1]; what lies outside is clipped.

        LIBERO neither terminates an episode nor truncates it.

        Raises:
            ValueError: If the action has another shape, or is not finite.
        """
        if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
            raise ValueError(
                f"action = {action.tolist()} in {self._task_id}: must be {ACTION_DIM} finite numbers, position, "
                "rotation and gripper."
            )
        command = np.clip(action, -1.0, 1.0).astype(np.float64)
        if self.suite.protocol.has_openvla_gripper:
            command[-1] = -np.sign(2.0 * command[-1] - 1.0)
        success = self._running().step(command)
        return StepResult(terminated=False, truncated=False, success=success, reward=float(success))

    def observe(self) -> Observation:
        """Render the current state.

        Raises:
            RuntimeError: If a frame is all black, or frozen while the robot moves.
        """
        simulation = self._running()
        images = self.suite.draw(simulation)
        hand = simulation.hand_position()
        self._guard.check(images, hand, task_id=self._task_id, decision=self._num_decisions)
        self._num_decisions += 1
        return Observation(images=images, proprio=simulation.proprio(), instruction=self._instruction)

    def expert_action(self) -> Float32[np.ndarray, " D"]:
        """LIBERO has no scripted expert.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(f"{self.suite.name} has no scripted expert; start from a policy or demonstrations.")

    def close(self) -> None:
        """Free the episode's simulator; the renderer stays with the suite."""
        if self.simulation is not None:
            self.simulation.close()
            self.simulation = None

    def _running(self) -> LiberoSimulation:
        if self.simulation is None:
            raise RuntimeError("this simulator has no episode; call reset(task) first.")
        return self.simulation


def _checked_tasks(suite: str, tasks: Sequence[str]) -> tuple[str, ...]:
    names = expand_tasks(suite, tasks)
    if not names:
        raise ValueError("env.tasks is empty; name at least one task, or write [all].")
    for name in names:
        if name not in TASKS[suite]:
            raise ValueError(f"env.tasks: {name!r} is no task of {suite}; {suggest(name, [*TASKS[suite], 'all'])}.")
    return tuple(dict.fromkeys(names))


def _checked_cameras(camera: str | Sequence[str]) -> tuple[str, ...]:
    cameras = (camera,) if isinstance(camera, str) else tuple(camera)
    if not cameras:
        raise ValueError(f"env.camera = []: must name at least one of {', '.join(CAMERAS)}.")
    for name in cameras:
        if name not in CAMERAS:
            raise ValueError(f"env.camera = {name!r} is unknown; {suggest(name, CAMERAS)}.")
    return cameras
