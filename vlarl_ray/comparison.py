"""Reference arrays against ours: one row for each, with its largest difference and tolerance, or why there is none.

reference arrays, by name ─┬─► the group that knows a name ─► ours ─► Row: ok, FAIL or not covered
                           └─► no group knows it ──────────────────► Row: not covered: unknown name
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

MODEL_TOLERANCE = 1e-4
"""Absolute, of a model's floats in fp32: features, hidden states, logits, log-probabilities."""
UNKNOWN_NAME = "unknown name"


class NotComparableError(Exception):
    """An array cannot be compared; the message says why."""


@dataclass(frozen=True)
class Row:
    """Outcome for one array."""

    name: str
    shape: str
    status: Literal["ok", "FAIL", "not covered"]
    difference: float | None = None
    """Largest absolute one."""
    tolerance: float | None = None
    detail: str = ""
    """How it was compared, or why not."""

    def line(self, name_width: int) -> str:
        """Write it as a line of a table."""
        difference, tolerance = ("" if x is None else f"{x:.1e}" for x in (self.difference, self.tolerance))
        detail = f"  {self.detail}" if self.detail else ""
        return f"{self.name:{name_width}} {self.shape:>14} {difference:>9} {tolerance:>9}  {self.status}{detail}"


@dataclass(frozen=True)
class Ours:
    """What the code here gives for a reference array."""

    value: Any
    """Array, tensor without gradient, number, list of numbers, or text."""
    tolerance: float | None = None
    """None is exact for integers and truth values, and a model's for floats."""
    detail: str = ""


@dataclass(frozen=True)
class NotCovered:
    """Why a known array is not compared."""

    reason: str


@dataclass(frozen=True)
class Group:
    """Arrays that are computed together, once one of them is there to compare with."""

    pattern: str
    """Names that are this group's, as a regular expression."""
    compute: Callable[[], Iterable[tuple[str, Ours | NotCovered]]]
    """Gives names with our values; a name may come more than once, if it is compared in more ways than one."""


def compare(references: Mapping[str, Any], groups: Sequence[Group]) -> list[Row]:
    """Compare every reference array; none is left out.

    Args:
        references: Arrays by name.
        groups: The first whose pattern fits a name is asked for it. What a group gives beyond `references` is dropped.
    """
    computed: dict[int, tuple[dict[str, list[Ours | NotCovered]], Row | None]] = {}
    rows: list[Row] = []
    for name, reference in references.items():
        shape = _shape(reference)
        index = next((i for i, group in enumerate(groups) if re.fullmatch(group.pattern, name)), None)
        if index is None:
            rows.append(Row(name, shape, "not covered", detail=UNKNOWN_NAME))
            continue
        if index not in computed:
            computed[index] = _compute(groups[index])
        found, stopped = computed[index]
        if name in found:
            rows += [_row(name, reference, ours) for ours in found[name]]
        elif stopped is not None:
            rows.append(Row(name, shape, stopped.status, detail=stopped.detail))
        else:
            rows.append(Row(name, shape, "not covered", detail=UNKNOWN_NAME))
    return rows


def compare_one(name: str, reference: Any, ours: Any, *, tolerance: float | None = None, detail: str = "") -> Row:
    """Compare two arrays, or two texts.

    Args:
        name: Of the row.
        reference: Array, number, list of numbers, or text.
        ours: The same of ours.
        tolerance: As in `Ours`.
        detail: Printed behind the row.
    """
    shape = _shape(reference)
    if isinstance(reference, str) or isinstance(ours, str):
        same = reference == ours
        said = detail if same else f"here {ours!r}, there {reference!r}"
        return Row(name, shape, "ok" if same else "FAIL", float(not same), 0.0, said)
    there, here = np.asarray(reference), np.asarray(ours)
    if there.shape != here.shape:
        return Row(name, shape, "FAIL", detail=f"ours has shape {_shape(here)}")
    if tolerance is None:
        tolerance = MODEL_TOLERANCE if there.dtype.kind == "f" else 0.0
    there, here = there.astype(np.float64), here.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinity minus infinity, where both are the same
        difference = float(np.where(there == here, 0.0, np.abs(there - here)).max(initial=0.0))
    is_close = difference <= tolerance  # False for NaN
    return Row(name, shape, "ok" if is_close else "FAIL", difference, tolerance, detail)


def missing(listed: Mapping[str, Any] | None, arrays: Mapping[str, Any], *, file: str) -> list[Row]:
    """Fail for what `meta.json` lists and a file lacks, or has in another shape.

    Args:
        listed: `{name: [shape, dtype]}`; None where there is no list.
        arrays: Of the file.
        file: Its name.
    """
    rows = []
    for name, (shape, _) in (listed or {}).items():
        said = " x ".join(map(str, shape)) or "scalar"
        if name not in arrays:
            rows.append(Row(name, said, "FAIL", detail=f"meta.json lists it, but {file} lacks it"))
        elif _shape(arrays[name]) != said:
            rows.append(Row(name, said, "FAIL", detail=f"of this shape in meta.json, {_shape(arrays[name])} in {file}"))
    return rows


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an `.npz` file, without running pickles.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is damaged, or holds objects.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays.items())
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged, or holds pickles, which are not read: {error}.") from error


def read_json(path: Path) -> Any:
    """Read a JSON file; one that is not there is an empty object.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error


def _compute(group: Group) -> tuple[dict[str, list[Ours | NotCovered]], Row | None]:
    """Run a group as far as it goes; what ended it early is the outcome of all that it still owed."""
    found: dict[str, list[Ours | NotCovered]] = {}
    try:
        for name, ours in group.compute():
            found.setdefault(name, []).append(ours)
    except NotComparableError as error:
        return found, Row("", "", "not covered", detail=str(error))
    except (ValueError, RuntimeError, IndexError) as error:  # of one group: the others still have something to tell
        return found, Row("", "", "FAIL", detail=f"cannot be computed: {error}")
    return found, None


def _row(name: str, reference: Any, ours: Ours | NotCovered) -> Row:
    if isinstance(ours, NotCovered):
        return Row(name, _shape(reference), "not covered", detail=ours.reason)
    return compare_one(name, reference, ours.value, tolerance=ours.tolerance, detail=ours.detail)


def _shape(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    return " x ".join(map(str, np.shape(value))) or "scalar"
