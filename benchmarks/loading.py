"""What loading takes: host memory of a rank that reads its shards of a checkpoint, and of a 7B model without weights.

Run: `python -m benchmarks.loading [--hidden-size N --num-layers N] [--ranks 1 2]`. It writes a checkpoint of random
bf16 weights in OpenVLA's layout (its own towers, a smaller language model; some 2 GB) into a temporary folder and loads
it in fresh processes over gloo, as `vlarl train --policy` does (`rows`), and the usual way (`whole`): every rank loads
the checkpoint, then shards it.

Memory is what loading adds to the process as it is after its imports, in shares of what the rank ends up holding:
`peak` counts anonymous and shared pages (RssAnon + RssShmem, sampled), which nothing but this process can give back;
`peak_rss` counts mapped pages of the checkpoint too (VmHWM, exact), which the kernel drops when memory is short.

Held to: `peak` of `rows` <= 1.2 x the rank's shards. OpenVLA's 7B model on the meta device, imports of torch included:
982 tensors, < 10 s of CPU time, < 1 GiB.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks._official_folder import OPENVLA_7B, write_checkpoint
from benchmarks._results import write_result
from vlarl_ray.config import ExperimentConfig, ModelConfig
from vlarl_ray.config_loader import load_config
from vlarl_ray.learner.build import build_learner
from vlarl_ray.learner.fsdp import local_shard
from vlarl_ray.learner.learner import Learner
from vlarl_ray.models import load_model
from vlarl_ray.models.heads import HEADS
from vlarl_ray.models.lora import attach_lora
from vlarl_ray.models.openvla import OpenVLA
from vlarl_ray.models.policy_import import import_policy
from vlarl_ray.registry import ALGORITHMS, resolve

MAX_SHARE, MAX_CPU_S, MAX_RSS_BYTES = 1.2, 10.0, 2**30
NUM_TENSORS, NUM_VALUES = 982, 7_541_237_184
POLL_S = 0.002


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--max-file-bytes", type=int, default=500_000_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    figures: dict[str, Any] = {"openvla_7b_on_meta": skeleton_in_fresh_process()}
    with tempfile.TemporaryDirectory() as temporary:
        source, policy = Path(temporary, "checkpoint"), Path(temporary, "policy")
        source.mkdir()
        model = replace(
            OPENVLA_7B,
            hidden_size=args.hidden_size,
            intermediate_size=args.hidden_size * 11 // 4,
            num_layers=args.num_layers,
            num_heads=args.hidden_size // 128,
            num_kv_heads=args.hidden_size // 128,
        )
        num_bytes = write_checkpoint(source, model, max_file_bytes=args.max_file_bytes)
        import_policy(source, policy, ModelConfig(), unnorm_key=None, seed=0)
        figures["checkpoint"] = {"bytes": num_bytes, "files": len([*source.glob("*.safetensors")])}
        for world_size in args.ranks:
            for way in ("rows", "whole"):
                figures[f"{way}, {world_size} rank(s)"] = load_on_ranks(way, policy, world_size)
    for name, figure in figures.items():
        print(name, figure)
    print("wrote", write_result("loading", figures))
    check(figures)


def check(figures: dict[str, Any]) -> None:
    """Exit with an error where a figure misses its bar."""
    skeleton = figures["openvla_7b_on_meta"]
    shares = [rank["peak_share"] for n, ranks in figures.items() if n.startswith("rows") for rank in ranks]
    if max(shares) > MAX_SHARE:
        raise SystemExit(f"a rank took {max(shares):.3f} x its shards, more than {MAX_SHARE}.")
    if (skeleton["tensors"], skeleton["values"]) != (NUM_TENSORS, NUM_VALUES):
        raise SystemExit(f"the 7B model has {skeleton}, not {NUM_TENSORS} tensors of {NUM_VALUES} values.")
    if skeleton["cpu_s"] > MAX_CPU_S or skeleton["peak_rss_bytes"] > MAX_RSS_BYTES:
        raise SystemExit(f"the 7B model on meta took {skeleton}, more than {MAX_CPU_S} s or {MAX_RSS_BYTES} bytes.")


def skeleton_in_fresh_process() -> dict[str, Any]:
    """Build the 7B model on the meta device, in a process that has done nothing before."""
    code = "import json; from benchmarks.loading import skeleton; print(json.dumps(skeleton()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def skeleton() -> dict[str, Any]:
    """Build it here; CPU time and memory are those of the process so far."""
    with torch.device("meta"):
        model = OpenVLA(OPENVLA_7B)
    tensors = [tensor for name, tensor in model.state_dict().items() if not name.startswith(HEADS)]
    return {
        "tensors": len(tensors),
        "values": sum(tensor.numel() for tensor in tensors),
        "cpu_s": round(time.process_time(), 3),
        "peak_rss_bytes": memory("VmHWM"),
    }


def load_on_ranks(way: str, policy: Path, world_size: int) -> list[dict[str, Any]]:
    """Load on R processes; the figures of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = probe.getsockname()
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe()
        process = context.Process(target=run_rank, args=(theirs, way, str(policy), rank, world_size, address))
        process.start()
        theirs.close()  # else a dead rank would leave recv waiting
        pipes.append(ours)
        processes.append(process)
    try:
        before = [pipe.recv() for pipe in pipes]
        for pipe in pipes:
            pipe.send("load")
        peaks, waiting = list(before), list(pipes)
        while waiting:
            for pipe in wait(waiting, timeout=POLL_S):
                waiting.remove(pipe)  # type: ignore[arg-type]
            peaks = [max(peak, private(process.pid)) for peak, process in zip(peaks, processes, strict=True)]
        results = [pipe.recv() for pipe in pipes]
        for pipe in pipes:
            pipe.send("done")
    finally:
        for process in processes:
            process.join(30)
            process.kill()
    figures = []
    for first, peak, (shards, rss, seconds) in zip(before, peaks, results, strict=True):
        figures.append(
            {
                "shard_bytes": shards,
                "peak_share": round((peak - first) / shards, 4),
                "peak_rss_share": round(rss / shards, 4),
                "imports_bytes": first,
                "seconds": round(seconds, 2),
            }
        )
    return figures


def run_rank(
    connection: Connection, way: str, policy: str, rank: int, world_size: int, address: tuple[str, int]
) -> None:
    """Body of one process: say how large it is, load, say what it holds, wait for the others."""
    settings = {"run_dir": "none", "learner.dtype": "bfloat16", "inference.dtype": "bfloat16", "learner.device": "cpu"}
    settings |= {"trust.canary_tolerance": "0.5", "trust.sampler_ratio_tolerance": "0.5"}
    cfg = load_config(None, [word for name, value in settings.items() for word in (f"--{name}", value)])
    ranks: dict[str, Any] = {"rank": rank, "world_size": world_size, "store_address": address}
    connection.send(private())
    connection.recv()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
    resident, start = memory("VmRSS"), time.perf_counter()
    learner = build_learner(cfg, policy, **ranks) if way == "rows" else load_then_shard(cfg, policy, **ranks)
    seconds = time.perf_counter() - start
    held = [*learner.model.parameters(), *learner.model.buffers()]
    connection.send((sum(local_shard(t).nbytes for t in held), memory("VmHWM") - resident, seconds))
    connection.recv()
    os._exit(0)  # gloo's threads sometimes abort an orderly exit


def load_then_shard(cfg: ExperimentConfig, policy: str, **ranks: Any) -> Learner:
    """Load the usual way: the whole model in its stored precision on every rank, of which each keeps its rows."""
    model = load_model(policy, dtype="bfloat16")
    attach_lora(model, cfg.learner.lora, seed=cfg.seed)
    algorithm = resolve(ALGORITHMS, cfg.algorithm.name, what="algorithm.name")(cfg.algorithm)
    return Learner(cfg.learner, algorithm, model, seed=cfg.seed, **ranks)


def private(pid: int | None = None) -> int:
    """Bytes that are resident and no file's pages."""
    return memory("RssAnon", pid) + memory("RssShmem", pid)


def memory(name: str, pid: int | None = None) -> int:
    """Read a figure of a process from /proc, bytes."""
    status = Path(f"/proc/{pid or 'self'}/status").read_text(encoding="utf-8")
    [line] = [line for line in status.splitlines() if line.startswith(f"{name}:")]
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
