"""Measuring a run: timers, the catalogue of metric names, writers. Imports neither torch nor ray.

The table of episodes is in `vlarl_ray.metrics.episodes`, which needs pyarrow.
"""

from vlarl_ray.metrics.catalogue import METRICS, Metric, MetricValue, describe_metric, is_timing_metric
from vlarl_ray.metrics.logger import MetricsLogger, MetricsSettings, read_jsonl
from vlarl_ray.metrics.rollout import summarize_rollout
from vlarl_ray.metrics.sinks import MetricSink, ProgressLogHandler, ProgressSink, TensorBoardSink, WandbSink
from vlarl_ray.metrics.timer import Timer

__all__ = [
    "METRICS",
    "Metric",
    "MetricSink",
    "MetricValue",
    "MetricsLogger",
    "MetricsSettings",
    "ProgressLogHandler",
    "ProgressSink",
    "TensorBoardSink",
    "Timer",
    "WandbSink",
    "describe_metric",
    "is_timing_metric",
    "read_jsonl",
    "summarize_rollout",
]
