"""OpenVLA and OpenVLA-OFT under FSDP2, one rank: hooks must see every use of every parameter."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from tests.small_openvla import observations, tiny, tiny_oft
from vlarl_ray.config import LoraConfig
from vlarl_ray.learner.fsdp import Ranks
from vlarl_ray.learner.fsdp import shard as shard_for_learning
from vlarl_ray.models import action_logprobs
from vlarl_ray.models.lora import attach_lora

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model, policy=None):
    mesh = init_device_mesh("cpu", (1,))
    for unit in model.fsdp_units():
        fully_shard(
            unit, mesh=mesh, mp_policy=MixedPrecisionPolicy() if unit is model.value_head or policy is None else policy
        )
    return fully_shard(model, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())


def gradients(model, inputs, tokens):
    output = model(inputs, tokens)
    logprobs = action_logprobs(output.actions.logits, tokens - model.first_action_token, temperature=1.0)
    (logprobs.mean() + output.values.square().mean()).backward()
    full = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in full.items()}, output


@pytest.mark.parametrize("decoding", ["parallel", "autoregressive"])
@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("rank", [2, 32])
def test_sharded_gradients_are_the_plain_ones(decoding, critic, rank):
    results = []
    for sharded in (False, True):
        model = tiny(decoding=decoding)
        attach_lora(model, LoraConfig(rank=rank), seed=0, critic=critic)
        inputs = observations(model)
        tokens = torch.randint(511, 767, (3, 6), generator=torch.Generator().manual_seed(0))
        results.append(gradients(shard(model) if sharded else model, inputs, tokens)[0])
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=0, atol=1e-6, msg=name)


def test_everything_trains_sharded_too():
    model = shard(tiny())
    inputs = observations(model)
    got, _ = gradients(model, inputs, torch.full((3, 6), 600))
    assert got.keys() == dict(model.named_parameters()).keys()


def test_mixed_precision_keeps_values_and_logits_fp32_and_comes_close():
    exact, mixed = tiny(), shard(tiny(), MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32))
    for model in (exact, mixed):
        with torch.no_grad():
            model.language_model.lm_head.weight.mul_(0.05)
    inputs = observations(exact)
    output, expected = mixed(inputs), exact(inputs)
    assert output.values.dtype == output.actions.logits.dtype == torch.float32
    assert (output.values - expected.values).abs().max() < 0.05
    columns = torch.zeros(3, 6, dtype=torch.int64)
    ours, theirs = (action_logprobs(o.actions.logits, columns, temperature=1.0) for o in (output, expected))
    assert 0 < (ours - theirs).abs().max() < 1e-2


def test_reference_policy_works_sharded():
    inputs, model = observations(tiny()), tiny()
    before = tiny()(inputs).actions.logits
    attach_lora(model, LoraConfig(rank=2), seed=0)
    shard(model)
    with model.adapters_disabled(), torch.no_grad():
        torch.testing.assert_close(model(inputs).actions.logits, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("trained", ["everything", "shared", "separate"])
@pytest.mark.parametrize("passes", ["one", "two", "two, detached"])
def test_sharded_gradients_of_openvla_oft_are_the_plain_ones(passes, trained):
    """In two passes a layer is called twice before the backward pass, first for its keys and values alone."""
    results = []
    for sharded in (False, True):
        model = tiny_oft(passes=passes[:3], detach_prompt=passes.endswith("detached"))
        if trained != "everything":
            attach_lora(model, LoraConfig(rank=2), seed=0, critic=trained)
        if sharded:
            shard_for_learning(model, Ranks(0, 1, has_process_group=True), device=CPU, compute_dtype=None)
        inputs = observations(model)
        output = model(inputs)
        loss = output.actions.log_prob(torch.full((3, 6), 0.3), temperature=1.0).mean() + output.values.square().mean()
        loss.backward()
        full = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append({n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in full.items()})
    plain, sharded = ({n: g for n, g in result.items() if g.abs().max() > 0} for result in results)
    assert plain.keys() == sharded.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(sharded[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("passes", ["one", "two"])
def test_mixed_precision_keeps_the_heads_of_openvla_oft_fp32_and_comes_close(passes):
    exact, mixed = tiny_oft(passes=passes), tiny_oft(passes=passes)
    shard_for_learning(mixed, Ranks(0, 1, has_process_group=True), device=CPU, compute_dtype=torch.bfloat16)
    seen = []
    mixed.action_head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    inputs = observations(exact)
    output, expected = mixed(inputs), exact(inputs)
    assert seen == [torch.float32]
    size = expected.actions.location.abs().max()
    assert 0 < (output.actions.location - expected.actions.location).abs().max() < 0.03 * size
    (output.actions.location.square().mean() + output.values.mean()).backward()
    assert all(p.grad.dtype == torch.float32 for p in mixed.parameters() if p.grad is not None)
