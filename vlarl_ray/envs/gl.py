"""Choose the headless OpenGL of this process before MuJoCo is imported, and say what it is and how fast.

A probe runs in a process of its own: a GL library that fails to start can leave the caller unable to try another.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

_LOG = logging.getLogger(__name__)

Backend = Literal["egl", "osmesa"]
BACKENDS: tuple[Backend, ...] = ("egl", "osmesa")

_SOFTWARE_RENDERERS = ("llvmpipe", "softpipe", "swrast", "software")
_PACKAGES = {"egl": "libegl1 libgl1-mesa-dri", "osmesa": "libosmesa6"}

_PROBE = """
import importlib, json, os, sys, time
import numpy as np
try:
    import mujoco
    from OpenGL import GL
    context = importlib.import_module("mujoco." + sys.argv[1]).GLContext(64, 64)
    context.make_current()
except Exception as error:
    print("FAILED" + " ".join(f"{type(error).__name__}: {error}".split()), flush=True)
    os._exit(1)
balls = "".join(f'<geom type="sphere" size=".1" pos="{i % 5} {i // 5} 0"/>' for i in range(25))
model = mujoco.MjModel.from_xml_string(
    '<mujoco><visual><quality shadowsize="0" offsamples="0"/><global offwidth="64" offheight="64"/></visual>'
    f'<worldbody><light pos="0 0 9"/>{balls}</worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
draw = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50)
mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, draw)
scene, camera = mujoco.MjvScene(model, maxgeom=100), mujoco.MjvCamera()
mujoco.mjv_defaultFreeCamera(model, camera)
mujoco.mjv_updateScene(model, data, mujoco.MjvOption(), None, camera, mujoco.mjtCatBit.mjCAT_ALL, scene)
view, frame = mujoco.MjrRect(0, 0, 64, 64), np.zeros((64, 64, 3), np.uint8)
start, num_frames = None, 0
while start is None or time.perf_counter() - start < 0.2:
    mujoco.mjr_render(view, scene, draw)
    mujoco.mjr_readPixels(frame, None, view, draw)
    start = start or time.perf_counter()
    num_frames += 1
seconds = time.perf_counter() - start
if frame.max() == 0:
    print("FAILEDthe probe frame is all black", flush=True)
    os._exit(1)
print("PROBE" + json.dumps({
    "renderer": GL.glGetString(GL.GL_RENDERER).decode(),
    "version": GL.glGetString(GL.GL_VERSION).decode(),
    "frames_per_s": (num_frames - 1) / seconds}), flush=True)
os._exit(0)
"""


class GLUnavailableError(ValueError):
    """No headless OpenGL backend works here; the message says what to install."""


@dataclass(frozen=True)
class GLDescription:
    """A working backend, measured on a scene of 25 spheres at 64 x 64 pixels."""

    backend: Backend
    renderer: str
    """GL_RENDERER, for example `llvmpipe (LLVM 15.0.6, 256 bits)`."""
    version: str
    is_software: bool
    frames_per_s: float

    def __str__(self) -> str:
        """One line for logs."""
        kind = "software" if self.is_software else "hardware"
        return f"{self.backend} on {self.renderer} ({kind}), {self.frames_per_s:.0f} probe frames/s"


def describe_gl(backend: Backend, *, egl_device_id: int | None = None, timeout_s: float = 60.0) -> GLDescription:
    """Start `backend` in a fresh process, draw with it and report what it is.

    Args:
        backend: `egl` or `osmesa`.
        egl_device_id: Index among the EGL devices; None takes the first that starts.
        timeout_s: Give up after this long.

    Raises:
        GLUnavailableError: If it does not start or draws nothing; with the last line of its error.
    """
    command = [sys.executable, "-c", _PROBE, backend]
    env = _environment(os.environ, backend, egl_device_id)
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise GLUnavailableError(f"{backend}: no frame within {timeout_s:g} s") from error
    last = done.stdout.splitlines()[-1] if done.stdout else ""
    if not last.startswith("PROBE"):
        reason = last.removeprefix("FAILED") or f"exit status {done.returncode}: {done.stderr.strip()[-200:]}"
        raise GLUnavailableError(f"{backend}: {reason}")
    report = json.loads(last.removeprefix("PROBE"))
    is_software = any(name in report["renderer"].lower() for name in _SOFTWARE_RENDERERS)
    return GLDescription(backend, report["renderer"], report["version"], is_software, report["frames_per_s"])


def activate_gl(
    requested: Literal["auto", "egl", "osmesa"] = "auto",
    *,
    egl_device_id: int | None = None,
    accept_software: bool = False,
) -> Backend:
    """Probe and set the backend of this process; call it before anything imports MuJoCo.

    `auto` takes `MUJOCO_GL` where the user has set it to one of ours, else EGL where a device works, else OSMesa. On a
    machine with an NVIDIA GPU, drawing in software is refused unless `osmesa` is asked for or `accept_software` is set.
    A process has one backend and one EGL device: once one is in use it is kept, and a request for another is an error.

    Args:
        requested: Value of `env.gl_backend`.
        egl_device_id: The EGL device assigned to this process. Sets `MUJOCO_EGL_DEVICE_ID` (an index among the EGL
            devices this process can see, from 0).
        accept_software: Draw on the CPU even though there is a GPU.

    Raises:
        GLUnavailableError: If nothing works, or only what is refused.
        RuntimeError: If this process already draws with another backend or EGL device.
    """
    loaded = loaded_backend()
    if loaded is not None:
        _check_same(requested, loaded, egl_device_id)
        return loaded
    preset = os.environ.get("MUJOCO_GL", "").lower().strip()
    if requested != "auto":
        candidates: tuple[Backend, ...] = (requested,)
    else:
        candidates = (cast("Backend", preset),) if preset in BACKENDS else BACKENDS
    failures = []
    for backend in candidates:
        try:
            found = describe_gl(backend, egl_device_id=egl_device_id)
        except GLUnavailableError as error:
            failures.append(str(error))
            continue
        asked_for = accept_software or candidates == ("osmesa",)
        if found.is_software and not asked_for and has_nvidia_gpu():
            raise GLUnavailableError(_refusal(found, requested))
        os.environ.update(_environment({}, backend, egl_device_id))
        # llvmpipe's own threads cost more than they give at these frame sizes; GPUs do not read the variable.
        os.environ.setdefault("LP_NUM_THREADS", "0")
        _LOG.info("rendering with %s", found)
        return backend
    packages = " or ".join(f"'apt-get install {_PACKAGES[backend]}'" for backend in candidates)
    raise GLUnavailableError(
        f"env.gl_backend = {requested!r}: no headless OpenGL works here ({'; '.join(failures)}); "
        f"install one with {packages}."
    )


def loaded_backend() -> Backend | None:
    """The backend that this process already draws with, if any."""
    for backend in BACKENDS:
        if f"mujoco.{backend}" in sys.modules:
            return backend
    return None


def has_nvidia_gpu() -> bool:
    """Whether this machine shows an NVIDIA device node."""
    return bool(glob.glob("/dev/nvidia[0-9]*") or glob.glob("/dev/dxg"))


def _environment(base: Mapping[str, str], backend: Backend, egl_device_id: int | None) -> dict[str, str]:
    """`base` with the variables that select `backend`; without those that would select another."""
    env = {key: value for key, value in base.items() if key != "PYOPENGL_PLATFORM"}
    env["MUJOCO_GL"] = backend
    if egl_device_id is not None:
        env["MUJOCO_EGL_DEVICE_ID"] = str(egl_device_id)
    return env


def _check_same(requested: str, loaded: Backend, egl_device_id: int | None) -> None:
    if requested not in ("auto", loaded):
        raise RuntimeError(
            f"env.gl_backend = {requested!r}, but this process already draws with {loaded!r} (MuJoCo was imported with "
            f"MUJOCO_GL={loaded}); use one backend per process, or build the suite before importing MuJoCo."
        )
    current = os.environ.get("MUJOCO_EGL_DEVICE_ID")
    if loaded == "egl" and egl_device_id is not None and str(egl_device_id) != current:
        raise RuntimeError(
            f"egl_device_id = {egl_device_id}, but this process already draws on EGL device "
            f"{current or 'of its own choice'}; a process has one EGL device: start another one."
        )


def _refusal(found: GLDescription, requested: str) -> str:
    return (
        f"env.gl_backend = {requested!r}: this machine has an NVIDIA GPU, but {found.backend} draws in software "
        f"({found.renderer}). Give the process the GPU's EGL (NVIDIA_DRIVER_CAPABILITIES=all in a container, "
        "libnvidia-gl on a host), or accept the slow way with env.gl_backend=osmesa."
    )
