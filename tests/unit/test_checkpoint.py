"""Checkpoints: what was committed comes back bit by bit, and what was damaged never does."""

import json
import logging
import pathlib
import pickle

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import fs

from vlarl_ray.checkpoint import MANIFEST, STATE, CheckpointError, _canonical, _sha256, commit, load_latest

STATE_AT = {10: {"iteration": 10, "lr": 0.1 + 0.2}, 20: {"iteration": 20, "lr": 1e-5}}
FILES = ["adapter.safetensors", "optimizer.safetensors", STATE, MANIFEST]


def arrays_at(step):
    rng = np.random.default_rng(step)
    return {
        "adapter": {"q.A": rng.normal(size=(4, 8)).astype(np.float32), "q.B": np.zeros((8, 4), np.float32)},
        "optimizer": {"step": np.array([step]), "m": rng.normal(size=(3,))},
    }


def commit_step(run_dir, step, *, keep=2, filesystem=None):
    state = STATE_AT.get(step, {"iteration": step})
    return commit(str(run_dir), step, arrays=arrays_at(step), state=state, keep=keep, filesystem=filesystem)


def assert_is_step(checkpoint, step):
    assert checkpoint is not None
    assert checkpoint.step == step
    assert checkpoint.state == STATE_AT.get(step, {"iteration": step})
    expected = arrays_at(step)
    assert checkpoint.arrays.keys() == expected.keys()
    for name, tensors in expected.items():
        assert checkpoint.arrays[name].keys() == tensors.keys()
        for key, tensor in tensors.items():
            np.testing.assert_array_equal(checkpoint.arrays[name][key], tensor)
            assert checkpoint.arrays[name][key].dtype == tensor.dtype


@pytest.fixture
def two_commits(tmp_path):
    commit_step(tmp_path, 10)
    newest = pathlib.Path(commit_step(tmp_path, 20))
    return tmp_path, newest


def test_a_commit_comes_back_exactly(two_commits):
    assert_is_step(load_latest(str(two_commits[0])), 20)


def test_a_fresh_run_dir_has_no_checkpoint(tmp_path):
    assert load_latest(str(tmp_path / "new")) is None


def test_a_uri_works_like_a_path(tmp_path):
    commit_step(tmp_path.as_uri(), 10)
    assert_is_step(load_latest(tmp_path.as_uri()), 10)
    assert_is_step(load_latest(str(tmp_path)), 10)


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_byte_is_detected_and_the_previous_one_used(two_commits, name, caplog):
    run_dir, newest = two_commits
    good = (newest / name).read_bytes()
    positions = range(len(good)) if name == MANIFEST else range(0, len(good), 7)
    for position in positions:
        bad = bytearray(good)
        bad[position] ^= 1
        (newest / name).write_bytes(bad)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert load_latest(str(run_dir)).step == 10, f"byte {position} of {name}"
        assert name in caplog.text
        assert newest.name in caplog.text


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncate", "empty", "delete", "extend"])
def test_damaged_files_fall_back_to_the_previous_commit(two_commits, name, damage, caplog):
    run_dir, newest = two_commits
    data = (newest / name).read_bytes()
    if damage == "delete":
        (newest / name).unlink()
    else:
        (newest / name).write_bytes({"truncate": data[:-1], "empty": b"", "extend": data + b" "}[damage])
    with caplog.at_level(logging.WARNING):
        assert_is_step(load_latest(str(run_dir)), 10)
    assert name in caplog.text


@pytest.mark.parametrize("content", ["{}", "[]", "null", "[" * 100_000, '{"body": {"files": 3}, "sha256": ""}'])
def test_a_manifest_of_another_shape_falls_back(two_commits, content):
    run_dir, newest = two_commits
    (newest / MANIFEST).write_text(content)
    assert_is_step(load_latest(str(run_dir)), 10)


def test_a_folder_with_the_content_of_another_step_falls_back(two_commits):
    run_dir, newest = two_commits
    older = sorted(newest.parent.iterdir())[0]
    for name in FILES:
        (newest / name).write_bytes((older / name).read_bytes())
    assert_is_step(load_latest(str(run_dir)), 10)


def test_no_intact_checkpoint_is_an_error_not_a_fresh_start(two_commits):
    run_dir, newest = two_commits
    for folder in newest.parent.iterdir():
        (folder / STATE).write_text("{}")
    with pytest.raises(CheckpointError, match=r"none is intact[\s\S]*state.json"):
        load_latest(str(run_dir))


def forge_manifest(folder, name, data):
    """Write a manifest that is consistent in itself and lists `name`."""
    body = json.loads((folder / MANIFEST).read_bytes())["body"]
    body["files"][name] = {"size": len(data), "sha256": _sha256(data)}
    (folder / MANIFEST).write_bytes(_canonical({"body": body, "sha256": _sha256(_canonical(body))}))


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/hostname", "..", "a/b.safetensors", ".hidden", "", ".safetensors", MANIFEST]
)
def test_a_manifest_cannot_name_files_outside_its_folder(two_commits, name, caplog):
    run_dir, newest = two_commits
    (newest.parent / "secret.safetensors").write_bytes(b"x")
    forge_manifest(newest, name, b"x")
    with caplog.at_level(logging.WARNING):
        assert_is_step(load_latest(str(run_dir)), 10)
    assert "no file name of a checkpoint" in caplog.text


def test_a_pickle_in_a_checkpoint_is_not_executed(two_commits):
    class Bomb:
        def __reduce__(self):
            return (pathlib.Path.touch, (run_dir / "executed",))

    run_dir, newest = two_commits
    data = pickle.dumps(Bomb())
    (newest / "adapter.safetensors").write_bytes(data)
    forge_manifest(newest, "adapter.safetensors", data)
    assert_is_step(load_latest(str(run_dir)), 10)
    assert not (run_dir / "executed").exists()


@pytest.mark.parametrize("name", ["../a", "a/b", "state.json", "a.pt", "", "a\n"])
def test_bad_group_names_are_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(CheckpointError, match="becomes a file name"):
        commit(str(tmp_path), 1, arrays={name: {"x": np.zeros(1)}}, state={}, keep=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("state", [{"a": {1, 2}}, {"a": float("nan")}, {"a": np.float32(1)}])
def test_state_that_is_not_json_is_refused(tmp_path, state):
    with pytest.raises(CheckpointError, match="JSON"):
        commit(str(tmp_path), 1, arrays={}, state=state, keep=2)


def test_keep_below_two_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=">= 2"):
        commit_step(tmp_path, 1, keep=1)


def test_only_the_newest_keep_commits_stay(tmp_path):
    for step in range(1, 6):
        newest = pathlib.Path(commit_step(tmp_path, step, keep=3))
    assert [folder.name[-1] for folder in sorted(newest.parent.iterdir())] == ["3", "4", "5"]


def test_a_damaged_checkpoint_does_not_count_towards_keep(tmp_path):
    commit_step(tmp_path, 1)
    commit_step(tmp_path, 2)
    damaged = pathlib.Path(commit_step(tmp_path, 3))
    (damaged / STATE).write_text("{}")
    newest = pathlib.Path(commit_step(tmp_path, 4))
    (newest / STATE).write_text("{}")
    assert_is_step(load_latest(str(tmp_path)), 2)


def test_a_commit_after_a_fall_back_wins_over_the_damaged_later_step(two_commits):
    run_dir, newest = two_commits
    (newest / STATE).write_text("{}")
    commit_step(run_dir, 15)
    assert_is_step(load_latest(str(run_dir)), 15)


class CrashingHandler(fs.FileSystemHandler):
    """A local file system that fails for good at its n-th change, with half of what was to be written on disk."""

    def __init__(self, changes_until_crash):
        self.local = fs.LocalFileSystem()
        self.left = changes_until_crash

    def change(self):
        self.left -= 1
        if self.left < 0:
            raise OSError("the machine is gone")

    def get_type_name(self):
        return "crashing"

    def get_file_info(self, paths):
        return self.local.get_file_info(paths)

    def get_file_info_selector(self, selector):
        return self.local.get_file_info(selector)

    def create_dir(self, path, recursive):
        self.change()
        self.local.create_dir(path, recursive=recursive)

    def delete_dir(self, path):
        for entry in sorted(pathlib.Path(path).iterdir(), reverse=True):  # the manifest last: the worst order
            self.change()
            entry.unlink()
        self.change()
        self.local.delete_dir(path)

    def delete_file(self, path):
        self.change()
        self.local.delete_file(path)

    def open_input_stream(self, path):
        return self.local.open_input_stream(path)

    def open_output_stream(self, path, metadata):
        self.change()
        self.left -= 1
        if self.left < 0:  # opened, and killed halfway through the bytes
            return half_written(path)
        return self.local.open_output_stream(path)

    def delete_dir_contents(self, path, missing_dir_ok=False):
        raise NotImplementedError

    delete_root_dir_contents = copy_file = move = open_input_file = open_append_stream = delete_dir_contents
    normalize_path = staticmethod(lambda path: path)


def half_written(path):
    class File:
        closed = False

        def write(self, data):
            pathlib.Path(path).write_bytes(bytes(data)[: len(data) // 2])
            raise OSError("the machine is gone")

        def close(self):
            self.closed = True

        def flush(self):
            pass

        def writable(self):
            return True

        readable = seekable = lambda self: False

    return pa.PythonFile(File(), mode="w")


def assert_manifests_vouch_for_what_is_there(run_dir):
    """Manifests are written last and deleted first: a complete one never stands beside missing files."""
    for manifest in (run_dir / "checkpoints").glob(f"*/{MANIFEST}"):
        try:
            files = json.loads(manifest.read_bytes())["body"]["files"]
        except json.JSONDecodeError:
            continue  # torn while it was written
        for name, entry in files.items():
            assert (manifest.parent / name).stat().st_size == entry["size"]


def test_a_crash_anywhere_in_a_commit_leaves_a_valid_checkpoint(tmp_path):
    """Every change of the file system is a crash point, those of the sweep and of the recovering commit included."""
    crash_points = 0
    for changes in range(100):
        run_dir = tmp_path / str(changes)
        for step in (8, 9):
            commit_step(run_dir, step)
        handler = CrashingHandler(changes)
        try:
            commit_step(run_dir, 10, filesystem=fs.PyFileSystem(handler))
        except OSError:
            crash_points += 1
        else:
            break
        found = load_latest(str(run_dir))
        assert found is not None
        assert found.step in (9, 10)
        assert_is_step(found, found.step)
        assert_manifests_vouch_for_what_is_there(run_dir)
        commit_step(run_dir, 20)
        assert_is_step(load_latest(str(run_dir)), 20)
        commit_step(run_dir, 30)  # a torn manifest counts as damage, which goes once `keep` newer ones verify
        left = list((run_dir / "checkpoints").iterdir())
        assert len(left) == 2, "the next commits sweep what the crash left"
        assert all((folder / MANIFEST).exists() for folder in left)
    assert_is_step(load_latest(str(run_dir)), 10)
    assert crash_points == 14  # 1 folder, 2 for each of 4 files, 5 in the sweep
