"""Write a benchmark's figures to `benchmarks/results/`, with the machine, commit and date they belong to."""

from __future__ import annotations

import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

from vlarl_ray.summary import describe_machine, installed_versions

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, figures: dict[str, Any]) -> Path:
    """Store figures as `results/<name>.json`, replacing older ones."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    record = {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "machine": describe_machine(),
        "versions": installed_versions(),
        "figures": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path
