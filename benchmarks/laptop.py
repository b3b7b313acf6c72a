"""The headline figure: held-out success of the laptop preset before and after RL, over seeds, with two controls.

For each seed the whole preset runs (demonstrations, warm start, evaluation, RL, evaluation). Controls, same seeds:
`more_sft` trains the warm start for as long again as the RL part may take (one learning-rate cycle over all of it, the
strongest form), `shuffled` runs RL with permuted outcomes for half as many updates, by when true ones have raised
success most of the way (`train_success_halfway`). Finished runs are kept and skipped, so the script can be interrupted
and run again. Figures are read from the run folders, with the commit and machine they were made on; those of earlier
results whose folder is gone are kept if they come from the same preset.

    python -m benchmarks.laptop [--seeds 0 1 2] [--parts rl more_sft shuffled] [--folder runs/benchmark-laptop]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks._results import current_commit, read_result, write_result
from vlarl_ray.metrics.logger import read_jsonl
from vlarl_ray.summary import describe_machine, installed_versions

PRESET = "jobs/laptop.yaml"
EXTRA_SFT_SECONDS = 900
SHUFFLED_UPDATES = 40
ORIGIN = "benchmark_origin.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", default=["rl", "more_sft", "shuffled"])
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-laptop"))
    parser.add_argument("--extra-steps-per-second", type=float, default=7.5, help="guess that sizes the longer cycle")
    parser.add_argument("--sft-threads", type=int, default=2, help="1 lets two controls run beside each other")
    args = parser.parse_args()
    figures: dict[str, Any] = {part: {} for part in ("rl", "more_sft", "shuffled")}
    for part in args.parts:
        for seed in args.seeds:
            {"rl": run_rl, "more_sft": run_more_sft, "shuffled": run_shuffled}[part](args, seed)
    preset = preset_digest()
    earlier = read_result("laptop")
    known = {int(name.removeprefix("seed ")) for part in earlier.values() for name in part}
    for seed in sorted({*args.seeds, *known}):
        for part in figures:
            found = read_run(args.folder / f"{part}-seed{seed}", final=part != "more_sft")
            kept = earlier.get(part, {}).get(f"seed {seed}", {})
            if found:
                figures[part][f"seed {seed}"] = {"preset": preset, **found}
            elif kept.get("preset") == preset:
                figures[part][f"seed {seed}"] = kept
    show(figures)
    print("wrote", write_result("laptop", figures))


def preset_digest() -> str:
    """Fingerprint of what the preset says, its comments left out."""
    content = json.dumps(yaml.safe_load(Path(PRESET).read_text(encoding="utf-8")), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def note_origin(folder: Path, **more: str) -> None:
    """Record, when a run begins, what it is made with."""
    folder.mkdir(parents=True, exist_ok=True)
    origin = {**more, "commit": current_commit(), "machine": describe_machine(), "versions": installed_versions()}
    (folder / ORIGIN).write_text(json.dumps(origin))


def run_rl(args: argparse.Namespace, seed: int) -> None:
    """The preset as a user runs it."""
    folder = args.folder / f"rl-seed{seed}"
    if not is_finished(folder):
        resume = ["--resume"] if folder.exists() else []
        note_origin(folder)
        vlarl("train", PRESET, "--seed", seed, "--run-dir", folder, *resume)


def run_more_sft(args: argparse.Namespace, seed: int) -> None:
    """The warm start alone, trained for 15 more minutes."""
    folder = args.folder / f"more_sft-seed{seed}"
    if (folder / "evaluation-0.json").exists():
        return
    steps = round(EXTRA_SFT_SECONDS * args.extra_steps_per_second)
    note_origin(folder)
    start = time.monotonic()
    common = (
        PRESET,
        "--seed",
        seed,
        "--run-dir",
        folder,
        "--sft.num_steps",
        steps,
        "--sft.num_threads",
        args.sft_threads,
    )
    vlarl("sft", *common, "--sft.max_seconds", EXTRA_SFT_SECONDS)
    (folder / "control.json").write_text(
        json.dumps({"seconds": time.monotonic() - start, "steps": steps, "threads": args.sft_threads})
    )
    vlarl("evaluate", *common)


def run_shuffled(args: argparse.Namespace, seed: int) -> None:
    """RL from the same warm start, on outcomes that were permuted."""
    folder = args.folder / f"shuffled-seed{seed}"
    policy = args.folder / f"rl-seed{seed}" / "policy"
    if not is_finished(folder):
        resume = ["--resume"] if folder.exists() else []
        note_origin(folder)
        vlarl(
            "train", PRESET, "--seed", seed, "--run-dir", folder, "--policy", policy, *resume,
            "--rollout.shuffle_rewards", "true", "--algorithm.gamma", "1", "--num_iterations", SHUFFLED_UPDATES,
        )  # fmt: skip


def vlarl(*words: Any) -> None:
    print("+ vlarl", *words, flush=True)
    subprocess.run([str(Path(sys.executable).parent / "vlarl"), *map(str, words)], check=True)


def is_finished(folder: Path) -> bool:
    path = folder / "summary.json"
    return path.exists() and json.loads(path.read_text())["final"] is not None


def read_run(folder: Path, *, final: bool) -> dict[str, Any] | None:
    """Figures of a run folder; None if it is not finished."""
    if not final:
        path = folder / "evaluation-0.json"
        if not path.exists():
            return None
        evaluation = condensed(read_json(path))
        return {"evaluate": evaluation, **read_json(folder / "control.json"), **read_json(folder / ORIGIN)}
    if not is_finished(folder):
        return None
    rows = read_jsonl(folder / "evaluations.jsonl")
    result = {row["label"]: condensed(row) for row in rows if row["label"] != "update"}
    summary = read_json(folder / "summary.json")
    names = (
        "rl_seconds", "total_seconds", "env_steps", "env_steps_per_s", "peak_rss_bytes", "model_bytes",
        "published_bytes_per_update", "expert_steps_to_success", "expert_steps_to_success_per_task",
    )  # fmt: skip
    config = read_json(folder / "config.json")
    rows = read_jsonl(folder / "metrics.jsonl")
    halfway = rows[SHUFFLED_UPDATES - 5 : SHUFFLED_UPDATES]
    extra = {
        "evaluated_every_updates_besides": config["evaluation"]["every_updates"],
        "updates": rows[-1]["version"],
        "planned_updates": config["num_iterations"],
        "train_success_halfway": sum(row["rollout/success_rate"] for row in halfway) / len(halfway),
    }
    return {**result, **{name: summary[name] for name in names}, **extra, **read_json(folder / ORIGIN)}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def condensed(row: dict[str, Any]) -> dict[str, Any]:
    names = (
        "success_rate",
        "ci_low",
        "ci_high",
        "episodes",
        "steps_to_success",
        "steps_to_success_all",
        "temperature",
        "split",
    )
    per_task = {task["task_id"]: [task["success_rate"], task["steps_to_success"]] for task in row["per_task"]}
    return {**{name: row[name] for name in names}, "per_task": per_task}


def show(figures: dict[str, Any]) -> None:
    for part, seeds in figures.items():
        for seed, figure in seeds.items():
            for label in ("warm_start", "final", "evaluate", "other_starts"):
                if label in figure:
                    row = figure[label]
                    tasks = ", ".join(f"{task} {rate:.2f}" for task, (rate, _) in row["per_task"].items())
                    steps = row["steps_to_success"]
                    interval = f"[{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
                    steps = None if steps is None else round(steps, 1)
                    print(f"{part:9} {seed} {label:12} {row['success_rate']:.3f} {interval} steps {steps} ({tasks})")


if __name__ == "__main__":
    main()
