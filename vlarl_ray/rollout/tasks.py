"""Which task from which initial state: a function of (seed, iteration) alone, so a redone iteration is the same one."""

from __future__ import annotations

import numpy as np

from vlarl_ray.config import EvaluationConfig, ExperimentConfig
from vlarl_ray.envs.base import Suite
from vlarl_ray.types import TaskSpec

_EVALUATION_SEED = 1 << 62


class TaskSampler:
    """Draws the tasks of an iteration, and enumerates those of an evaluation.

    Args:
        suite: Where tasks and initial states come from.
        cfg: The run.
        run_id: Identity of the run.
    """

    def __init__(self, suite: Suite, cfg: ExperimentConfig, *, run_id: str) -> None:
        self._suite = suite
        self._cfg = cfg
        self._run_id = run_id

    def training_tasks(self, iteration: int, *, version: int) -> list[TaskSpec]:
        """Draw an iteration in slot order: tasks in equal shares, initial states without repeats while they last."""
        rollout = self._cfg.rollout
        rng = np.random.default_rng([self._cfg.seed, iteration])
        task_ids = list(self._suite.task_ids)
        first = int(rng.integers(len(task_ids)))  # the remainder of an uneven division goes to another task each time
        decks = {task: self._deck(rng, task, rollout.groups_per_update) for task in task_ids}
        tasks = []
        for group in range(rollout.groups_per_update):
            task_id = task_ids[(first + group) % len(task_ids)]
            init_state = decks[task_id].pop()
            tasks.extend(
                TaskSpec(
                    run_id=self._run_id,
                    iteration=iteration,
                    slot=group * rollout.group_size + member,
                    group_id=group,
                    suite=self._suite.name,
                    task_id=task_id,
                    instruction=self._suite.instruction(task_id),
                    init_state_id=init_state,
                    split="train",
                    seed=self._cfg.seed,
                    policy_version=version,
                    max_env_steps=self._cfg.env.max_env_steps,
                    temperature=rollout.temperature,
                )
                for member in range(rollout.group_size)
            )
        return tasks

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

    def _deck(self, rng: np.random.Generator, task_id: str, size: int) -> list[int]:
        available = self._suite.num_init_states(task_id, "train")
        cards: list[int] = []
        while len(cards) < size:
            cards.extend(int(card) for card in rng.permutation(available))
        return cards[:size][::-1]
