"""Draw frames of MuJoCo scenes as cheaply as a CPU allows: one GL context per process, one set of meshes per scene.

`draw` is most of what an episode costs. The `fast` profile draws no shadows, reflections, sky, haze or multisampling,
and may thin meshes and textures to what the image can show; `full` is the simulator's own look. Both leave physics
alone: thinning happens on a copy of the model that only the GL context reads.
"""

from __future__ import annotations

import atexit
import copy
import importlib
import threading
import weakref
from dataclasses import dataclass
from typing import Any, Literal

import mujoco as mujoco_library
import numpy as np
from jaxtyping import Float, UInt8

from vlarl_ray.envs.mesh_thinning import thin_for_drawing

mujoco: Any = mujoco_library  # its names come from compiled modules without type information

_MAX_GEOMS = 1000
_MAX_SCENES = 60
"""Scenes whose meshes and textures are kept at once: all of MT50, two thirds of LIBERO-90."""
_IDENTICAL_FRAMES = 3
_FROZEN_HAND_M = 0.1


@dataclass(frozen=True)
class DrawSettings:
    """What frames look like."""

    image_size: int
    """Side of the frames, pixels."""
    cameras: tuple[str, ...]
    """Names of cameras of the scene; a picture has a frame of each, in this order."""
    render_profile: Literal["fast", "full"]
    thin_meshes: bool = True
    """In `fast`: coarser meshes, for scenes whose small objects survive it."""
    orientation: Literal["upright", "rotated180", "bottom-up"] = "upright"
    """`bottom-up` is what OpenGL reads; `rotated180` turns that, which also swaps left and right."""
    hidden_geom_groups: tuple[int, ...] = ()
    """Groups of geometry that are not drawn, such as collision shapes."""


class FrameRenderer:
    """Draws any simulator whose scene it has seen or can load; use it from the thread that first draws.

    Args:
        backend: `egl` or `osmesa`, as `activate_gl` returned it.
        settings: What frames look like.
    """

    def __init__(self, backend: str, settings: DrawSettings) -> None:
        size = settings.image_size
        self._settings = settings
        self._is_fast = settings.render_profile == "fast"
        self._view = mujoco.MjrRect(0, 0, size, size)
        self._options = mujoco.MjvOption()
        for group in settings.hidden_geom_groups:
            self._options.geomgroup[group] = 0
        self._pixels = np.empty((size, size, 3), dtype=np.uint8)
        self._thread = threading.get_ident()
        self._scenes: dict[str, _Scene] = {}
        self._gl = importlib.import_module(f"mujoco.{backend}").GLContext(size, size)
        self._gl.make_current()
        # At exit this must run before MuJoCo's own hook ends the display, or freeing prints errors. Hooks run last
        # registered first, and MuJoCo registered at the first GL context; weakref's own hook may be older than that.
        self._finalizer = weakref.finalize(self, _free, self._gl, self._scenes)
        self._finalizer.atexit = False
        atexit.register(self._finalizer)

    def draw(self, scene_id: str, model: Any, data: Any) -> UInt8[np.ndarray, "V H W 3"]:
        """Draw one picture: a frame of each camera.

        Args:
            scene_id: Identity of the scene; models of one scene have the same meshes, textures and cameras.
            model: MjModel of the simulator.
            data: MjData of the simulator, with positions up to date.

        Returns:
            RGB; the caller owns it.

        Raises:
            RuntimeError: If called from another thread than the constructor.
        """
        if threading.get_ident() != self._thread:
            raise RuntimeError(
                "rendering: a GL context belongs to the thread that made it; reset and observe all simulators of a "
                "suite from one thread, or build one suite per thread."
            )
        scene = self._scenes.get(scene_id)
        self._gl.make_current()  # another suite of this process may have drawn last
        if scene is None:
            if len(self._scenes) >= _MAX_SCENES:
                self._scenes.pop(next(iter(self._scenes))).context.free()
            scene = self._scenes[scene_id] = self._load(model)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, scene.context)
        frames = [self._draw_camera(scene, viewpoint, model, data) for viewpoint in scene.viewpoints]
        return np.stack(frames)

    def _draw_camera(self, scene: _Scene, viewpoint: _Viewpoint, model: Any, data: Any) -> UInt8[np.ndarray, "H W 3"]:
        every = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(model, data, self._options, None, viewpoint.camera, every, scene.geometry)
        mujoco.mjr_render(self._view, scene.geometry, scene.context)
        mujoco.mjr_readPixels(self._pixels, None, self._view, scene.context)
        # OpenGL rows run from the bottom up: reversing columns alone turns the picture by 180 degrees.
        if self._settings.orientation == "bottom-up":
            turned = self._pixels
        elif self._settings.orientation == "rotated180":
            turned = self._pixels[::-1, ::-1]
        else:
            turned = self._pixels[:, ::-1] if viewpoint.is_upside_down else self._pixels[::-1]
        return turned.copy()

    def close(self) -> None:
        """Free meshes, textures and the GL context."""
        self._finalizer()
        atexit.unregister(self._finalizer)

    def _load(self, model: Any) -> _Scene:
        size = self._settings.image_size
        if self._is_fast and self._settings.thin_meshes:
            drawn = thin_for_drawing(model, cell_m=_cell_m(size), max_texture_size=max(128, 2 * size))
        else:
            drawn = copy.copy(model)
        drawn.vis.global_.offwidth = drawn.vis.global_.offheight = size
        geometry = mujoco.MjvScene(model, maxgeom=_MAX_GEOMS)
        if self._is_fast:
            quality = drawn.vis.quality
            quality.shadowsize = quality.offsamples = 0
            quality.numslices, quality.numstacks, quality.numquads = _roundness(size)
            flags = mujoco.mjtRndFlag
            for flag in (flags.mjRND_SHADOW, flags.mjRND_REFLECTION, flags.mjRND_SKYBOX, flags.mjRND_HAZE):
                geometry.flags[flag] = 0
        viewpoints = tuple(_viewpoint(model, name) for name in self._settings.cameras)
        return _Scene(mujoco.MjrContext(drawn, mujoco.mjtFontScale.mjFONTSCALE_50), geometry, viewpoints)


class FrameGuard:
    """Notices frames that cannot be right: all black, or frozen while the robot moves."""

    def __init__(self) -> None:
        self._frame: UInt8[np.ndarray, "V H W 3"] | None = None
        self._hand: Float[np.ndarray, " 3"] | None = None
        self._num_identical = 0

    def check(
        self, frame: UInt8[np.ndarray, "V H W 3"], hand: Float[np.ndarray, " 3"], *, task_id: str, decision: int
    ) -> None:
        """Look at the next frame of an episode.

        Identical frames are frozen only if the hand moved 10 cm (several pixels) while at least three followed each
        other: a robot that stands still draws the same picture legitimately.

        Raises:
            RuntimeError: Naming task and decision.
        """
        if not frame.any(axis=(1, 2, 3)).all():
            raise RuntimeError(
                f"rendering: a frame of {task_id} at decision {decision} is all black; the GL context is broken: "
                "restart the worker, and see `vlarl doctor` for the backend."
            )
        if self._frame is None or self._hand is None or not np.array_equal(frame, self._frame):
            self._frame, self._hand, self._num_identical = frame, hand.copy(), 0
            return
        self._num_identical += 1
        if self._num_identical >= _IDENTICAL_FRAMES and np.abs(hand - self._hand).max() > _FROZEN_HAND_M:
            raise RuntimeError(
                f"rendering: the frame of {task_id} at decision {decision} is the same for {self._num_identical} "
                "decisions although the robot moved; the GL context is broken, or env.camera does not see the robot."
            )


@dataclass(frozen=True)
class _Scene:
    """GL resources, scene buffer and cameras of one scene."""

    context: Any
    geometry: Any
    viewpoints: tuple[_Viewpoint, ...]


@dataclass(frozen=True)
class _Viewpoint:
    """One camera."""

    camera: Any
    is_upside_down: bool


def _viewpoint(model: Any, name: str) -> _Viewpoint:
    camera = mujoco.MjvCamera()
    camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
    camera.fixedcamid = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, name)
    if camera.fixedcamid < 0:
        names = [model.camera(index).name for index in range(model.ncam)]
        raise ValueError(f"env.camera = {name!r}: the scene has {names}; take one of them.")
    # Third row, second column: how far the camera's up axis points up. corner2's points down.
    return _Viewpoint(camera, bool(model.cam_mat0[camera.fixedcamid].reshape(3, 3)[2, 1] < -0.2))


def _cell_m(image_size: int) -> float:
    """Side of a thinning cell: about one pixel of the corner cameras, which see 2 m or so."""
    return min(0.03, 1.92 / image_size)


def _roundness(image_size: int) -> tuple[int, int, int]:
    """Slices and stacks of spheres and cylinders, quads per box side (MuJoCo's own: 28, 16, 4)."""
    return (12, 8, 1) if image_size <= 96 else (20, 12, 1)


def _free(gl_context: Any, scenes: dict[str, _Scene]) -> None:
    gl_context.make_current()
    for scene in scenes.values():
        scene.context.free()
    scenes.clear()
    gl_context.free()
