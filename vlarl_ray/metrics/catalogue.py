"""Every metric a run may log: its name, its unit, what it means. A name that is not here is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from vlarl_ray.registry import suggest

MetricValue = float | int | None
"""None where a metric is undefined, as steps to success without a success."""


@dataclass(frozen=True)
class Metric:
    """One entry of the catalogue."""

    unit: str
    """`1` for ratios, probabilities and other pure numbers."""
    meaning: str


_SECTIONS = {
    "update": "one whole iteration of the main loop",
    "rollout": "episodes: simulation, rendering and inference",
    "score": "the learner's scores of the episodes, where the algorithm needs them",
    "batch": "advantages, returns and masks on the driver",
    "learn": "the optimiser steps",
    "publish": "shipping, merging and verifying weights",
    "evaluate": "held-out evaluation (logged with the iteration that follows it)",
    "checkpoint": "committing a checkpoint (logged with the iteration that follows it)",
}
_PARTS = {
    "reset": "resetting simulators",
    "physics": "stepping simulators",
    "render": "rendering frames",
    "inference": "forward passes of the inference server",
}


def _timing() -> dict[str, Metric]:
    table = {f"time/{name}_s": Metric("s", f"Wall time of {what}.") for name, what in _SECTIONS.items()}
    for name, what in _SECTIONS.items():
        table[f"time/{name}_driver_cpu_s"] = Metric("s", f"CPU time of the driver process during {what}.")
    for name, what in _PARTS.items():
        table[f"time/{name}_cpu_ms_per_decision"] = Metric("ms", f"CPU time of {what}, per decision.")
        table[f"time/{name}_cpu_s"] = Metric("s", f"CPU time of {what}, all episodes of the rollout.")
    return table


_ROLLOUT = {
    "rollout/num_episodes": Metric("episodes", "Attempted episodes."),
    "rollout/num_decisions": Metric("decisions", "Decisions (action chunks) of all attempted episodes."),
    "rollout/env_steps": Metric("env steps", "Env steps executed in all attempted episodes."),
    "rollout/success_rate": Metric("1", "Episodes with success at any env step / attempted episodes."),
    "rollout/success_rate/<task>": Metric("1", "The same for one task; null where it was not drawn."),
    "rollout/last_step_success_rate": Metric("1", "Episodes that are successful at their last env step / attempted."),
    "rollout/episode_return": Metric("reward", "Mean undiscounted return of attempted episodes."),
    "rollout/episode_env_steps": Metric("env steps", "Mean length of attempted episodes."),
    "rollout/steps_to_success": Metric(
        "env steps", "Mean first successful env step, over successes; null without any."
    ),
    "rollout/steps_to_success_all": Metric("env steps", "The same over all episodes, a failure counting the horizon."),
    "rollout/truncated_fraction": Metric("1", "Episodes cut off at the horizon / attempted episodes."),
    "rollout/accept_rate": Metric("1", "Groups used for the update / groups attempted."),
    "rollout/accept_rate/<task>": Metric("1", "The same for one task; null where it was not drawn."),
    "rollout/num_groups": Metric("groups", "Groups used for the update."),
    "rollout/groups_attempted": Metric("groups", "Groups judged, accepted or not."),
    "rollout/duplicates_dropped": Metric("episodes", "Results that arrived a second time and were ignored."),
    "rollout/episodes_redone": Metric("episodes", "Episodes run again after a crash or a deadline."),
    "rollout/workers_restarted": Metric("workers", "Env workers replaced during the iteration."),
    "throughput/env_steps_per_s": Metric("env steps/s", "Env steps / wall time of the rollout."),
    "throughput/decisions_per_s": Metric("decisions/s", "Decisions / wall time of the rollout."),
    "throughput/episodes_per_s": Metric("episodes/s", "Episodes / wall time of the rollout."),
}

_LEARN = {
    "learn/policy_loss": Metric("1", "Policy terms of the loss: surrogate, entropy bonus, KL penalty."),
    "learn/value_loss": Metric("1", "Value loss, its coefficient included."),
    "learn/learning_rate": Metric("1", "AdamW learning rate of the policy in this update."),
    "learn/bc_loss": Metric("nats", "Mean negative log-probability of cloned action tokens, before its weight."),
    "learn/policy_weight": Metric("1", "Weight of the surrogate."),
    "learn/bc_weight": Metric("1", "Weight of the cloning loss."),
    "learn/grad_norm_policy": Metric("1", "Gradient norm of the actor before cloning is added; where demos are."),
    "learn/grad_norm_bc": Metric("1", "Gradient norm of the cloning loss, before its weight."),
    "learn/value_error": Metric("reward^2", "Value loss before its coefficient."),
    "learn/entropy": Metric("nats", "Mean entropy of the distributions over the action bins."),
    "learn/approx_kl": Metric("nats", "Mean of ratio - 1 - log ratio against the old policy (k3 estimator)."),
    "learn/kl_to_reference": Metric("nats", "Mean estimated KL divergence from the reference policy."),
    "learn/clip_fraction": Metric("1", "Ratios outside the clip range / all ratios."),
    "learn/ratio_max": Metric("1", "Largest importance ratio."),
    "learn/ratio_error": Metric("1", "Largest |ratio - 1| of a minibatch, mean over minibatches."),
    "learn/first_ratio_error": Metric(
        "1", "Largest |ratio - 1| of the first minibatch, before any step; with `learner.lora.dropout`, what that does."
    ),
    "learn/explained_variance": Metric("1", "1 - var(returns - old values) / var(returns); 0 for constant returns."),
    "learn/grad_norm_actor": Metric("1", "Gradient norm of the policy before clipping, mean over minibatches."),
    "learn/grad_norm_critic": Metric("1", "Gradient norm of the value head before clipping, mean over minibatches."),
    "learn/num_optimizer_steps": Metric("steps", "Optimiser steps taken; fewer than planned where the KL stop fired."),
    "learn/stopped_by_kl": Metric("0 or 1", "1 if the KL stop ended the update early."),
    "learn/critic_warmup": Metric("0 or 1", "1 if the actor was frozen in this update."),
    "learn/sampler_ratio_max_error": Metric(
        "1", "Largest |exp(learner - engine log-probability) - 1|, before any step."
    ),
    "learn/sampler_ratio_rms_error": Metric(
        "nats", "Root mean square of a decision's learner - engine log-probability, before any step."
    ),
    "learn/sampler_ratio_decisions": Metric("decisions", "Decisions that the sampler ratio was taken on."),
    "learn/policy_age_mean": Metric("updates", "Updates between a decision's weights and those it is learned under."),
    "learn/policy_age_max": Metric("updates", "The largest of these; at most rollout.max_policy_lag."),
}

_BUFFER = {
    "buffer/episodes": Metric("episodes", "Episodes in the self-cloning buffer."),
    "buffer/offered": Metric("episodes", "Episodes offered to the buffer so far."),
    "buffer/admitted": Metric("episodes", "Of these, admitted."),
    "buffer/rejected_fail": Metric("episodes", "Of these, rejected as failures."),
    "buffer/rejected_long": Metric("episodes", "Of these, rejected as longer than what is there."),
    "buffer/evicted": Metric("episodes", "Episodes that gave way to shorter ones."),
    "buffer/mean_length/<task>": Metric("env steps", "Mean steps to success of a task's stored episodes."),
}

_PUBLISH = {
    "publish/bytes": Metric("bytes", "Adapter and head tensors shipped to each server."),
    "publish/model_bytes": Metric("bytes", "The full model, for comparison."),
    "publish/fallbacks": Metric(
        "loads", "Times that a server got its weights through the object store, as a broadcast had failed."
    ),
    "publish/delta_kept": Metric("1", "Projection of the served weight change on the trained one; 1 loses nothing."),
    "publish/server_restarts": Metric("servers", "Inference servers lost and restarted since this process started."),
    "canary/max_abs_logprob_diff": Metric("nats", "Largest server - learner difference on the probe batch."),
    "memory/peak_bytes": Metric("bytes", "Largest summed memory of the run's processes on this machine so far."),
    "memory/planned_bytes": Metric(
        "bytes", "Tensors of a learner rank as planned (`vlarl doctor`), in the first update that trains everything."
    ),
    "memory/measured_bytes": Metric("bytes", "What they take there: weights, optimiser, peak of the passes."),
    "time/gpu_s": Metric("GPU-s", "Reserved GPUs x wall time of the iteration."),
}

_EVAL = {
    "eval/success_rate": Metric("1", "Held-out episodes with success at any env step / all of them."),
    "eval/success_rate/<task>": Metric("1", "The same for one task."),
    "eval/ci_low": Metric("1", "Lower end of the 95 % Wilson interval of eval/success_rate."),
    "eval/ci_high": Metric("1", "Upper end of it."),
    "eval/last_step_success_rate": Metric("1", "Held-out episodes that are successful at their last env step."),
    "eval/steps_to_success": Metric("env steps", "Mean first successful env step, over successes; null without any."),
    "eval/steps_to_success/<task>": Metric("env steps", "The same for one task."),
    "eval/steps_to_success_all": Metric("env steps", "The same over all episodes, a failure counting the horizon."),
    "eval/episodes": Metric("episodes", "Held-out episodes, each (task, initial state) once."),
}

METRICS: Mapping[str, Metric] = MappingProxyType({**_ROLLOUT, **_LEARN, **_BUFFER, **_PUBLISH, **_EVAL, **_timing()})
"""By name; a last part `<task>` stands for any task id."""

_TIMING_AREAS = frozenset({"time", "throughput", "memory"})


def describe_metric(name: str, *, extra: Mapping[str, Metric] | None = None) -> Metric:
    """Look up what a metric means.

    Args:
        name: `area/name`, or `area/name/<task id>` for metrics that exist per task.
        extra: Entries beyond `METRICS`, of an algorithm or environment of your own.

    Raises:
        ValueError: If the name is in neither table.

    Example:
        >>> describe_metric("rollout/success_rate/drawer-close-v3").unit
        '1'
    """
    area, _, rest = name.partition("/")
    family = f"{area}/{rest.partition('/')[0]}/<task>" if "/" in rest else name
    for table in (METRICS, extra or {}):
        if name in table or family in table:
            return table.get(name) or table[family]
    raise ValueError(
        f"metric {name!r} is not in the catalogue; {suggest(name, {**METRICS, **(extra or {})})}. "
        "Describe it in vlarl_ray.metrics.catalogue, or pass it as `extra_metrics`."
    )


def is_timing_metric(name: str) -> bool:
    """Tell whether a metric depends on how fast the machine is, so that two equal runs may differ in it.

    Example:
        >>> is_timing_metric("time/rollout_s"), is_timing_metric("learn/approx_kl")
        (True, False)
    """
    return name.partition("/")[0] in _TIMING_AREAS
