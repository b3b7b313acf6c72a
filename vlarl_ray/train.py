"""The main loop: improve a policy for a number of updates. Version v = weights after v updates.

            TaskSpec                Observation ->
TaskSampler -------> EnvWorker xN <---------------> InferenceServer xM <-- WeightPublisher
                        |              <- ActionChunk                            ^
                        | Trajectory (frames by reference)                       | adapter + heads, version v
                        v                                                        |
                   RolloutLedger -- groups, in slot order --> Algorithm --> LearnerGroup (FSDP)
                                                              make_batch   score, update
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from vlarl_ray.algorithms.base import Algorithm
from vlarl_ray.config import ExperimentConfig
from vlarl_ray.envs.base import Suite
from vlarl_ray.evaluate import evaluate
from vlarl_ray.inference.base import WrongVersionError
from vlarl_ray.learner.group import LearnerGroup
from vlarl_ray.recorder import RunRecorder
from vlarl_ray.rewards.control import shuffle_rewards
from vlarl_ray.rollout.groups import GroupIntake, GroupRule, accept_rates
from vlarl_ray.rollout.ledger import RolloutLedger
from vlarl_ray.rollout.tasks import TaskSampler
from vlarl_ray.transport import Transport
from vlarl_ray.types import Scores, TrajectoryGroup
from vlarl_ray.weights.publisher import WeightPublisher

_LOG = logging.getLogger(__name__)


class SamplerMismatchError(RuntimeError):
    """Engine and learner disagree about the probability of sampled actions: every ratio would be biased."""


@dataclass
class System:
    """The components of a run, wired by `launch`; they do not know each other or the loop."""

    cfg: ExperimentConfig
    suite: Suite
    sampler: TaskSampler
    ledger: RolloutLedger
    algorithm: Algorithm
    learner: LearnerGroup
    weights: WeightPublisher
    recorder: RunRecorder | None
    """None where nothing is trained."""
    transport: Transport
    memory: Callable[[], Mapping[str, float]]
    """Compares, once, what an update takes of memory with what was planned; returns metrics."""


def train(cfg: ExperimentConfig, system: System) -> int:
    """Improve the policy until `cfg.num_iterations`, or until its budget of seconds or env steps is used up.

    Returns:
        The last version.

    Raises:
        SamplerMismatchError: If the engine's log-probabilities are not the learner's.
        CanaryError: If a server does not hold the published weights.
    """
    recorder = system.recorder
    assert recorder is not None
    timer = recorder.timer
    iteration, version = recorder.restore(system)  # 0, 0 on a fresh run
    system.weights.publish(version)  # inference answers with these weights
    rule = GroupRule.from_config(cfg)
    if iteration == 0:
        recorder.log_evaluation("warm_start", evaluate(cfg.evaluation, system, version=0), iteration=0)
    ahead: Future[GroupIntake] | None = None  # at lag 1, the rollout that runs while the learner learns
    while iteration < cfg.num_iterations and not (recorder.is_over_budget or recorder.stop_signal):
        with timer("rollout"):
            intake = ahead.result() if ahead else roll_out(system, rule, iteration, version=version)
        ahead = None
        system.sampler.observe(intake.attempted)
        iteration += 1
        if cfg.rollout.max_policy_lag and iteration < cfg.num_iterations:
            ahead = system.transport.background(partial(roll_out, system, rule, iteration, version=version))
        numbers = accept_rates(intake, system.suite.task_ids)
        groups = intake.accepted
        check_versions(groups, version, max_lag=cfg.rollout.max_policy_lag)
        if not groups:  # nothing to learn from; counted, never hidden
            recorder.log_update(iteration, version, intake.attempted, numbers)
            continue
        if cfg.rollout.shuffle_rewards:
            groups = shuffle_rewards(groups, seed=cfg.seed, iteration=iteration - 1)
        with timer("score"):
            scores = system.learner.score([t for group in groups for t in group.trajectories])
        exact = cfg.inference.dtype == cfg.learner.dtype == "float32"
        tolerance = cfg.trust.sampler_ratio_tolerance
        ratios = check_sampler_ratio(groups, scores, version=version, tolerance=tolerance, exact=exact)
        with timer("batch"):
            batch = system.algorithm.make_batch(groups, scores, version=version)
            batch = replace(batch, progress=recorder.progress(iteration - 1))
        with timer("learn"):
            losses = system.learner.update(batch)
        attempts = [t.success for group in intake.attempted for t in group.trajectories]
        system.algorithm.observe_update(losses, success_rate=float(np.mean(attempts)))
        numbers |= system.algorithm.metrics()
        version += 1
        with timer("publish"):
            published = system.weights.publish(version)
        numbers |= system.memory()
        recorder.log_update(iteration, version, intake.attempted, {**numbers, **ratios, **losses, **published})
        del intake, groups, scores, batch  # frees their frames before the next rollout fills the object store
        if version % cfg.checkpoint.every_updates == 0:
            with timer("checkpoint"):
                recorder.save(iteration, version, system)
        is_last = iteration == cfg.num_iterations  # evaluated below
        if cfg.evaluation.every_updates and version % cfg.evaluation.every_updates == 0 and not is_last:
            wait([ahead] if ahead else [])  # one ledger, one thing at a time
            recorder.log_evaluation("update", evaluate(cfg.evaluation, system, version=version), iteration=iteration)
    wait([ahead] if ahead else [])  # of a run over its budget; these episodes are not used
    if iteration != recorder.saved_iteration:  # iterations without an update count, too: their draws are used up
        recorder.save(iteration, version, system)
    if recorder.stop_signal:
        return version  # the final evaluation belongs to the end of the run, after it was resumed
    recorder.log_evaluation("final", evaluate(cfg.evaluation, system, version=version), iteration=iteration)
    return version


def roll_out(system: System, rule: GroupRule, iteration: int, *, version: int) -> GroupIntake:
    """Run the episodes of one iteration, drawn and answered with `version` or, at lag 1, with the next."""
    return system.ledger.take((draw.tasks for draw in system.sampler.draws(iteration, version=version)), rule)


def check_versions(groups: Sequence[TrajectoryGroup], version: int, *, max_lag: int) -> None:
    """Require that every decision was made by weights no older than `max_lag` updates, and no newer than `version`.

    Raises:
        WrongVersionError: Naming the first episode of which that is not true.
    """
    for trajectory in (t for group in groups for t in group.trajectories):
        oldest, newest = int(trajectory.policy_versions.min()), int(trajectory.policy_versions.max())
        if oldest < version - max_lag or newest > version:
            raise WrongVersionError(
                f"{trajectory.task.task_id}, slot {trajectory.task.slot}: decided by versions {oldest} to {newest}; "
                f"the update from version {version} takes {version - max_lag} to {version} "
                f"(rollout.max_policy_lag = {max_lag})."
            )


def check_sampler_ratio(
    groups: Sequence[TrajectoryGroup], scores: Sequence[Scores], *, version: int, tolerance: float, exact: bool = True
) -> dict[str, Any]:
    """Compare two sources: exp(the learner's log-probability of each sampled chunk - the engine's), before any step.

    Args:
        groups: What the engine sampled.
        scores: What the learner says of it.
        version: The learner's; decisions of an older one (at lag 1) differ with reason and are not compared.
        tolerance: Largest accepted distance from 1.
        exact: Whether every single decision is held to that, as fp32 can be. In bf16 the rounding of a decision's
            tokens adds up, and the largest of thousands is far out: there it is their root mean square in nats.

    Returns:
        The largest distance from 1, that root mean square and over how many decisions; the mean and largest age of
        decisions, in updates.

    Raises:
        SamplerMismatchError: If the distance exceeds `tolerance`, naming task, slot and decision of the largest.
    """
    worst, where, count, squares = 0.0, "", 0, 0.0
    ages: list[int] = []
    trajectories = [t for group in groups for t in group.trajectories]
    for trajectory, score in zip(trajectories, scores, strict=True):
        assert score.logprobs is not None
        compared = trajectory.token_mask() & (trajectory.policy_versions == version)[:, None]
        difference = np.where(compared, score.logprobs - trajectory.behaviour_logprobs, 0.0).sum(axis=1)
        distance = np.abs(np.expm1(difference))
        count += int(compared.any(axis=1).sum())
        squares += float(np.square(difference, dtype=np.float64).sum())
        ages += (version - trajectory.policy_versions).tolist()
        if not np.isfinite(distance).all():
            raise SamplerMismatchError(
                f"sampler_ratio is not finite at {trajectory.task.task_id}, slot {trajectory.task.slot}, decision "
                f"{int(np.isfinite(distance).argmin())}: a log-probability of engine or learner is NaN or infinite."
            )
        if distance.max() > worst:
            worst = float(distance.max())
            where = f"{trajectory.task.task_id}, slot {trajectory.task.slot}, decision {int(distance.argmax())}"
    rms = (squares / count) ** 0.5 if count else 0.0
    if not (worst if exact else rms) <= tolerance:
        found = f"{worst:.3g} away from 1" if exact else f"{rms:.3g} nats away from 1 in the root mean square"
        place = f"at {where}" if exact else f"and {worst:.3g} at {where}"
        raise SamplerMismatchError(
            f"sampler_ratio is {found} (allowed {tolerance:.3g}) {place}: the engine samples from "
            "another distribution than the learner scores (stale weights, temperature, preprocessing or precision)."
        )
    return {
        "learn/sampler_ratio_max_error": worst if count else None,
        "learn/sampler_ratio_rms_error": rms if count else None,
        "learn/sampler_ratio_decisions": float(count),
        "learn/policy_age_mean": float(np.mean(ages)),
        "learn/policy_age_max": float(max(ages)),
    }
