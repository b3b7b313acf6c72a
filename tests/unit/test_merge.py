"""What a server is given: merged from the pristine base, rounded so that small changes stay, fingerprinted."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vlarl_ray.models.weight_files import WeightFiles
from vlarl_ray.weights import merge as merge_module
from vlarl_ray.weights.merge import (
    DeltaMeter,
    checksum,
    merge,
    merged,
    names_to_load,
    read_update,
    round_dithered,
    write_update,
)
from vlarl_ray.weights.update import WeightUpdate

NAME = "model.layers.0.mlp.down_proj.weight"
RANK, ROWS, COLUMNS = 32, 256, 192


def make_update(size: float, *, scale: float = 1.0, name: str = NAME) -> WeightUpdate:
    rng = np.random.default_rng(0)
    a = rng.uniform(-1, 1, (RANK, COLUMNS)).astype(np.float32) / COLUMNS**0.5
    b = (size * rng.standard_normal((ROWS, RANK))).astype(np.float32)
    return WeightUpdate(3, scale, {name: (a, b)}, {"value_head.0.weight": np.ones((2, 3), np.float32)})


def base(dtype=torch.bfloat16) -> torch.Tensor:
    return (torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)


# B after updates 1, 10 and 50 at a learning rate of 2e-5: Adam moves each entry by about that.
@pytest.mark.parametrize("num_updates", [1, 10, 50])
def test_a_change_far_below_bf16s_step_is_served(num_updates):
    update, meter = make_update(2e-5 * num_updates), DeltaMeter()
    served = merge(NAME, base(), update, dtype=torch.bfloat16, meter=meter)
    a, b = (torch.from_numpy(part) for part in update.adapters[NAME])
    asked = b @ a
    assert meter.share == pytest.approx(1.0, abs=0.05)
    change = (served.float() - base().float()).double()
    assert float((change * asked).sum() / (asked * asked).sum()) == pytest.approx(meter.share, abs=1e-4)
    nearest = (base().float() + asked).bfloat16().float() - base().float()
    if num_updates == 1:  # rounding to nearest would lose nearly all of it
        assert float((nearest * asked).sum() / (asked * asked).sum()) < 0.2


def test_without_a_change_the_base_is_served_bit_by_bit():
    still = make_update(0.0)
    assert torch.equal(merge(NAME, base(), still, dtype=torch.bfloat16), base())
    assert torch.equal(merge("other.weight", base(), still, dtype=torch.bfloat16), base())


def test_dither_is_fixed_monotone_and_less_than_a_step():
    target = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 5000)
    rounded = round_dithered(target, torch.bfloat16, salt=7)
    assert torch.equal(rounded, round_dithered(target, torch.bfloat16, salt=7))
    assert not torch.equal(rounded, round_dithered(target, torch.bfloat16, salt=8))
    assert ((rounded.float() - target).abs() < target.abs() * 2**-7).all()
    larger = round_dithered(target + target.abs() * 1e-3, torch.bfloat16, salt=7)
    assert (larger >= rounded).all()


def test_in_fp32_nothing_is_rounded():
    update = make_update(0.1, scale=2.0)
    a, b = (torch.from_numpy(part) for part in update.adapters[NAME])
    served = merge(NAME, base(torch.float32), update, dtype=torch.float32)
    torch.testing.assert_close(served, base(torch.float32) + 2.0 * (b @ a), rtol=0, atol=1e-6)
    assert served.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_is_the_same_bits_however_it_is_computed(dtype, monkeypatch):
    """Learner and server may compute on other devices, and their checksums have to be equal."""
    update = make_update(0.1, scale=2.0)
    a, b = update.adapters[NAME]
    total = np.zeros((ROWS, COLUMNS), np.float32)
    for rank in range(RANK):  # NumPy's kernels: each operation rounds once, ranks come in their order
        total += b[:, rank, None] * a[rank]
    target = torch.from_numpy(base(dtype).float().numpy() + total * np.float32(2.0))
    expected = round_dithered(target, dtype, salt=zlib.crc32(NAME.encode()))
    for part in (1, 7 * COLUMNS, 1 << 30):
        monkeypatch.setattr(merge_module, "_CPU_PART", part)
        meter = DeltaMeter()
        served = merge(NAME, base(dtype), update, dtype=dtype, meter=meter)
        assert checksum(served) == checksum(expected)
        assert meter.share == pytest.approx(1.0, abs=0.01)
    product = base(dtype).float() + 2.0 * (torch.from_numpy(b) @ torch.from_numpy(a))
    assert not torch.equal(product, target)  # a matrix product would not do


def test_a_checksum_sees_every_bit_and_the_order():
    tensor = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    known = {checksum(tensor)}
    changed = tensor.clone()
    changed.view(torch.int32)[299, 4] ^= 1
    rows = tensor[torch.tensor([1, 0, *range(2, 300)])]
    for other in (changed, rows, tensor.t(), tensor.reshape(5, 300), tensor.bfloat16(), -tensor):
        assert checksum(other) not in known
        known.add(checksum(other))
    assert checksum(tensor.clone()) in known


def test_fused_groups_are_loaded_whole():
    layer = "model.layers.1.self_attn"
    pristine = [f"{layer}.{part}_proj.weight" for part in "qkvo"] + ["norm.weight", "value_head.0.weight"]
    update = make_update(0.1, name=f"{layer}.v_proj.weight")
    names = names_to_load(update, pristine, [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")])
    assert names == [f"{layer}.{part}_proj.weight" for part in "kqv"] + ["value_head.0.weight"]
    pristine += [f"{layer}.q_proj.bias", f"{layer}.o_proj.bias", "value_head.0.bias"]
    with_biases = names_to_load(update, pristine, [("q_proj", "k_proj", "v_proj")])
    assert set(with_biases) - set(names) == {f"{layer}.q_proj.bias", "value_head.0.bias"}
    with pytest.raises(ValueError, match="which the served model does not have"):
        names_to_load(make_update(0.1), pristine, [])


def test_an_update_survives_its_file(tmp_path):
    update = make_update(0.1, scale=1 / 3)
    write_update(update, tmp_path / "update.safetensors")
    back = read_update(tmp_path / "update.safetensors")
    assert (back.version, back.lora_scale) == (3, 1 / 3)
    for name, pair in update.adapters.items():
        for sent, got in zip(pair, back.adapters[name], strict=True):
            np.testing.assert_array_equal(sent, got)
    np.testing.assert_array_equal(back.tensors["value_head.0.weight"], update.tensors["value_head.0.weight"])


def test_every_merge_starts_from_the_pristine_files(tmp_path):
    save_file({NAME: base()}, tmp_path / "model.safetensors")
    pristine = WeightFiles.of_folder(tmp_path)

    def serve(size: float) -> torch.Tensor:
        [(_, tensor)] = merged(pristine, make_update(size), [NAME], dtype=torch.bfloat16)
        return tensor

    once = serve(0.3)
    for size in (0.1, 0.2, 1.0):
        serve(size)
    assert torch.equal(serve(0.3), once)
