"""Rollout speed on the laptop preset: env steps a second and CPU-ms a decision by part, against two naive loops.

Ours is the real system (Ray, two env workers, one inference server) with an untrained policy, so that every episode
runs to the horizon and nothing depends on what a policy has learned; `--policy` takes a trained one. The naive loops
are one process that renders a frame after every env step and asks the same policy for one chunk at a time: with
Meta-World's default rendering, and with our fast profile. The limit is the CPU time of simulation, rendering and
inference / cores.

    python -m benchmarks.rollout [--policy DIR] [--iterations 3] [--no-save]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil

from benchmarks._results import write_result
from vlarl_ray.config import ExperimentConfig
from vlarl_ray.config_loader import load_config
from vlarl_ray.envs import make_suite
from vlarl_ray.launch import build_system, join_ray, processes
from vlarl_ray.summary import PeakMemory
from vlarl_ray.types import Trajectory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="jobs/laptop.yaml")
    parser.add_argument("--policy")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--naive-seconds", type=float, default=20.0)
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        cfg = load_config(args.preset, ["--run_dir", folder, "--metrics.progress", "false"])
        policy = Path(args.policy) if args.policy else untrained_policy(cfg, Path(folder) / "policy")
        ours = measure_ours(cfg, policy, iterations=args.iterations, cores=cores)
        naive = {
            profile: measure_naive(
                replace(cfg, env=replace(cfg.env, render_profile=profile)), policy, args.naive_seconds
            )
            for profile in ("full", "fast")
        }
    figures = {
        "policy": "trained" if args.policy else "untrained",
        "ours": ours,
        "naive_default_rendering": naive["full"],
        "naive_fast_rendering": naive["fast"],
        "speedup_over_naive_default": ours["env_steps_per_s"] / naive["full"]["env_steps_per_s"],
        "speedup_over_naive_fast": ours["env_steps_per_s"] / naive["fast"]["env_steps_per_s"],
    }
    rate, limit = ours["env_steps_per_s"], ours["limit_env_steps_per_s"]
    print(f"ours                     {rate:8.0f} env steps/s   (bar 900)")
    print(f"limit (CPU time / cores) {limit:8.0f} env steps/s")
    print(f"wall / limit             {ours['wall_over_limit']:8.2f}               (bar 1.15)")
    for name, bar in (("fast", 3), ("default", 30)):
        naive_rate = figures[f"naive_{name}_rendering"]["env_steps_per_s"]
        speedup = figures[f"speedup_over_naive_{name}"]
        print(f"naive, {name} rendering {naive_rate:8.1f} env steps/s, ours x{speedup:.1f} (bar {bar})")
    parts = ours["cpu_ms_per_decision"].items()
    print("CPU-ms a decision: " + ", ".join(f"{name} {value:.2f}" for name, value in parts))
    if not args.no_save:
        print("wrote", write_result("rollout", figures))


def untrained_policy(cfg: ExperimentConfig, folder: Path) -> Path:
    from vlarl_ray.models import new_policy

    suite = make_suite(cfg.env)
    new_policy(cfg.model, [suite.instruction(task) for task in suite.task_ids], 0).save(folder)
    return folder


def measure_ours(cfg: ExperimentConfig, policy: Path, *, iterations: int, cores: int) -> dict:
    suite = make_suite(cfg.env)
    with ExitStack() as stack:
        join_ray(cfg, stack)
        where = stack.enter_context(processes(cfg, policy, inline=False, memory=PeakMemory()))
        system = build_system(cfg, suite, where, recorder=None)
        system.weights.publish(0)
        system.ledger.run(system.sampler.training_tasks(0, version=0))  # builds simulators and renderers
        rows = []
        for iteration in range(1, iterations + 1):
            tasks = system.sampler.training_tasks(iteration, version=0)
            before, start = cpu_seconds(), time.perf_counter()
            trajectories = system.ledger.run(tasks)
            wall, spent = time.perf_counter() - start, cpu_seconds() - before
            rows.append(one_rollout(trajectories, wall_s=wall, all_cpu_s=spent, cores=cores))
    return sorted(rows, key=lambda row: row["env_steps_per_s"])[len(rows) // 2]


def one_rollout(trajectories: list[Trajectory], *, wall_s: float, all_cpu_s: float, cores: int) -> dict:
    steps = sum(t.total_env_steps for t in trajectories)
    decisions = sum(t.num_decisions for t in trajectories)
    parts = {
        name: sum(getattr(t.timing, f"{name}_s") for t in trajectories)
        for name in ("reset", "physics", "render", "inference")
    }
    work_s = sum(parts.values())
    milliseconds = {name: 1e3 * seconds / decisions for name, seconds in parts.items()}
    milliseconds["ray_and_the_rest"] = 1e3 * (all_cpu_s - work_s) / decisions
    return {
        "env_steps_per_s": steps / wall_s,
        "decisions_per_s": decisions / wall_s,
        "limit_env_steps_per_s": steps / (work_s / cores),
        "wall_over_limit": wall_s / (work_s / cores),
        "cpu_ms_per_decision": milliseconds,
        "cpu_utilisation": all_cpu_s / wall_s / cores,
        "episodes": len(trajectories),
        "wall_s": wall_s,
    }


def cpu_seconds() -> float:
    """CPU time so far of this process and everything below it (Ray's daemons and actors)."""
    total = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def measure_naive(cfg: ExperimentConfig, policy_dir: Path, seconds: float) -> dict:
    """One process, one simulator, a frame after every env step, one chunk at a time."""
    import torch

    from vlarl_ray.models import load_policy
    from vlarl_ray.rollout.tasks import TaskSampler

    torch.set_num_threads(1)
    policy = load_policy(str(policy_dir))
    suite = make_suite(cfg.env)
    env = suite.make_env()
    tasks = TaskSampler(suite, cfg, run_id="naive").training_tasks(0, version=0)
    for task in tasks[: len(suite.task_ids)]:
        env.reset(task)  # builds simulators and renderers
    steps, start = 0, time.perf_counter()
    for task in tasks:
        observation = env.reset(task)
        count = 0
        while count < task.max_env_steps and time.perf_counter() - start < seconds:
            [chunk] = policy.act([observation], temperature=1.0, seed=count)
            for action in np.asarray(chunk.actions):
                result = env.step(action)
                observation = env.observe()
                count += 1
                if result.success:
                    break
            if result.success:
                break
        steps += count
        if time.perf_counter() - start >= seconds:
            break
    env.close()
    return {"env_steps_per_s": steps / (time.perf_counter() - start), "env_steps": steps}


if __name__ == "__main__":
    main()
