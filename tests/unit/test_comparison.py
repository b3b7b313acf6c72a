import numpy as np
import pytest

from vlarl_ray.comparison import (
    Group,
    NotComparableError,
    NotCovered,
    Ours,
    compare,
    compare_one,
    read_arrays,
    read_json,
)


def outcome(reference, ours, **settings):
    row = compare_one("x", reference, ours, **settings)
    return row.status, row.difference


def test_floats_have_a_models_tolerance_and_integers_none():
    assert outcome(np.float32([1, 2]), np.float32([1, 2.00005])) == ("ok", pytest.approx(5e-5, rel=1e-2))
    assert outcome(np.float32([1, 2]), np.float32([1, 2.0002]))[0] == "FAIL"
    assert outcome(np.array([5]), np.array([6])) == ("FAIL", 1.0)
    assert outcome(np.array([True]), np.array([True])) == ("ok", 0.0)


def test_what_is_not_a_number_fails_and_equal_infinities_agree():
    assert outcome(np.array([np.nan]), np.array([np.nan]))[0] == "FAIL"
    assert outcome(np.array([0.0]), np.array([np.nan]), tolerance=1e9)[0] == "FAIL"
    assert outcome(np.array([-np.inf, 1.0]), np.array([-np.inf, 1.0])) == ("ok", 0.0)
    assert outcome(np.array([np.inf]), np.array([-np.inf]))[0] == "FAIL"


def test_shapes_are_not_broadcast():
    row = compare_one("x", np.zeros((2, 1)), np.zeros(2))
    assert (row.status, row.shape, row.detail) == ("FAIL", "2 x 1", "ours has shape 2")
    assert outcome(np.zeros(0), np.zeros(0)) == ("ok", 0.0)


def test_texts_are_equal_or_not():
    assert outcome("a", "a") == ("ok", 0.0)
    assert compare_one("x", "a", "b").detail == "here 'b', there 'a'"


def test_every_reference_has_its_row_whatever_a_group_does():
    def stops():
        yield "a1", Ours(1.0)
        yield "a1", Ours(2.0, detail="in another way")
        raise ValueError("no more")

    def is_not_comparable():
        yield "b1", NotCovered("for this reason")
        raise NotComparableError("for that reason")

    groups = [Group("a.", stops), Group("b.", is_not_comparable), Group("c", lambda: iter([("d", Ours(0))]))]
    rows = compare({"a1": 1.0, "a2": 1.0, "b1": 0.0, "b2": 0.0, "c": 0.0, "d": 0.0}, groups)
    assert [(row.name, row.status, row.detail) for row in rows] == [
        ("a1", "ok", ""),
        ("a1", "FAIL", "in another way"),
        ("a2", "FAIL", "cannot be computed: no more"),
        ("b1", "not covered", "for this reason"),
        ("b2", "not covered", "for that reason"),
        ("c", "not covered", "unknown name"),
        ("d", "not covered", "unknown name"),
    ]


def test_groups_that_nothing_asks_for_are_not_computed():
    assert compare({}, [Group(".+", lambda: 1 / 0)]) == []  # type: ignore[arg-type, return-value]


def test_damaged_files_say_so(tmp_path):
    for name in ("x.npz", "x.json"):
        (tmp_path / name).write_text("{")
    with pytest.raises(ValueError, match=r"x\.npz is damaged"):
        read_arrays(tmp_path / "x.npz")
    with pytest.raises(ValueError, match=r"x\.json is damaged"):
        read_json(tmp_path / "x.json")
    np.savez(tmp_path / "objects.npz", x=np.array([object()], dtype=object))
    with pytest.raises(ValueError, match="holds pickles"):
        read_arrays(tmp_path / "objects.npz")
    assert read_json(tmp_path / "none.json") == {}
    with pytest.raises(FileNotFoundError, match=r"none\.npz does not exist"):
        read_arrays(tmp_path / "none.npz")
