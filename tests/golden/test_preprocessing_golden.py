"""Our preprocessing, action tokenizer and prompts as the published code has them, beyond arrays (see test_parity)."""

import json

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models

from tests.golden_data import golden_path
from vlarl_ray.models import ActionTokenizer
from vlarl_ray.models.preprocessing import apply_frame_steps, jpeg_round_trip
from vlarl_ray.models.tokenizer import PromptTokenizer
from vlarl_ray.preprocessing_config import PreprocessingConfig, official_image_size

SIZE = 42
FRAME_SIZES = {0: SIZE, 1: SIZE, 2: SIZE, 3: 224}


def arrays(name):
    return {key: torch.from_numpy(value) for key, value in np.load(golden_path("openvla_preprocess", name)).items()}


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


def peak_signal_to_noise_db(ours, expected):
    return 10 * np.log10(255**2 / (ours.double() - expected.double()).square().mean().item())


def test_official_processor_config_comes_back_field_by_field(official):
    config = PreprocessingConfig.from_official(official)
    assert config == PreprocessingConfig(interpolation="bicubic")
    assert config.to_official(official_image_size(official)) == official


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


def test_bins_are_the_published_tokenizers(actions):
    tokenizer = ActionTokenizer(int(actions["vocab_size"]))
    edges = actions["bins"]
    assert torch.equal(tokenizer.encode(edges), tokenizer.vocab_size - torch.arange(1, 257))
    below = torch.from_numpy(np.nextafter(edges.numpy()[1:], -1))
    assert torch.equal(tokenizer.encode(below), tokenizer.vocab_size - torch.arange(1, 256))
    centers = tokenizer.decode(tokenizer.vocab_size - torch.arange(1, 256))
    assert torch.equal(centers, actions["bin_centers"].float())


@pytest.mark.parametrize("style", ["openvla", "openvla-v01"])
def test_the_lone_space_ends_a_prompt_once(prompts, style):
    """The vocabulary is Llama's in the one id that matters; everything else is unknown to it."""
    trailing = prompts["trailing_token_id"]
    vocabulary = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "▁": trailing}, unk_token="<unk>"))
    vocabulary.add_special_tokens([AddedToken("<s>", special=True)])
    ids = PromptTokenizer(vocabulary, style).encode("pick up the black bowl")
    assert (ids[0], ids[-1], ids.count(trailing)) == (1, trailing, 1)
