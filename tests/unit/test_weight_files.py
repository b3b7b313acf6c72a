"""Checkpoints in one file or many: what is there is found, what is not is named in full, pickles are refused."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlarl_ray.models.unpickle import unpickle, unpickle_folder
from vlarl_ray.models.weight_files import INDEX, SINGLE, WeightFiles, write_files

TENSORS = {
    "a.weight": torch.arange(12.0).reshape(4, 3),
    "b.weight": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "c.scale": torch.tensor(2.5),
    "d.count": torch.tensor([3]),
}


def write_shards(folder, max_file_bytes=50):
    folder.mkdir(exist_ok=True)
    write_files(folder, TENSORS.items(), max_file_bytes=max_file_bytes)
    return folder


def empty_like(tensors):
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}


@pytest.mark.parametrize(("max_file_bytes", "num_files"), [(10**9, 1), (50, 2), (1, 4)])
def test_what_is_written_is_read_from_however_many_files(tmp_path, max_file_bytes, num_files):
    files = WeightFiles.of_folder(write_shards(tmp_path, max_file_bytes))
    assert len({tensor.path for tensor in files.values()}) == num_files
    assert (tmp_path / INDEX).exists() == (num_files > 1)
    assert not list(tmp_path.glob(".part*"))
    for name, tensor in TENSORS.items():
        assert torch.equal(files.read(name), tensor)
        assert files.read(name).dtype == tensor.dtype
    files.check(empty_like(TENSORS))


def test_an_index_tells_the_total_size_as_the_official_ones_do(tmp_path):
    write_shards(tmp_path)
    size = sum(tensor.numel() * tensor.element_size() for tensor in TENSORS.values())
    assert json.loads((tmp_path / INDEX).read_text())["metadata"] == {"total_size": size}


def test_rows_are_read_alone(tmp_path):
    files = WeightFiles.of_folder(write_shards(tmp_path))
    wanted = {"a.weight": slice(1, 3), "b.weight": slice(2, 2), "c.scale": slice(None)}
    found = {name: tensor.clone() for name, tensor in files.read_rows(wanted)}
    assert torch.equal(found["a.weight"], TENSORS["a.weight"][1:3])
    assert found["b.weight"].shape == (0, 3)
    assert found["c.scale"] == 2.5


def test_every_missing_file_is_named(tmp_path):
    write_shards(tmp_path, 1)
    for number in (2, 3):
        (tmp_path / f"model-0000{number}-of-00004.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 2 of the 4 files.*model-00002-of-00004.*model-00003-of-00004"):
        WeightFiles.of_folder(tmp_path)


def test_every_difference_from_the_config_is_listed(tmp_path):
    files = WeightFiles.of_folder(write_shards(tmp_path))
    expected = empty_like({**TENSORS, "e.bias": torch.zeros(2), "f.bias": torch.zeros(2)})
    del expected["b.weight"]
    expected["a.weight"] = torch.empty(3, 4, device="meta")
    expected["d.count"] = torch.empty(1, device="meta")
    with pytest.raises(ValueError, match="5 tensors are not what the config describes") as error:
        files.check(expected)
    for line in (
        "missing: e.bias", "missing: f.bias", "unknown: b.weight (2, 3)",
        "shape: a.weight is (4, 3), the config says (3, 4)", "type: d.count is I64, the model's is torch.float32",
    ):  # fmt: skip
        assert line in str(error.value)
    with pytest.raises(ValueError, match="4 tensors"):
        files.check(expected, may_lack=("e.",))


def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path):
    write_shards(tmp_path, 1)
    index = json.loads((tmp_path / INDEX).read_text())
    where = index["weight_map"]
    where["nowhere"] = where.pop("a.weight")
    where["b.weight"], where["c.scale"] = where["c.scale"], where["b.weight"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="nowhere is not in model-00001") as error:
        WeightFiles.of_folder(tmp_path)
    assert "holds a.weight, which the index lacks" in str(error.value)
    assert "b.weight is in model-00002-of-00004.safetensors, not in model-00003" in str(error.value)


def test_damaged_files_are_refused(tmp_path):
    write_shards(tmp_path, 10**9)
    path = tmp_path / SINGLE
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cut short"):
        WeightFiles.of_folder(tmp_path)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        WeightFiles.of_folder(tmp_path)


def test_what_is_no_checkpoint_says_so(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"is no checkpoint: it has neither .* but notes\.txt"):
        WeightFiles.of_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        WeightFiles.of_folder(tmp_path / "none")


def test_joined_sets_may_not_share_a_name(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "head.safetensors")
    files = WeightFiles.of_folder(write_shards(tmp_path / "model"))
    joined = files | WeightFiles.of_file(tmp_path / "head.safetensors", prefix="head.")
    assert torch.equal(joined.read("head.weight"), torch.zeros(2))
    with pytest.raises(ValueError, match=r"a\.weight"):
        _ = joined | files
    assert set(joined.renamed({"a.weight": "z"}).without(["c.scale"])) == {"z", "b.weight", "d.count", "head.weight"}


def test_pickles_are_refused_with_what_to_do_and_convert_without_running_code(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    floats = {name: tensor for name, tensor in TENSORS.items() if name != "d.count"}
    torch.save({f"module.{name}": tensor for name, tensor in floats.items()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds pickles \(pytorch_model.bin\).*vlarl_ray.models.unpickle"):
        WeightFiles.of_folder(folder)
    subprocess.run([sys.executable, "-m", "vlarl_ray.models.unpickle", str(folder)], check=True, capture_output=True)
    files = WeightFiles.of_folder(folder)
    assert all(torch.equal(files.read(name), tensor) for name, tensor in floats.items())


def test_a_training_checkpoint_gives_its_weights(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}, "optimizer": {"state": {}}, "step": 3}, tmp_path / "quest.pth")
    assert load_file(unpickle(tmp_path / "quest.pth")).keys() == {"w"}
    with pytest.raises(FileExistsError, match="move it away"):
        unpickle(tmp_path / "quest.pth")


def test_a_pickle_that_would_run_code_is_not_converted(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    with (tmp_path / "evil.pt").open("wb") as file:
        pickle.dump({"w": Evil()}, file, protocol=2)
    with pytest.raises(ValueError, match="more than tensors and plain values"):
        unpickle(tmp_path / "evil.pt")
    assert not list(tmp_path.glob("*.safetensors"))


def test_pickled_shards_keep_their_index(tmp_path):
    where = {}
    for number, name in enumerate(("a.weight", "b.weight"), 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: TENSORS[name]}, tmp_path / file)
        where[name] = file
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert [path.name for path in unpickle_folder(tmp_path)] == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    ]  # fmt: skip
    assert set(WeightFiles.of_folder(tmp_path)) == {"a.weight", "b.weight"}
