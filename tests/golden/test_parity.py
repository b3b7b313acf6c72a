"""The parity command: every array of the golden folders is compared and agrees, and whatever is wrong is told."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.golden_data import GOLDEN, golden_path
from tests.reference_folder import write_oft, write_openvla, write_quest
from vlarl_ray.models.parity import FAILED, OK, UNKNOWN, examine, main
from vlarl_ray.models.parity_openvla import OUTSIDE
from vlarl_ray.models.parity_quest import OUTSIDE as NO_CODE

UNCOVERED = {
    "openvla": set(),
    "openvla_small_vocab": set(),
    "openvla_oft": set(),
    "quest": set(),
    "openvla_preprocess": {"an input", "of TensorFlow's codec", "the folder has no tokenizer.json"},
    "advantages": {"counts masked and invalid tokens"},
    "openvla_7b_parameters.json": set(),
}
NUM_ARRAYS = {"openvla": 37, "openvla_small_vocab": 37, "openvla_oft": 43, "quest": 22}
EXACT = (
    "_uint8", "_resized", "_without_jpeg", "_center_cropped", "_tokens", "_ids", "_index", "_mask",
    "code_indices", "greedy_indices", "top5_indices", "code_levels",
)  # fmt: skip


def report_of(path):
    [report] = examine(path)
    return report


def failures(path):
    return {row.name: row.detail for row in report_of(path).rows if row.status == "FAIL"}


@pytest.fixture
def copy(tmp_path):
    """A folder to damage."""
    return shutil.copytree(golden_path("openvla_small_vocab"), tmp_path / "some folder")


def edit_arrays(path, change):
    arrays = dict(np.load(path).items())
    change(arrays)
    np.savez(path, **arrays)


@pytest.mark.parametrize("name", UNCOVERED)
def test_every_golden_array_is_compared_and_agrees(name):
    report = report_of(golden_path(name))
    assert report.exit_status == OK
    assert not [row for row in report.rows if row.status == "FAIL"]
    reasons = {row.detail for row in report.rows if row.status == "not covered"}
    assert {known for known in UNCOVERED[name] for reason in reasons if reason.startswith(known)} == UNCOVERED[name]
    assert all(reason.startswith(tuple(UNCOVERED[name])) for reason in reasons)
    names = {row.name for row in report.rows}
    if name in NUM_ARRAYS:
        assert set(np.load(golden_path(name, "outputs.npz"))) <= names
        assert len(np.load(golden_path(name, "outputs.npz"))) == NUM_ARRAYS[name]
        path = GOLDEN / name / "grad_norms.json"
        gradients = {f"gradient of {n}" for n in json.loads(path.read_text() if path.exists() else "{}")}
        assert (name == "quest") == (not gradients)
        assert gradients <= names
    assert all(row.difference == 0 for row in report.rows if row.status == "ok" and row.name.endswith(EXACT))


def test_a_folder_of_folders_is_walked():
    reports = list(examine(golden_path()))
    assert {report.path.name for report in reports} == UNCOVERED.keys()
    assert all(report.exit_status == OK for report in reports)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        ("vision_backbone.featurizer.blocks.0.ls1.scale_factor", "dino_patches"),
        ("vision_backbone.fused_featurizer.blocks.1.mlp.fc1.bias", "siglip_patches"),
        ("projector.fc3.bias", "projected_patches"),
        ("language_model.model.layers.1.mlp.down_proj.weight", "prompt0_hidden_2"),
        ("language_model.lm_head.weight", "batch_entropy"),
    ],
)
def test_a_changed_tensor_fails(copy, tensor, expected, capsys):
    tensors = load_file(copy / "model.safetensors")
    tensors[tensor] += 0.05 * torch.randn(tensors[tensor].shape, generator=torch.Generator().manual_seed(0))
    save_file(tensors, copy / "model.safetensors")
    assert expected in failures(copy)
    assert main([str(copy)]) == FAILED
    assert "FAIL" in capsys.readouterr().out


def test_a_missing_output_array_fails(copy):
    edit_arrays(copy / "outputs.npz", lambda arrays: arrays.pop("prompt1_actions"))
    assert failures(copy) == {"prompt1_actions": "meta.json lists it, but outputs.npz lacks it"}


def test_a_missing_input_array_fails_and_what_depends_on_it_is_named(copy):
    edit_arrays(copy / "inputs.npz", lambda arrays: arrays.pop("batch_labels"))
    report = report_of(copy)
    assert set(failures(copy)) == {"batch_labels"}
    uncovered = {row.name: row.detail for row in report.rows if row.status == "not covered"}
    assert uncovered["batch_loss"] == uncovered["grad_norms.json"] == "inputs.npz lacks batch_labels"


def test_an_unknown_output_array_is_named(copy):
    edit_arrays(copy / "outputs.npz", lambda arrays: arrays.update(prompt0_novelty=np.zeros(3), x=np.zeros(2)))
    report = report_of(copy)
    unknown = {row.name for row in report.rows if (row.status, row.detail) == ("not covered", "unknown name")}
    assert (unknown, report.exit_status) == ({"prompt0_novelty", "x"}, OK)


def test_arrays_may_be_of_other_precision(copy):
    def narrow(arrays):
        arrays |= {name: array.astype(np.int32) for name, array in arrays.items() if array.dtype == np.int64}
        arrays |= {name: array.astype(np.float64) for name, array in arrays.items() if array.dtype == np.float32}

    for file in ("inputs.npz", "outputs.npz"):
        edit_arrays(copy / file, narrow)
    assert {row.status for row in report_of(copy).rows} == {"ok"}


def test_wrong_statistics_fail(copy):
    meta = json.loads((copy / "meta.json").read_text())
    swapped = {**meta, "unnorm_keys": meta["unnorm_keys"][1:2] + meta["unnorm_keys"][1:]}
    (copy / "meta.json").write_text(json.dumps(swapped))
    assert set(failures(copy)) == {"prompt0_actions"}
    (copy / "meta.json").write_text(json.dumps({**meta, "unnorm_keys": ["nonesuch"] * 3}))
    assert "unnorm_key = 'nonesuch' is not in" in failures(copy)["prompt0_action_tokens"]


def test_values_that_are_not_numbers_and_other_shapes_fail(copy):
    def change(arrays):
        arrays["batch_loss"][...] = np.nan
        arrays["batch_entropy"] = arrays["batch_entropy"][1:]
        arrays["prompt0_action_tokens"][2] += 1

    edit_arrays(copy / "outputs.npz", change)
    found = {(row.name, row.detail) for row in report_of(copy).rows if row.status == "FAIL"}
    assert {
        ("batch_loss", ""),
        ("batch_entropy", "of this shape in meta.json, 23 in outputs.npz"),
        ("batch_entropy", "ours has shape 24"),
        ("prompt0_action_tokens", "decoded from the action bins"),
    } <= found


@pytest.mark.parametrize(("factor", "fails"), [(1.0005, False), (1.002, True), (None, True)])
def test_gradient_norms_agree_to_a_thousandth(copy, factor, fails):
    path, name = copy / "grad_norms.json", "projector.fc2.weight"
    norms = json.loads(path.read_text())
    path.write_text(json.dumps({**norms, name: None if factor is None else norms[name] * factor}))
    assert (f"gradient of {name}" in failures(copy)) == fails


def test_folders_that_nobody_knows_or_that_do_not_exist(tmp_path, capsys):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "notes.txt").write_text("nothing")
    assert main([str(tmp_path)]) == UNKNOWN
    printed = capsys.readouterr().out
    assert "looked for" in printed
    assert "gae.json or rloo.json" in printed
    assert main([str(tmp_path / "nowhere")]) == UNKNOWN
    assert "does not exist" in capsys.readouterr().out


def test_a_failure_says_more_than_an_unknown_folder(copy, tmp_path, capsys):
    (copy / "model.safetensors").write_bytes(b"cut short")
    (tmp_path / "unknown").mkdir()
    assert main([str(tmp_path / "unknown"), str(copy)]) == FAILED
    assert "is cut short" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "array", "change"),
    [
        ("images.npz", "image1_letterbox_pixel_values", 1e-4),
        ("images.npz", "image2_resized_uint8", 1),
        ("resize_crop.npz", "frame1_resized", 1),
        ("resize_crop.npz", "frame0_center_cropped", 2),
        ("action_tokenizer.npz", "token_ids_f32", 1),
        ("action_tokenizer.npz", "bin_centers", 1e-6),
    ],
)
def test_changed_preprocessing_fails(tmp_path, file, array, change):
    folder = shutil.copytree(golden_path("openvla_preprocess"), tmp_path / "copy")

    def shift(arrays):
        if arrays[array].dtype.kind == "f":
            arrays[array].flat[7] += change
        else:
            arrays[array].flat[7] ^= change

    edit_arrays(folder / file, shift)
    assert array in failures(folder)
    assert {array.partition("_")[0], "decoded"} >= {name.partition("_")[0] for name in failures(folder)}


def test_changed_prompts_and_a_missing_processor_are_told(tmp_path):
    folder = shutil.copytree(golden_path("openvla_preprocess"), tmp_path / "copy")
    for name in ("images.npz", "resize_crop.npz", "action_tokenizer.npz"):
        (folder / name).unlink()
    text = (folder / "prompts.json").read_text()
    (folder / "prompts.json").write_text(text.replace("take to pick", "take  to pick", 1))
    assert set(failures(folder)) == {"prompts[0].inference_prompt"}
    shutil.copy(golden_path("openvla_preprocess", "images.npz"), folder)
    (folder / "preprocessor_config.json").unlink()
    uncovered = {row.name: row.detail for row in report_of(folder).rows if row.status == "not covered"}
    assert "preprocessor_config.json is missing" in uncovered["image0_pixel_values"]


def test_changed_advantages_fail(tmp_path):
    for name, change in (("gae.json", "value_targets"), ("rloo.json", "advantages_recovered_from_ript")):
        folder = tmp_path / name.removesuffix(".json")
        folder.mkdir()
        content = json.loads(golden_path("advantages", name).read_text())
        case = content["cases"][3]
        values = case["outputs"]["reward_smdp__discount_smdp"] if name == "gae.json" else case
        values[change][0] += 1e-5
        (folder / name).write_text(json.dumps(content))
        [failed] = failures(folder)
        assert failed.startswith(f"{folder.name}[3].")
        assert failed.endswith(change)


def test_parameter_lists_of_other_sizes_and_with_faults(tmp_path):
    listed = {
        name: list(tensor.shape) for name, tensor in load_file(golden_path("openvla", "model.safetensors")).items()
    }
    path = tmp_path / "parameters.json"
    path.write_text(json.dumps(listed))
    assert (report_of(path).exit_status, len(report_of(path).rows)) == (OK, len(listed))
    listed["projector.fc2.bias"] = [23]
    listed["extra"] = [1]
    del listed["vision_backbone.featurizer.norm.bias"]
    path.write_text(json.dumps(listed))
    assert set(failures(path)) == {"projector.fc2.bias", "extra", "vision_backbone.featurizer.norm.bias"}


@pytest.mark.parametrize("num_prompts", [2, 5])
def test_openvla_folders_of_other_sizes(tmp_path, num_prompts):
    folder = write_openvla(tmp_path / "other", seed=num_prompts, num_prompts=num_prompts)
    report = report_of(folder)
    assert {row.status for row in report.rows} == {"ok"}
    assert {f"prompt{num_prompts - 1}_hidden_3", "batch_entropy", "siglip_patches"} <= {row.name for row in report.rows}
    assert np.load(folder / "outputs.npz")["prompt0_actions"].shape == (5,)


def test_tokens_outside_the_action_bins_are_not_covered_but_all_else_is(tmp_path):
    rows = report_of(write_openvla(tmp_path / "other", inside=False)).rows
    uncovered = [(row.name, row.detail) for row in rows if row.status == "not covered"]
    names = [f"prompt{i}_{name}" for i in (0, 1) for name in ("generated_ids", "action_tokens")]
    assert uncovered == [(name, OUTSIDE) for name in names if name in dict(uncovered)]
    assert "prompt0_action_tokens" in dict(uncovered)
    assert all(row.status == "ok" for row in rows if row.name not in dict(uncovered))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_cameras": 1, "action_head": "l1", "chunk_length": 3},
        {"num_cameras": 3, "proprio_dim": 6, "chunk_length": 4, "kind": "bounds", "num_prompts": 3},
        {"num_cameras": 2, "action_head": "tokens", "chunk_length": 2},
    ],
    ids=str,
)
def test_oft_folders_of_other_sizes(tmp_path, settings):
    folder = write_oft(tmp_path / "other", seed=3, **settings)
    report = report_of(folder)
    assert {row.status for row in report.rows} == {"ok"}
    names = {row.name for row in report.rows}
    assert {"prompt1_discrete_tokens", "batch_token_loss", "prompt1_hidden_3", "batch_action_mask"} <= names
    assert ("ript_mean" in names) == (settings.get("action_head") != "tokens")
    assert ("ript_logprob_clip_m1_p025" in names) == ("action_head" not in settings)
    assert ("projected_proprio" in names) == ("proprio_dim" in settings)


def test_mistaken_kind_of_bounds_fails(tmp_path):
    folder = write_oft(tmp_path / "other", kind="bounds", action_head="l1")
    config = json.loads((folder / "config.json").read_text())
    config["tiny"]["action_proprio_normalization_type"] = "bounds_q99"
    (folder / "config.json").write_text(json.dumps(config))
    assert {"prompt0_actions", "prompt0_discrete_actions"} <= set(failures(folder))


@pytest.mark.parametrize("component", ["action_head", "scale_head", "proprio_projector"])
def test_a_changed_component_fails(tmp_path, component):
    folder = write_oft(tmp_path / "other", proprio_dim=4)
    path = folder / f"{component}--9_checkpoint.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(path).items()}, path)
    expected = {"action_head": "ript_mean", "scale_head": "ript_log_b", "proprio_projector": "projected_proprio"}
    assert expected[component] in failures(folder)


@pytest.fixture
def quest_copy(tmp_path):
    """A folder to damage."""
    return shutil.copytree(golden_path("quest"), tmp_path / "some folder")


@pytest.mark.parametrize(
    ("tensor", "expected", "untouched"),
    [
        ("autoencoder.conv_block.blocks.1.block.0.conv.weight", "conv_features", "greedy_logits"),
        ("autoencoder.encoder.layers.1.linear2.bias", "encoder_z", "conv_features"),
        ("autoencoder.vq.project_in.bias", "code_levels", "encoder_z"),
        ("autoencoder.decoder.layers.0.multihead_attn.in_proj_weight", "decoded_random_indices", "codes"),
        ("image_encoders.agentview_rgb.block_3.downsample.1.running_var", "image_embedding_agentview_rgb", "codes"),
        ("lowdim_encoders.gripper_states.projection.0.weight", "lowdim_embedding_gripper_states", "codes"),
        ("task_encoder.weight", "context", "image_embedding_agentview_rgb"),
        ("policy_prior.decoder.layers.1.self_attn.in_proj_weight", "prior_nll", "context"),
        ("policy_prior.head.bias", "top5_probs", "greedy_actions"),
    ],
)
def test_a_changed_tensor_of_quest_fails(quest_copy, tensor, expected, untouched):
    tensors = load_file(quest_copy / "model.safetensors")
    tensors[tensor] += 0.1 * torch.rand(tensors[tensor].shape, generator=torch.Generator().manual_seed(0))
    save_file(tensors, quest_copy / "model.safetensors")
    assert expected in failures(quest_copy)
    assert untouched not in failures(quest_copy)
    assert main([str(quest_copy)]) == FAILED


@pytest.mark.parametrize(
    "array", ["code_indices", "greedy_indices", "top5_indices", "context", "ript_logprobs_of_greedy"]
)
def test_a_changed_output_of_quest_fails(quest_copy, array):
    def shift(arrays):
        arrays[array].flat[3] += 2e-4 if arrays[array].dtype.kind == "f" else 1

    edit_arrays(quest_copy / "outputs.npz", shift)
    assert array in failures(quest_copy)
    assert main([str(quest_copy)]) == FAILED


def test_missing_arrays_of_quest_and_what_depends_on_them_are_named(quest_copy):
    edit_arrays(quest_copy / "outputs.npz", lambda arrays: arrays.pop("codes"))
    edit_arrays(quest_copy / "inputs.npz", lambda arrays: arrays.pop("obs_gripper_states"))
    report, lacks = report_of(quest_copy), "inputs.npz lacks obs_gripper_states"
    assert failures(quest_copy) == {
        "codes": "meta.json lists it, but outputs.npz lacks it",
        "obs_gripper_states": "meta.json lists it, but inputs.npz lacks it",
    }
    uncovered = {row.name: row.detail for row in report.rows if row.status == "not covered"}
    assert set(uncovered.values()) == {lacks}
    seen = {"lowdim_embedding_gripper_states", "context", "prior_logits", "greedy_actions", "top5_probs"}
    assert seen <= uncovered.keys()
    assert not {"image_embedding_agentview_rgb", "lowdim_embedding_joint_states"} & uncovered.keys()
    assert report.exit_status == FAILED


def test_quest_checkpoints_that_are_of_another_variant_or_damaged_are_told_apart(quest_copy):
    config = json.loads((quest_copy / "config.json").read_text())
    other = {**config, "autoencoder": {**config["autoencoder"], "vq_type": "vq"}}
    (quest_copy / "config.json").write_text(json.dumps(other))
    report = report_of(quest_copy)
    assert (report.exit_status, report.counts["not covered"]) == (UNKNOWN, NUM_ARRAYS["quest"])
    assert "autoencoder.vq_type = 'vq' is not supported" in report.rows[0].detail
    (quest_copy / "config.json").write_text(json.dumps({**config, "image_embed_dim": 26}))
    assert "image_encoders.agentview_rgb" in failures(quest_copy)["conv_features"]
    assert report_of(quest_copy).exit_status == FAILED


@pytest.mark.parametrize(
    "settings",
    [
        {"cameras": ("front", "left", "wrist"), "batch": 2, "top": 5},
        {"task_encoding": "embedding", "cameras": (), "lowdim_hidden_sizes": (6,), "fsq_levels": (7, 5)},
        {
            "lowdim": (),
            "conv_kernels": (5, 3, 3, 3),
            "conv_strides": (2, 2, 2, 1),
            "block_length": 24,
            "prior_layers": 3,
        },
    ],
    ids=str,
)
def test_quest_folders_of_other_sizes(tmp_path, settings):
    folder = write_quest(tmp_path / "other", seed=4, **settings)
    report = report_of(folder)
    assert {row.status for row in report.rows} == {"ok"}
    names = {row.name for row in report.rows}
    images = {name for name in names if name.startswith("image_embedding_")}
    assert images == {f"image_embedding_{camera}" for camera in settings.get("cameras", ("image",))}
    assert {"reconstructed_actions", "prior_nll", "ript_logprobs_of_greedy"} <= names
    assert f"top{settings.get('top', 4)}_probs" in names
    (folder / "meta.json").unlink()
    edit_arrays(
        folder / "inputs.npz",
        lambda arrays: arrays.update({n: a.astype(float) for n, a in arrays.items() if a.dtype == np.float32}),
    )
    assert {row.status for row in report_of(folder).rows} == {"ok"}


def test_outputs_of_the_prior_that_are_no_codes_are_not_drawn_but_all_else_is_compared(tmp_path):
    folder = write_quest(tmp_path / "other", prior_vocab_size=200, batch=6)
    rows = report_of(folder).rows
    uncovered = [(row.name, row.detail) for row in rows if row.status == "not covered"]
    assert uncovered == [("greedy_indices", NO_CODE)]
    assert all(row.status == "ok" for row in rows if (row.name, row.detail) not in uncovered)
    assert np.load(folder / "outputs.npz")["prior_logits"].shape == (6, 4, 200)
