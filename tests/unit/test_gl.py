import os
import subprocess
import sys
from dataclasses import replace

import pytest

from vlarl_ray.envs import gl

RUN = [sys.executable, "-c"]


def in_fresh_process(code: str, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "MUJOCO_EGL_DEVICE_ID")}
    return subprocess.run([*RUN, code], env={**clean, **env}, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.sim
def test_description_names_renderer_and_speed():
    backend = gl.activate_gl()
    found = gl.describe_gl(backend)
    assert found.backend == backend
    assert found.renderer
    assert found.frames_per_s > 1
    assert found.is_software == ("llvmpipe" in found.renderer or "softpipe" in found.renderer)


@pytest.mark.sim
def test_probe_leaves_this_process_free_to_choose():
    code = """
import sys
from dataclasses import replace
from vlarl_ray.envs.gl import activate_gl, loaded_backend
backend = activate_gl()
assert "mujoco" not in sys.modules and "OpenGL" not in sys.modules and loaded_backend() is None
import os
assert os.environ["MUJOCO_GL"] == backend
import mujoco
assert loaded_backend() == backend
"""
    done = in_fresh_process(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.sim
def test_a_backend_that_fails_says_why():
    with pytest.raises(gl.GLUnavailableError, match=r"MUJOCO_EGL_DEVICE_ID|EGL"):
        gl.describe_gl("egl", egl_device_id=4096)


@pytest.mark.sim
def test_failed_activation_names_the_packages():
    code = """
from vlarl_ray.envs.gl import GLUnavailableError, activate_gl
try:
    activate_gl("egl", egl_device_id=4096)
except GLUnavailableError as error:
    assert "apt-get install libegl1 libgl1-mesa-dri" in str(error), error
    assert "env.gl_backend = 'egl'" in str(error), error
else:
    raise SystemExit("no error")
"""
    done = in_fresh_process(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.sim
def test_egl_device_comes_from_the_argument_not_from_a_global_index():
    # device = rank * stages + stage runs out of range on the second node; the caller's assignment is taken as is.
    code = """
import os
from vlarl_ray.envs.gl import activate_gl
try:
    backend = activate_gl("egl", egl_device_id=0)
except RuntimeError as error:
    raise SystemExit(f"SKIP {error}")
assert os.environ["MUJOCO_EGL_DEVICE_ID"] == "0"
import mujoco
activate_gl("egl", egl_device_id=0)
try:
    activate_gl("egl", egl_device_id=1)
except RuntimeError as error:
    assert "egl_device_id = 1" in str(error)
else:
    raise SystemExit("a second EGL device was accepted")
"""
    done = in_fresh_process(code, RANK="13", LOCAL_RANK="13")
    if "SKIP" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr


@pytest.mark.sim
def test_software_is_refused_on_a_gpu_machine_unless_asked_for(monkeypatch):
    monkeypatch.setattr(gl, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(gl, "loaded_backend", lambda: None)
    slow = gl.GLDescription("egl", "llvmpipe (LLVM 15)", "4.5", True, 400.0)
    monkeypatch.setattr(gl, "describe_gl", lambda backend, **_: replace(slow, backend=backend))
    monkeypatch.setattr(gl.os, "environ", {})
    with pytest.raises(gl.GLUnavailableError, match="draws in software"):
        gl.activate_gl("auto")
    with pytest.raises(gl.GLUnavailableError, match="accept the slow way"):
        gl.activate_gl("egl")
    assert gl.activate_gl("osmesa") == "osmesa"
    gl.os.environ.clear()
    assert gl.activate_gl("auto", accept_software=True) == "egl"


def test_hardware_is_taken_on_a_gpu_machine(monkeypatch):
    monkeypatch.setattr(gl, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(gl, "loaded_backend", lambda: None)
    fast = gl.GLDescription("egl", "NVIDIA H200/PCIe/SSE2", "4.6", False, 9000.0)
    monkeypatch.setattr(gl, "describe_gl", lambda backend, **_: fast)
    monkeypatch.setattr(gl.os, "environ", {})
    assert gl.activate_gl("auto") == "egl"


def test_another_backend_than_the_loaded_one_is_refused(monkeypatch):
    monkeypatch.setattr(gl, "loaded_backend", lambda: "egl")
    with pytest.raises(RuntimeError, match="already draws with 'egl'"):
        gl.activate_gl("osmesa")
