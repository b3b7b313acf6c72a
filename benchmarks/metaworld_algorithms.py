"""Six configurations on the laptop preset's tasks: same warm start, same env steps, three seeds; success and speed.

Each seed starts all configurations from one policy, fine-tuned as the preset says. Training stops at the same number of
simulated env steps, rejected groups included; learning rates fall until then. The table is written after each run, and
runs in it are not repeated, so the script can be interrupted at any time; a run takes about five minutes on two cores.

    python -m benchmarks.metaworld_algorithms [--seeds 0 1 2] [--folder DIR] [--only NAME ...]
    python -m benchmarks.metaworld_algorithms --table      # the table of what is recorded, in Markdown
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy import stats

from benchmarks._results import current_commit, read_result, setup_digest, write_result
from vlarl_ray.metrics.logger import read_jsonl
from vlarl_ray.summary import read_summary

PRESET = "jobs/laptop.yaml"
ENV_STEPS = 120_000
BUDGET = ("--max_rl_env_steps", ENV_STEPS, "--max_rl_seconds", "null")
GROUPS = ("--rollout.groups_per_update", 10, "--rollout.group_size", 6, "--algorithm.critic_warmup_updates", 0)
VARIANTS: dict[str, tuple[Any, ...]] = {
    "PPO, action-level ratio": (),
    "PPO, chunk-level ratio": ("--algorithm.ratio_level", "chunk"),
    "RLOO": ("--algorithm.name", "rloo", *GROUPS),
    "RLOO, dynamic sampling": ("--algorithm.name", "rloo", *GROUPS, "--sampling.dynamic", "true"),
    "GRPO": ("--algorithm.name", "grpo", *GROUPS),
    "chunk PPO + self-BC": (
        *("--algorithm.name", "chunk_ppo", "--algorithm.ratio_level", "chunk", "--algorithm.self_bc.seed_demos", 0),
        *("--algorithm.self_bc.schedule", "constant", "--algorithm.self_bc.bc_weight", 0.1),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-metaworld-algorithms"))
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    figures = read_result("metaworld_algorithms")
    if args.table:
        print(table(figures))
        return
    for seed in args.seeds:
        for name in args.only:
            setup = setup_digest(PRESET, (*BUDGET, *VARIANTS[name]))
            if figures.get(name, {}).get(f"seed {seed}", {}).get("setup") == setup:
                continue
            policy = warm_start(seed, args.folder)
            run_dir = args.folder / f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}"
            run(name, seed, run_dir, policy)
            figures.setdefault(name, {})[f"seed {seed}"] = {"setup": setup, **read_run(run_dir)}
            show(figures)
            print("wrote", write_result("metaworld_algorithms", figures), flush=True)


def warm_start(seed: int, folder: Path) -> Path:
    """Fine-tune the policy that all configurations of a seed start from."""
    run_dir = folder / f"warm-start-seed{seed}"
    if not (run_dir / "policy" / "config.json").exists():
        vlarl("sft", PRESET, "--seed", seed, "--run-dir", run_dir)
    return run_dir / "policy"


def run(name: str, seed: int, run_dir: Path, policy: Path) -> None:
    """Run one configuration, or the rest of it."""
    summary = read_summary(run_dir)
    if summary is not None and summary.final is not None:
        return
    resume = ["--resume"] if run_dir.exists() else []
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "benchmark_origin.json").write_text(json.dumps({"commit": current_commit()}))
    vlarl(
        "train", PRESET, "--seed", seed, "--run-dir", run_dir, "--policy", policy, "--demos.path",
        policy.parent / "demos", *BUDGET, *resume, *VARIANTS[name],
    )  # fmt: skip


def vlarl(*words: Any) -> None:
    print("+ vlarl", *words, flush=True)
    subprocess.run([str(Path(sys.executable).parent / "vlarl"), *map(str, words)], check=True)


def read_run(run_dir: Path) -> dict[str, Any]:
    """Figures of a finished run."""
    figures: dict[str, Any] = {}
    for row in read_jsonl(run_dir / "evaluations.jsonl"):
        names = ("success_rate", "ci_low", "ci_high", "steps_to_success", "steps_to_success_all")
        tasks = {task["task_id"]: task["success_rate"] for task in row["per_task"]}
        figures[row["label"]] = {**{name: row[name] for name in names}, "per_task": tasks}
    summary = read_summary(run_dir)
    assert summary is not None
    figures |= {"env_steps": summary.env_steps, "updates": summary.updates, "rl_seconds": summary.rl_seconds}
    return {**figures, **json.loads((run_dir / "benchmark_origin.json").read_text())}


def show(figures: dict[str, Any]) -> None:
    for name, seeds in figures.items():
        for seed, figure in seeds.items():
            before, after = figure["warm_start"], figure["final"]
            print(
                f"{name:26} {seed}: {before['success_rate']:.3f} -> {after['success_rate']:.3f} "
                f"[{after['ci_low']:.3f}, {after['ci_high']:.3f}], steps over all episodes "
                f"{before['steps_to_success_all']:.1f} -> {after['steps_to_success_all']:.1f}, "
                f"{figure['env_steps']} env steps in {figure['updates']} updates, {figure['rl_seconds']:.0f} s"
            )


def table(figures: dict[str, Any]) -> str:
    """Success and env steps over all episodes, by seed, and their means over seeds with 95 % t-intervals."""
    seeds = sorted(next(iter(figures.values())))
    lines = [f"| | {' | '.join(seeds)} | success, mean | env steps, mean |", "|---" * (len(seeds) + 3) + "|"]
    rows = {"warm start": [next(iter(figures.values()))[seed]["warm_start"] for seed in seeds]}
    rows |= {name: [by_seed[seed]["final"] for seed in seeds] for name, by_seed in figures.items()}
    for name, runs in rows.items():
        success = [run["success_rate"] for run in runs]
        steps = [run["steps_to_success_all"] for run in runs]
        cells = [
            f"{run['success_rate']:.3f} [{run['ci_low']:.3f}, {run['ci_high']:.3f}], {run['steps_to_success_all']:.1f}"
            for run in runs
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {interval(success, 3)} | {interval(steps, 1)} |")
    return "\n".join(lines)


def interval(values: list[float], digits: int) -> str:
    """Mean over seeds, and its 95 % t-interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{mean(values):.{digits}f} ± {half:.{digits}f}"


if __name__ == "__main__":
    main()
