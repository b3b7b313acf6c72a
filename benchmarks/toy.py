"""Learning on the 2-D reach task: every algorithm, self-cloning, an impossible task, shuffled rewards.

All runs are `jobs/toy.yaml` in one process, with the overrides of VARIANTS. Success is that of 200 held-out initial
states with the decoding of training, before and after. "Env steps to the threshold" are all that were simulated,
rejected groups too, until the mean training success of three iterations on end was 0.9 (where one of five tasks is
impossible: 0.75 on the other four). Results are written after each run and not made again, so the script can be
interrupted.

    python -m benchmarks.toy [--seeds 0 1 2 3 4] [--parts learn self_bc impossible shuffled] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks._results import read_result, setup_digest, write_result
from vlarl_ray.metrics.logger import read_jsonl

PRESET = "jobs/toy.yaml"
GROUPS = ("--rollout.groups_per_update", 64, "--rollout.group_size", 6, "--algorithm.critic_warmup_updates", 0)
CHUNK = ("--algorithm.ratio_level", "chunk")
SOLVABLE = ("reach-a", "reach-b", "reach-c", "reach-d")
WIDER = ("--model.hidden_size", 128)
WARM_START_OF_FOUR = (
    "--env.tasks", f"[{', '.join(SOLVABLE)}]", "--demos.episodes_per_task", 100, "--sft.num_steps", 1000, *WIDER,
)  # fmt: skip
"""Of the five tasks: there is nothing to imitate in the impossible one."""
FIVE_TASKS = (
    "--env.tasks", f"[{', '.join(SOLVABLE)}, impossible]", "--algorithm.name", "rloo", *GROUPS,
    "--rollout.groups_per_update", 96, "--learner.actor_learning_rate", 2e-3, *WIDER,
)  # fmt: skip
DYNAMIC = ("--sampling.dynamic", "true", "--rollout.groups_per_update", 56)
"""Groups that are kept; some 96 are attempted, so that an update takes as many env steps as without."""
SELF_BC = ("--algorithm.self_bc.seed_demos", 0, "--algorithm.self_bc.capacity", 300)
"""No demonstrations, as these are no better than the policy; room for the successes of two updates, as the shortest are
those that started next to the goal, and a small buffer would hold nothing else."""
FRONTIER = ("--sampling.curriculum", "frontier", "--sampling.curriculum_temperature", 0.5)
VARIANTS: dict[str, tuple[Any, ...]] = {
    "ppo": (),
    "rloo": ("--algorithm.name", "rloo", *GROUPS),
    "grpo": ("--algorithm.name", "grpo", *GROUPS),
    "chunk_ppo": ("--algorithm.name", "chunk_ppo", *CHUNK, *SELF_BC),
    "chunk_ppo without cloning": CHUNK,
    "shuffled": ("--rollout.shuffle_rewards", "true", "--algorithm.gamma", 1),
    "five tasks, uniform": FIVE_TASKS,
    "five tasks, dynamic": (*FIVE_TASKS, *DYNAMIC),
    "five tasks, frontier": (*FIVE_TASKS, *FRONTIER),
}
PARTS = {
    "learn": ("ppo", "rloo", "grpo", "chunk_ppo"),
    "self_bc": ("chunk_ppo", "chunk_ppo without cloning"),
    "shuffled": ("shuffled",),
    "impossible": ("five tasks, uniform", "five tasks, dynamic", "five tasks, frontier"),
}
THRESHOLD = {"five tasks": 0.75}
"""Training success, on the tasks that can be solved, whose first reaching is timed; 0.9 elsewhere."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-toy"))
    args = parser.parse_args()
    figures = read_result("toy")
    for name in dict.fromkeys(name for part in args.parts for name in PARTS[part]):
        for seed in args.seeds:
            setup = setup_digest(PRESET, (*VARIANTS[name], *warm_start_words(name)))
            if figures.get(name, {}).get(f"seed {seed}", {}).get("setup") != setup:
                figures.setdefault(name, {})[f"seed {seed}"] = {"setup": setup, **run(name, seed, args.folder)}
            show(name, seed, figures[name][f"seed {seed}"])
            write_result("toy", figures)
    compare(figures, "self-cloning against PPO alone", "chunk_ppo", "chunk_ppo without cloning")
    compare(figures, "impossible task, dynamic sampling against uniform", "five tasks, dynamic", "five tasks, uniform")
    compare(figures, "impossible task, frontier against uniform", "five tasks, frontier", "five tasks, uniform")


def run(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Run a variant unless it is there; returns its figures."""
    run_dir = folder / f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}"
    if not (run_dir / "figures.json").exists():
        words = ["--inline", *VARIANTS[name]]
        if run_dir.exists():
            words.append("--resume")
        start, before = time.monotonic(), cpu_seconds()
        if warm_start_words(name):
            warm = folder / f"warm-start-of-four-seed{seed}"
            if not (warm / "policy" / "config.json").exists():
                vlarl("sft", seed, warm, *warm_start_words(name))
            words += ["--policy", warm / "policy"]
        vlarl("train", seed, run_dir, *words)
        seconds = {"wall_s": time.monotonic() - start, "cpu_s": cpu_seconds() - before}
        (run_dir / "figures.json").write_text(json.dumps(seconds))
    return {**json.loads((run_dir / "figures.json").read_text()), **read_run(run_dir, name)}


def warm_start_words(name: str) -> tuple[Any, ...]:
    """Overrides of a warm start that the variant does not make itself."""
    return WARM_START_OF_FOUR if name.startswith("five tasks") else ()


def vlarl(command: str, seed: int, run_dir: Path, *words: Any) -> None:
    """Run a command on the preset, in one thread, without displays and films."""
    quiet = ("--metrics.progress", "false", "--metrics.tensorboard", "false", "--evaluation.videos_per_task", 0)
    said = (command, PRESET, "--seed", seed, "--run-dir", run_dir, *quiet, *words)
    done = subprocess.run(
        [str(Path(sys.executable).parent / "vlarl"), *map(str, said)],
        check=False, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"vlarl {' '.join(map(str, said))} failed:\n{done.stderr}")


def cpu_seconds() -> float:
    """CPU time of all finished child processes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def read_run(run_dir: Path, name: str) -> dict[str, Any]:
    """Figures of a finished run."""
    by_label = {row["label"]: row for row in read_jsonl(run_dir / "evaluations.jsonl")}
    figures: dict[str, Any] = {}
    for label in ("warm_start", "final"):
        row = by_label[label]
        figures[label] = {key: row[key] for key in ("success_rate", "ci_low", "ci_high", "steps_to_success")}
        if len(row["per_task"]) > 1:
            figures[label]["per_task"] = {task["task_id"]: task["success_rate"] for task in row["per_task"]}
    rows = read_jsonl(run_dir / "metrics.jsonl")
    tasks = SOLVABLE if name.startswith("five tasks") else ("reach-a",)
    threshold = THRESHOLD.get(name.partition(",")[0], 0.9)
    figures["env_steps"] = sum(row["rollout/env_steps"] for row in rows)
    figures["env_steps_to_threshold"] = env_steps_until(rows, tasks, threshold)
    figures["steps_to_success_last_updates"] = statistics.mean(row["rollout/steps_to_success"] for row in rows[-5:])
    if name == "five tasks, dynamic":
        accepted = [row.get("rollout/accept_rate/impossible") for row in rows]
        figures["accepted_groups_of_impossible"] = sum(rate or 0.0 for rate in accepted)
    return figures


def env_steps_until(rows: list[dict[str, Any]], tasks: tuple[str, ...], threshold: float) -> int | None:
    """Env steps simulated until the mean success of three iterations on end reached the threshold; None if never."""
    total, recent = 0, []
    for row in rows:
        total += row["rollout/env_steps"]
        rates = [row.get(f"rollout/success_rate/{task}") for task in tasks]
        drawn = [rate for rate in rates if rate is not None]
        if drawn:
            recent = [*recent, statistics.mean(drawn)][-3:]
        if len(recent) == 3 and statistics.mean(recent) >= threshold:
            return total
    return None


def show(name: str, seed: int, figure: dict[str, Any]) -> None:
    before, after = figure["warm_start"], figure["final"]
    print(
        f"{name:26} seed {seed}: {before['success_rate']:.3f} -> {after['success_rate']:.3f} "
        f"[{after['ci_low']:.3f}, {after['ci_high']:.3f}], steps to success {before['steps_to_success']:.2f} -> "
        f"{after['steps_to_success']:.2f}, env steps to threshold {figure['env_steps_to_threshold']}, "
        f"{figure['wall_s']:.0f} s ({figure['cpu_s']:.0f} CPU-s)",
        flush=True,
    )


def compare(figures: dict[str, Any], title: str, ours: str, other: str) -> None:
    """Print the ratio of env steps to the threshold, seed by seed."""
    shared = [seed for seed in figures.get(ours, {}) if seed in figures.get(other, {})]
    ratios = []
    for seed in shared:
        steps, others = (figures[name][seed]["env_steps_to_threshold"] for name in (ours, other))
        ratios.append(float("inf") if steps is None else 0.0 if others is None else steps / others)
    if ratios:
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{title}: env steps to the threshold, ratio by seed: {each}; median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
