"""Stored episodes on disk."""

from dataclasses import replace

import numpy as np
import pytest

from tests.fake_episodes import make_task, make_trajectory
from vlarl_ray.episode_store import EpisodeStore
from vlarl_ray.types import StoredEpisode


def episode(key, *, first_success=12):
    frames = np.random.default_rng(len(key)).integers(0, 256, (4, 1, 8, 8, 3), dtype=np.uint8)
    trajectory = make_trajectory(make_task(), first_success=first_success, frames=frames)
    return replace(StoredEpisode.from_trajectory(trajectory), key=key, pinned=key == "a")


def test_what_is_written_is_read_back(tmp_path):
    episodes = [episode("a"), episode("bb")]
    digests = EpisodeStore(tmp_path).write(episodes, list)
    found = EpisodeStore(tmp_path).read(digests, lambda frames: frames)
    assert set(found) == {"a", "bb"}
    for wanted in episodes:
        got = found[wanted.key]
        for name in ("task_id", "instruction", "length", "pinned"):
            assert getattr(got, name) == getattr(wanted, name)
        for name in ("frames", "proprio", "actions", "num_env_steps"):
            np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name))


def test_only_new_episodes_are_fetched_and_written(tmp_path):
    store, fetched = EpisodeStore(tmp_path), []

    def fetch(references):
        fetched.append(len(references))
        return list(references)

    store.write([episode("a")], fetch)
    store.write([episode("a"), episode("bb")], fetch)
    assert fetched == [1, 1]


def test_an_episode_stays_for_one_more_checkpoint_after_it_is_evicted(tmp_path):
    store = EpisodeStore(tmp_path)
    files = []
    for keys in (["a", "bb"], ["a"], ["a"]):
        store.write([episode(key) for key in keys], list)
        files.append({path.stem for path in tmp_path.glob("*.safetensors")})
    assert files == [{"a", "bb"}, {"a", "bb"}, {"a"}]


def test_a_damaged_or_missing_file_is_refused_by_name(tmp_path):
    digests = EpisodeStore(tmp_path).write([episode("a"), episode("bb")], list)
    (tmp_path / "a.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged"):
        EpisodeStore(tmp_path).read(digests, list)
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(ValueError, match=r"a\.safetensors is missing"):
        EpisodeStore(tmp_path).read(digests, list)
    assert not list(tmp_path.glob("*.partial"))
