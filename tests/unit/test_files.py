"""A file is there whole or not at all."""

import os

import pytest

from vlarl_ray.files import write_whole


def test_content_is_replaced_and_nothing_else_is_left(tmp_path):
    path = write_whole(tmp_path / "new" / "a.json", "first")
    write_whole(path, "second")
    assert path.read_text() == "second"
    assert os.listdir(path.parent) == ["a.json"]


def test_an_interruption_leaves_the_old_content(tmp_path, monkeypatch):
    path = write_whole(tmp_path / "a.json", "old")

    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert path.read_text() == "old"
