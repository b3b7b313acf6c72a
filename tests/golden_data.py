"""Where the reference numbers lie: beside the checkout, as they are not shipped. CI has them and must not skip."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"


def golden_path(*parts: str) -> Path:
    """Path of a reference file; skips the test where it is missing, and fails it in CI."""
    path = GOLDEN.joinpath(*parts)
    if not path.exists():
        message = f"{path} is not there: the reference numbers are not shipped with the package"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    return path
