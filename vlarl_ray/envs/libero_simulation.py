"""LIBERO's simulators: a new one for every episode, so that nothing of the last one is left; frames are ours to draw.

LIBERO keeps state over its resets: the controller's goal, samplers that are added once more, numpy's global generator.
A simulator that is built after seeding gives the same bits every time, and takes no longer than LIBERO's hard reset.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import logging
import os
import pickle
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from vlarl_ray.libero_tasks import ACTION_DIM, Protocol

_MAX_PLACEMENTS = 20
_POSES = tuple(f"{thing}_{what}" for thing in ("geom", "site", "cam") for what in ("xpos", "xmat"))
_DRAWN = (*_POSES, "light_xpos", "light_xdir")
"""Entries of MjData that a picture depends on."""
_ASSET_FOLDERS = ("scenes", "stable_scanned_objects", "turbosquid_objects", "articulated_objects")


class LiberoUnavailableError(ValueError):
    """LIBERO or its assets are missing; the message says what to install or where to put them."""


def package_folder() -> Path:
    """Find the installed package's folder with `bddl_files` and `init_files`, without importing it.

    Raises:
        LiberoUnavailableError: If it is not installed.
    """
    spec = importlib.util.find_spec("libero")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    for folder in folders:
        if (Path(folder) / "libero" / "bddl_files").is_dir():
            return Path(folder) / "libero"
    raise LiberoUnavailableError(
        "env.suite: LIBERO is not installed; run pip install --no-deps --no-build-isolation -r "
        "requirements-libero.lock (in a clone: ./run.sh libero) on every node."
    )


def assets_folder(given: str | None) -> Path:
    """Find LIBERO's assets: the given folder, else where LIBERO itself looks.

    Raises:
        LiberoUnavailableError: If they are nowhere; LIBERO would go on to download them.
    """
    places = [Path(given)] if given else [package_folder() / "assets", Path.home() / ".cache" / "libero" / "assets"]
    for place in places:
        if all((place / name).is_dir() for name in _ASSET_FOLDERS):
            return place
    raise LiberoUnavailableError(
        f"env.assets = {given or 'null'}: LIBERO's assets ({', '.join(_ASSET_FOLDERS)}, ...) are not in "
        f"{' nor in '.join(map(str, places))}. They are not part of the Python package; take libero/libero/assets "
        "of the LIBERO repository, or the dataset lerobot/libero-assets, and name the folder with env.assets."
    )


def read_init_states(suite: str, task_id: str) -> Float64[np.ndarray, "N S"]:
    """Read the initial states that come with LIBERO: time, joint positions and velocities of each.

    They are pickles; nothing but a numpy array is unpickled.

    Raises:
        LiberoUnavailableError: If LIBERO is not installed.
        ValueError: If the file holds anything else.
    """
    path = package_folder() / "init_files" / suite / f"{task_id}.pruned_init"
    with zipfile.ZipFile(path) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("data.pkl")]
        states = _ArrayUnpickler(io.BytesIO(archive.read(name))).load()
    if not isinstance(states, np.ndarray) or states.ndim != 2:
        raise ValueError(f"{path}: holds {type(states).__name__}, not a table of initial states; install LIBERO anew.")
    return states.astype(np.float64)


class LiberoSimulation:
    """One episode of one task.

    Args:
        suite: Name of the suite.
        task_id: One of its tasks.
        assets: Folder of the assets.
        seed: Of everything that LIBERO draws: where fixtures are, and, without `init_state`, objects and joints too.
        init_state: Row of `read_init_states`; None draws one from the regions that the task describes.
        protocol: How many steps to settle for, and what proprioception holds.
    """

    def __init__(
        self,
        suite: str,
        task_id: str,
        *,
        assets: Path,
        seed: int,
        init_state: Float64[np.ndarray, " S"] | None,
        protocol: Protocol,
    ) -> None:
        self._protocol = protocol
        bddl_file = package_folder() / "bddl_files" / suite / f"{task_id}.bddl"
        with _numpy_seeded(seed), _missing_assets_named(task_id, assets):
            self._env: Any = _build(bddl_file, assets, has_noise=init_state is None)
            self.seen: Any = self._keep_what_is_seen()
            self._observation: Mapping[str, Any] = _placed(task_id, self._env.env.reset)
            if init_state is not None:
                self._observation = self._env.set_init_state(init_state)
            settle = np.array([0.0] * (ACTION_DIM - 1) + [protocol.settle_gripper])
            for _ in range(protocol.num_settle_steps):
                self._observation = self._env.step(settle)[0]
        self.scene_id = _scene_id(self.model)

    @property
    def model(self) -> Any:
        """MjModel of MuJoCo; `seen` is the MjData to draw."""
        return self._env.sim.model._model

    def step(self, action: Float64[np.ndarray, " 7"]) -> bool:
        """Advance one env step (1/20 s) by an action in LIBERO's units; returns whether the task's goal holds."""
        self._observation, _, success, _ = self._env.step(action)
        return bool(success)

    def proprio(self) -> np.ndarray:
        """What the protocol wants of the robot's state, in its order."""
        return np.concatenate([self._entry(name) for name, _ in self._protocol.proprio]).astype(np.float32)

    def hand_position(self) -> np.ndarray:
        """Position of the end effector, m."""
        return np.asarray(self._observation["robot0_eef_pos"])

    def close(self) -> None:
        """Free the simulator."""
        self._env.close()

    def _keep_what_is_seen(self) -> Any:
        """Have poses copied at the moment that LIBERO observes them, which is early in each env step.

        LIBERO renders then, every env step; copied poses can be drawn when a decision needs them.
        """
        observables: Any = importlib.import_module("robosuite.utils.observables")
        seen = importlib.import_module("mujoco").MjData(self.model)

        @observables.sensor(modality="poses")
        def poses(obs_cache: Mapping[str, Any]) -> float:
            del obs_cache
            now = self._env.sim.data._data
            for name in _DRAWN:
                getattr(seen, name)[:] = getattr(now, name)
            return 0.0

        rate = self._env.env.control_freq
        self._env.env.add_observable(observables.Observable("poses", poses, sampling_rate=rate))
        return seen

    def _entry(self, name: str) -> np.ndarray:
        if name != "robot0_eef_axis_angle":
            return np.asarray(self._observation[name])
        transforms: Any = importlib.import_module("robosuite.utils.transform_utils")
        return transforms.quat2axisangle(np.array(self._observation["robot0_eef_quat"]))


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays; anything else is an error, and no code of the file's choice runs."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) in (
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        ):
            return super().find_class(module_name.replace("numpy.core", "numpy._core"), global_name)
        raise ValueError(
            f"initial states: the file names {module_name}.{global_name}, which no array needs; not loaded."
        )


def _build(bddl_file: Path, assets: Path, *, has_noise: bool) -> Any:
    """Build LIBERO's environment without its renderer."""
    wrapper = _import_libero(assets)
    return _placed(
        bddl_file.stem,
        lambda: wrapper.ControlEnv(
            bddl_file_name=str(bddl_file),
            use_camera_obs=False,
            has_offscreen_renderer=False,
            hard_reset=False,  # it was built a moment ago
            ignore_done=True,  # episodes are truncated by whoever runs them
            initialization_noise="default" if has_noise else None,
        ),
    )


def _placed(task_id: str, place: Callable[[], Any]) -> Any:
    """Do what places objects; again where they did not fit (`ControlEnv.reset` does so for ever, on any error)."""
    errors: Any = importlib.import_module("robosuite.utils.errors")
    for _ in range(_MAX_PLACEMENTS):
        try:
            return place()
        except errors.RandomizationError:
            continue
    raise RuntimeError(f"LIBERO found no place for the objects of {task_id} in {_MAX_PLACEMENTS} attempts.")


def _import_libero(assets: Path) -> Any:
    """Import LIBERO's environments: without a question on stdin, a download, or warnings about private macros."""
    importlib.import_module("mujoco")  # before robosuite, which would have a say in the GL backend
    logging.getLogger("robosuite_logs").addFilter(_is_error)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.yaml").write_text("{}")  # where there is none, importing LIBERO asks for folders
        # robosuite takes the EGL device for a CUDA one, and refuses it where it is none
        with _environment(LIBERO_CONFIG_PATH=folder, MUJOCO_EGL_DEVICE_ID=None):
            libero: Any = importlib.import_module("libero.libero")
            libero._assets_path_cache = str(assets)
            return importlib.import_module("libero.libero.envs.env_wrapper")


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@contextmanager
def _environment(**variables: str | None) -> Iterator[None]:
    """Context with some environment variables set, or unset where None."""
    before = {name: os.environ.pop(name, None) for name in variables}
    os.environ.update({name: value for name, value in variables.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Context in which numpy's global generator, which LIBERO draws from, starts at `seed`; it is restored after."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


@contextmanager
def _missing_assets_named(task_id: str, assets: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        if isinstance(error, ValueError) and "rror opening file" not in str(error):
            raise
        raise LiberoUnavailableError(
            f"env.assets = {str(assets)!r}: lacks what {task_id} needs ({' '.join(str(error).split())}); complete it "
            "from libero/libero/assets of the LIBERO repository."
        ) from error


def _scene_id(model: Any) -> str:
    """Digest of what is drawn but not moved: models of one id may share what the GL context holds."""
    parts = (model.mesh_vert, model.mesh_face, model.mesh_faceadr, model.tex_data, model.tex_adr, model.cam_bodyid)
    digest = 0
    for part in parts:
        digest = zlib.crc32(np.ascontiguousarray(part).data, digest)
    return f"{digest:08x}-{model.nmesh}-{model.ntex}"
