"""OpenVLA and OpenVLA-OFT learn on two ranks what they learn in one process (QueST's test is in test_quest_learner)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.learner_runs import run_ranks, update_folder
from tests.small_openvla import INSTRUCTIONS, observations, tiny, tiny_oft
from vlarl_ray.models import load_model
from vlarl_ray.types import TrainBatch

NUM_ROWS = 13  # minibatches of 7 and 6: uneven over two ranks
LIMIT = 1e-5
MODELS = {
    "openvla": (tiny, {}),
    "openvla autoregressive": (tiny, {"decoding": "autoregressive", "official_unused": True}),
    "openvla_oft laplace": (tiny_oft, {"passes": "two"}),
    "openvla_oft gaussian": (tiny_oft, {"action_head": "gaussian", "official_unused": True}),
}
CASES = [(model, train) for model in MODELS for train in ("lora", "full")]


def recorded(model):
    """Rows that the model sampled, with ratios, advantages and values that are not what it would say itself."""
    rng = np.random.default_rng(0)
    inputs = observations(model, NUM_ROWS)
    noise = model.draw_noise(np.array([[7, row] for row in range(NUM_ROWS)], dtype=np.uint64))
    samples, logprobs = model.sample(inputs, temperature=1.0, noise=noise)

    def numbers(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return TrainBatch(
        frames=tuple(image[None].repeat(2, 0) for image in inputs.images.numpy()),
        instructions=tuple(INSTRUCTIONS[row % 3] for row in range(NUM_ROWS)),
        trajectory_index=np.arange(NUM_ROWS, dtype=np.int32),
        decision_index=np.zeros(NUM_ROWS, np.int32),
        proprio=inputs.proprio.numpy(),
        action_tokens=samples.numpy() if samples.is_floating_point() else samples.numpy().astype(np.int32),
        token_mask=rng.random(samples.shape) < 0.8,
        old_logprobs=logprobs.numpy() + 0.1 * numbers(*logprobs.shape),
        advantages=numbers(NUM_ROWS),
        returns=numbers(NUM_ROWS),
        old_values=numbers(NUM_ROWS),
        weights=rng.uniform(0.5, 1.5, NUM_ROWS).astype(np.float32),
        num_actions_per_decision=model.chunk_length,
        temperature=1.0,
        policy_version=0,
    )


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    made = {}
    for name, (make, changes) in MODELS.items():
        model, folder = make(**changes), tmp_path_factory.mktemp("policy")
        model.save(folder)
        with torch.no_grad():
            batch = recorded(model)
        for train in ("lora", "full"):
            made[name, train] = {"folder": str(folder), "train": train, "batch": batch}
    return made


@pytest.fixture(scope="module")
def two_ranks(jobs):
    ranks = run_ranks(2, [("update_folder", jobs[case]) for case in CASES])
    return [dict(zip(CASES, rank, strict=True)) for rank in ranks]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_f59_two_ranks_learn_what_one_process_does(case, jobs, two_ranks):
    alone = update_folder(**jobs[case], rank=0, world_size=1, store_address=None)
    two, other = (rank[case] for rank in two_ranks)
    assert two["metrics"] == other["metrics"]
    for loss in ("policy_loss", "value_loss"):
        assert two["metrics"][f"learn/{loss}"] == pytest.approx(alone["metrics"][f"learn/{loss}"], abs=LIMIT)
    assert two["metrics"] == pytest.approx(alone["metrics"], rel=1e-4, abs=LIMIT)  # the largest ratio rounds more
    assert two["metrics"]["learn/num_optimizer_steps"] == 2
    for part in ("parameters", "moments"):  # what Adam keeps of the gradients
        assert alone[part].keys() == two[part].keys()
        for name, value in alone[part].items():
            np.testing.assert_allclose(two[part][name], value, rtol=0, atol=LIMIT, err_msg=name)


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_all_that_is_trained_moves_by_more_than_the_limit(case, jobs, two_ranks):
    model = load_model(jobs[case]["folder"])
    start = {name: parameter.numpy(force=True) for name, parameter in model.named_parameters()}
    learnt = two_ranks[0][case]["parameters"]
    expected = {n for n in start if not n.startswith((*model.unused_modules, *model.frozen_modules))}
    if case[1] == "lora":
        assert {n for n in learnt if ".lora_B." in n and not learnt[n].any()} == set()
        expected = {name for name in expected if name in learnt}
    still = {name for name in expected if np.abs(learnt[name] - start[name]).max() < 10 * LIMIT}
    assert still == set()
