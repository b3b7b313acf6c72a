import dataclasses

import peft
import pytest
import torch

from tests.small_openvla import TINY, observations, tiny
from vlarl_ray.config import LoraConfig
from vlarl_ray.models.lora import (
    CRITIC,
    LoraLinear,
    adapter_tensors,
    attach_lora,
    head_tensors,
    load_adapter,
    load_adapter_tensors,
    lora_layers,
    merged_weight,
    official_name,
    save_adapter,
    use_adapter,
)

SMALL, LARGE = LoraConfig(rank=2, alpha=4.0), LoraConfig(rank=32, alpha=32.0)


def attached(config=SMALL, **options):
    model = tiny()
    attach_lora(model, config, seed=3, **options)
    return model


def perturb(model, seed=5):
    """Make B non-zero, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for name in layer.lora_B:
                layer.pair(name)[1].normal_(0, 0.1, generator=generator)
    return model


def backward(model):
    output = model(observations(model))
    (output.actions.logits.square().mean() + output.values.square().sum()).backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("config", [SMALL, LARGE])
def test_only_adapters_and_value_head_get_gradients_f28(config):
    model = attached(config)
    with_gradient = backward(model)
    expected = {n for n, _ in model.named_parameters() if ".lora_" in n or n.startswith("value_head.")}
    assert with_gradient == expected
    assert any("vision_backbone" in name for name in expected)
    assert any("lm_head" in name for name in expected)


@pytest.mark.parametrize("config", [SMALL, LARGE])
def test_a_new_adapter_changes_nothing_and_a_trained_one_does(config):
    inputs = observations(tiny())
    before, model = tiny()(inputs), attached(config)
    torch.testing.assert_close(model(inputs).actions.logits, before.actions.logits, rtol=0, atol=1e-6)
    assert (perturb(model)(inputs).actions.logits - before.actions.logits).abs().max() > 1e-2


def test_disabled_adapters_give_the_model_before_training_to_the_bit_and_leave_gradients_alone_f28():
    model = perturb(attached())
    inputs = observations(model)
    before, trained = tiny()(inputs), model(inputs)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with model.adapters_disabled():
        reference = model(inputs)
    assert torch.equal(reference.actions.logits, before.actions.logits)
    assert torch.equal(model(inputs).actions.logits, trained.actions.logits)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


def test_disabled_adapters_come_back_after_an_error():
    model = perturb(attached())
    with pytest.raises(RuntimeError, match="inside"), model.adapters_disabled():
        raise RuntimeError("inside")
    assert all(layer.active == "default" for layer in lora_layers(model).values())


@pytest.mark.parametrize("config", [SMALL, LARGE])
def test_merging_reproduces_the_adapted_model_and_leaves_the_base_untouched_f28(config):
    model, merged = perturb(attached(config)), tiny()
    inputs, pristine = observations(model), {n: t.clone() for n, t in tiny().state_dict().items()}
    tensors, scale = merged.state_dict(), config.alpha / config.rank
    for name, (a, b) in adapter_tensors(model).items():
        tensors[name] = merged_weight(pristine[name], a, b, scale)
    merged.load_state_dict(tensors)
    torch.testing.assert_close(merged(inputs).actions.logits, model(inputs).actions.logits, rtol=0, atol=5e-5)
    base = {official_name(n): t for n, t in model.state_dict().items() if ".lora_" not in n}
    assert base.keys() == pristine.keys()
    assert all(torch.equal(base[name], pristine[name]) for name in pristine)


def test_wide_ranks_multiply_by_the_very_weight_that_a_server_merges():
    model = perturb(attached(LARGE))
    name, layer = next(iter(lora_layers(model).items()))
    x = torch.randn(5, layer.base_layer.in_features)
    a, b = adapter_tensors(model)[name]
    weight = merged_weight(layer.base_layer.weight, a, b, 1.0)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, weight, layer.base_layer.bias))


@pytest.mark.parametrize("rank", [1, 24])
def test_both_ways_of_computing_agree_in_output_and_gradient(rank):
    torch.manual_seed(0)
    layer = LoraLinear(torch.nn.Linear(16, 24), LoraConfig(rank=rank, alpha=3.0), ["default"])
    with torch.no_grad():
        layer.pair("default")[1].normal_()
    x, results = torch.randn(7, 16, requires_grad=True), []
    for layer.merges in (False, True):
        layer.zero_grad()
        x.grad = None
        output = layer(x)
        output.square().sum().backward()
        results.append([output, x.grad, *(p.grad for p in layer.pair("default"))])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_merging_again_and_again_does_not_drift():
    base = torch.randn(8, 6).bfloat16()
    pristine = base.clone()
    for step in range(50):
        merged_weight(base, torch.randn(2, 6), torch.randn(8, 2), 0.5 + step)
    assert torch.equal(base, pristine)
    assert torch.equal(merged_weight(base, torch.randn(2, 6), torch.zeros(8, 2), 1.0), pristine)


def test_same_seed_gives_the_same_adapters_and_another_does_not():
    first, second, third = attached(), attached(), tiny()
    attach_lora(third, SMALL, seed=4)
    for name, (a, b) in adapter_tensors(first).items():
        assert torch.equal(a, adapter_tensors(second)[name][0])
        assert not torch.equal(a, adapter_tensors(third)[name][0])
        assert (b == 0).all()


def test_a_separate_critic_has_its_own_adapters_and_neither_touches_the_other():
    model = perturb(attached(critic="separate"))
    inputs = observations(model)
    output = model(inputs)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.pair(CRITIC)[1].add_(0.1)
    moved = model(inputs)
    assert torch.equal(moved.actions.logits, output.actions.logits)
    assert ((moved.values - output.values).abs() > 1e-4).all()
    moved.values.sum().backward()
    for layer in lora_layers(model).values():
        assert layer.pair("default")[0].grad is None
    assert any(
        layer.pair(CRITIC)[0].grad.abs().max() > 0
        for layer in lora_layers(model).values()
        if layer.pair(CRITIC)[0].grad is not None
    )
    model.zero_grad()
    model(inputs).actions.logits.sum().backward()
    assert all(layer.pair(CRITIC)[0].grad is None for layer in lora_layers(model).values())


def test_values_of_a_new_separate_critic_are_those_of_the_shared_one():
    inputs = observations(tiny())
    separate, shared = attached(critic="separate"), attached()
    torch.testing.assert_close(separate(inputs).values, shared(inputs).values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("detach", [False, True])
def test_value_gradient_reaches_the_backbone_unless_detached_f33(detach):
    model = perturb(attached(detach_value=detach))
    model(observations(model)).values.sum().backward()
    norm = sum(p.grad.norm() for n, p in model.named_parameters() if ".lora_" in n and p.grad is not None)
    assert (norm == 0) == detach
    assert model.value_head[0].weight.grad.norm() > 0


def test_switching_adapters_keeps_requires_grad():
    model = attached(critic="separate")
    with use_adapter(model, CRITIC):
        pass
    assert all(
        p.requires_grad for layer in lora_layers(model).values() for n in ("default", CRITIC) for p in layer.pair(n)
    )


def test_heads_are_the_value_head_with_adapters_and_everything_without():
    assert set(head_tensors(attached())) == {n for n in tiny().state_dict() if n.startswith("value_head.")}
    assert set(head_tensors(tiny())) == set(tiny().state_dict())


def test_peft_reads_the_saved_adapter_and_computes_the_same(tmp_path):
    model = perturb(attached())
    save_adapter(tmp_path, adapter_tensors(model), head_tensors(model), SMALL)
    theirs = peft.PeftModel.from_pretrained(tiny(), str(tmp_path))
    inputs = observations(model)
    # Not through PeftModel.forward, which expects a Hugging Face signature.
    torch.testing.assert_close(
        theirs.base_model.model(inputs).actions.logits, model(inputs).actions.logits, rtol=0, atol=1e-5
    )


def test_an_adapter_round_trips_through_its_folder(tmp_path):
    model, other = perturb(attached()), attached()
    save_adapter(tmp_path, adapter_tensors(model), head_tensors(model), SMALL)
    adapters, heads, scale = load_adapter(tmp_path)
    assert scale == 2.0
    assert heads.keys() == head_tensors(model).keys()
    load_adapter_tensors(other, adapters)
    inputs = observations(model)
    assert torch.equal(other(inputs).actions.logits, model(inputs).actions.logits)


def test_adapters_of_another_shape_or_name_are_refused():
    model = attached()
    adapters = adapter_tensors(model)
    name = next(iter(adapters))
    with pytest.raises(ValueError, match="missing"):
        load_adapter_tensors(model, {n: pair for n, pair in adapters.items() if n != name})
    with pytest.raises(ValueError, match=r"lora\.rank"):
        load_adapter_tensors(attached(LARGE), adapters)


def test_targets_can_be_chosen_and_nonsense_is_refused():
    model = tiny()
    config = LoraConfig(rank=2, target_modules=r"language_model.*(q_proj|v_proj)", include_lm_head=False)
    attach_lora(model, config, seed=0)
    assert {name.split(".")[-2] for name in lora_layers(model)} == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match="already"):
        attach_lora(model, SMALL, seed=0)
    with pytest.raises(ValueError, match="matches no linear layer"):
        attach_lora(tiny(), LoraConfig(target_modules="decoder"), seed=0)


def test_parameters_that_are_never_computed_get_no_adapters():
    model = tiny(official_unused=True)
    attach_lora(model, SMALL, seed=0)
    backward(model)
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)
    assert dataclasses.replace(TINY, official_unused=True) == model.model_config
