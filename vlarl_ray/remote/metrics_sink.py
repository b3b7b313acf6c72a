"""Metrics to the Ray dashboard: gauges through `ray.util.metrics`, scraped at the node's metrics port."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ray.util.metrics import Gauge


class RayMetricsSink:
    """Exports every metric of an update as a gauge `ray_vlarl_<area>_<name>`, tagged with the run's name."""

    def __init__(self, run_name: str) -> None:
        self._run_name = run_name
        self._gauges: dict[str, Gauge] = {}

    def write(self, row: Mapping[str, float | int | str | None], *, step: int) -> None:
        """Set the gauges to this update's values."""
        for name, value in row.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self._gauge(name).set(float(value), tags={"run": self._run_name})

    def close(self) -> None:
        """Nothing to flush."""

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            self._gauges[name] = Gauge(
                "vlarl_" + re.sub(r"[^a-zA-Z0-9_]", "_", name), description=name, tag_keys=("run",)
            )
        return self._gauges[name]
