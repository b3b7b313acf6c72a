"""Meta-World simulators that share one MuJoCo model per task, reset to numbered goals, and are lent out from a pool.

Everything here gives the bits of Meta-World's own `set_task`, `reset` and `step`; only work without effect is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mujoco as mujoco_library
import numpy as np
from jaxtyping import Float, Float32, Float64
from metaworld.env_dict import ALL_V3_ENVIRONMENTS, ML1_ARGS_KWARGS

mujoco: Any = mujoco_library  # its names come from compiled modules without type information

GOALS_PER_SET = 50


class TaskModel:
    """The MuJoCo model of one task, shared by its simulators.

    A model is 20 MB, mostly meshes, but a task writes only positions of bodies and sites into it. Each simulator keeps
    its own copy of those, and they are swapped in when another one had its turn.
    """

    def __init__(self, task_id: str, *, camera: str, camera_position_m: Sequence[float] | None) -> None:
        self.task_id = task_id
        self.model: Any = None
        self._camera = camera
        self._camera_position_m = camera_position_m
        self._owner: Simulation | None = None
        task_model = self

        def initialize(env: Any) -> tuple[Any, Any]:
            if task_model.model is None:
                task_model._load(env.fullpath)
            return task_model.model, mujoco.MjData(task_model.model)

        base = ALL_V3_ENVIRONMENTS[task_id]
        self.env_class = type(base.__name__, (base,), {"_initialize_simulation": initialize})

    def switch_to(self, simulation: Simulation | None) -> None:
        """Let the model describe the scene of `simulation`; None is the scene as the file has it."""
        if self.model is None or (self._owner is simulation and simulation is not None):
            return
        if self._owner is not None:
            self._owner.placement = (self.model.body_pos.copy(), self.model.site_pos.copy())
        self.place(self._pristine if simulation is None else simulation.placement or self._pristine)
        self._owner = simulation

    def place(self, placement: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        """Move bodies and sites; None puts them where the file has them."""
        self.model.body_pos[:], self.model.site_pos[:] = placement or self._pristine

    def _load(self, path: str) -> None:
        self.model = mujoco.MjModel.from_xml_path(path)
        if self._camera_position_m is not None:
            self.model.camera(self._camera).pos = self._camera_position_m
        self._pristine = (self.model.body_pos.copy(), self.model.site_pos.copy())


class Simulation:
    """One Meta-World environment of one task, with the goal visible in its observation (as in MT1, MT10, MT50)."""

    def __init__(self, task_model: TaskModel) -> None:
        self.task_model = task_model
        self.placement: tuple[np.ndarray, np.ndarray] | None = None
        task_model.switch_to(None)
        self._env: Any = task_model.env_class()
        task_model.switch_to(self)
        self._env._partially_observable = False
        self._env.__dict__.pop("sawyer_observation_space", None)  # was computed for the hidden goal
        self._env._set_task_called = True
        settings: Any = ML1_ARGS_KWARGS[task_model.task_id]["kwargs"]
        self._env._set_task_inner(**{name: value for name, value in settings.items() if name != "task_id"})
        self.data: Any = self._env.data
        self.observation: Float64[np.ndarray, " 39"] = np.zeros(39)

    @property
    def scene_file(self) -> str:
        """Path of the scene description."""
        return self._env.fullpath

    @property
    def model(self) -> Any:
        """MjModel, describing this simulator's scene."""
        self.task_model.switch_to(self)
        return self.task_model.model

    def reset(self, goal: Float64[np.ndarray, " G"]) -> None:
        """Start an episode; the same goal gives the same bits whatever ran before.

        Meta-World runs `reset_model` twice and lets the hand settle in both; the first only matters for where it puts
        bodies and sites, so the hand stays out of it.
        """
        env = self._env
        self.task_model.switch_to(self)
        self.task_model.place()
        env._freeze_rand_vec, env._last_rand_vec = True, goal.copy()
        env.curr_path_length = 0
        env._reset_hand = self._skip_hand
        try:
            env.reset_model()
        finally:
            del env._reset_hand
        mujoco.mj_resetData(env.model, env.data)
        observation = env.reset_model()
        env._prev_obs = observation[:18].copy()
        observation[18:36] = env._prev_obs
        self.observation = observation.astype(np.float64)
        # Some tasks move a joint last: without this the first frame would show it where it was. Positions only, so
        # that not a bit of the dynamics changes.
        mujoco.mj_kinematics(env.model, env.data)

    def step(self, action: Float32[np.ndarray, " 4"]) -> tuple[float, bool]:
        """Advance one env step; returns Meta-World's own reward and whether the state reached is a success."""
        self.task_model.switch_to(self)
        self.observation, reward, _, _, info = self._env.step(action)
        return float(reward), bool(info["success"])

    def physics_state(self) -> Float64[np.ndarray, " N"]:
        """Everything the next step depends on inside MuJoCo (for tests of equality)."""
        spec = mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.empty(mujoco.mj_stateSize(self.model, spec))
        mujoco.mj_getState(self.model, self.data, state, spec)
        return state

    def sample_goals(self, seed: int) -> list[Float64[np.ndarray, " G"]]:
        """Draw the 50 goals that `metaworld.MT1(task_id, seed=seed)` draws, in its order.

        Meta-World draws from numpy's global generator, which other threads may use, and settles the hand a hundred
        times. A generator of our own in the same state gives the same numbers.
        """
        env, rng = self._env, np.random.RandomState(seed)

        def draw() -> Float[np.ndarray, " G"]:
            space = env._random_reset_space
            env._last_rand_vec = rng.uniform(space.low, space.high, size=space.low.size).astype(np.float64)
            return env._last_rand_vec

        self.task_model.switch_to(self)
        env._get_state_rand_vec, env._reset_hand = draw, self._skip_hand
        try:
            goals = []
            for _ in range(GOALS_PER_SET):
                env.reset()
                goals.append(env._last_rand_vec.copy())
            return goals
        finally:
            del env._get_state_rand_vec, env._reset_hand

    def _skip_hand(self, steps: int = 50) -> None:
        del steps
        mujoco.mj_kinematics(self._env.model, self._env.data)
        self._env.init_tcp = self._env.tcp_center


class SimulationPool:
    """Lends simulators by task; there are never more than were in use at once."""

    def __init__(self, *, camera: str, camera_position_m: Sequence[float] | None) -> None:
        self._camera = camera
        self._camera_position_m = camera_position_m
        self._models: dict[str, TaskModel] = {}
        self._idle: dict[str, list[Simulation]] = {}

    def borrow(self, task_id: str) -> Simulation:
        """Take an idle simulator of the task, or build one."""
        idle = self._idle.setdefault(task_id, [])
        if idle:
            return idle.pop()
        if task_id not in self._models:
            self._models[task_id] = TaskModel(task_id, camera=self._camera, camera_position_m=self._camera_position_m)
        return Simulation(self._models[task_id])

    def give_back(self, simulation: Simulation) -> None:
        """Return a simulator; its next borrower resets it."""
        self._idle[simulation.task_model.task_id].append(simulation)
