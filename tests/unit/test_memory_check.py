"""What an update takes is measured, sharded or not, and held against the plan once."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.learner_runs import build, fixed_batch
from tests.tiny_model import algorithm_config, learner_config, small_openvla
from vlarl_ray.algorithms.ppo import PPO
from vlarl_ray.config_loader import load_config
from vlarl_ray.learner.fsdp import Ranks, shard
from vlarl_ray.learner.group import LearnerGroup
from vlarl_ray.learner.memory import MeasuredMemory, PassMeter, shards
from vlarl_ray.live_bytes import LiveBytes
from vlarl_ray.memory_check import MemoryCheck, report
from vlarl_ray.memory_plan import plan_learner
from vlarl_ray.transport import LocalTransport

CPU = torch.device("cpu")


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_storage_that_is_emptied_and_filled_counts_with_what_it_holds():
    gathered = torch.zeros(256)
    gathered.untyped_storage().resize_(0)
    with LiveBytes(resized=[gathered]) as live:
        kept = torch.zeros(64)
        assert live.peak == 256
        gathered.untyped_storage().resize_(1024)
        kept = kept + gathered[:64]
        gathered.untyped_storage().resize_(0)
        kept = kept + 1
    assert live.peak == 1024 + 2 * 256


def test_the_first_update_that_trains_everything_is_measured():
    options = {"learner": {"micro_batch_size": 7}, "algorithm": {"critic_warmup_updates": 1}, "openvla": {}}
    learner, seen = build(**options), []
    for version in range(3):
        batch = fixed_batch(PPO(algorithm_config(critic_warmup_updates=1)), version=version, model=learner.model)
        learner.update(batch)
        seen.append(learner.measured_memory())
    assert seen[0] is None
    assert seen[1] is seen[2]
    measured = seen[1]
    trained = sum(p.nbytes for p in learner.model.parameters() if p.requires_grad)
    assert measured.weights == sum(shard.nbytes for shard in shards(learner.model))
    assert measured.optimizer == 2 * trained
    assert measured.pass_rows == 5  # a minibatch of 10 rows in two passes
    assert measured.passes > trained  # gradients and more


def test_what_fsdp_gathers_counts_while_it_is_there(process_group):
    """Every time alike: its tensors are made in the first pass, and filled and emptied later."""

    def peaks(model):
        ids, lengths = model.encode_prompts(["reach", "push it"])
        inputs = model_inputs(model, ids, lengths)
        found = []
        for _ in range(2):
            with PassMeter(model, CPU) as meter:
                output = model(inputs)
                (output.actions.logits.square().sum() + output.values.sum()).backward()
            found.append(meter.peak)
            model.zero_grad()
        return found

    plain, sharded = (small_openvla(learner_config(), num_layers=6) for _ in range(2))
    weights = sum(parameter.nbytes for parameter in plain.parameters())
    units = [sum(parameter.nbytes for parameter in unit.parameters()) for unit in plain.fsdp_units()]
    in_no_unit = weights - sum(units)
    shard(sharded, Ranks(0, 1, has_process_group=True), device=CPU, compute_dtype=None, min_params=0)
    alone, gathering = peaks(plain), peaks(sharded)
    assert alone[0] == alone[1]
    assert gathering[0] == gathering[1]
    more = gathering[0] - alone[0]
    # What is in no unit is gathered throughout, and of units one or two, not all; a buffer of one more is on its way.
    assert in_no_unit < more < in_no_unit + 4 * max(units) < weights


def model_inputs(model, ids, lengths):
    from vlarl_ray.models.base import PolicyInputs

    return PolicyInputs(torch.zeros(2, 1, 16, 16, 3, dtype=torch.uint8), ids, lengths, torch.zeros(2, 0))


@pytest.fixture(scope="module")
def job():
    return load_config("jobs/toy.yaml", ["--learner.micro_batch_size", "512"])


@pytest.fixture(scope="module")
def plan(job):
    return plan_learner(job, proprio_dim=2)


def planned(plan, **changes):
    """A measurement that is what was planned."""
    parts = {part.name: part.num_bytes for part in plan.parts}
    passes = parts["gradients"] + parts["gathered"] + parts["activations"]
    weights = parts["frozen weights"] + parts["trained weights"]
    return replace(MeasuredMemory(weights, parts["optimizer"], passes, pass_rows=512), **changes)


@pytest.mark.parametrize(("share", "warns"), [(1.0, False), (1.1, False), (0.5, True), (2.0, True)])
def test_a_phase_that_is_further_off_than_15_percent_is_named(plan, caplog, share, warns):
    passes = int(share * planned(plan).passes)
    with caplog.at_level(logging.INFO):
        report(plan, planned(plan, passes=passes))
    assert "planned / measured with 512 rows a pass" in caplog.messages[0]
    assert f"passes {planned(plan).passes / 2**20:.1f} MiB / {passes / 2**20:.1f} MiB" in caplog.messages[0]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == warns
    assert all(text.startswith("memory: passes of a learner rank were planned to take") for text in warnings)


def test_what_is_off_by_less_than_a_mebibyte_is_not_worth_a_warning(plan, caplog):
    report(plan, planned(plan, optimizer=0))
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def check(job, measurements):
    """A check of a learner of two ranks, which give these measurements one after the other."""
    ranks = [SimpleNamespace(measured_memory=iter(m).__next__) for m in measurements]
    return MemoryCheck(job, LearnerGroup(ranks, LocalTransport(), deadline_s=1.0), num_ranks=2, proprio_dim=2)


def test_the_rank_with_the_most_is_compared_once_with_a_plan_for_the_rows_it_had(job, plan):
    less, most = planned(plan, pass_rows=8), planned(plan, pass_rows=8, passes=10**9)
    compare = check(job, [[None, less], [None, most]])
    assert compare() == {}
    metrics = compare()
    assert metrics["memory/measured_bytes"] == most.total
    on_two = replace(job, learner=replace(job.learner, num_ranks=2, micro_batch_size=8))
    assert metrics["memory/planned_bytes"] == plan_learner(on_two, proprio_dim=2).total("learner rank")
    assert metrics["memory/planned_bytes"] < plan.total("learner rank")
    assert compare() == {}


def test_an_architecture_of_one_s_own_has_no_plan(job):
    own = replace(job, model=replace(job.model, architecture="tests.flow_policy:FlowPolicy"))
    assert check(own, [[], []])() == {}
