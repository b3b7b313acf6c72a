"""What the learner costs over a bare PyTorch loop that does the same forwards, backwards and optimiser steps.

Run: `python -m benchmarks.learner [--rounds N]`. One process, one thread; the contenders take turns within every round,
and the medians over rounds of CPU time and wall time are compared. Held to: <= 1.10 x the bare loop.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from benchmarks._recorded import laptop_model, recorded_batch
from benchmarks._results import write_result
from vlarl_ray.algorithms.ppo import PPO
from vlarl_ray.config import AlgorithmConfig, LearnerConfig
from vlarl_ray.learner.batch import BatchReader, MicroBatch, PromptCache, deal_rows, epoch_minibatches
from vlarl_ray.learner.learner import Learner
from vlarl_ray.models.base import VLAModel
from vlarl_ray.types import TrainBatch

NUM_ROWS, NUM_MINIBATCHES = 256, 2
LEARNER = LearnerConfig(device="cpu", micro_batch_size=64)
ALGORITHM = AlgorithmConfig(num_epochs=1, num_minibatches=NUM_MINIBATCHES)


class BareLoop:
    """PPO written straight down: tensors ready in memory, no sharding, no checks, no metrics."""

    def __init__(self, model: VLAModel, batch: TrainBatch) -> None:
        self._model = model
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=1e-4, fused=True)
        reader = BatchReader(batch, np.arange(len(batch)), list, PromptCache(model), torch.device("cpu"))
        dealing = {"rank": 0, "world_size": 1, "micro_batch_size": LEARNER.micro_batch_size}
        self._minibatches: list[list[MicroBatch]] = [
            [reader.read(dealt) for dealt in deal_rows(rows, **dealing)]
            for rows in epoch_minibatches(len(batch), NUM_MINIBATCHES, seed=0, version=0, epoch=0)
        ]

    def __call__(self) -> None:
        """Do one update."""
        for passes in self._minibatches:
            num_rows = sum(len(rows.advantages) for rows in passes)
            for rows in passes:
                output = self._model(rows.inputs, rows.tokens)
                logprobs = torch.log_softmax(output.actions.logits, -1)
                columns = rows.tokens - self._model.first_action_token
                log_ratio = (logprobs.gather(-1, columns[..., None]).squeeze(-1) - rows.old_logprobs) * rows.token_mask
                ratio = log_ratio.unflatten(1, (self._model.chunk_length, -1)).sum(-1).exp()
                advantages = rows.advantages[:, None]
                surrogate = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages).mean(1).sum()
                value = functional.mse_loss(output.values, rows.returns, reduction="sum")
                ((surrogate + 0.25 * value) / num_rows).backward()
            torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)


def build_learner(*, sharded: bool) -> Learner:
    """Build the learner's only rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = probe.getsockname()
    return Learner(LEARNER, PPO(ALGORITHM), laptop_model(LEARNER), store_address=address if sharded else None)


def measure(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Median CPU and wall seconds of each contender over alternating rounds, after one unmeasured round."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for index in range(rounds + 1):
        for name, run in contenders.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            spent = (time.process_time() - cpu, time.perf_counter() - wall)
            if index:
                seconds[name].append(spent)
    return {
        name: {"cpu_s": statistics.median(c for c, _ in spent), "wall_s": statistics.median(w for _, w in spent)}
        for name, spent in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    model = laptop_model(LEARNER)
    batch = recorded_batch(model, num_rows=NUM_ROWS, version=0, algorithm=ALGORITHM)
    plain, sharded = build_learner(sharded=False), build_learner(sharded=True)
    figures: dict = measure(
        {
            "bare_loop": BareLoop(model, batch),
            "learner": lambda: plain.update(batch),
            "learner_sharded_1_rank": lambda: sharded.update(batch),
        },
        rounds,
    )
    sharded.shutdown()
    for name in ("learner", "learner_sharded_1_rank"):
        for clock in ("cpu_s", "wall_s"):
            figures[name][f"{clock[:-2]}_over_bare"] = figures[name][clock] / figures["bare_loop"][clock]
    figures["setting"] = {
        "rows": NUM_ROWS,
        "minibatches": NUM_MINIBATCHES,
        "micro_batch_size": LEARNER.micro_batch_size,
        "rounds": rounds,
    }
    for name, values in figures.items():
        print(name, {key: round(value, 4) for key, value in values.items()})
    print("wrote", write_result("learner", figures))


if __name__ == "__main__":
    main()
