"""What an evaluation found: success with its interval, a row per task, and whether the initial states were held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from vlarl_ray.evaluation_stats import EpisodeOutcome, TaskResult, results_table
from vlarl_ray.metrics.catalogue import MetricValue
from vlarl_ray.types import Split, Trajectory

SplitLabel = Literal["held-out", "shared-init"]

_T = TypeVar("_T")


@runtime_checkable
class InitialStates(Protocol):
    """What an evaluation needs of `envs.base.Suite`."""

    def num_init_states(self, task_id: str, split: Split) -> int:
        """How many initial states the split holds; ids are 0..n-1."""
        ...

    def init_state_hash(self, task_id: str, split: Split, init_state_id: int) -> str:
        """Digest of the initial state."""
        ...


@dataclass(frozen=True)
class EvaluationResult:
    """Figures of one evaluation: every task x held-out initial state, each exactly once."""

    success_rate: float
    """Success at any env step."""
    ci_low: float
    ci_high: float
    """95 % Wilson interval of `success_rate`."""
    episodes: int
    steps_to_success: float | None
    """Mean first successful env step over successes; None without any."""
    steps_to_success_all: float
    """The same over all episodes, failures counted at the horizon."""
    last_step_success_rate: float
    """Success at the last env step; below `success_rate` only where episodes run on after a success."""
    per_task: tuple[TaskResult, ...]
    split: SplitLabel
    """`shared-init` if any evaluated initial state is also one of training."""
    num_shared_init_states: int
    """Evaluated initial states that training can start from too."""
    temperature: float
    """Decoding temperature; 0 is greedy."""
    max_env_steps: int
    """Horizon of the episodes."""
    policy_version: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types."""
        return {**asdict(self), "per_task": [asdict(row) for row in self.per_task]}

    def summary(self) -> dict[str, Any]:
        """The six fields that `summary.json` shows."""
        names = ("success_rate", "ci_low", "ci_high", "episodes", "steps_to_success", "split")
        return {name: getattr(self, name) for name in names}

    def metrics(self) -> dict[str, MetricValue]:
        """The `eval/...` metrics."""
        names = (
            "success_rate", "ci_low", "ci_high", "episodes",
            "steps_to_success", "steps_to_success_all", "last_step_success_rate",
        )  # fmt: skip
        metrics: dict[str, MetricValue] = {f"eval/{name}": getattr(self, name) for name in names}
        for row in self.per_task:
            metrics[f"eval/success_rate/{row.task_id}"] = row.success_rate
            metrics[f"eval/steps_to_success/{row.task_id}"] = row.steps_to_success
        return metrics


def summarize_evaluation(
    trajectories: Sequence[Trajectory], suite: InitialStates, *, task_ids: Sequence[str], states_per_task: int
) -> EvaluationResult:
    """Condense the episodes of an evaluation, after checking that they are the whole enumeration and nothing else.

    Args:
        trajectories: One episode for each of `task_ids` x initial states 0..`states_per_task`-1, in any order.
        suite: Whose initial states they are; tells equal states apart by digest.
        task_ids: Tasks evaluated; rows of the table come in this order.
        states_per_task: Held-out initial states of each task.

    Raises:
        ValueError: If an episode is missing, counted twice (by id or by digest), not of the evaluation split, or run
            under other settings (temperature, horizon, weights, seed) than the rest.
    """
    _check_enumeration(trajectories, task_ids, states_per_task)
    digests = _check_digests(suite, task_ids, states_per_task)
    shared = digests & _training_digests(suite, task_ids)
    position = {task_id: index for index, task_id in enumerate(task_ids)}
    ordered = sorted(trajectories, key=lambda t: (position[t.task.task_id], t.task.init_state_id))
    horizon = _common("max_env_steps", [t.task.max_env_steps for t in ordered])
    outcomes = [
        EpisodeOutcome(t.task.task_id, t.success, t.success_at_last_step, t.first_success_env_step) for t in ordered
    ]
    *per_task, overall = results_table(outcomes, horizon)
    return EvaluationResult(
        success_rate=overall.success_rate,
        ci_low=overall.ci_low,
        ci_high=overall.ci_high,
        episodes=overall.episodes,
        steps_to_success=overall.steps_to_success,
        steps_to_success_all=overall.steps_to_success_all,
        last_step_success_rate=overall.last_step_success_rate,
        per_task=tuple(per_task),
        split="shared-init" if shared else "held-out",
        num_shared_init_states=len(shared),
        temperature=_common("temperature", [t.task.temperature for t in ordered]),
        max_env_steps=horizon,
        policy_version=_common("policy_version", [int(v) for t in ordered for v in t.policy_versions]),
        seed=_common("seed", [t.task.seed for t in ordered]),
    )


def _check_enumeration(trajectories: Sequence[Trajectory], task_ids: Sequence[str], states_per_task: int) -> None:
    wrong_split = [t.task for t in trajectories if t.task.split != "eval"]
    if wrong_split:
        task = wrong_split[0]
        raise ValueError(
            f"an episode of {task.task_id}, initial state {task.init_state_id}, is of split {task.split!r}; "
            "an evaluation counts split 'eval' only."
        )
    counts = Counter((t.task.task_id, t.task.init_state_id) for t in trajectories)
    expected = {(task_id, state) for task_id in task_ids for state in range(states_per_task)}
    if len(expected) != len(task_ids) * states_per_task:
        raise ValueError(f"task_ids = {list(task_ids)} names a task twice; each may be there once.")
    for problem, cells in (
        ("counted twice", [cell for cell, count in counts.items() if count > 1]),
        ("missing", [cell for cell in sorted(expected) if cell not in counts]),
        ("not part of the enumeration", [cell for cell in counts if cell not in expected]),
    ):
        if cells:
            task_id, state = cells[0]
            raise ValueError(
                f"evaluation of {len(task_ids)} tasks x {states_per_task} initial states: {len(cells)} "
                f"{problem}, first {task_id}, initial state {state}; each must be there exactly once."
            )


def _check_digests(suite: InitialStates, task_ids: Sequence[str], states_per_task: int) -> set[tuple[str, str]]:
    """Digests of the evaluated states, by task; two equal ones would be one episode counted twice."""
    seen: dict[tuple[str, str], int] = {}
    for task_id in task_ids:
        for state in range(states_per_task):
            key = (task_id, suite.init_state_hash(task_id, "eval", state))
            if key in seen:
                raise ValueError(
                    f"{task_id}: held-out initial states {seen[key]} and {state} are the same state, which would count "
                    "twice; lower evaluation.states_per_task, or change env.eval_seed."
                )
            seen[key] = state
    return set(seen)


def _training_digests(suite: InitialStates, task_ids: Sequence[str]) -> set[tuple[str, str]]:
    return {
        (task_id, suite.init_state_hash(task_id, "train", state))
        for task_id in task_ids
        for state in range(suite.num_init_states(task_id, "train"))
    }


def _common(name: str, values: Sequence[_T]) -> _T:
    distinct = list(dict.fromkeys(values))
    if len(distinct) > 1:
        raise ValueError(
            f"episodes of one evaluation differ in {name}: {distinct[0]!r} and {distinct[1]!r}; "
            "evaluate them separately, figures under unlike settings are not comparable."
        )
    return distinct[0]
