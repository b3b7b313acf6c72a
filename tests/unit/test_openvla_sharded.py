"""OpenVLA and OpenVLA-OFT under FSDP2, one rank: hooks must see every use of every parameter."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.small_openvla import observations, tiny, tiny_oft
from vlarl_ray.config import LoraConfig
from vlarl_ray.config_loader import load_config
from vlarl_ray.learner import fsdp
from vlarl_ray.memory_plan import plan_memory
from vlarl_ray.models import action_logprobs
from vlarl_ray.models.lora import attach_lora

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model, compute_dtype=None, *, min_params=0):
    ranks = fsdp.Ranks(0, 1, has_process_group=True)
    fsdp.shard(model, ranks, device=CPU, compute_dtype=compute_dtype, min_params=min_params)
    return model


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
    exact, mixed = tiny(), shard(tiny(), torch.bfloat16)
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
            shard(model)
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
    shard(mixed, torch.bfloat16)
    seen = []
    mixed.action_head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    inputs = observations(exact)
    output, expected = mixed(inputs), exact(inputs)
    assert seen == [torch.float32]
    size = expected.actions.location.abs().max()
    assert 0 < (output.actions.location - expected.actions.location).abs().max() < 0.03 * size
    (output.actions.location.square().mean() + output.values.mean()).backward()
    assert all(p.grad.dtype == torch.float32 for p in mixed.parameters() if p.grad is not None)


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("make", [tiny, tiny_oft])
def test_what_a_pass_gathers_is_what_the_memory_plan_says(make, train):
    """Of the large parts one at a time, and never those that are carried but not computed."""
    model = make(official_unused=True)
    cfg = load_config("jobs/toy.yaml", ["--learner.fsdp_min_params", "0", "--learner.lora.rank", "2"])
    cfg = replace(cfg, model=model.model_config, learner=replace(cfg.learner, train=train))
    [planned] = [part.num_bytes for part in plan_memory(cfg, proprio_dim=4).parts if part.name == "gathered"]
    if train == "lora":
        attach_lora(model, cfg.learner.lora, seed=0)
    shard(model)
    units = {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule) and name}
    seen, peak = [], 0

    def note(*_):
        nonlocal peak
        gathered = [p for p in model.parameters() if not isinstance(p, DTensor)]
        seen.append({name for name, unit in units.items() if any(p is q for p in unit.parameters() for q in gathered)})
        peak = max(peak, sum(p.nbytes for p in gathered))

    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding | torch.nn.RMSNorm):
            module.register_forward_pre_hook(note)
            module.register_full_backward_hook(note)
    output = model(observations(model), None)
    assert max(map(len, seen)) == 1
    samples = torch.full((3, 6), 600) if make is tiny else torch.full((3, 6), 0.3)
    (output.actions.log_prob(samples, temperature=1.0).sum() + output.values.sum()).backward()
    never = {name for name in units if f"{name}.".startswith(model.unused_modules)}
    assert len(never) == 3 + (make is tiny_oft)  # two last blocks, the pooling, and an output layer that no head reads
    assert set().union(*seen) == units.keys() - never
    assert 0.6 * planned < peak <= planned
