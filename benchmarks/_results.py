"""Write a benchmark's figures to `benchmarks/results/`, with the machine, commit and date they belong to."""

from __future__ import annotations

import datetime
import hashlib
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

import vlarl_ray
from vlarl_ray.summary import describe_machine, installed_versions

RESULTS = Path(__file__).parent / "results"


def current_commit() -> str:
    """Commit of the package that is measured; `+` after it where files of it were changed since."""
    source = Path(vlarl_ray.__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=source, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("rev-parse", "HEAD") or "unknown"
    return f"{commit}+" if git("status", "--porcelain", "--untracked-files=no", ".") else commit


def setup_digest(preset: str, overrides: Sequence[Any] = ()) -> str:
    """Fingerprint of what a run is made with: what the preset says, its comments left out, and the overrides."""
    said = [yaml.safe_load(Path(preset).read_text(encoding="utf-8")), [str(word) for word in overrides]]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def read_result(name: str) -> dict[str, Any]:
    """Return the figures stored last; empty if there are none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["figures"] if path.exists() else {}


def write_result(name: str, figures: dict[str, Any]) -> Path:
    """Store figures as `results/<name>.json`, replacing older ones."""
    record = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": current_commit(),
        "machine": describe_machine(),
        "versions": installed_versions(),
        "figures": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path
