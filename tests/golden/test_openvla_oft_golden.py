"""Our OpenVLA-OFT against numbers from the published code (OpenVLA-OFT, and RIPT-VLA's two passes) on tiny weights."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.golden_data import golden_path
from vlarl_ray.config import ModelConfig, OFTConfig, TowerConfig
from vlarl_ray.models import ActionNormalizer, PolicyInputs, ProprioNormalizer
from vlarl_ray.models.openvla_oft import COMPONENTS, OpenVLAOFT, component_names

TOLERANCE = 1e-4
PROMPTS = [0, 1, 2]
CLIPS = {"none": (-100.0, 100.0), "m2_p05": (-2.0, 0.5), "m1_0": (-1.0, 0.0)}


@pytest.fixture(scope="module")
def golden():
    return Golden(golden_path("openvla_oft"))


class Golden:
    def __init__(self, folder):
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.grad_norms = json.loads((folder / "grad_norms.json").read_text())
        statistics = json.loads((folder / "dataset_statistics.json").read_text())
        self.statistics = statistics[json.loads((folder / "meta.json").read_text())["unnorm_key"]]
        self.inputs = {k: torch.from_numpy(v) for k, v in np.load(folder / "inputs.npz").items()}
        self.outputs = {k: torch.from_numpy(v) for k, v in np.load(folder / "outputs.npz").items()}
        self.tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        self.trailing = self.config["tiny"]["trailing_token_id"]

    def model(self, rows=None, *, action_head="l1", passes="one", clip=(-100.0, 100.0), max_prompt_tokens=20):
        """The reference model; `rows` of its pixels go in in place of frames, as they are random and not images."""
        config = self.model_config(action_head, passes, clip, max_prompt_tokens)
        action, proprio = self.statistics["action"], self.statistics["proprio"]
        normalizer = ActionNormalizer.from_statistics(action["q01"], action["q99"], action["mask"], epsilon=1e-8)
        reads_proprio = bool(config.proprio_dim)
        model = OpenVLAOFT(
            config,
            normalizer=normalizer,
            proprio_normalizer=ProprioNormalizer.from_statistics(proprio["q01"], proprio["q99"], proprio.get("mask"))
            if reads_proprio
            else None,
        )
        has = {"action_head": action_head != "tokens", "proprio_projector": reads_proprio}
        has["scale_head"] = action_head in ("laplace", "gaussian")
        tensors = dict(self.tensors)
        for component in COMPONENTS:
            if has[component]:
                found = load_file(self.folder / f"{component}.safetensors")
                tensors |= {ours: found[name].float() for name, ours in component_names(component, found).items()}
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        assert all(name.startswith("value_head.") for name in missing)
        assert not unexpected
        if rows is not None:
            pixels = self.inputs["pixel_values"][rows]
            model.preprocess = lambda images: pixels
        return model

    def model_config(self, action_head, passes, clip, max_prompt_tokens):
        tiny, text = self.config["tiny"], self.config["text_config"]
        dino, siglip = (
            TowerConfig(dim=t["embed_dim"], depth=t["depth"], num_heads=t["num_heads"], mlp_dim=t["mlp_hidden"])
            for t in (tiny["featurizer"], tiny["fused_featurizer"])
        )
        return ModelConfig(
            architecture="openvla_oft",
            image_size=tiny["featurizer"]["img_size"],
            patch_size=tiny["featurizer"]["patch_size"],
            num_register_tokens=tiny["featurizer"]["reg_tokens"],
            dino=dino,
            siglip=siglip,
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            num_layers=text["num_hidden_layers"],
            num_heads=text["num_attention_heads"],
            num_kv_heads=text["num_key_value_heads"],
            text_vocab_size=tiny["tokenizer_vocab_size"] - self.config["n_action_bins"],
            num_action_bins=self.config["n_action_bins"],
            pad_to_multiple_of=self.config["pad_to_multiple_of"],
            action_head=action_head,
            log_scale_range=clip,
            action_dim=tiny["action_dim"],
            chunk_length=tiny["num_actions_chunk"],
            proprio_dim=0 if action_head == "tokens" else tiny["proprio_dim"],
            max_prompt_tokens=max_prompt_tokens,
            official_unused=True,
            oft=OFTConfig(num_cameras=tiny["num_images_in_input"], passes=passes, stop_token_id=tiny["stop_token_id"]),
        )

    def prompt(self, index, *, extra_padding=0):
        ids = self.inputs[f"prompt{index}_input_ids"][0]
        if ids[-1] != self.trailing:
            ids = torch.cat([ids, torch.tensor([self.trailing])])
        return self.policy_inputs([ids], slice(index, index + 1), extra_padding=extra_padding)

    def all_prompts(self):
        rows = [self.prompt(index) for index in PROMPTS]
        return self.policy_inputs([row.prompt_ids[0] for row in rows], slice(None))

    def ript_prompts(self, *, extra_padding=0):
        trailing = torch.full((3, 1), self.trailing)
        prompts = list(torch.cat([self.inputs["ript_input_ids"], trailing], 1))
        return self.policy_inputs(prompts, slice(None), extra_padding=extra_padding)

    def policy_inputs(self, prompts, rows, *, extra_padding=0):
        lengths = torch.tensor([len(ids) for ids in prompts])
        padded = torch.full((len(prompts), int(lengths.max()) + extra_padding), 77)  # its content must not matter
        for row, ids in zip(padded, prompts, strict=True):
            row[: len(ids)] = ids
        images = torch.zeros(len(prompts), 2, 4, 4, 3, dtype=torch.uint8)
        return PolicyInputs(images, padded, lengths, self.inputs["proprio_raw"][rows])

    def batch(self):
        """The training batch: action tokens are replaced by placeholders, so only their number matters."""
        labels, ids = self.inputs["batch_labels"], self.inputs["batch_input_ids"]
        lengths = (labels != -100).int().argmax(1)
        prompts = [row[:length] for row, length in zip(ids, lengths, strict=True)]
        assert len(set(lengths.tolist())) == 3, "the rows should have different lengths"
        return self.policy_inputs(prompts, slice(None))


def close(ours, expected, *, tolerance=TOLERANCE):
    torch.testing.assert_close(ours.detach().double(), expected.double(), rtol=0, atol=tolerance)


def steps(chunk):
    """[B, K*D] as [B, K, D]."""
    return chunk.unflatten(-1, (8, 7))


def test_visual_tokens_are_the_references(golden):
    """Both cameras' patches along the sequence, then one token of normalised proprioception."""
    model, inputs = golden.model(slice(None)), golden.all_prompts()
    pixels = golden.inputs["pixel_values"]
    features = [model.vision_backbone(pixels[:, :6]), model.vision_backbone(pixels[:, 6:])]
    close(torch.cat(features, 1), golden.outputs["patch_features"])
    close(model.normalized_proprio(inputs), golden.inputs["proprio_normalized"], tolerance=1e-9)
    visual = model._embed_visual(inputs)
    close(visual[:, :-1], golden.outputs["projected_patches"])
    close(visual[:, -1], golden.outputs["projected_proprio"])


def test_embeddings_and_hidden_states_after_every_layer_are_the_references(golden):
    model, inputs = golden.model(slice(0, 1)), golden.prompt(0)
    states = []
    for layer in model.language_model.model.layers[:-1]:
        layer.register_forward_hook(lambda module, args, output: states.append(output[0]))
    embeddings = model._embed(inputs)
    close(embeddings[0], golden.outputs["prompt0_multimodal_embeddings"])
    every = torch.arange(embeddings.shape[1])[None]
    last, _ = model.language_model.model(embeddings, every, lengths=torch.tensor([embeddings.shape[1]]))
    for index, state in enumerate([embeddings, *states, last]):
        close(state[0], golden.outputs[f"prompt0_hidden_{index}"])


@pytest.mark.parametrize("extra_padding", [0, 5])
@pytest.mark.parametrize("index", PROMPTS)
def test_actions_of_one_pass_are_the_references_whatever_the_padding(golden, index, extra_padding):
    model, expected = golden.model(slice(index, index + 1), action_head="laplace"), golden.outputs
    inputs = golden.prompt(index, extra_padding=extra_padding)
    close(model._hidden(inputs, 56)[0], expected[f"prompt{index}_actions_hidden_states"])
    actions = model(inputs).actions
    close(steps(actions.location[0]), expected[f"prompt{index}_normalized_actions"])
    close(steps(actions.log_scale[0]), expected[f"prompt{index}_log_b"])
    samples, _ = model.sample(inputs, temperature=0.0, noise=None)
    close(model.decode_actions(samples)[0], expected[f"prompt{index}_actions"])
    exact = model.decode_actions(expected[f"prompt{index}_normalized_actions"].flatten()[None])
    close(exact[0], expected[f"prompt{index}_actions"], tolerance=1e-6)


def test_prompts_of_several_lengths_in_one_batch_give_the_references(golden):
    actions = golden.model(slice(None), action_head="laplace")(golden.all_prompts()).actions
    for index in PROMPTS:
        close(steps(actions.location[index]), golden.outputs[f"prompt{index}_normalized_actions"])
        close(steps(actions.log_scale[index]), golden.outputs[f"prompt{index}_log_b"])


@pytest.mark.parametrize("index", PROMPTS)
def test_parallel_action_tokens_are_the_references(golden, index):
    """They are the likeliest of the whole vocabulary there; restricted to the action bins they must be the same."""
    model, inputs = golden.model(slice(index, index + 1), action_head="tokens"), golden.prompt(index)
    logits = model.language_model.lm_head(model._hidden(inputs, 56))
    best = logits.topk(2)
    assert torch.equal(steps(best.indices[0, :, 0]), golden.outputs[f"prompt{index}_discrete_tokens"])
    close(steps(best.values[0, :, 0] - best.values[0, :, 1]), golden.outputs[f"prompt{index}_discrete_margin"])
    samples, _ = model.sample(inputs, temperature=0.0, noise=None)
    assert torch.equal(steps(samples[0]), golden.outputs[f"prompt{index}_discrete_tokens"])
    close(model.decode_actions(samples)[0], golden.outputs[f"prompt{index}_discrete_actions"], tolerance=1e-6)


def test_the_training_pass_over_rows_of_several_lengths_is_the_references(golden):
    model, inputs, labels = golden.model(slice(None)), golden.batch(), golden.inputs["batch_labels"]
    close(model._hidden(inputs, 56), golden.outputs["batch_actions_hidden_states"])
    actions = model(inputs).actions
    close(steps(actions.location), golden.outputs["batch_predicted_actions"])
    loss = (steps(actions.location) - golden.inputs["batch_actions"]).abs().mean()
    close(loss, golden.outputs["batch_l1_loss"])
    assert torch.equal(actions.mode_error(golden.inputs["batch_actions"].flatten(1)).mean(), loss)
    logits = model.language_model.lm_head(model._hidden(inputs, 57))
    targets = labels[labels != -100].view(3, 57)
    close(
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()), golden.outputs["batch_token_loss"]
    )


def test_the_positions_read_are_the_references(golden):
    """The mask is over text, without BOS's patches and proprioception, one position before each label."""
    model, inputs = golden.model(), golden.batch()
    read = model._last_positions(inputs)[:, :56] - model.num_visual_tokens
    mask = torch.zeros(3, 70, dtype=torch.bool).scatter(1, read, value=True)
    assert torch.equal(mask, golden.outputs["batch_action_mask"])


@pytest.mark.parametrize("extra_padding", [0, 5])
def test_two_passes_are_ript_vlas_whatever_the_padding(golden, extra_padding):
    model, expected = golden.model(slice(None), action_head="laplace", passes="two"), golden.outputs
    inputs = golden.ript_prompts(extra_padding=extra_padding)
    actions = model(inputs).actions
    close(steps(actions.location), expected["ript_mean"])
    close(steps(actions.log_scale), expected["ript_log_b"])
    samples, _ = model.sample(inputs, temperature=0.0, noise=None)
    close(model.decode_actions(samples), expected["ript_actions"])
    close(model.decode_actions(expected["ript_mean"].flatten(1)), expected["ript_actions"], tolerance=1e-6)
    single = golden.model(slice(None), passes="one")(inputs).actions.location
    close(steps(single), expected["ript_rows_single_pass_mean"])


@pytest.mark.parametrize("clip", CLIPS)
def test_laplace_log_probabilities_are_ript_vlas_at_every_clip(golden, clip):
    model = golden.model(slice(None), action_head="laplace", passes="two", clip=CLIPS[clip])
    actions = model(golden.ript_prompts()).actions
    scored = actions.log_prob(golden.inputs["ript_sample"].flatten(1), temperature=1.0)
    close(steps(scored), golden.outputs[f"ript_logprob_clip_{clip}"])


def test_laplace_log_probability_of_the_mean_is_ript_vlas(golden):
    model = golden.model(slice(None), action_head="laplace", passes="two")
    actions = model(golden.ript_prompts()).actions
    close(steps(actions.log_prob(actions.location, temperature=1.0)), golden.outputs["ript_logprob_of_mean"])


def test_gradients_of_the_training_loss_are_the_references(golden):
    model = golden.model(slice(None))
    predicted = steps(model(golden.batch()).actions.location)
    (predicted - golden.inputs["batch_actions"]).abs().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    checked = set()
    for qualified, expected in golden.grad_norms.items():
        component, _, name = qualified.partition(":")
        name = name if component == "vla" else component_names(component, [name])[name]
        checked.add(name)
        if expected is None:
            assert gradients[name] is None, name
        else:
            assert gradients[name].norm().item() == pytest.approx(expected, rel=1e-3, abs=1e-6), name
    assert {name for name, gradient in gradients.items() if gradient is not None} <= checked


def test_every_array_is_compared(golden):
    """A guard for whoever renews the numbers: the names below are those that the tests above read."""
    per_prompt = ["normalized_actions", "actions", "actions_hidden_states", "log_b"]
    per_prompt += [f"discrete_{name}" for name in ("tokens", "actions", "margin")]
    names = {f"prompt{index}_{name}" for index in PROMPTS for name in per_prompt}
    names |= {"prompt0_multimodal_embeddings", *(f"prompt0_hidden_{index}" for index in range(5))}
    names |= {"patch_features", "projected_patches", "projected_proprio"}
    batch = ("actions_hidden_states", "predicted_actions", "l1_loss", "token_loss", "action_mask")
    ript = ("mean", "log_b", "actions", "logprob_of_mean", "rows_single_pass_mean")
    names |= {f"batch_{name}" for name in batch} | {f"ript_{name}" for name in ript}
    names |= {f"ript_logprob_clip_{clip}" for clip in CLIPS}
    assert golden.outputs.keys() == names


def test_the_mistakes_listed_beside_the_references_have_the_size_given_there(golden):
    """So these arrays do depend on what the mistakes break."""
    inputs, expected = golden.prompt(0), golden.outputs["prompt0_normalized_actions"]
    effects = json.loads((golden.folder / "meta.json").read_text())["effect_of_common_mistakes"]
    swapped, raw, stopped, causal, late = (golden.model(slice(0, 1)) for _ in range(5))
    pixels = golden.inputs["pixel_values"][:1].roll(6, 1)
    swapped.preprocess = lambda images: pixels
    raw.proprio_normalizer = None
    stopped.model_config = dataclasses.replace(
        stopped.model_config, oft=dataclasses.replace(stopped.model_config.oft, stop_token_id=1)
    )
    decoder = causal.language_model.model
    plain = decoder.forward
    decoder.forward = lambda embeddings, read, lengths: plain(embeddings, read)
    mistaken = {
        "two images swapped": swapped._hidden(inputs, 56),
        "raw proprio": raw._hidden(inputs, 56),
        "stop token replaced by BOS": stopped._hidden(inputs, 56),
        "stock causal attention": causal._hidden(inputs, 56),
        "hidden states taken one position later": late._hidden(inputs, 57)[:, 1:],
    }
    for mistake, hidden in mistaken.items():
        difference = (steps(late.action_head(hidden)[0]) - expected).abs().max().item()
        assert difference == pytest.approx(effects[mistake], abs=1e-3), mistake
