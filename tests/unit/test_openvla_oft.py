"""OpenVLA-OFT: rows of several prompt lengths, one or two passes, cameras, proprioception, heads."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.small_openvla import INSTRUCTIONS, observations, tiny, tiny_oft
from vlarl_ray.config import AlgorithmConfig, ExperimentConfig, InferenceConfig, LearnerConfig, LoraConfig, ModelConfig
from vlarl_ray.inference.torch_server import TorchEngine
from vlarl_ray.learner.build import build_learner
from vlarl_ray.models import Policy, PolicyInputs, ProprioNormalizer, add_scale_head, load_model, load_policy
from vlarl_ray.models.lora import attach_lora, lora_layers
from vlarl_ray.models.openvla_oft import OpenVLAOFT, component_names
from vlarl_ray.types import ActRequest, Observation

HEADS = ["tokens", "laplace", "gaussian"]
PASSES = ["one", "two"]


def noise(model, batch=3, seed=1):
    return model.draw_noise(np.stack([np.full(batch, seed), np.arange(batch)], 1).astype(np.uint64))


def head(actions):
    return actions.logits if hasattr(actions, "logits") else torch.cat([actions.location, actions.log_scale], 1)


def padded(inputs, count, *, content=77):
    return dataclasses.replace(inputs, prompt_ids=torch.nn.functional.pad(inputs.prompt_ids, (0, count), value=content))


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_sampled_logprobs_are_those_the_scorer_gives_f25(kind, passes, temperature):
    """The scorer sees the rows with more padding, in another order, beside other prompts."""
    model = tiny_oft(action_head=kind, passes=passes)
    inputs = observations(model)
    assert len(set(inputs.prompt_lengths.tolist())) > 1
    samples, sampled = model.sample(inputs, temperature=temperature, noise=noise(model) if temperature else None)
    scored = model(inputs, samples).actions.log_prob(samples, temperature=temperature)
    torch.testing.assert_close(sampled, scored, rtol=0, atol=1e-5)
    order = torch.tensor([2, 0, 0, 1])
    others = padded(inputs.rows(order), 9)
    scored = model(others, samples[order]).actions.log_prob(samples[order], temperature=temperature)
    torch.testing.assert_close(sampled[order], scored, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("passes", PASSES)
def test_a_row_depends_neither_on_padding_nor_on_its_neighbours_f30(kind, passes):
    model = tiny_oft(action_head=kind, passes=passes)
    inputs = observations(model)
    whole = model(inputs)
    for row, length in enumerate(inputs.prompt_lengths.tolist()):
        alone = inputs.rows(slice(row, row + 1))
        bare = dataclasses.replace(alone, prompt_ids=alone.prompt_ids[:, :length])
        for part in (alone, bare, padded(bare, 11), padded(bare, 3, content=5)):
            output = model(part)
            torch.testing.assert_close(head(output.actions), head(whole.actions)[row : row + 1], rtol=0, atol=2e-5)
            torch.testing.assert_close(output.values, whole.values[row : row + 1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("passes", PASSES)
def test_every_prompt_token_matters_and_its_place_too(passes):
    """The first one, too, sees and is seen: attention has no direction."""
    model = tiny_oft(passes=passes)
    inputs = observations(model)
    before = model(inputs)
    for column in range(int(inputs.prompt_lengths.min())):
        ids = inputs.prompt_ids.clone()
        ids[:, column] = 200
        after = model(dataclasses.replace(inputs, prompt_ids=ids))
        assert ((after.values - before.values).abs() > 1e-5).all()
        assert ((after.actions.location - before.actions.location).abs().amax(1) > 1e-5).all()
    swapped = inputs.prompt_ids.clone()
    swapped[:, [2, 3]] = inputs.prompt_ids[:, [3, 2]]
    assert not torch.equal(swapped, inputs.prompt_ids)
    after = model(dataclasses.replace(inputs, prompt_ids=swapped))
    assert ((after.actions.location - before.actions.location).abs().amax(1) > 1e-5).all()


def test_the_two_ways_of_passing_are_different_functions():
    """Which is why the config of the checkpoint says how it was trained."""
    one, two = tiny_oft(passes="one"), tiny_oft(passes="two")
    two.load_state_dict(one.state_dict())
    inputs = observations(one)
    assert (one(inputs).actions.location - two(inputs).actions.location).abs().max() > 1e-2


def test_with_two_passes_the_prompt_does_not_see_what_follows():
    """Its keys and values are those of a pass over the prompt alone; with one pass they depend on the stop token."""
    changed = {}
    for passes in PASSES:
        model = tiny_oft(passes=passes)
        inputs = observations(model, 1)
        seen = []
        model.language_model.model.layers[1].self_attn.v_proj.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output)
        )
        model(inputs)
        with torch.no_grad():
            model.language_model.model.embed_tokens.weight[model.model_config.oft.stop_token_id] += 1.0
        model(inputs)
        half = len(seen) // 2
        prompt = model.num_visual_tokens + int(inputs.prompt_lengths[0]) - 1
        changed[passes] = (seen[0][:, :prompt] - seen[half][:, :prompt]).abs().max().item()
    assert changed["one"] > 1e-4
    assert changed["two"] == 0


def test_a_detached_prompt_changes_gradients_but_no_numbers():
    """What reads the observation gets none, as in RIPT-VLA; the decoder layers get those of the last positions."""
    outputs, gradients = {}, {}
    for detached in (False, True):
        model = tiny_oft(passes="two", detach_prompt=detached)
        output = model(observations(model))
        (output.actions.location.square().mean() + output.values.sum()).backward()
        outputs[detached] = output
        gradients[detached] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert torch.equal(outputs[False].actions.location, outputs[True].actions.location)
    assert torch.equal(outputs[False].values, outputs[True].values)
    lost = {name.partition(".")[0] for name in gradients[False].keys() - gradients[True].keys()}
    assert lost == {"vision_backbone", "projector", "proprio_projector", "language_model"}
    assert "language_model.model.embed_tokens.weight" not in gradients[True]
    for layer in ("layers.0.self_attn.k_proj", "layers.0.mlp.up_proj", "layers.1.self_attn.v_proj"):
        name = f"language_model.model.{layer}.weight"
        assert gradients[True][name].norm() > 0
        assert (gradients[True][name] - gradients[False][name]).abs().max() > 1e-6
    last = "action_head.model.fc2.weight"
    torch.testing.assert_close(gradients[True][last], gradients[False][last])


def test_positions_alone_tell_the_numbers_of_a_chunk_apart():
    model = tiny_oft(action_head="tokens")
    logits = model(observations(model, 1)).actions.logits[0]
    assert (logits[1:] - logits[:-1]).abs().amax(-1).min() > 1e-3


def test_placeholders_are_zeros_and_the_stop_token_follows_them():
    model = tiny_oft()
    inputs = observations(model)
    embeddings, words = model._embed(inputs), model.language_model.model.embed_tokens.weight
    for row, last in zip(embeddings, model._last_positions(inputs), strict=True):
        assert (row[last[1:-1]] == 0).all()
        assert torch.equal(row[last[-1]], words[2])
        assert torch.equal(row[0], words[model.tokenizer.bos_token_id])
    trailing = inputs.prompt_ids.gather(1, inputs.prompt_lengths[:, None] - 1)
    assert torch.equal(embeddings[torch.arange(3), model._last_positions(inputs)[:, 0]], words[trailing[:, 0]])


def test_value_is_read_at_the_last_prompt_token_of_every_row_f31():
    model = tiny_oft()
    inputs = observations(model)
    assert model.num_visual_tokens == 2 * 16 + 1
    assert model._last_positions(inputs)[:, 0].tolist() == [33 + n - 1 for n in inputs.prompt_lengths.tolist()]
    hidden = model._hidden(inputs, model.num_action_tokens)
    assert torch.equal(model(inputs).values, model.value_head(hidden[:, 0]))


@pytest.mark.parametrize("passes", PASSES)
def test_a_separate_critic_reads_the_same_place_with_its_own_adapters(passes):
    model = tiny_oft(passes=passes)
    inputs = observations(model)
    before = model(inputs)
    attach_lora(model, LoraConfig(rank=2), seed=0, critic="separate")
    torch.testing.assert_close(model(inputs).values, before.values, rtol=0, atol=1e-5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B.critic" in name:
                parameter.add_(0.05)
    assert ((model(inputs).values - before.values).abs() > 1e-4).all()
    torch.testing.assert_close(model(inputs).actions.location, before.actions.location, rtol=0, atol=1e-5)


def test_every_camera_matters_and_so_does_their_order():
    model = tiny_oft()
    inputs = observations(model)
    before = model(inputs).actions.location
    for camera in (0, 1):
        images = inputs.images.clone()
        images[:, camera] = 255 - images[:, camera]
        changed = model(dataclasses.replace(inputs, images=images)).actions.location - before
        assert (changed.abs().amax(1) > 1e-4).all()
    swapped = dataclasses.replace(inputs, images=inputs.images.flip(1))
    assert ((model(swapped).actions.location - before).abs().amax(1) > 1e-4).all()


def test_cameras_are_laid_out_one_after_the_other():
    model = tiny_oft()
    inputs = observations(model, size=48)
    pixels = model.preprocess(inputs.images)
    assert pixels.shape == (3, 12, 32, 32)
    single = tiny()
    for camera in (0, 1):
        own = single.preprocess(inputs.images[:, camera : camera + 1])
        assert torch.equal(pixels[:, 6 * camera : 6 * camera + 6], own)
        patches = model.projector(model.vision_backbone(own))
        laid_out = model._embed_visual(inputs)[:, 16 * camera : 16 * camera + 16]
        torch.testing.assert_close(laid_out, patches, rtol=0, atol=1e-5)


def test_observations_of_another_robot_are_refused():
    model = tiny_oft()
    inputs = observations(model)
    with pytest.raises(ValueError, match="images hold 1 cameras per observation; this model takes 2"):
        model(dataclasses.replace(inputs, images=inputs.images[:, :1]))
    with pytest.raises(ValueError, match="3 proprioception dimensions; this model reads 4"):
        model(dataclasses.replace(inputs, proprio=inputs.proprio[:, :3]))


def test_proprioception_is_normalised_and_clipped_inside_the_model():
    model = tiny_oft()
    inputs = observations(model)
    before = model(inputs).actions.location
    far, bound = (dataclasses.replace(inputs, proprio=torch.full((3, 4), value)) for value in (7.0, 2.0))
    assert torch.equal(model(far).actions.location, model(bound).actions.location)
    assert ((model(far).actions.location - before).abs().amax(1) > 1e-4).all()
    halved = dataclasses.replace(inputs, proprio=inputs.proprio / 2)
    model.proprio_normalizer = ProprioNormalizer((-1.0,) * 4, (1.0,) * 4, (True,) * 4)
    torch.testing.assert_close(model(halved).actions.location, before, rtol=0, atol=1e-5)


def test_statistics_of_another_robot_are_refused():
    with pytest.raises(ValueError, match=r"proprio statistics have 2 dimensions, but model\.proprio_dim = 4"):
        OpenVLAOFT(tiny_oft().model_config, proprio_normalizer=ProprioNormalizer((0.0,) * 2, (1.0,) * 2, (True,) * 2))


def test_a_config_that_is_none_of_this_model_is_refused():
    with pytest.raises(ValueError, match=r"model\.decoding = 'autoregressive'"):
        tiny_oft(decoding="autoregressive")
    config = tiny_oft().model_config
    stop = dataclasses.replace(config, oft=dataclasses.replace(config.oft, stop_token_id=511))
    with pytest.raises(ValueError, match=r"stop_token_id = 511 is no text id"):
        OpenVLAOFT(stop)


def test_a_component_of_another_name_is_refused():
    with pytest.raises(ValueError, match="allowed: action_head, proprio_projector, scale_head"):
        component_names("vision_backbone", [])


@pytest.mark.parametrize("kind", ["tokens", "laplace", "l1"])
@pytest.mark.parametrize("passes", PASSES)
def test_a_folder_gives_back_the_same_policy(tmp_path, kind, passes):
    model = tiny_oft(action_head=kind, passes=passes, log_scale_range=(-2.0, 0.5))
    model.save(tmp_path)
    loaded = load_policy(tmp_path)
    assert loaded.model.model_config == model.model_config
    rng = np.random.default_rng(0)
    seen = [
        Observation(rng.integers(0, 256, (2, 32, 32, 3), np.uint8), rng.standard_normal(4, np.float32), text)
        for text in INSTRUCTIONS
    ]
    for ours, theirs in zip(Policy(model).act(seen, seed=0), loaded.act(seen, seed=0), strict=True):
        assert np.array_equal(ours.actions, theirs.actions)
        assert np.array_equal(ours.tokens, theirs.tokens)
        assert np.array_equal(ours.logprobs, theirs.logprobs)


def test_adapters_are_on_the_backbone_and_proprioception_and_the_heads_are_trained_whole():
    model = tiny_oft(official_unused=True)
    attach_lora(model, LoraConfig(rank=2), seed=0)
    adapted = {name.removesuffix(".weight") for name in lora_layers(model)}
    assert {"proprio_projector.fc1", "proprio_projector.fc2", "projector.fc3"} <= adapted
    assert "language_model.model.layers.0.mlp.up_proj" in adapted
    assert not any(name.startswith(("action_head.", "scale_head.", "value_head.")) for name in adapted)
    assert "language_model.lm_head" not in adapted  # carried, but no action is read from it
    whole = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert whole == {"action_head", "scale_head", "value_head"}


def test_the_output_layer_of_the_language_model_is_adapted_where_actions_are_tokens():
    model = tiny_oft(action_head="tokens")
    attach_lora(model, LoraConfig(rank=2), seed=0)
    assert "language_model.lm_head.weight" in lora_layers(model)


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
@pytest.mark.parametrize("passes", PASSES)
def test_adding_a_scale_head_leaves_the_mean_bit_identical_f26(kind, passes):
    deterministic = tiny_oft(action_head="l1", passes=passes)
    stochastic, again = (add_scale_head(deterministic, kind, log_scale=-1.5) for _ in range(2))
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in stochastic.state_dict().items())
    inputs = observations(deterministic)
    before, after = deterministic(inputs), stochastic(inputs)
    assert torch.equal(before.actions.location, after.actions.location)
    assert torch.equal(before.values, after.values)
    assert torch.equal(after.actions.log_scale, torch.full((3, 6), -1.5))
    assert torch.equal(stochastic.sample(inputs, temperature=0.0, noise=None)[0], before.actions.location)
    loss = -after.actions.log_prob(torch.zeros(3, 6), temperature=1.0).mean()
    loss.backward()
    assert stochastic.scale_head.last_layer.weight.grad.norm() > 0


@pytest.mark.parametrize("log_scale_range", [(-2.0, 0.5), (-1.0, 0.0)])
def test_sampler_and_scorer_clip_the_scale_alike_f24(log_scale_range):
    """RIPT-VLA's sampler does not clip, its scorer does."""
    model = tiny_oft(log_scale_range=log_scale_range)
    with torch.no_grad():
        model.scale_head.last_layer.weight.mul_(50)
    inputs = observations(model)
    raw = model.scale_head(model._hidden(inputs, 6))
    assert raw.min() < log_scale_range[0]
    assert raw.max() > log_scale_range[1]
    drawn = noise(model)
    samples, sampled = model.sample(inputs, temperature=1.0, noise=drawn)
    actions = model(inputs).actions
    clipped = raw.clamp(*log_scale_range)
    torch.testing.assert_close(samples, actions.location + clipped.exp() * drawn, rtol=0, atol=1e-5)
    torch.testing.assert_close(sampled, actions.log_prob(samples, temperature=1.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("trained", [True, False])
def test_what_a_learner_publishes_is_what_a_server_acts_with(tmp_path, trained):
    tiny_oft(passes="two").save(tmp_path)
    cfg = ExperimentConfig(
        model=load_model(tmp_path).model_config,
        learner=LearnerConfig(num_ranks=1, lora=LoraConfig(rank=2), train_scale_head=trained),
    )
    learner = build_learner(cfg, tmp_path, rank=0, world_size=1, store_address=None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in learner.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    update = learner.weight_update(1)
    published = {name.partition(".")[0] for name in update.tensors}
    assert published == {"action_head", "value_head"} | ({"scale_head"} if trained else set())
    engine = TorchEngine(tmp_path, InferenceConfig(batch_size=2), deterministic=True)
    engine.load(update)
    inputs = observations(learner.model)
    request = ActRequest(
        images=inputs.images.numpy(),
        proprio=inputs.proprio.numpy(),
        instructions=tuple(INSTRUCTIONS),
        noise_keys=np.arange(6, dtype=np.uint64).reshape(3, 2),
        temperature=1.0,
        policy_version=1,
    )
    reply = engine.sample(request)
    np.testing.assert_allclose(learner.logprobs(request, reply.tokens), reply.logprobs, atol=1e-4)
    before = TorchEngine(tmp_path, InferenceConfig(), deterministic=True)
    before.version = 0
    assert np.abs(before.logprobs(request, reply.tokens) - reply.logprobs).max() > 1e-2


def test_the_action_head_as_a_moving_reference_is_refused(tmp_path):
    tiny_oft().save(tmp_path)
    learner = LearnerConfig(num_ranks=1, train_scale_head=False)
    cfg = ExperimentConfig(algorithm=AlgorithmConfig(kl_coef=0.1), learner=learner)
    with pytest.raises(ValueError, match=r"the action head is trained whole; set algorithm.kl_coef to 0"):
        build_learner(cfg, tmp_path, rank=0, world_size=1, store_address=None)


def test_parameter_shapes_at_7b_are_the_published_ones():
    config = ModelConfig(
        architecture="openvla_oft", hidden_size=4096, num_layers=1, num_heads=32, num_kv_heads=32, action_dim=7,
        chunk_length=8, proprio_dim=8, action_head="laplace", text_vocab_size=31744,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in OpenVLAOFT(config).state_dict().items()}
    assert shapes["action_head.model.fc1.weight"] == shapes["scale_head.trunk.fc1.weight"] == (4096, 28672)
    assert shapes["action_head.model.fc2.weight"] == shapes["scale_head.log_b_head.weight"] == (7, 4096)
    assert shapes["action_head.model.mlp_resnet_blocks.1.ffn.1.weight"] == (4096, 4096)
    assert "action_head.model.mlp_resnet_blocks.2.ffn.1.weight" not in shapes
    assert shapes["proprio_projector.fc1.weight"] == (4096, 8)
    assert "language_model.lm_head.weight" not in shapes


def test_no_prompt_is_too_short_or_too_long_for_its_batch():
    """The shortest leaves nothing before its last token but BOS, the longest no padding."""
    for passes in PASSES:
        model = tiny_oft(passes=passes)
        inputs = observations(model, 2)
        ids = torch.randint(5, 500, (2, 9), generator=torch.Generator().manual_seed(0))
        extreme = PolicyInputs(inputs.images, ids, torch.tensor([2, 9]), inputs.proprio)
        whole = model(extreme).actions.location
        assert torch.isfinite(whole).all()
        short = dataclasses.replace(extreme, prompt_ids=ids[:, :2], prompt_lengths=torch.tensor([2, 2]))
        torch.testing.assert_close(model(short).actions.location[0], whole[0], rtol=0, atol=1e-5)
