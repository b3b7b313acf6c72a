"""CPU time per decision: the vLLM engine, vLLM's own `LLM.generate` on the same requests, and the PyTorch engine.

The vLLM engine comes with its adapters merged, and with native LoRA: vLLM applies the same ones (rank 32, all linear
layers of the language model) itself. Of both, the CPU time of a publication's loading is given, too.

Each runs in a process of its own and they take turns, so that a busy machine is busy for all of them. CPU time is that
of a case's process and its children. `LLM.generate` comes twice: as vLLM starts it by itself (its engine in a second
process), and with all of it in one process, which the engine, whose server must answer while it decodes, cannot be.

Usage: python -m benchmarks.vllm_speed [--rounds 15] [--rows 32] [--cases NAME ...] [--no-save]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch

from benchmarks._results import write_result
from benchmarks.vllm_engine import INSTRUCTIONS, MODEL, request_of
from vlarl_ray.config import InferenceConfig, LoraConfig, VllmConfig
from vlarl_ray.inference.torch_server import TorchEngine
from vlarl_ray.inference.vllm_plugin import ENGINE_OF
from vlarl_ray.models import new_policy
from vlarl_ray.types import ActRequest
from vlarl_ray.vllm_sizes import adapted_linears
from vlarl_ray.weights.update import WeightUpdate

LORA = LoraConfig(rank=32, target_modules="language_model.*")
MERGED, NATIVE = "vllm engine", "vllm engine, native LoRA"
BASELINES = ("LLM.generate", "LLM.generate, one process")


def random_update(seed: int) -> WeightUpdate:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32) * 0.02

    sizes = adapted_linears(LORA, MODEL).items()
    adapters = {
        f"{name}.weight": (draw(LORA.rank, fan_in), draw(fan_out, LORA.rank)) for name, (fan_in, fan_out) in sizes
    }
    return WeightUpdate(1, LORA.alpha / LORA.rank, adapters, {})


@dataclass(frozen=True)
class Case:
    """What is measured."""

    sample: Callable[[ActRequest], object]
    load: Callable[[WeightUpdate], object] | None = None


def vllm_engine(folder: Path, lora: Literal["merged", "native"]) -> Case:
    from vlarl_ray.inference.vllm_engine import VllmEngine

    cfg = InferenceConfig(engine="vllm", vllm=VllmConfig(lora=lora))
    engine = VllmEngine(folder, cfg, deterministic=False, lora=LORA)
    engine.load(random_update(0))
    return Case(engine.sample, engine.load)


def torch_engine(folder: Path) -> Case:
    engine = TorchEngine(folder, InferenceConfig(batch_size=32), deterministic=False)
    engine.load(random_update(0))
    return Case(engine.sample, engine.load)


def bare_vllm(folder: Path, *, processes: str) -> Case:
    """What a user without this package would write, under the settings of the engine."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": processes,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        ENGINE_OF: "benchmark",  # its engine would outlive it
    }
    from vllm import LLM, SamplingParams

    from vlarl_ray.inference.vllm_folder import link_policy
    from vlarl_ray.inference.vllm_rows import request_seed
    from vlarl_ray.models.policy import empty_model
    from vlarl_ray.vllm_sizes import needed_len

    policy, _ = empty_model(folder)
    model_len, sequences = needed_len(MODEL), InferenceConfig().vllm.max_num_seqs
    linked = folder.parent / f"linked-{processes}"
    linked.mkdir()
    llm = LLM(
        model=str(link_policy(folder, linked, dtype="float32")),
        skip_tokenizer_init=True,
        generation_config="vllm",
        dtype="float32",
        max_model_len=model_len,
        max_num_seqs=sequences,
        enable_chunked_prefill=False,
        max_num_batched_tokens=sequences * model_len,
        logprobs_mode="processed_logprobs",
        mm_processor_cache_gb=0,
        enable_prefix_caching=False,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 28,
        disable_log_stats=True,
        use_tqdm_on_load=False,
    )
    first = policy.first_action_token
    action_ids = list(range(first, first + MODEL.num_action_bins))

    def generate(request: ActRequest) -> object:
        ids, lengths = policy.encode_prompts(list(request.instructions))
        prompts = [
            {"prompt_token_ids": row[: int(length)].tolist(), "multi_modal_data": {"image": list(frames)}}
            for row, length, frames in zip(ids, lengths, request.images, strict=True)
        ]
        parameters = [
            SamplingParams(
                temperature=request.temperature,
                max_tokens=policy.num_action_tokens,
                ignore_eos=True,
                detokenize=False,
                logprobs=0,
                allowed_token_ids=action_ids,
                seed=request_seed(key),
            )
            for key in request.noise_keys
        ]
        return llm.generate(prompts, parameters, use_tqdm=False)

    return Case(generate)


def cpu_seconds() -> float:
    process = psutil.Process()
    times = [part.cpu_times() for part in (process, *process.children(recursive=True))]
    return sum(t.user + t.system for t in times)


CASES: dict[str, Callable[[Path], Case]] = {
    MERGED: lambda folder: vllm_engine(folder, "merged"),
    NATIVE: lambda folder: vllm_engine(folder, "native"),
    BASELINES[0]: lambda folder: bare_vllm(folder, processes="1"),
    BASELINES[1]: lambda folder: bare_vllm(folder, processes="0"),
    "torch engine": torch_engine,
}


def serve(name: str, folder: Path, pipe: Connection) -> None:
    """Run in a case's own process: a batch or a publication whenever a task comes, answered with CPU and wall seconds.

    A task is a number of rows, 0 for a publication, and a seed.
    """
    torch.set_num_threads(1)
    case = CASES[name](folder)
    pipe.send(case.load is not None)
    while (task := pipe.recv()) is not None:
        rows, seed = task
        request, update = request_of(max(rows, 1), 1, seed=seed), random_update(seed)
        cpu, wall = cpu_seconds(), time.perf_counter()
        if rows:
            case.sample(request)
        elif case.load is not None:
            case.load(update)
        pipe.send((cpu_seconds() - cpu, time.perf_counter() - wall))
    os._exit(0)  # vLLM's finalisers take seconds and say nothing of use


Taken = dict[str, list[tuple[float, float]]]
"""CPU and wall seconds of every round, by case."""


def measure(folder: Path, cases: Sequence[str], rows: int, rounds: int) -> tuple[Taken, Taken]:
    """Time batches and loadings; the first two rounds warm up and are left out."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    taken: Taken = {}
    loaded: Taken = {}
    for name in cases:
        pipes[name], theirs = context.Pipe()
        context.Process(target=serve, args=(name, folder, theirs)).start()
        taken[name] = []
        if pipes[name].recv():
            loaded[name] = []
    for turn in range(rounds + 2):
        for num_rows, times in ((rows, taken), (0, loaded)):
            for name in times:
                pipes[name].send((num_rows, turn))
                times[name].append(pipes[name].recv())
    for pipe in pipes.values():
        pipe.send(None)
    return {name: times[2:] for name, times in taken.items()}, {name: times[2:] for name, times in loaded.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "policy"
        new_policy(MODEL, INSTRUCTIONS, 0).save(folder)
        start_load = os.getloadavg()[0]
        taken, loaded = measure(folder, args.cases, args.rows, args.rounds)
    figures: dict[str, object] = {"rows": args.rows, "rounds": args.rounds, "load_1min": round(start_load, 2)}
    for name, rounds in taken.items():
        cpu, wall = (1e3 * statistics.median(values) / args.rows for values in zip(*rounds, strict=True))
        figures[name] = {"cpu_ms_per_decision": round(cpu, 3), "wall_ms_per_decision": round(wall, 3)}
        if name in loaded:
            cpu, wall = (1e3 * statistics.median(values) for values in zip(*loaded[name], strict=True))
            figures[name] |= {"cpu_ms_of_loading": round(cpu, 1), "wall_ms_of_loading": round(wall, 1)}
    for other, base in ((MERGED, BASELINES[0]), (MERGED, BASELINES[1]), (NATIVE, MERGED)):
        if {other, base} <= taken.keys():
            figures[f"cpu of {other} / {base}"] = round(cpu_ratio(taken, other, base), 3)
    if {NATIVE, MERGED} <= loaded.keys():
        figures[f"cpu of loading, {NATIVE} / {MERGED}"] = round(cpu_ratio(loaded, NATIVE, MERGED), 3)
    for name, figure in figures.items():
        print(f"{name:44} {figure}")
    if not args.no_save:
        print(write_result("vllm_speed", figures))


def cpu_ratio(taken: Taken, other: str, base: str) -> float:
    return sum(cpu for cpu, _ in taken[other]) / sum(cpu for cpu, _ in taken[base])


if __name__ == "__main__":
    main()
