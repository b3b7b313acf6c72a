"""Checkpoint folders in the published layouts: read whole, or refused with what is wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from tests.golden_data import golden_path
from vlarl_ray.config import ModelConfig, OFTConfig, TowerConfig
from vlarl_ray.models import load_model, load_quest_official
from vlarl_ray.models.official import is_official, read_official
from vlarl_ray.models.policy_export import export_policy
from vlarl_ray.models.policy_import import import_policy
from vlarl_ray.registry import MODELS, resolve

OFT = ModelConfig(chunk_length=8, oft=OFTConfig(num_cameras=2))
CASES = {
    "openvla": (ModelConfig(), "libero_spatial_no_noops"),
    "openvla_small_vocab": (ModelConfig(), "bridge_orig"),
    "openvla_oft": (OFT, None),
}


@pytest.fixture
def copy(tmp_path):
    """A folder to damage."""
    return shutil.copytree(golden_path("openvla_small_vocab"), tmp_path / "checkpoint")


def read(folder, wanted=None):
    return read_official(folder, wanted or ModelConfig(), unnorm_key="bridge_orig")


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_has_its_place_and_only_the_value_head_is_new(name):
    wanted, key = CASES[name]
    folder = golden_path(name)
    assert is_official(folder)
    policy = read_official(folder, wanted, unnorm_key=key)
    with torch.device("meta"):
        model = resolve(MODELS, policy.model.architecture, what="model.architecture")(policy.model)
    policy.weights.check(model.state_dict(), may_lack=("value_head.",))
    stored = load_file(folder / "model.safetensors")
    for tensor in stored:
        assert torch.equal(policy.weights.read(tensor), stored[tensor])


def test_oft_brings_heads_statistics_and_proprioception_of_its_own():
    policy = read_official(golden_path("openvla_oft"), OFT)
    assert (policy.model.architecture, policy.model.action_head, policy.model.proprio_dim) == (
        "openvla_oft",
        "laplace",
        8,
    )
    assert policy.normalizer.epsilon == 1e-8
    assert policy.proprio_normalizer is not None
    statistics = json.loads((golden_path("openvla_oft") / "dataset_statistics.json").read_text())
    assert list(policy.normalizer.q01) == statistics["libero_spatial_no_noops"]["action"]["q01"]
    l1 = read_official(golden_path("openvla_oft"), ModelConfig(action_head="l1", chunk_length=8, oft=OFT.oft))
    assert not any(name.startswith("scale_head.") for name in l1.weights)


def test_openvla_has_no_epsilon_and_no_mask_means_all(copy):
    policy = read(copy)
    assert policy.normalizer.epsilon == 0.0
    assert all(policy.normalizer.mask)
    assert (policy.model.architecture, policy.model.decoding, policy.model.chunk_length) == (
        "openvla",
        "autoregressive",
        1,
    )


def test_statistics_are_of_the_kind_that_the_checkpoint_was_trained_with(copy):
    config = json.loads((copy / "config.json").read_text())
    action = config["norm_stats"]["bridge_orig"]["action"]
    for kind, low, high in (("bounds", "min", "max"), ("bounds_q99", "q01", "q99")):
        edit(copy, tiny={**config["tiny"], "action_proprio_normalization_type": kind})
        normalizer = read(copy).normalizer
        assert (normalizer.q01, normalizer.q99) == (tuple(action[low]), tuple(action[high]))
    edit(copy, tiny={**config["tiny"], "action_proprio_normalization_type": "normal"})
    with pytest.raises(ValueError, match="'normal' is unknown; allowed: bounds, bounds_q99"):
        read(copy)


def test_statistics_must_be_of_a_dataset_that_is_there(copy):
    with pytest.raises(ValueError, match=r"has statistics of bridge_orig, libero_spatial_no_noops; say which"):
        read_official(copy, ModelConfig())
    with pytest.raises(ValueError, match="did you mean 'bridge_orig'"):
        read_official(copy, ModelConfig(), unnorm_key="bridge")
    edit(copy, norm_stats={})
    with pytest.raises(ValueError, match=r"neither dataset_statistics\.json nor norm_stats"):
        read(copy)


def test_what_the_checkpoint_settles_may_not_be_said_otherwise(copy):
    with pytest.raises(ValueError, match=r"model.hidden_size = 7, but the checkpoint .* leave it out"):
        read(copy, ModelConfig(hidden_size=7))
    with pytest.raises(ValueError, match=r"model\.dino"):
        read(copy, ModelConfig(dino=TowerConfig(dim=8)))
    assert read(copy, ModelConfig(value_hidden_sizes=(9,))).model.value_hidden_sizes == (9,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_fused_vision_backbone": False}, "only the fused DINOv2-SigLIP"),
        ({"timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_x"], "tiny": {}}, "names 'vit_x'"),
        ({"image_sizes": [42, 56]}, "both towers must take the same image"),
        ({"pad_to_multiple_of": 48}, "action tokens would lie elsewhere"),
        ({"n_action_bins": None, "image_sizes": 42}, "image_sizes = 42, n_action_bins = None: missing"),
        ({"norm_stats": {"bridge_orig": {"proprio": {}}}}, r"statistics of 'bridge_orig' lack action\.q01"),
    ],
)
def test_models_that_are_none_of_ours_are_refused(copy, changes, message):
    edit(copy, **changes)
    with pytest.raises(ValueError, match=message):
        read(copy)


def test_a_llama_of_another_kind_is_refused(copy):
    text = json.loads((copy / "config.json").read_text())["text_config"]
    edit(copy, text_config={**text, "rms_norm_eps": 1e-5})
    with pytest.raises(ValueError, match="rms_norm_eps = 1e-05"):
        read(copy)


def tokenizer_of(size):
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"t{i}": i for i in range(3, size)}}
    return Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))


def test_a_tokenizer_of_another_size_is_refused(copy):
    tokenizer_of(448).save(str(copy / "tokenizer.json"))
    assert read(copy).tokenizer is not None
    tokenizer_of(449).save(str(copy / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"has 449 tokens, but by config\.json .* trained with 448"):
        read(copy)


def test_a_component_that_is_a_pickle_is_refused_with_how_to_convert_it(copy):
    torch.save({"module.model.fc1.bias": torch.zeros(2)}, copy / "action_head--100_checkpoint.pt")
    with pytest.raises(ValueError, match=r"action_head--100_checkpoint\.pt is a pickle.*vlarl_ray.models.unpickle"):
        read(copy)


def test_a_damaged_config_says_so(copy):
    (copy / "config.json").write_text("{")
    assert not is_official(copy)
    with pytest.raises(ValueError, match="is damaged"):
        read(copy)
    (copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        read(copy)


@pytest.mark.parametrize("name", CASES)
def test_an_export_has_the_tensors_config_and_statistics_that_were_imported(name, tmp_path):
    wanted, key = CASES[name]
    source = golden_path(name)
    policy = import_policy(source, tmp_path / "policy", wanted, unnorm_key=key, seed=0)
    folder = export_policy(policy, tmp_path / "out")
    for file in ("config.json", "dataset_statistics.json"):
        if (source / file).exists():
            assert json.loads((folder / file).read_text()) == json.loads((source / file).read_text())
    for file in source.glob("*.safetensors"):
        stored, written = load_file(file), load_file(folder / file.name)
        assert stored.keys() == written.keys()
        assert all(torch.equal(written[tensor], stored[tensor]) for tensor in stored)
        assert all(written[tensor].dtype == stored[tensor].dtype for tensor in stored)


def test_quest_is_imported_with_a_table_of_instructions_and_goes_back_as_it_came(tmp_path):
    source = shutil.copytree(golden_path("quest"), tmp_path / "checkpoint")
    assert is_official(source)
    with pytest.raises(ValueError, match="has no `instructions`; list there what the policy was taught"):
        read_official(source, ModelConfig())
    vectors, known = torch.randn(2, 20, generator=torch.Generator().manual_seed(0)), ["push the plate", "open the door"]
    edit(source, instructions=known)
    save_file({"task_embeddings": vectors}, source / "task_embeddings.safetensors")
    model = load_model(import_policy(source, tmp_path / "policy", ModelConfig(), unnorm_key=None, seed=0))
    published = load_quest_official(source, instructions=known, task_embeddings=vectors).state_dict()
    assert published.keys() == model.state_dict().keys()
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, published[name])}
    assert all(name.startswith("value_head.") for name in published.keys() - same)
    folder = export_policy(tmp_path / "policy", tmp_path / "out")
    assert json.loads((folder / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    for file in source.glob("*.safetensors"):
        stored, written = load_file(file), load_file(folder / file.name)
        assert stored.keys() == written.keys()
        assert all(torch.equal(written[tensor], stored[tensor]) for tensor in stored)


def test_a_published_checkpoint_is_not_exported_again(copy, tmp_path):
    with pytest.raises(ValueError, match="published layout already"):
        export_policy(copy, tmp_path / "out")
