"""Our preprocessing, action tokenizer and prompts against every array that the published code gave."""

import json

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models

from tests.golden_data import golden_path
from vlarl_ray.models import ActionTokenizer
from vlarl_ray.models.preprocessing import apply_frame_steps, jpeg_round_trip, preprocess
from vlarl_ray.models.resampling import (
    center_crop_levels,
    lanczos_levels,
    pillow_resize,
    round_levels,
    truncate_levels,
)
from vlarl_ray.models.tokenizer import PromptTokenizer, prompt_text, training_text
from vlarl_ray.preprocessing_config import PreprocessingConfig, official_image_size

SIZE = 42
FRAME_SIZES = {0: SIZE, 1: SIZE, 2: SIZE, 3: 224}
IMAGENET = {
    "means": ((0.485, 0.456, 0.406), (0.5, 0.5, 0.5)),
    "stds": ((0.229, 0.224, 0.225), (0.5, 0.5, 0.5)),
}


def arrays(name):
    return {key: torch.from_numpy(value) for key, value in np.load(golden_path("openvla_preprocess", name)).items()}


@pytest.fixture(scope="module")
def images():
    return arrays("images.npz")


@pytest.fixture(scope="module")
def frames():
    return arrays("resize_crop.npz")


@pytest.fixture(scope="module")
def actions():
    return arrays("action_tokenizer.npz")


@pytest.fixture(scope="module")
def prompts():
    return json.loads(golden_path("openvla_preprocess", "prompts.json").read_text())


@pytest.fixture(scope="module")
def official():
    return json.loads(golden_path("openvla_preprocess", "preprocessor_config.json").read_text())


def pixels_of(image, config):
    return preprocess(image[None, None], config, image_size=SIZE)[0]


def assert_close(ours, expected, tolerance):
    torch.testing.assert_close(ours.double(), expected.double(), rtol=0, atol=tolerance)


def peak_signal_to_noise_db(ours, expected):
    return 10 * np.log10(255**2 / (ours.double() - expected.double()).square().mean().item())


@pytest.mark.parametrize("index", range(5))
def test_processor_gives_the_published_pixels(images, official, index):
    image, config = images[f"image{index}_uint8"], PreprocessingConfig.from_official(official)
    resized = pillow_resize(image[None], (SIZE, SIZE), kernel="bicubic")[0]
    assert torch.equal(resized, images[f"image{index}_resized_uint8"])
    assert_close(pixels_of(image, config), images[f"image{index}_pixel_values"], 1e-6)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("imagenet_norm", IMAGENET),
        ("letterbox", {"resize_strategy": "letterbox"}),
        ("resizecrop", {"resize_strategy": "resize-crop"}),
    ],
)
def test_other_strategies_and_statistics_give_the_published_pixels(images, name, changes):
    config = PreprocessingConfig(interpolation="bicubic", **changes)
    assert_close(pixels_of(images["image1_uint8"], config), images[f"image1_{name}_pixel_values"], 1e-6)


def test_official_processor_config_comes_back_field_by_field(official):
    config = PreprocessingConfig.from_official(official)
    assert config == PreprocessingConfig(interpolation="bicubic")
    assert config.to_official(official_image_size(official)) == official


@pytest.mark.parametrize("index", FRAME_SIZES)
def test_lanczos_gives_the_published_frames(frames, index):
    size = (FRAME_SIZES[index],) * 2
    levels = lanczos_levels(frames[f"frame{index}_jpeg_roundtrip"][None], size)
    assert torch.equal(round_levels(levels)[0], frames[f"frame{index}_resized"])
    if index == 3:
        return  # the frame of real size comes without the arrays in between
    assert_close(levels[0], frames[f"frame{index}_resized_float"], 5e-4)
    straight = round_levels(lanczos_levels(frames[f"frame{index}_uint8"][None], size))[0].int()
    difference = (straight - frames[f"frame{index}_resized_without_jpeg"].int()).abs()
    # frame 0 has one level at 124.499997, which float32 rounds up
    assert difference.sum() <= 1


@pytest.mark.parametrize("index", FRAME_SIZES)
def test_center_crop_gives_the_published_frames(frames, index):
    levels = center_crop_levels(frames[f"frame{index}_resized"][None], 0.9)
    assert torch.equal(truncate_levels(levels)[0], frames[f"frame{index}_center_cropped"])
    if index != 3:
        assert_close(levels[0] / 255, frames[f"frame{index}_center_cropped_float"], 1e-6)


@pytest.mark.parametrize("index", FRAME_SIZES)
def test_frame_steps_after_the_codec_give_the_published_frames_f60(frames, index):
    config = PreprocessingConfig(frame_steps=("lanczos", "center_crop"))
    done = apply_frame_steps(frames[f"frame{index}_jpeg_roundtrip"][None], config, image_size=FRAME_SIZES[index])
    assert torch.equal(done[0], frames[f"frame{index}_center_cropped"])


@pytest.mark.parametrize(
    ("index", "codec_db", "chain_db"), [(0, 38.5, 39.5), (1, 39.5, 40.5), (2, 38, 38.5), (3, 44, 44.5)]
)
def test_pillows_codec_comes_near_tensorflows(frames, index, codec_db, chain_db):
    """Frames 0 to 2 are of hard edges, the worst case; frame 3 has the real size."""
    frame = frames[f"frame{index}_uint8"][None]
    ours, expected = jpeg_round_trip(frame, 95)[0], frames[f"frame{index}_jpeg_roundtrip"]
    assert peak_signal_to_noise_db(ours, expected) > codec_db
    assert (ours.int() - expected.int()).abs().max() <= 16
    config = PreprocessingConfig(frame_steps=("jpeg", "lanczos", "center_crop"))
    done = apply_frame_steps(frame, config, image_size=FRAME_SIZES[index])[0]
    assert peak_signal_to_noise_db(done, frames[f"frame{index}_center_cropped"]) > chain_db


def test_tokens_and_actions_are_the_published_tokenizers(actions):
    tokenizer = ActionTokenizer(int(actions["vocab_size"]))
    for name, ids, decoded in (
        ("actions_f64", "token_ids_f64", "decoded_f64"),
        ("actions_f32", "token_ids_f32", "decoded_f32"),
        ("chunk_actions", "chunk_token_ids", "chunk_decoded"),
    ):
        assert torch.equal(tokenizer.encode(actions[name], allow_infinite=True), actions[ids])
        assert torch.equal(tokenizer.decode(actions[ids]), actions[decoded].float())
    assert torch.equal(tokenizer.decode(actions["all_token_ids"], clip=True), actions["all_decoded"].float())
    assert tokenizer.first_token == int(actions["action_token_begin_idx"]) + 1


def test_bins_are_the_published_tokenizers(actions):
    tokenizer = ActionTokenizer(int(actions["vocab_size"]))
    edges = actions["bins"]
    assert torch.equal(tokenizer.encode(edges), tokenizer.vocab_size - torch.arange(1, 257))
    below = torch.from_numpy(np.nextafter(edges.numpy()[1:], -1))
    assert torch.equal(tokenizer.encode(below), tokenizer.vocab_size - torch.arange(1, 256))
    centers = tokenizer.decode(tokenizer.vocab_size - torch.arange(1, 256))
    assert torch.equal(centers, actions["bin_centers"].float())


def test_prompts_are_the_published_ones(prompts):
    assert len(prompts["prompts"]) == 3
    for expected in prompts["prompts"]:
        instruction = expected["instruction"]
        assert set(expected) == {
            "instruction",
            "inference_prompt",
            "builder_prompt_without_answer",
            "training_text",
            "inference_prompt_v01",
        }
        assert prompt_text(instruction) == expected["inference_prompt"]
        assert prompt_text(instruction) == expected["builder_prompt_without_answer"]
        assert training_text(instruction, "<ACTION_TOKENS>") == expected["training_text"]
        assert prompt_text(instruction, "openvla-v01") == expected["inference_prompt_v01"]


@pytest.mark.parametrize("style", ["openvla", "openvla-v01"])
def test_the_lone_space_ends_a_prompt_once(prompts, style):
    """The vocabulary is Llama's in the one id that matters; everything else is unknown to it."""
    trailing = prompts["trailing_token_id"]
    vocabulary = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "▁": trailing}, unk_token="<unk>"))
    vocabulary.add_special_tokens([AddedToken("<s>", special=True)])
    ids = PromptTokenizer(vocabulary, style).encode("pick up the black bowl")
    assert (ids[0], ids[-1], ids.count(trailing)) == (1, trailing, 1)
