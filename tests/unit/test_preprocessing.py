"""From frames to pixels: the default is what it always was, steps are done in their order, 8-bit resizing is exact."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from tests.small_openvla import INSTRUCTIONS, TINY, observations, tiny
from vlarl_ray.config_loader import ConfigError, load_config
from vlarl_ray.models import load_model, new_policy
from vlarl_ray.models.preprocessing import apply_frame_steps, jpeg_round_trip, preprocess
from vlarl_ray.models.resampling import (
    center_crop_levels,
    lanczos_levels,
    pillow_resize,
    round_levels,
    truncate_levels,
)
from vlarl_ray.preprocessing_config import PreprocessingConfig, official_image_size

LIBERO = PreprocessingConfig(frame_steps=("rotate180", "jpeg", "lanczos", "center_crop"), interpolation="bicubic")
MEANS = (0.484375, 0.455078125, 0.40625, 0.5, 0.5, 0.5)
STDS = (0.228515625, 0.2236328125, 0.224609375, 0.5, 0.5, 0.5)


def frames(*shape, seed=0):
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def pictures(count, height, width):
    """Frames of soft waves and a hard-edged bar, as a camera might see them."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 90 * np.sin(x / (5 + i) + channel) * np.cos(y / 9) for i in range(count) for channel in range(3)]
    stacked = np.stack(waves).reshape(count, 3, height, width).transpose(0, 2, 3, 1)
    stacked[:, height // 3 : height // 2, width // 4 :] = (250, 20, 60)
    return torch.from_numpy(stacked.astype(np.uint8))


def former_preprocess(images, size):
    """What `OpenVLA.preprocess` did before there was a choice."""
    pixels = images[:, 0].permute(0, 3, 1, 2).to(torch.float32).div(255)
    if pixels.shape[-2:] != (size, size):
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (MEANS, STDS))
    return (pixels.repeat(1, 2, 1, 1) - mean) / std


@pytest.mark.parametrize("shape", [(32, 32), (48, 48), (64, 80), (20, 17), (1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_is_bit_for_bit_the_former_behaviour(shape, dtype):
    images = frames(5, 1, *shape)
    ours = preprocess(images, PreprocessingConfig(), image_size=32, dtype=dtype)
    expected = former_preprocess(images, 32).to(dtype)
    assert ours.dtype == dtype
    assert torch.equal(ours, expected)
    assert ours.stride() == expected.stride(), "another memory layout sends convolutions another way"


def test_the_model_does_what_its_config_declares():
    model, declared = tiny(), tiny(preprocessing=LIBERO)
    inputs = observations(model, 2, size=48)
    assert torch.equal(model.preprocess(inputs.images), former_preprocess(inputs.images, 32))
    assert torch.equal(declared.preprocess(inputs.images), preprocess(inputs.images, LIBERO, image_size=32))


def test_preprocessing_and_prompt_style_are_stored_with_the_policy(tmp_path):
    config = dataclasses.replace(TINY, preprocessing=LIBERO, prompt_style="openvla-v01")
    model = new_policy(config, INSTRUCTIONS, 0)
    model.save(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.model_config == config
    assert torch.equal(loaded.encode_prompts(INSTRUCTIONS)[0], model.encode_prompts(INSTRUCTIONS)[0])
    description = json.loads((tmp_path / "config.json").read_text())
    del description["model"]["preprocessing"], description["model"]["prompt_style"]
    (tmp_path / "config.json").write_text(json.dumps(description))
    assert load_model(tmp_path).model_config == TINY, "a policy from before they were declared"


# steps


def test_every_swap_of_neighbouring_steps_changes_the_pixels_f60():
    images = pictures(2, 50, 50)[:, None]
    for first in range(3):
        steps = list(LIBERO.frame_steps)
        steps[first], steps[first + 1] = steps[first + 1], steps[first]
        swapped = dataclasses.replace(LIBERO, frame_steps=tuple(steps))
        first, second = (preprocess(images, config, image_size=32) for config in (LIBERO, swapped))
        assert not torch.equal(first, second), steps


def test_each_order_of_the_steps_gives_frames_of_its_own_f60():
    images = pictures(1, 50, 50)
    orders = [
        apply_frame_steps(images, PreprocessingConfig(frame_steps=order, lanczos_size=32), image_size=64)
        for order in itertools.permutations(LIBERO.frame_steps)
    ]
    distinct = {order.numpy().tobytes() for order in orders}
    # rotation commutes with resize and crop, which look alike from both ends, but not with the codec
    assert len(distinct) >= 12
    assert all(order.shape == (1, 32, 32, 3) for order in orders)


def test_rotation_turns_a_frame_by_half():
    config = PreprocessingConfig(frame_steps=("rotate180",))
    images = frames(2, 5, 7)
    assert torch.equal(apply_frame_steps(images, config, image_size=9), images.flip(1, 2))


def test_lanczos_takes_the_models_size_unless_given_its_own():
    for size, side in ((None, 20), (33, 33)):
        config = PreprocessingConfig(frame_steps=("lanczos",), lanczos_size=size)
        assert apply_frame_steps(frames(1, 40, 30), config, image_size=20).shape == (1, side, side, 3)


def test_jpeg_is_lossy_but_near_and_the_better_the_higher_its_quality():
    images = pictures(2, 40, 56)
    errors = [(jpeg_round_trip(images, quality).float() - images.float()).square().mean() for quality in (95, 60, 10)]
    assert 0 < errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("height", [1, 2, 7, 32])
def test_the_whole_area_and_flat_colours_pass_the_crop_unchanged(height):
    images = frames(2, height, 9)
    assert torch.equal(truncate_levels(center_crop_levels(images, 1.0)), images)
    flat = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, height, 9, 3)
    assert torch.equal(truncate_levels(center_crop_levels(flat, 0.5)), flat)


def test_crop_keeps_a_fraction_of_the_area_around_the_middle():
    ramp = torch.arange(101, dtype=torch.uint8).view(1, 1, -1, 1).expand(1, 11, -1, 3)
    levels = center_crop_levels(ramp, 0.25)[0, 5, :, 0]
    assert levels[[0, 50, 100]].tolist() == pytest.approx([25, 50, 75], abs=1e-4)


# 8-bit resizing

SIZES = [
    ((256, 256), (224, 224)),
    ((64, 64), (42, 42)),
    ((30, 30), (42, 42)),
    ((42, 42), (42, 42)),
    ((42, 90), (42, 42)),
    ((90, 42), (42, 42)),
    ((100, 37), (42, 42)),
    ((116, 80), (42, 42)),
    ((113, 102), (106, 104)),
    ((480, 640), (224, 224)),
    ((3, 200), (200, 3)),
    ((1, 1), (16, 16)),
    ((50, 70), (1, 1)),
    ((37, 53), (37, 54)),
]


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
def test_8_bit_resizing_is_pillows_to_the_bit(kernel):
    image_module = pytest.importorskip("PIL.Image")
    if int(image_module.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow took its passes in another order before version 13")
    code = {"bilinear": image_module.Resampling.BILINEAR, "bicubic": image_module.Resampling.BICUBIC}[kernel]
    rng = np.random.default_rng(0)
    random_sizes = [(tuple(rng.integers(1, 150, 2)), tuple(rng.integers(1, 150, 2))) for _ in range(20)]
    for index, (size, target) in enumerate([*SIZES, *random_sizes]):
        images = frames(2, *map(int, size), seed=index)
        images[1] = (images[1] > 127) * 255  # hard edges overshoot
        expected = [np.asarray(image_module.fromarray(x.numpy()).resize(target[::-1], code)) for x in images]
        ours = pillow_resize(images, (int(target[0]), int(target[1])), kernel=kernel)
        assert np.array_equal(ours.numpy(), np.stack(expected)), (size, target)


def test_lanczos_weighs_by_the_windowed_sinc():
    image = pictures(1, 61, 40)
    rows, columns = (windowed_sinc(61, 24), windowed_sinc(40, 50))
    expected = np.einsum("ih,nhwc,jw->nijc", rows, image.numpy().astype(np.float64), columns)
    assert np.abs(lanczos_levels(image, (24, 50)).numpy() - expected).max() < 1e-3


def windowed_sinc(size_in, size_out):
    ratio = size_in / size_out
    x = (np.arange(size_in) + 0.5 - (np.arange(size_out)[:, None] + 0.5) * ratio) / max(ratio, 1)
    weights = np.sinc(x) * np.sinc(x / 3) * (np.abs(x) < 3)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [(19, 33), (42, 42)])
def test_a_frame_of_the_target_size_passes_every_resize_unchanged(size):
    images = frames(3, *size)
    assert torch.equal(round_levels(lanczos_levels(images, size)), images)
    assert torch.equal(pillow_resize(images, size, kernel="bicubic"), images)


def test_flat_colours_stay_as_they_are():
    flat = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 21, 34, 3)
    for size in ((32, 32), (9, 50)):
        resized = [pillow_resize(flat, size, kernel="bicubic"), round_levels(lanczos_levels(flat, size))]
        for frame in resized:
            assert torch.equal(frame, flat[:, :1, :1].expand(-1, *size, 3))


# cameras and batches

CONFIGS = {
    "default": PreprocessingConfig(),
    "libero": LIBERO,
    "letterbox": PreprocessingConfig(resize_strategy="letterbox", interpolation="bilinear-8bit"),
    "crop": PreprocessingConfig(resize_strategy="resize-crop"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_several_cameras_are_each_camera_alone(name):
    images = frames(3, 4, 40, 56)
    whole = preprocess(images, CONFIGS[name], image_size=32)
    assert whole.shape == (3, 24, 32, 32)
    for camera in range(4):
        alone = preprocess(images[:, camera : camera + 1], CONFIGS[name], image_size=32)
        assert torch.equal(whole[:, 6 * camera : 6 * camera + 6], alone)


@pytest.mark.parametrize("config", [PreprocessingConfig(), LIBERO])
def test_no_observation_gives_no_pixels(config):
    assert preprocess(frames(0, 2, 32, 32), config, image_size=32).shape == (0, 12, 32, 32)


@pytest.mark.parametrize("name", CONFIGS)
def test_pixels_do_not_depend_on_the_batch(name):
    images = frames(70, 1, 40, 40)  # more than are resized at once
    whole = preprocess(images, CONFIGS[name], image_size=32)
    for rows in (slice(0, 1), slice(60, 70), slice(63, 65)):
        assert torch.equal(preprocess(images[rows], CONFIGS[name], image_size=32), whole[rows])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("step", ["lanczos", "center_crop", "bilinear-8bit", "bicubic"])
def test_8_bit_frames_on_a_gpu_are_those_on_the_cpu(step):
    config = PreprocessingConfig(frame_steps=(step,) if step in ("lanczos", "center_crop") else ())
    kernel = "bicubic" if step == "bicubic" else "bilinear"
    results = []
    for images in (frames(8, 256, 320), frames(8, 256, 320).cuda()):
        done = apply_frame_steps(images, config, image_size=224)
        results.append((done if config.frame_steps else pillow_resize(done, (224, 224), kernel=kernel)).cpu())
    assert torch.equal(*results)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(20, 20), (32, 32), (100, 37), (37, 100), (33, 32), (10, 9)])
def test_frames_of_any_shape_fill_the_models_square(name, size):
    pixels = preprocess(frames(2, 1, *size), CONFIGS[name], image_size=32)
    assert pixels.shape == (2, 6, 32, 32)
    assert torch.isfinite(pixels).all()


@pytest.mark.parametrize("interpolation", ["bilinear", "bilinear-8bit", "bicubic"])
def test_interpolations_agree_but_for_rounding_on_soft_pictures(interpolation):
    soft = pictures(1, 90, 90)[:, :30]
    config = PreprocessingConfig(interpolation=interpolation, means=((0.0,) * 3,) * 2, stds=((1.0,) * 3,) * 2)
    pixels, expected = (
        preprocess(soft[:, None], each, image_size=24)
        for each in (config, dataclasses.replace(config, interpolation="bilinear"))
    )
    assert (pixels - expected).abs().max() < 0.1
    assert torch.equal(pixels, expected) == (interpolation == "bilinear")


def test_letterbox_pads_both_towers_with_the_second_ones_mean():
    config = PreprocessingConfig(resize_strategy="letterbox", interpolation="bicubic")
    assert config.letterbox_fill == (127, 127, 127)
    pixels = preprocess(torch.full((1, 1, 16, 32, 3), 255, dtype=torch.uint8), config, image_size=32)[0]
    padding = (127 / 255 - torch.tensor(MEANS)) / torch.tensor(STDS)
    torch.testing.assert_close(pixels[:, 0, 0], padding)
    torch.testing.assert_close(pixels[:, 31, 31], padding)
    torch.testing.assert_close(pixels[:, 16, 16], (1 - torch.tensor(MEANS)) / torch.tensor(STDS))


def test_resize_crop_cuts_the_longer_side_alike_at_both_ends():
    images = torch.zeros(1, 1, 32, 64, 3, dtype=torch.uint8)
    images[..., 16:48, :] = 255
    pixels = preprocess(images, PreprocessingConfig(resize_strategy="resize-crop"), image_size=32)
    assert (pixels[0, 3:] == 1).all()


# official files and configs


def official(**changes):
    return {**PreprocessingConfig(interpolation="bicubic").to_official(224), **changes}


@pytest.mark.parametrize("strategy", ["resize-naive", "letterbox", "resize-crop"])
@pytest.mark.parametrize("interpolation", ["bilinear-8bit", "bicubic"])
def test_official_configs_round_trip(strategy, interpolation):
    config = PreprocessingConfig(resize_strategy=strategy, interpolation=interpolation, means=((0.1, 0.2, 0.3),) * 2)
    written = json.loads(json.dumps(config.to_official(98)))
    assert PreprocessingConfig.from_official(written) == config
    assert official_image_size(written) == 98
    assert written["tvf_letterbox_fill"] == ([25, 51, 76] if strategy == "letterbox" else None)


def test_means_that_the_official_processor_applies_win_over_those_it_names():
    imagenet = [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]]
    assert PreprocessingConfig.from_official(official(means=imagenet)).means == PreprocessingConfig().means
    bare = {key: value for key, value in official(means=imagenet).items() if not key.startswith("tvf_")}
    assert PreprocessingConfig.from_official(bare).means[0] == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"use_fused_vision_backbone": False}, "use_fused_vision_backbone = False: must be true"),
        ({"image_resize_strategy": "stretch"}, "image_resize_strategy = 'stretch': must be resize-naive, letterbox or"),
        ({"image_resize_strategy": None}, "lacks image_resize_strategy"),
        ({"interpolations": ["lanczos", "lanczos"]}, "interpolations = 'lanczos': must be one of bilinear, bicubic"),
        ({"interpolations": ["bicubic", "bilinear"]}, "must hold one entry for each of two towers, and the same"),
        ({"input_sizes": [[3, 224, 224]]}, "input_sizes = .*must hold one entry for each of two towers"),
        ({"input_sizes": [[3, 224, 196]] * 2}, r"input_sizes = .*must be \[3, side, side\]"),
        ({"tvf_normalize_params": None, "stds": [[1, 1, 1]]}, "stds = .*must hold red, green and blue"),
        ({"tvf_do_letterbox": True}, "tvf_do_letterbox = True: contradicts the file's other fields, which give False"),
        ({"tvf_crop_params": [{"output_size": [196, 196]}] * 2}, "tvf_crop_params = .*contradicts"),
    ],
)
def test_official_configs_that_cannot_be_followed_are_refused(changes, expected):
    with pytest.raises(ValueError, match=expected):
        PreprocessingConfig.from_official(official(**changes))


def test_float_interpolation_has_no_official_counterpart():
    with pytest.raises(ValueError, match="allowed for export are bilinear-8bit, bicubic"):
        PreprocessingConfig().to_official(224)


PREFIX = "--model.preprocessing"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([f"{PREFIX}.frame_steps", "[jpg]"], "frame_steps[0] = 'jpg': must be a list, each one of rotate180, jpeg,"),
        ([f"{PREFIX}.frame_steps", "[jpeg, jpeg]"], "frame_steps names 'jpeg' more than once; name it once"),
        ([f"{PREFIX}.crop_area", "0"], "crop_area = 0: must be a number > 0 and <= 1"),
        ([f"{PREFIX}.crop_area", "0.5"], "crop_area = 0.5: has no effect unless model.preprocessing.frame_steps names"),
        ([f"{PREFIX}.lanczos_size", "9"], "lanczos_size = 9: has no effect unless"),
        ([f"{PREFIX}.interpolation", "cubic"], "interpolation = 'cubic': must be one of bilinear, bilinear-8bit,"),
        ([f"{PREFIX}.resize_strategy", "pad"], "resize_strategy = 'pad': must be one of resize-naive, letterbox,"),
        ([f"{PREFIX}.stds", "[[1, 1, 1], [0, 1, 1]]"], "stds[1][0] = 0: must be a list"),
        ([f"{PREFIX}.crop_aera", "0.5"], "did you mean 'model.preprocessing.crop_area'?"),
        (["--model.prompt_style", "v01"], "model.prompt_style = 'v01': must be one of openvla, openvla-v01"),
        (
            ["--model.architecture", "pixel_mlp", f"{PREFIX}.interpolation", "bicubic"],
            "model.preprocessing is not for pixel_mlp",
        ),
    ],
)
def test_a_broken_section_is_refused_by_one_precise_message(overrides, expected):
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert len(caught.value.problems) == 1
    assert expected in caught.value.problems[0]


def test_a_whole_chain_can_be_set_from_the_command_line():
    cfg = load_config(
        None,
        [f"{PREFIX}.frame_steps", "[rotate180, jpeg, lanczos, center_crop]", f"{PREFIX}.interpolation", "bicubic"],
    )
    assert cfg.model.preprocessing == LIBERO
