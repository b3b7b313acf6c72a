"""CPU-ms of a Meta-World frame and env step, by render profile and size, beside Meta-World's own and the limit.

The baseline is what `env.render()` after every `env.step()` costs with Meta-World's default settings. The limits are a
frame of an empty scene (clear and read back) and MuJoCo's own five physics steps. It is CPU time of this process, all
threads; cases take turns and each figure is the median of its rounds, so that a busy machine disturbs all alike.

    python -m benchmarks.rendering [--sizes 64 128 224] [--rounds 5] [--gl-backend auto] [--no-save]
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import psutil

from benchmarks._results import write_result
from vlarl_ray.envs import single_task
from vlarl_ray.envs.gl import activate_gl, describe_gl
from vlarl_ray.envs.metaworld import MetaWorldSuite

TASKS = ("drawer-close-v3", "window-open-v3", "button-press-topdown-v3")
CHUNK_LENGTH = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 224])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gl-backend", default="auto")
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    backend = activate_gl(args.gl_backend)
    gl = describe_gl(backend)
    print(f"rendering with {gl}; mean over {', '.join(TASKS)}\n")
    steps = measure_steps(args.rounds)
    print("CPU-ms per env step: " + ", ".join(f"{name} {value:.3f}" for name, value in steps.items()) + "\n")
    sizes = {}
    for size in args.sizes:
        frames = measure_frames(backend, size, args.rounds)
        sizes[str(size)] = rows = per_step(frames, steps)
        print_size(size, frames, rows)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        memory = fresh.submit(measure_memory).result()
    print("MiB: " + ", ".join(f"{name} {value:.1f}" for name, value in memory.items()))
    if not args.no_save:
        figures = {"gl": str(gl), "tasks": TASKS, "chunk_length": CHUNK_LENGTH, "cpu_ms_per_env_step": steps}
        figures["load_average"] = os.getloadavg()[0]
        print(f"written to {write_result('rendering', {**figures, 'by_image_size': sizes, 'memory_mib': memory})}")


def measure_steps(rounds: int) -> dict[str, float]:
    """CPU-ms of one env step without a frame: ours, Meta-World's own, and five steps of MuJoCo."""
    import mujoco as mujoco_library

    mujoco: Any = mujoco_library
    cases: dict[str, Callable[[], Any]] = {}
    suite = MetaWorldSuite(TASKS)
    action = np.zeros(4, dtype=np.float32)
    for task_id in TASKS:
        env = suite.make_env()
        env.reset(single_task(suite, task_id))
        stock = stock_env(suite, task_id, 64)
        model, data = stock.model, stock.data
        inner = env.simulation._env  # its clock is set back, as it refuses to step past 500
        cases[f"ours {task_id}"] = lambda env=env, inner=inner: (
            setattr(inner, "curr_path_length", 0),
            env.step(action),
        )
        cases[f"baseline {task_id}"] = lambda stock=stock: (setattr(stock, "curr_path_length", 0), stock.step(action))
        cases[f"limit {task_id}"] = lambda model=model, data=data: mujoco.mj_step(model, data, nstep=5)
    return mean_over_tasks(cpu_ms(cases, rounds, calls=150))


def measure_frames(backend: str, size: int, rounds: int) -> dict[str, float]:
    """CPU-ms of one frame: baseline, fast without thinned meshes, fast, and an empty scene."""
    from vlarl_ray.envs.rendering import DrawSettings, FrameRenderer

    suite = MetaWorldSuite(TASKS, image_size=size)
    fast = FrameRenderer(backend, DrawSettings(size, ("corner2",), "fast"))
    unthinned = FrameRenderer(backend, DrawSettings(size, ("corner2",), "fast", thin_meshes=False))
    cases: dict[str, Callable[[], Any]] = {}
    for task_id in TASKS:
        env = suite.make_env()
        env.reset(single_task(suite, task_id))
        simulation = env.simulation
        view = (simulation.scene_file, simulation.model, simulation.data)
        cases[f"fast {task_id}"] = lambda view=view: fast.draw(*view)
        cases[f"fast_unthinned {task_id}"] = lambda view=view: unthinned.draw(*view)
    fast_ms = mean_over_tasks(cpu_ms(cases, rounds, calls=40))
    limit = {"limit": empty_frame_ms(fast, view, rounds)}
    for renderer in (fast, unthinned, suite):
        renderer.close()
    stocks = [stock_env(suite, task_id, size) for task_id in TASKS]
    baseline = mean_over_tasks(
        cpu_ms({f"baseline {t}": s.render for t, s in zip(TASKS, stocks, strict=True)}, min(rounds, 3), calls=3)
    )
    for stock in stocks:
        stock.close()
    return {**baseline, **fast_ms, **limit}


def empty_frame_ms(renderer: Any, view: tuple[str, Any, Any], rounds: int) -> float:
    """CPU-ms of clearing and reading back, with nothing to draw."""
    import mujoco as mujoco_library

    mujoco: Any = mujoco_library
    renderer.draw(*view)
    scene = renderer._scenes[view[0]]
    scene.geometry.ngeom = 0

    def draw() -> None:
        mujoco.mjr_render(renderer._view, scene.geometry, scene.context)
        mujoco.mjr_readPixels(renderer._pixels, None, renderer._view, scene.context)

    return cpu_ms({"limit": draw}, rounds, calls=200)["limit"]


def stock_env(suite: MetaWorldSuite, task_id: str, size: int) -> Any:
    """Meta-World's own environment with its default rendering, reset to the suite's first training goal."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    env: Any = ALL_V3_ENVIRONMENTS[task_id](render_mode="rgb_array", camera_name="corner2", width=size, height=size)
    env._partially_observable = False
    env.__dict__.pop("sawyer_observation_space", None)
    env._set_task_called = env._freeze_rand_vec = True
    env._last_rand_vec = suite.goal(task_id, "train", 0).copy()
    env.reset()
    return env


def cpu_ms(cases: dict[str, Callable[[], Any]], rounds: int, *, calls: int) -> dict[str, float]:
    """Median over rounds of the mean CPU-ms of a call; the cases take turns."""
    for call in cases.values():
        call()
    measured: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, call in cases.items():
            start = time.process_time()
            for _ in range(calls):
                call()
            measured[name].append((time.process_time() - start) / calls * 1e3)
    return {name: statistics.median(values) for name, values in measured.items()}


def mean_over_tasks(by_case: dict[str, float]) -> dict[str, float]:
    """Average `kind task` over tasks."""
    kinds = dict.fromkeys(name.split()[0] for name in by_case)
    return {kind: statistics.mean(v for name, v in by_case.items() if name.split()[0] == kind) for kind in kinds}


def per_step(frames: dict[str, float], steps: dict[str, float]) -> dict[str, dict[str, float]]:
    """CPU-ms per frame and per env step: the baseline draws every env step, ours once in `CHUNK_LENGTH`."""
    rows = {}
    for name, frame in frames.items():
        physics = steps.get(name, steps["ours"])
        share = 1.0 if name == "baseline" else 1.0 / CHUNK_LENGTH
        rows[name] = {"cpu_ms_per_frame": frame, "cpu_ms_per_env_step": physics + share * frame}
    return rows


def print_size(size: int, frames: dict[str, float], rows: dict[str, dict[str, float]]) -> None:
    baseline = rows["baseline"]
    print(f"{size} px{'':18s}CPU-ms/frame  x cheaper   CPU-ms/env step  x cheaper")
    for name in frames:
        frame, step = rows[name]["cpu_ms_per_frame"], rows[name]["cpu_ms_per_env_step"]
        gains = baseline["cpu_ms_per_frame"] / frame, baseline["cpu_ms_per_env_step"] / step
        print(f"  {name:20s}{frame:12.2f}{gains[0]:11.1f}{step:18.2f}{gains[1]:11.1f}")
    print()


def measure_memory() -> dict[str, float]:
    """Resident MiB of a suite with one simulator of each task, and of every further one."""
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    suite = MetaWorldSuite(TASKS)
    first = [suite.make_env() for _ in TASKS]
    for env, task_id in zip(first, TASKS, strict=True):
        env.reset(single_task(suite, task_id))
    with_one = process.memory_info().rss
    more = [suite.make_env() for _ in range(10 * len(TASKS))]
    for index, env in enumerate(more):
        env.reset(single_task(suite, TASKS[index % len(TASKS)]))
    with_all = process.memory_info().rss
    return {
        "suite_with_one_simulator_per_task": (with_one - before) / 2**20,
        "each_further_simulator": (with_all - with_one) / 2**20 / len(more),
    }


if __name__ == "__main__":
    main()
