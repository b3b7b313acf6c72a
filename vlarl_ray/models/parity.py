"""Compare this package with reference numbers: folders of inputs, and outputs that other code gave for them.

    python -m vlarl_ray.models.parity FOLDER_OR_FILE ...

folder ─► families that know its files ─► a row for each array ─► table; exit status 0, 1 (FAIL) or 2 (nobody knows it)
folder of folders ─► each of them
JSON file of names and shapes ─► our parameters, on the meta device

Every array of a folder's outputs has a row: `ok`, `FAIL`, or `not covered` with the reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlarl_ray.comparison import Row, read_json
from vlarl_ray.models.openvla_oft import COMPONENTS
from vlarl_ray.models.quest_checkpoint import is_quest
from vlarl_ray.registry import resolve

OK, FAILED, UNKNOWN = 0, 1, 2
"""Exit statuses; where several folders differ, FAILED says more than UNKNOWN."""


@dataclass(frozen=True)
class Family:
    """Folders of one kind."""

    name: str
    looks_for: str
    """Printed where no family knows a folder."""
    knows: Callable[[Path], bool]
    rows: str
    """`module:function` that takes the folder and gives its rows. A text, as the layers below are not all below this
    module: advantages belong to algorithms, which models must not import."""


def _is_openvla(folder: Path) -> bool:
    return _config(folder).get("model_type") == "openvla" and (folder / "outputs.npz").exists()


def _is_oft(folder: Path) -> bool:
    has_component = any(any(folder.glob(f"{component}*")) for component in COMPONENTS)
    return _is_openvla(folder) and (has_component or "num_actions_chunk" in _config(folder).get("tiny", {}))


def _has_any(*files: str) -> Callable[[Path], bool]:
    return lambda folder: any((folder / file).exists() for file in files)


FAMILIES: Sequence[Family] = (
    Family(
        "OpenVLA-OFT",
        "config.json (model_type openvla) and outputs.npz, with action_head*, proprio_projector* or scale_head* beside "
        "them or num_actions_chunk in the config's block `tiny`",
        _is_oft,
        "vlarl_ray.models.parity_oft:rows",
    ),
    Family(
        "OpenVLA",
        "config.json (model_type openvla) and outputs.npz",
        lambda folder: _is_openvla(folder) and not _is_oft(folder),
        "vlarl_ray.models.parity_openvla:rows",
    ),
    Family(
        "QueST",
        "config.json (autoencoder, policy_prior) and outputs.npz",
        lambda folder: is_quest(folder) and (folder / "outputs.npz").exists(),
        "vlarl_ray.models.parity_quest:rows",
    ),
    Family(
        "preprocessing",
        "images.npz, resize_crop.npz, action_tokenizer.npz or prompts.json",
        _has_any("images.npz", "resize_crop.npz", "action_tokenizer.npz", "prompts.json"),
        "vlarl_ray.models.parity_preprocessing:rows",
    ),
    Family(
        "advantages",
        "gae.json or rloo.json",
        _has_any("gae.json", "rloo.json"),
        "vlarl_ray.algorithms.parity:rows",
    ),
)
PARAMETER_LIST = "vlarl_ray.models.parity_parameters:rows"


@dataclass(frozen=True)
class Report:
    """What was found in one folder or file."""

    path: Path
    family: str
    rows: Sequence[Row] = ()
    problem: str = ""
    """Why nothing could be compared."""

    @property
    def exit_status(self) -> int:
        """FAILED if any row is, UNKNOWN if nothing was compared."""
        counts = self.counts
        if counts["FAIL"]:
            return FAILED
        return OK if counts["ok"] else UNKNOWN

    @property
    def counts(self) -> Mapping[str, int]:
        """Rows by status."""
        return {status: sum(row.status == status for row in self.rows) for status in ("ok", "FAIL", "not covered")}

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=0)
        lines = [f"{self.path} ({self.family})" if self.family else str(self.path)]
        lines += [row.line(width) for row in self.rows]
        if self.problem:
            lines.append(self.problem)
        elif self.rows:
            lines.append(", ".join(f"{count} {status}" for status, count in self.counts.items()))
        return "\n".join(lines)


def examine(path: Path) -> Iterator[Report]:
    """Compare a folder, the folders within it, or a parameter list.

    Args:
        path: Folder or JSON file.
    """
    if path.is_file() and is_parameter_list(path):
        yield _report(path, "parameters", PARAMETER_LIST)
        return
    families = [family for family in FAMILIES if path.is_dir() and family.knows(path)]
    for family in families:
        yield _report(path, family.name, family.rows)
    if families:
        return
    inner = [child for child in sorted(path.iterdir()) if _may_hold_references(child)] if path.is_dir() else []
    if not inner:
        yield Report(path, "", problem=_unknown(path))
    for child in inner:
        yield from examine(child)


def is_parameter_list(path: Path) -> bool:
    """Whether a file is JSON that maps names to shapes."""
    try:
        content = read_json(path) if path.suffix == ".json" else None
    except ValueError:
        return False
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(shape, list) and all(type(n) is int for n in shape) for shape in content.values())
    )


def _may_hold_references(child: Path) -> bool:
    if child.is_dir():
        return not child.name.startswith((".", "__")) and any(child.iterdir())
    return is_parameter_list(child)


def _report(path: Path, family: str, target: str) -> Report:
    try:
        rows = resolve({}, target, what="family")(path)
    except (ValueError, OSError, KeyError) as error:  # of one folder: the others still have something to tell
        return Report(path, family, [Row(path.name, "", "FAIL", detail=f"cannot be read: {error}")])
    if not any(row.status != "not covered" for row in rows):
        return Report(path, family, rows, "nothing in this folder could be compared")
    return Report(path, family, rows)


def _unknown(path: Path) -> str:
    if not path.exists():
        return f"{path} does not exist"
    kinds = "\n".join(f"  {family.name}: {family.looks_for}" for family in FAMILIES)
    return f"no reference folder of a known kind; looked for\n{kinds}\n  parameters: a JSON file of names and shapes"


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        config = read_json(folder / "config.json")
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table for each folder of the command line.

    Returns:
        Exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="FOLDER_OR_FILE")
    statuses = set()
    for path in parser.parse_args(arguments).paths:
        for report in examine(path):
            statuses.add(report.exit_status)
            sys.stdout.write(f"{report}\n\n")
            sys.stdout.flush()
    return next(status for status in (FAILED, UNKNOWN, OK) if status in statuses)


if __name__ == "__main__":
    sys.exit(main())
