"""1 rank against R ranks on the same recorded batches with uneven rows: largest difference of trained parameters.

Run: `python -m benchmarks.ranks [--ranks R]`. Held to after 3 AdamW updates: 1e-6 for LoRA, 1e-5 for full training.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import sys
import time
from multiprocessing.connection import Connection

import numpy as np
import torch

from benchmarks._recorded import laptop_model, recorded_batch
from benchmarks._results import write_result
from vlarl_ray.algorithms.ppo import PPO
from vlarl_ray.config import AlgorithmConfig, LearnerConfig
from vlarl_ray.learner.learner import Learner

NUM_ROWS, NUM_UPDATES = 61, 3
ALGORITHM = AlgorithmConfig(num_epochs=1, num_minibatches=2)
LIMITS = {"lora": 1e-6, "full": 1e-5}


def train(mode: str, **ranks: object) -> tuple[dict[str, np.ndarray], float]:
    """Run the updates; returns the trained parameters (empty except on rank 0) and seconds."""
    cfg = LearnerConfig(device="cpu", micro_batch_size=16, train=mode)
    model = laptop_model(cfg)
    batches = [recorded_batch(model, num_rows=NUM_ROWS, version=v, algorithm=ALGORITHM) for v in range(NUM_UPDATES)]
    learner = Learner(cfg, PPO(ALGORITHM), model, **ranks)
    start = time.perf_counter()
    for batch in batches:
        learner.update(batch)
    seconds = time.perf_counter() - start
    arrays, _ = learner.state_dict()
    learner.shutdown()
    return arrays.get("parameters", {}), seconds


def run_rank(sender: Connection, mode: str, rank: int, world_size: int, address: tuple[str, int]) -> None:
    """Body of one process."""
    result = train(mode, rank=rank, world_size=world_size, store_address=address)
    if rank == 0:
        sender.send(result)
    sender.close()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort an orderly exit


def train_on_ranks(mode: str, world_size: int) -> tuple[dict[str, np.ndarray], float]:
    """Run the updates on R processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = probe.getsockname()
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    processes = [
        context.Process(target=run_rank, args=(sender, mode, r, world_size, address)) for r in range(world_size)
    ]
    for process in processes:
        process.start()
    sender.close()  # else a dead rank 0 would leave recv waiting
    try:
        return receiver.recv()
    finally:
        for process in processes:
            process.join(30)
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    world_size = parser.parse_args().ranks
    torch.set_num_threads(1)
    figures: dict = {"ranks": world_size, "rows": NUM_ROWS, "updates": NUM_UPDATES}
    for mode, limit in LIMITS.items():
        one, one_s = train(mode)
        many, many_s = train_on_ranks(mode, world_size)
        difference = max(float(np.abs(one[name] - many[name]).max()) for name in one)
        figures[mode] = {"max_abs_diff": difference, "limit": limit, "one_rank_s": one_s, "ranks_s": many_s}
        print(
            f"{mode}: {world_size} ranks differ from 1 by {difference:.3g} (limit {limit:.0e}); "
            f"{one_s:.2f} s / {many_s:.2f} s"
        )
        if difference > limit:
            raise SystemExit(f"{mode}: {difference:.3g} exceeds the limit of {limit:.0e}.")
    print("wrote", write_result("ranks", figures))


if __name__ == "__main__":
    main()
