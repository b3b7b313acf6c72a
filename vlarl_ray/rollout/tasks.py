"""Which task from which initial state, drawn from (seed, iteration, draw) and state frozen for the iteration.

So a redone iteration is the same one, and it does not matter how many groups were started beyond those it needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlarl_ray.config import EvaluationConfig, ExperimentConfig
from vlarl_ray.envs.base import Suite
from vlarl_ray.rollout.curriculum import Curriculum
from vlarl_ray.types import TaskSpec, TrajectoryGroup

_EVALUATION_SEED = 1 << 62
_MOST_SKIPS = 3

Context = tuple[str, int]
"""Task id and initial state."""


@dataclass(frozen=True)
class Draw:
    """One group to run."""

    tasks: tuple[TaskSpec, ...]
    """One per member, in slot order."""
    skipped: tuple[Context, ...]
    """Solved contexts that were passed over on the way to this one."""


class TaskSampler:
    """Draws the groups of an iteration, and enumerates the episodes of an evaluation.

    Args:
        suite: Where tasks and initial states come from.
        cfg: The run.
        run_id: Identity of the run.
    """

    def __init__(self, suite: Suite, cfg: ExperimentConfig, *, run_id: str) -> None:
        self._suite = suite
        self._cfg = cfg
        self._run_id = run_id
        sampling = cfg.sampling
        self.curriculum = Curriculum(
            suite.task_ids,
            mode=sampling.curriculum,
            temperature=sampling.curriculum_temperature,
            rate=sampling.curriculum_rate,
        )
        self._solved = SolvedContexts()
        self._draws: list[Draw] = []

    def draws(self, iteration: int, *, version: int) -> Iterator[Draw]:
        """Draw groups without end; the caller takes as many as it needs, and tells `observe` which it used."""
        self._draws = []
        rng = np.random.default_rng([self._cfg.seed, iteration])
        task_ids = list(self._suite.task_ids)
        first = int(rng.integers(len(task_ids)))  # the remainder of an uneven division goes to another task each time
        decks = {task: self._deck(rng, task, iteration=iteration) for task in task_ids}
        probabilities = None if self.curriculum.is_uniform else self.curriculum.probabilities()
        solved = self._solved.copy()
        index = 0
        while True:
            if probabilities is None:
                task_id = task_ids[(first + index) % len(task_ids)]
            else:
                chooser = np.random.default_rng([self._cfg.seed, iteration, index])
                task_id = task_ids[int(chooser.choice(len(task_ids), p=probabilities))]
            skipped = []
            while (context := (task_id, next(decks[task_id]))) in solved:
                solved.skip(context)
                skipped.append(context)
            draw = Draw(self._group(index, context, iteration=iteration, version=version), tuple(skipped))
            self._draws.append(draw)
            yield draw
            index += 1

    def observe(self, attempted: Sequence[TrajectoryGroup]) -> None:
        """Learn from the groups that were judged, in draw order, for the next iteration's draws."""
        self.curriculum.observe(attempted)
        if not self._cfg.sampling.skip_solved:
            return
        for draw, group in zip(self._draws, attempted, strict=False):
            for context in draw.skipped:
                self._solved.skip(context)
            task = draw.tasks[0]
            is_solved = all(trajectory.success for trajectory in group.trajectories)
            self._solved.mark((task.task_id, task.init_state_id), is_solved=is_solved)

    def training_tasks(self, iteration: int, *, version: int) -> list[TaskSpec]:
        """List the episodes of the first `rollout.groups_per_update` groups, in slot order."""
        draws = self.draws(iteration, version=version)
        return [task for _ in range(self._cfg.rollout.groups_per_update) for task in next(draws).tasks]

    def evaluation_tasks(self, cfg: EvaluationConfig, *, version: int) -> list[TaskSpec]:
        """Every task x held-out initial state once, tasks interleaved.

        Raises:
            ValueError: If a task has fewer held-out states than asked for.
        """
        tasks = []
        for state in range(cfg.states_per_task):
            for task_id in self._suite.task_ids:
                available = self._suite.num_init_states(task_id, "eval")
                if state >= available:
                    raise ValueError(
                        f"evaluation.states_per_task = {cfg.states_per_task}, but {task_id} has {available} held-out "
                        f"initial states; set it to <= {available}."
                    )
                tasks.append(
                    TaskSpec(
                        run_id=f"{self._run_id}/eval",
                        iteration=version,
                        slot=len(tasks),
                        group_id=len(tasks),
                        suite=self._suite.name,
                        task_id=task_id,
                        instruction=self._suite.instruction(task_id),
                        init_state_id=state,
                        split="eval",
                        seed=self._cfg.seed ^ _EVALUATION_SEED,
                        policy_version=version,
                        max_env_steps=self._cfg.env.max_env_steps,
                        temperature=cfg.temperature,
                        stop_on_success=cfg.stop_on_success,
                    )
                )
        return tasks

    def state_dict(self) -> dict[str, Any]:
        """What later draws depend on (JSON types)."""
        return {"curriculum": self.curriculum.state_dict(), "solved": self._solved.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        self.curriculum.load_state_dict(state["curriculum"])
        self._solved.load_state_dict(state["solved"])

    def _group(self, index: int, context: Context, *, iteration: int, version: int) -> tuple[TaskSpec, ...]:
        task_id, init_state = context
        rollout = self._cfg.rollout
        return tuple(
            TaskSpec(
                run_id=self._run_id,
                iteration=iteration,
                slot=index * rollout.group_size + member,
                group_id=index,
                suite=self._suite.name,
                task_id=task_id,
                instruction=self._suite.instruction(task_id),
                init_state_id=init_state,
                split="train",
                seed=self._cfg.seed,
                policy_version=version,
                max_policy_lag=rollout.max_policy_lag,
                max_env_steps=self._cfg.env.max_env_steps,
                temperature=rollout.temperature,
            )
            for member in range(rollout.group_size)
        )

    def _deck(self, rng: np.random.Generator, task_id: str, *, iteration: int) -> Iterator[int]:
        """Deal initial states without repeats while they last, then from a new shuffle."""
        available = self._suite.num_init_states(task_id, "train")
        num_first = -(-self._cfg.rollout.groups_per_update // available)
        # drawn now: decks share one generator, and whoever is dealt from more must not change the others' cards
        first = [int(card) for _ in range(num_first) for card in rng.permutation(available)]
        which = list(self._suite.task_ids).index(task_id)

        def deal() -> Iterator[int]:
            yield from first
            later = np.random.default_rng([self._cfg.seed, iteration, which, 1])
            while True:
                yield from (int(card) for card in later.permutation(available))

        return deal()


class SolvedContexts:
    """Contexts whose last group was solved throughout, and how often each was skipped since.

    Source:
        RIPT-VLA (arXiv:2505.17016): skipped, and forgotten after more than 3 skips.
    """

    def __init__(self) -> None:
        self._skips: dict[Context, int] = {}

    def __contains__(self, context: Context) -> bool:
        return context in self._skips

    def copy(self) -> SolvedContexts:
        """An independent copy."""
        other = SolvedContexts()
        other._skips = dict(self._skips)
        return other

    def skip(self, context: Context) -> None:
        """Count one skip; the fourth makes it forgotten, so that the next draw tries the context again."""
        if context in self._skips:
            self._skips[context] += 1
            if self._skips[context] > _MOST_SKIPS:
                del self._skips[context]

    def mark(self, context: Context, *, is_solved: bool) -> None:
        """Note how the context's group ended."""
        if is_solved:
            self._skips[context] = 0
        else:
            self._skips.pop(context, None)

    def state_dict(self) -> list[list[Any]]:
        """Rows of task id, initial state, skips."""
        return [[task_id, state, skips] for (task_id, state), skips in self._skips.items()]

    def load_state_dict(self, state: Sequence[Sequence[Any]]) -> None:
        """Restore `state_dict`."""
        self._skips = {(task_id, init_state): skips for task_id, init_state, skips in state}
