"""Our OpenVLA against numbers from the published code on tiny random checkpoints in the official layout."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.golden_data import golden_path
from vlarl_ray.config import ModelConfig, TowerConfig
from vlarl_ray.models import ActionNormalizer, PolicyInputs
from vlarl_ray.models.action_tokens import action_logprobs
from vlarl_ray.models.openvla import OpenVLA

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["openvla", "openvla_small_vocab"])
def golden(request):
    return Golden(golden_path(request.param))


class Golden:
    def __init__(self, folder):
        self.config = json.loads((folder / "config.json").read_text())
        self.meta = json.loads((folder / "meta.json").read_text())
        self.grad_norms = json.loads((folder / "grad_norms.json").read_text())
        self.inputs = {k: torch.from_numpy(v) for k, v in np.load(folder / "inputs.npz").items()}
        self.outputs = {k: torch.from_numpy(v) for k, v in np.load(folder / "outputs.npz").items()}
        self.tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        self.trailing = self.config["tiny"]["trailing_token_id"]
        self.vocab = self.config["tiny"]["tokenizer_vocab_size"]

    def model(self, *, max_prompt_tokens=12, key=None, num_tokens=7):
        tiny, text = self.config["tiny"], self.config["text_config"]
        dino, siglip = (
            TowerConfig(dim=t["embed_dim"], depth=t["depth"], num_heads=t["num_heads"], mlp_dim=t["mlp_hidden"])
            for t in (tiny["featurizer"], tiny["fused_featurizer"])
        )
        config = ModelConfig(
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
            text_vocab_size=self.vocab - self.config["n_action_bins"],
            num_action_bins=self.config["n_action_bins"],
            pad_to_multiple_of=self.config["pad_to_multiple_of"],
            action_dim=num_tokens,
            chunk_length=1,
            decoding="autoregressive",
            max_prompt_tokens=max_prompt_tokens,
            official_unused=True,
        )
        normalizer = None
        if key is not None:
            statistics = self.config["norm_stats"][key]["action"]
            normalizer = ActionNormalizer.from_statistics(statistics["q01"], statistics["q99"], statistics.get("mask"))
        model = OpenVLA(config, normalizer=normalizer)
        missing, unexpected = model.load_state_dict(self.tensors, strict=False)
        assert all(name.startswith("value_head.") for name in missing)
        assert not unexpected
        return model

    def prompt(self, index, *, length=None):
        """Pixels go in through `preprocess`, which the caller replaces: the reference's are random, not images."""
        ids = self.inputs[f"prompt{index}_input_ids"][0]
        if ids[-1] != self.trailing:
            ids = torch.cat([ids, torch.tensor([self.trailing])])
        padded = torch.zeros(1, length or len(ids), dtype=torch.int64)
        padded[0, : len(ids)] = ids
        images = torch.zeros(1, 1, 4, 4, 3, dtype=torch.uint8)
        return PolicyInputs(images, padded, torch.tensor([len(ids)]), torch.zeros(1, 1))


def _with_pixels(model, pixels):
    model.preprocess = lambda images: pixels
    return model


def test_patch_features_and_projection_are_the_references(golden):
    model = golden.model()
    with torch.no_grad():
        pixels = golden.inputs["pixel_values"]
        features = model.vision_backbone(pixels)
        torch.testing.assert_close(features, golden.outputs["patch_features"], rtol=0, atol=TOLERANCE)
        dino = model.vision_backbone.featurizer(pixels[:, :3])
        torch.testing.assert_close(dino, golden.outputs["dino_patches"], rtol=0, atol=TOLERANCE)
        projected = model.projector(features)
        torch.testing.assert_close(projected, golden.outputs["projected_patches"], rtol=0, atol=TOLERANCE)


def test_hidden_states_after_every_layer_are_the_references(golden):
    model = _with_pixels(golden.model(), golden.inputs["pixel_values"][:1])
    tokens = golden.outputs["prompt0_action_tokens"][None]
    states = []
    for layer in model.language_model.model.layers[:-1]:
        layer.register_forward_hook(lambda module, args, output: states.append(output[0]))
    with torch.no_grad():
        embeddings = model._embed(golden.prompt(0), tokens, num_slots=6)
        every = torch.arange(embeddings.shape[1])[None]
        last, _ = model.language_model.model(embeddings, every)
    for index, state in enumerate([embeddings, *states, last]):
        expected = golden.outputs[f"prompt0_hidden_{index}"]
        torch.testing.assert_close(state[0], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("extra_padding", [0, 5])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_teacher_forced_logits_are_the_references_whatever_the_padding(golden, index, extra_padding):
    model = _with_pixels(golden.model(), golden.inputs["pixel_values"][index : index + 1])
    tokens = golden.outputs[f"prompt{index}_action_tokens"][None]
    inputs = golden.prompt(index, length=golden.prompt(index).prompt_ids.shape[1] + extra_padding)
    with torch.no_grad():
        logits = model(inputs, tokens).actions.logits
    expected = golden.outputs[f"prompt{index}_action_logits_window"][:, :256]
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_greedy_tokens_and_actions_are_the_references(golden, index):
    key = golden.meta["unnorm_keys"][index]
    model = _with_pixels(golden.model(key=key), golden.inputs["pixel_values"][index : index + 1])
    tokens, _ = model.sample(golden.prompt(index), temperature=0.0, noise=None)
    assert tokens[0].tolist() == golden.outputs[f"prompt{index}_action_tokens"].tolist()
    actions = model.decode_actions(tokens)[0, 0].double()
    torch.testing.assert_close(actions, golden.outputs[f"prompt{index}_actions"], rtol=0, atol=1e-6)


def test_masked_logprobs_are_the_references_renormalised_over_the_action_bins(golden):
    model = _with_pixels(golden.model(), golden.inputs["pixel_values"][:1])
    tokens = golden.outputs["prompt0_action_tokens"][None]
    window = golden.outputs["prompt0_action_logits_window"][:, :256].double()
    columns = model.action_tokenizer.columns(tokens)
    with torch.no_grad():
        ours = action_logprobs(model(golden.prompt(0), tokens).actions.logits, columns, temperature=1.0)
    expected = torch.log_softmax(window, -1).gather(1, columns.T).T
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=TOLERANCE)


def test_gradients_of_the_training_loss_are_the_references(golden):
    """The reference batch scores 7 action tokens and the end token: 8 targets a row, hence 8 read-outs."""
    model = _with_pixels(golden.model(num_tokens=8), golden.inputs["pixel_values"])
    ids, mask = golden.inputs["batch_input_ids"], golden.inputs["batch_attention_mask"]
    lengths = mask.sum(1) - 8
    slots = lengths[:, None] + torch.arange(8)
    targets = ids.gather(1, slots)
    prompts = torch.where(torch.arange(ids.shape[1]) < lengths[:, None], ids, 0)
    inputs = PolicyInputs(
        torch.zeros(len(ids), 1, 4, 4, 3, dtype=torch.uint8), prompts, lengths, torch.zeros(len(ids), 1)
    )
    embeddings = model._embed(inputs, targets, num_slots=7)
    hidden, _ = model.language_model.model(embeddings, model._read_positions(inputs, 8))
    logprobs = model.language_model.lm_head(hidden).log_softmax(-1)
    loss = -logprobs.gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(loss.detach(), golden.outputs["batch_loss"], rtol=0, atol=TOLERANCE)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, expected in golden.grad_norms.items():
        if expected is None:
            assert gradients[name] is None, name
        else:
            assert gradients[name].norm().item() == pytest.approx(expected, rel=1e-3, abs=1e-6), name


def test_parameter_names_and_shapes_at_7b_are_the_official_ones():
    path = golden_path("openvla_7b_parameters.json")
    official = {name: tuple(shape) for name, shape in json.loads(path.read_text()).items()}
    with torch.device("meta"):
        model = OpenVLA(openvla_7b())
    ours = {n: tuple(t.shape) for n, t in model.state_dict().items() if not n.startswith("value_head.")}
    assert ours == official


def openvla_7b():
    return ModelConfig(
        image_size=224,
        patch_size=14,
        num_register_tokens=4,
        dino=TowerConfig(dim=1024, depth=24, num_heads=16, mlp_dim=4096),
        siglip=TowerConfig(dim=1152, depth=27, num_heads=16, mlp_dim=4304),
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        text_vocab_size=31744,
        action_dim=7,
        chunk_length=1,
        decoding="autoregressive",
        max_prompt_tokens=64,
        value_hidden_sizes=(1024, 512),
        official_unused=True,
    )
