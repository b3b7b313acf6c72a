"""The vLLM engine against the learner and the PyTorch engine: agreement, publications, requests in flight.

One policy of the laptop's size with autoregressive decoding, fp32, one thread. The learner's numbers are the reference
of every probability. `delta kept` is the share of an update's change that survives bf16: ours, and rounding to nearest
beside it. CPU time is in `benchmarks.vllm_speed`.

Usage: python -m benchmarks.vllm_engine [--publications 20] [--in_flight 200] [--tokens 5000] [--no-save]
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks._official_folder import OPENVLA_7B
from benchmarks._results import write_result
from vlarl_ray.config import (
    AlgorithmConfig,
    ExperimentConfig,
    InferenceConfig,
    LearnerConfig,
    LoraConfig,
    ModelConfig,
)
from vlarl_ray.inference.torch_server import TorchEngine
from vlarl_ray.learner.build import build_learner
from vlarl_ray.learner.group import LearnerGroup
from vlarl_ray.models import new_policy
from vlarl_ray.models.heads import HEADS
from vlarl_ray.models.lora import adapter_tensors, attach_lora, load_adapter_tensors
from vlarl_ray.models.openvla import OpenVLA
from vlarl_ray.models.policy import policy_weights
from vlarl_ray.transport import LocalTransport
from vlarl_ray.types import ActRequest
from vlarl_ray.weights.canary import make_probe
from vlarl_ray.weights.merge import DeltaMeter, merge
from vlarl_ray.weights.publisher import WeightPublisher
from vlarl_ray.weights.update import WeightUpdate

INSTRUCTIONS = ("close the drawer", "open the window", "press the button from above")
MODEL = ModelConfig(decoding="autoregressive")
LORA = LoraConfig(rank=32, alpha=32.0)
DEADLINE_S = 120.0


def request_of(rows, version, *, temperature=1.0, seed=0):
    rng, side = np.random.default_rng(seed), MODEL.image_size
    return ActRequest(
        images=rng.integers(0, 256, (rows, 1, side, side, 3), dtype=np.uint8),
        proprio=np.zeros((rows, 4), np.float32),
        instructions=tuple(INSTRUCTIONS[i % 3] for i in range(rows)),
        noise_keys=np.stack([np.full(rows, seed), np.arange(rows)], axis=1).astype(np.uint64),
        temperature=temperature,
        policy_version=version,
    )


def train(learner, seed):
    """Give the learner random adapters, heads left alone."""
    generator = torch.Generator().manual_seed(seed)
    pairs = adapter_tensors(learner.model).items()
    load_adapter_tensors(
        learner.model,
        {
            name: tuple(torch.randn(t.shape, generator=generator) * s for t, s in ((a, 0.1), (b, 0.02)))
            for name, (a, b) in pairs
        },
    )


def gap(learner, request, reply):
    return float(np.abs(learner.logprobs(request, reply.tokens) - reply.logprobs).max())


def agreement(engine, learner, publisher, folder, num_tokens):
    train(learner, 1)
    publisher.publish(1)
    figures = {}
    for temperature in (1.0, 1.6):
        request = request_of(64, 1, temperature=temperature)
        figures[f"max |log-probability - learner's|, T={temperature}"] = gap(learner, request, engine.sample(request))
    beside = TorchEngine(folder, InferenceConfig(batch_size=12), deterministic=False)
    beside.load(learner.weight_update(1))
    rows = -(-num_tokens // learner.model.num_action_tokens)
    request = request_of(rows, 1, temperature=0.0)
    same = engine.sample(request).tokens == beside.sample(request).tokens
    return figures | {"greedy tokens": same.size, "greedy tokens equal to the PyTorch engine's": float(same.mean())}


def publications(engine, learner, publisher, folder, count):
    first, gaps, seconds = 100, [], []
    for version in range(first, first + count):
        train(learner, version if version < first + count - 1 else first)  # the last is the first once more
        start = time.perf_counter()
        metrics = publisher.publish(version)  # compares digests, checksums and probe
        seconds.append(time.perf_counter() - start)
        request = request_of(12, version)
        gaps.append(max(gap(learner, request, engine.sample(request)), metrics["canary/max_abs_logprob_diff"]))
        if version == first:
            after_first = engine.load(learner.weight_update(version)).checksums
    after_last = engine.load(learner.weight_update(first + count - 1)).checksums
    return {
        "publications": count,
        "max |log-probability - learner's| after any": max(gaps),
        "tensors whose checksum at the loader equals the learner's merge, after each": len(after_last),
        "tensors that differ from one merge of the last": sum(
            after_last[n] != known for n, known in after_first.items()
        ),
        "seconds of a publication with its probe (median)": statistics.median(seconds),
        "seconds of loading (median)": statistics.median(
            engine.load(learner.weight_update(version)).seconds for version in range(10)
        ),
        "bytes sent": learner.weight_update(0).num_bytes,
        "bytes of the model": policy_weights(folder).num_bytes,
    }


def in_flight(engine, learner, publisher, count):
    first, replies, failures, stop = 1000, [], [], threading.Event()
    train(learner, first)
    publisher.publish(first)

    def ask(number):
        asked = 0
        while not stop.is_set():
            request = replace(request_of(4, first, seed=number * 100_000 + asked), max_policy_lag=count)
            try:
                replies.append((request, engine.sample(request)))
            except Exception as error:  # noqa: BLE001 - counted
                failures.append(repr(error))
            asked += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    waiting, answers = [], {first: first}
    for version in range(first + 1, first + 1 + count):
        train(learner, version % 7)
        answers[version] = version % 7
        waiting.append(engine.load(learner.weight_update(version)).seconds)
    stop.set()
    for thread in threads:
        thread.join(DEADLINE_S)
    wrong = 0
    for version in sorted({reply.policy_version for _, reply in replies}):
        train(learner, answers[version])
        pairs = [pair for pair in replies if pair[1].policy_version == version]
        wrong += sum(gap(learner, request, reply) > 1e-4 for request, reply in pairs)
    return {
        "publications": count,
        "requests answered": len(replies),
        "requests lost": len(failures) + sum(thread.is_alive() for thread in threads),
        "answered with other or mixed weights": wrong,
        "versions that answered": len({reply.policy_version for _, reply in replies}),
        "seconds of loading, requests drained (median)": statistics.median(waiting),
    }


def delta_kept():
    """Of one 1024 x 1024 matrix whose adapter moved as Adam moves it at a learning rate of 2e-5."""
    rng, figures = np.random.default_rng(0), {}
    base = torch.from_numpy(rng.standard_normal((1024, 1024)).astype(np.float32) * 0.02).bfloat16()
    a = (rng.uniform(-1, 1, (32, 1024)) / 32).astype(np.float32)
    for updates in (1, 10, 50):
        b = (2e-5 * updates * rng.choice([-1.0, 1.0], (1024, 32))).astype(np.float32)
        meter = DeltaMeter()
        merge("w", base, WeightUpdate(1, 1.0, {"w": (a, b)}, {}), dtype=torch.bfloat16, meter=meter)
        asked = torch.from_numpy(b) @ torch.from_numpy(a)
        nearest = (base.float() + asked).bfloat16().float() - base.float()
        plain = float((nearest * asked).sum() / (asked * asked).sum())
        figures[f"update {updates}"] = {"ours": round(meter.share, 3), "rounded to nearest": round(plain, 3)}
    return figures


def on_paper():
    """What a publication of OpenVLA-7B sends and does, adapters of rank 32 on all linear layers; nothing is timed."""
    with torch.device("meta"):
        model = OpenVLA(OPENVLA_7B)
    served = 2 * sum(p.numel() for name, p in model.named_parameters() if not name.startswith(HEADS))
    attach_lora(model, LORA, seed=0)
    pairs = adapter_tensors(model).values()
    return {
        "adapter bytes sent (fp32)": sum(4 * (a.numel() + b.numel()) for a, b in pairs),
        "bytes of the model (bf16)": served,
        "bytes merged and loaded (bf16)": sum(2 * a.shape[1] * b.shape[0] for a, b in pairs),
        "TFLOP of the merges": round(sum(2 * a.numel() * b.shape[0] for a, b in pairs) / 1e12, 3),
        "probe: prompts scored": 8 * OPENVLA_7B.action_dim * OPENVLA_7B.chunk_length,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--publications", type=int, default=20)
    parser.add_argument("--in_flight", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=5000)
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    from vlarl_ray.inference.vllm_engine import VllmEngine

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = new_policy(MODEL, INSTRUCTIONS, 0)
        with torch.no_grad():
            model.language_model.lm_head.weight.mul_(20)  # far from uniform actions
        model.save(folder)
        learner_config = LearnerConfig(num_ranks=1, lora=LORA, micro_batch_size=64)
        cfg = ExperimentConfig(algorithm=AlgorithmConfig(critic_warmup_updates=0), learner=learner_config)
        learner = build_learner(cfg, folder, rank=0, world_size=1, store_address=None)
        start = time.perf_counter()
        engine = VllmEngine(folder, InferenceConfig(engine="vllm"), deterministic=False)
        figures = {"start_s": round(time.perf_counter() - start, 1), "load_1min": round(os.getloadavg()[0], 2)}
        num_tokens, token_ids = type(model).sample_space(MODEL)
        shape = (1, MODEL.image_size, MODEL.image_size, 3)
        probe = make_probe(
            INSTRUCTIONS, image_shape=shape, proprio_dim=4, token_ids=token_ids, num_tokens=num_tokens, seed=0
        )
        group, transport = LearnerGroup([learner], LocalTransport(), deadline_s=DEADLINE_S), LocalTransport()
        publisher = WeightPublisher(group, [engine], transport, probe=probe, tolerance=1e-4, deadline_s=DEADLINE_S)
        try:
            figures["OpenVLA-7B, on paper"] = on_paper()
            figures["delta kept in bf16"] = delta_kept()
            figures["agreement"] = agreement(engine, learner, publisher, folder, args.tokens)
            figures["publications"] = publications(engine, learner, publisher, folder, args.publications)
            figures["in flight"] = in_flight(engine, learner, publisher, args.in_flight)
        finally:
            engine.close()
    for name, figure in figures.items():
        print(f"{name:24} {figure}")
    if not args.no_save:
        print(write_result("vllm_engine", figures))


if __name__ == "__main__":
    main()
