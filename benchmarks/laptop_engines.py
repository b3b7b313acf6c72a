"""The laptop trio decoded token by token: learning through vLLM over seeds, and its pace beside the PyTorch engine's.

`rl`: the whole preset `jobs/laptop_vllm.yaml` for each seed (demonstrations, warm start, evaluation, RL, evaluation),
and an evaluation of what came of it on 150 further starts, which had no part in how the preset was chosen.
`control`: from each warm start, fewer updates on outcomes that were shuffled; nothing must be learnt.
`pace`: both engines in turn run a few iterations from the first seed's warm start, learning as they would.
Finished runs are kept and skipped; a run that was interrupted resumes.

    python -m benchmarks.laptop_engines [--seeds 0 1 2] [--parts rl control pace] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks._results import read_result, setup_digest, write_result
from benchmarks.laptop import (
    ORIGIN,
    SHUFFLED_UPDATES,
    condensed,
    is_finished,
    note_origin,
    read_json,
    read_run,
    show,
    vlarl,
)
from vlarl_ray.metrics.logger import read_jsonl

PRESET = "jobs/laptop_vllm.yaml"
ENGINES = {
    "vllm": (),
    "torch": (
        "--inference.engine", "torch", "--inference.vllm.kv_cache_bytes", "null", "--inference.batch_size", 30,
    ),
}  # fmt: skip
OTHER_STARTS = ("--env.eval_seed", 2042)
PACE_TURNS, PACE_ITERATIONS = 2, 8
PACE = (
    "throughput/decisions_per_s",
    "throughput/env_steps_per_s",
    "time/inference_cpu_ms_per_decision",
    "time/rollout_s",
    "time/update_s",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", default=["rl", "control", "pace"])
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-laptop-engines"))
    args = parser.parse_args()
    if "rl" in args.parts:
        for seed in args.seeds:
            folder = args.folder / f"vllm-seed{seed}"
            run(folder, "--seed", seed)
            if not (elsewhere := other_starts(folder)).exists():
                policy = ("--policy", folder / "policy_final", "--run-dir", elsewhere.parent)
                vlarl("evaluate", PRESET, *policy, *OTHER_STARTS, "--seed", seed)
    if "control" in args.parts:
        for seed in args.seeds:
            policy = args.folder / f"vllm-seed{seed}" / "policy"
            common = ("--seed", seed, "--policy", policy, "--num_iterations", SHUFFLED_UPDATES)
            shuffled = ("--rollout.shuffle_rewards", "true", "--algorithm.gamma", 1)
            run(args.folder / f"shuffled-seed{seed}", *common, *shuffled)
    if "pace" in args.parts:
        policy = args.folder / f"vllm-seed{args.seeds[0]}" / "policy"
        for turn in range(PACE_TURNS):
            for engine, settings in ENGINES.items():
                common = ("--seed", turn, "--policy", policy, "--num_iterations", PACE_ITERATIONS)
                run(args.folder / f"pace-{engine}-{turn}", *common, "--evaluation.states_per_task", 2, *settings)
    figures = collect(args.folder, args.seeds)
    show({"vllm": figures["learning through vLLM"], "shuffled": figures["shuffled rewards"]})
    for engine, pace in figures["pace"].items():
        print(engine, pace)
    print("wrote", write_result("laptop_engines", figures))


def other_starts(folder: Path) -> Path:
    """Where the evaluation of a run's policy on further starts is."""
    return folder.with_name(f"{folder.name}-other-starts") / "evaluation-0.json"


def run(folder: Path, *settings: Any) -> None:
    """Run the preset, unless that was done; a folder of another version of it is refused."""
    resume = ["--resume"] if folder.exists() else []
    if resume and not is_of_preset(folder):
        raise SystemExit(f"{folder} is no run of this {PRESET}; move it away, or name another --folder.")
    if not is_finished(folder):
        note_origin(folder, preset=setup_digest(PRESET))
        vlarl("train", PRESET, "--run-dir", folder, *settings, *resume)


def is_of_preset(folder: Path) -> bool:
    """Whether a folder holds a run of the preset as it is now."""
    origin = folder / ORIGIN
    return origin.exists() and read_json(origin).get("preset") == setup_digest(PRESET)


def collect(folder: Path, seeds: list[int]) -> dict[str, Any]:
    """Figures of finished runs; those of earlier results are kept where a run is gone but not its preset."""
    digest, earlier = setup_digest(PRESET), read_result("laptop_engines")
    figures: dict[str, Any] = {"learning through vLLM": {}, "shuffled rewards": {}, "pace": {}}
    learned, controls = earlier.get("learning through vLLM", {}), earlier.get("shuffled rewards", {})
    known = {int(name.removeprefix("seed ")) for name in learned}
    for seed in sorted(known.union(seeds)):
        path, name = folder / f"vllm-seed{seed}", f"seed {seed}"
        found = read_run(path, final=True) if is_of_preset(path) and other_starts(path).exists() else None
        if found:
            rows = read_jsonl(path / "metrics.jsonl")
            found["other_starts"] = condensed(read_json(other_starts(path)))
            found["median"] = {key: round(statistics.median(row[key] for row in rows), 2) for key in PACE}
            figures["learning through vLLM"][name] = found
        elif learned.get(name, {}).get("preset") == digest:
            figures["learning through vLLM"][name] = learned[name]
        control = read_run(folder / f"shuffled-seed{seed}", final=True) or controls.get(name, {})
        if control.get("preset") == digest:
            figures["shuffled rewards"][name] = control
    for engine in ENGINES:
        folders = [folder / f"pace-{engine}-{turn}" for turn in range(PACE_TURNS)]
        if all(is_of_preset(path) and is_finished(path) for path in folders):
            # the first iteration of each warms up
            rows = [row for path in folders for row in read_jsonl(path / "metrics.jsonl")[1:]]
            medians = {name: round(statistics.median(row[name] for row in rows), 2) for name in PACE}
            figures["pace"][engine] = {"iterations": len(rows), **medians, **read_json(folders[0] / ORIGIN)}
        elif earlier.get("pace", {}).get(engine, {}).get("preset") == digest:
            figures["pace"][engine] = earlier["pace"][engine]
    return figures


if __name__ == "__main__":
    main()
