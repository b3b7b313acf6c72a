"""Runs learners for tests: in this process, or as R processes that meet over gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tests.e2e.toy_run import toy_config
from tests.tiny_model import algorithm_config, as_groups, learner_config, make_trajectories, small_openvla, tiny_model
from vlarl_ray.algorithms.ppo import PPO
from vlarl_ray.learner.build import build_learner
from vlarl_ray.learner.learner import Learner
from vlarl_ray.types import ActRequest, Scores, TrainBatch

LENGTHS = (3, 7, 1, 5, 4)  # 20 decisions: 2 minibatches of 10, uneven over 3 ranks


def fixed_batch(algorithm: PPO, *, version: int, model=None) -> TrainBatch:
    """Recorded rows: the same for every learner, whatever its weights."""
    trajectories = make_trajectories(LENGTHS, seed=version, model=model)
    rng = np.random.default_rng(version)
    scores = [Scores(rng.standard_normal(t.num_decisions + 1).astype(np.float32), None) for t in trajectories]
    return algorithm.make_batch(as_groups(trajectories), scores, version=version)


def build(*, learner=None, algorithm=None, openvla=None, **ranks) -> Learner:
    cfg, ppo = learner_config(**learner or {}), PPO(algorithm_config(**algorithm or {}))
    return Learner(cfg, ppo, _model(cfg, openvla), seed=3, **ranks)


def _model(cfg, openvla):
    return tiny_model(cfg) if openvla is None else small_openvla(cfg, **openvla)


def three_updates(
    *, learner=None, algorithm=None, openvla=None, num_updates=3, resume=None, first_version=0, **ranks
) -> dict:
    """Score, update thrice and collect everything a learner gives out."""
    model = _model(learner_config(**learner or {}), openvla)
    learner = build(learner=learner, algorithm=algorithm, openvla=openvla, **ranks)
    if resume is not None:
        learner.load_state_dict(*resume)
    ppo = PPO(algorithm_config(**algorithm or {}))
    scores = learner.score(make_trajectories(LENGTHS, model=model))
    metrics = [learner.update(fixed_batch(ppo, version=first_version + v, model=model)) for v in range(num_updates)]
    result = {
        "metrics": metrics,
        "update": learner.weight_update(num_updates),
        "state": learner.state_dict(),
        "scores": scores,
        "memory": learner.measured_memory(),
    }
    learner.shutdown()
    return result


def poisoned_update(**ranks) -> str:
    """An update whose loss overflows: the message of its error, and nothing may have moved."""
    learner = build(**ranks)
    before = learner.state_dict()[0].get("parameters", {})
    batch = fixed_batch(PPO(algorithm_config()), version=0)
    batch = replace(batch, returns=np.full_like(batch.returns, 3e38))
    message = ""
    try:
        learner.update(batch)
    except RuntimeError as error:
        message = str(error)
    after = learner.state_dict()[0].get("parameters", {})
    learner.shutdown()
    unchanged = all(np.array_equal(before[name], after[name]) for name in before)
    return message if unchanged else f"weights changed: {message}"


def load_folder(*, folder: str, train: str, **ranks) -> dict:
    """Build a rank from a policy folder, as a run does; what it holds, and what it says of a fixed observation."""
    cfg = toy_config(Path(folder))
    cfg = replace(cfg, learner=replace(cfg.learner, train=train, fsdp_min_params=0))
    learner = build_learner(cfg, folder, **ranks)
    arrays, _ = learner.state_dict()
    request = ActRequest(
        images=np.full((2, 1, 32, 32, 3), [[[[[10]]]], [[[[200]]]]], np.uint8),
        proprio=np.zeros((2, 2), np.float32),
        instructions=("reach the cross",) * 2,
        noise_keys=np.zeros((2, 2), np.uint64),
        temperature=1.0,
        policy_version=0,
    )
    model = learner.model
    num_tokens, ids = model.sample_space(model.model_config)
    samples = np.full((2, num_tokens), np.float32(0.3) if ids is None else ids[7])
    frozen = [(n, p) for n, p in model.named_parameters() if n.startswith(model.frozen_modules)]
    result = {
        "parameters": arrays.get("parameters", {}),
        "whole": {name: tensor.numpy(force=True) for name, tensor in [*frozen, *model.named_buffers()]},
        "logprobs": learner.logprobs(request, samples),
    }
    learner.shutdown()
    return result


def update_folder(*, folder: str, train: str, batch: TrainBatch, trajectories=(), **ranks) -> dict:
    """Build a rank from a policy folder, score, and learn from a batch whose ratios are of tokens; what it then is."""
    cfg = toy_config(Path(folder))
    algorithm = replace(cfg.algorithm, ratio_level="token", critic_warmup_updates=0)
    cfg = replace(cfg, learner=replace(cfg.learner, train=train, fsdp_min_params=0), algorithm=algorithm)
    learner = build_learner(cfg, folder, **ranks)
    scores = learner.score(list(trajectories)) if trajectories else []
    metrics = learner.update(batch)
    arrays, _ = learner.state_dict()
    learner.shutdown()
    return {
        "scores": scores,
        "parameters": arrays.get("parameters", {}),
        "moments": arrays.get("optimizer", {}),
        "metrics": metrics,
    }


SCENARIOS = {
    "three_updates": three_updates,
    "poisoned_update": poisoned_update,
    "load_folder": load_folder,
    "update_folder": update_folder,
}


def run_ranks(world_size: int, jobs: list[tuple[str, dict]]) -> list[list]:
    """Run jobs one after the other on R processes; returns one list of results per rank.

    A result counts even if its process dies at exit: gloo sometimes aborts there.
    """
    context = multiprocessing.get_context("spawn")
    addresses = [("127.0.0.1", _free_port()) for _ in jobs]
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run_rank, args=(sender, rank, world_size, addresses, jobs), daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        results = []
        for pipe in pipes:
            assert pipe.poll(120), "a rank hangs"
            results.append(pipe.recv())
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    for result in results:
        assert not isinstance(result, str), result
    return results


def _run_rank(sender, rank, world_size, addresses, jobs):
    torch.set_num_threads(1)
    try:
        results = [
            SCENARIOS[name](rank=rank, world_size=world_size, store_address=address, **options)
            for address, (name, options) in zip(addresses, jobs, strict=True)
        ]
        sender.send(results)
    except Exception:  # noqa: BLE001 - the parent re-raises it
        sender.send(traceback.format_exc())
    sender.close()
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
