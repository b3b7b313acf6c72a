"""What a batch costs the driver: `make_batch` of every algorithm, 4,096 episodes of 100 decisions of 5 x 4 tokens.

Prints CPU seconds of ours, of the textbook loop (advantages of one decision after the other, rows gathered one by one)
and of the floor: copying the rows of all episodes into one array each, without computing anything.

    python -m benchmarks.make_batch [--episodes 4096] [--decisions 100] [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks._results import write_result
from vlarl_ray.algorithms.advantages import leave_one_out_advantages
from vlarl_ray.config import AlgorithmConfig
from vlarl_ray.registry import ALGORITHMS, resolve
from vlarl_ray.types import EpisodeTiming, Scores, TaskSpec, Trajectory, TrajectoryGroup

GROUP_SIZE = 8
CHUNK, ACTION_DIM = 5, 4
CONFIGS = {
    "ppo": AlgorithmConfig(name="ppo"),
    "ppo, smdp": AlgorithmConfig(name="ppo", discount_mode="smdp"),
    "chunk_ppo": AlgorithmConfig(name="chunk_ppo", ratio_level="chunk"),
    "rloo": AlgorithmConfig(name="rloo"),
    "grpo, per-trajectory mean": AlgorithmConfig(name="grpo", loss_normalization="trajectory_mean"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=4096)
    parser.add_argument("--decisions", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    groups, scores = make_episodes(args.episodes, args.decisions)
    jobs: dict[str, Callable[[], Any]] = {"copy of the rows": lambda: copy_rows(groups)}
    for name, cfg in CONFIGS.items():
        algorithm_class = resolve(ALGORITHMS, cfg.name, what="algorithm.name")
        jobs[name] = lambda cfg=cfg, make=algorithm_class: make(cfg).make_batch(groups, scores, version=0)
    jobs["textbook loop, ppo"] = lambda: textbook_ppo(CONFIGS["ppo"], groups, scores)
    jobs["textbook loop, rloo"] = lambda: textbook_rloo(groups)
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(args.rounds):
        for name, job in jobs.items():
            start = time.process_time()
            job()
            seconds[name].append(time.process_time() - start)
    figures = {
        name: {"cpu_s": statistics.median(values), "worst_cpu_s": max(values)} for name, values in seconds.items()
    }
    for name, figure in figures.items():
        print(f"{name:28} {figure['cpu_s']:.3f} CPU-s (worst {figure['worst_cpu_s']:.3f})")
    print("wrote", write_result("make_batch", {"episodes": args.episodes, "decisions": args.decisions, **figures}))


def make_episodes(episodes: int, decisions: int) -> tuple[list[TrajectoryGroup], list[Scores]]:
    """Draw groups of 8 episodes, half of them successful, from one generator."""
    rng = np.random.default_rng(0)
    tokens = CHUNK * ACTION_DIM
    groups, scores = [], []
    for group in range(episodes // GROUP_SIZE):
        members = []
        for member in range(GROUP_SIZE):
            task = TaskSpec(
                run_id="benchmark", iteration=0, slot=group * GROUP_SIZE + member, group_id=group, suite="none",
                task_id="task", instruction="do it", init_state_id=group, split="train", seed=0, policy_version=0,
                max_env_steps=decisions * CHUNK, temperature=1.0,
            )  # fmt: skip
            success = member % 2 == 0
            rewards = np.zeros((decisions, CHUNK), np.float32)
            rewards[-1, -1] = success
            logprobs = -rng.random((decisions, tokens), dtype=np.float32)
            members.append(
                Trajectory(
                    task=task,
                    frames=None,
                    proprio=rng.random((decisions + 1, 4), dtype=np.float32),
                    tokens=rng.integers(0, 256, (decisions, tokens), dtype=np.int32),
                    behaviour_logprobs=logprobs,
                    policy_versions=np.zeros(decisions, np.int32),
                    rewards=rewards,
                    num_env_steps=np.full(decisions, CHUNK, np.int32),
                    executed_actions=np.zeros((decisions, CHUNK, ACTION_DIM), np.float32),
                    terminated=success,
                    truncated=not success,
                    success=success,
                    success_at_last_step=success,
                    first_success_env_step=decisions * CHUNK if success else None,
                    worker=0,
                    timing=EpisodeTiming(0.0, 0.0, 0.0, 0.0),
                )
            )
            scores.append(Scores(rng.random(decisions + 1, dtype=np.float32), logprobs))
        groups.append(TrajectoryGroup(tuple(members)))
    return groups, scores


def copy_rows(groups: list[TrajectoryGroup]) -> list[np.ndarray]:
    """Concatenate what every batch holds."""
    episodes = [t for group in groups for t in group.trajectories]
    return [
        np.concatenate([getattr(t, name) for t in episodes])
        for name in ("tokens", "behaviour_logprobs", "proprio", "rewards", "num_env_steps")
    ]


def textbook_ppo(cfg: AlgorithmConfig, groups: list[TrajectoryGroup], scores: list[Scores]) -> list[np.ndarray]:
    """GAE as in the paper's recursion, one decision at a time, for all episodes; rows collected in lists."""
    columns: list[list[Any]] = [[] for _ in range(6)]
    episodes = [t for group in groups for t in group.trajectories]
    for trajectory, score in zip(episodes, scores, strict=True):
        values = score.values
        assert values is not None
        advantage, backwards = 0.0, []
        for k in reversed(range(trajectory.num_decisions)):
            is_last = k == trajectory.num_decisions - 1
            next_value = 0.0 if is_last and trajectory.terminated else values[k + 1]
            delta = trajectory.rewards[k].sum() + cfg.gamma * next_value - values[k]
            advantage = delta + cfg.gamma * cfg.gae_lambda * advantage
            backwards.append(advantage)
        mask = trajectory.token_mask()
        for k, advantage in enumerate(reversed(backwards)):
            row = (advantage, advantage + values[k], trajectory.tokens[k], trajectory.behaviour_logprobs[k], mask[k])
            for column, value in zip(columns, (*row, trajectory.proprio[k]), strict=True):
                column.append(value)
    return [np.array(column) for column in columns]


def textbook_rloo(groups: list[TrajectoryGroup]) -> list[np.ndarray]:
    """Leave-one-out advantages group by group, rows collected in lists."""
    columns: list[list[Any]] = [[] for _ in range(5)]
    for group in groups:
        for trajectory, advantage in zip(group.trajectories, leave_one_out_advantages(group.returns), strict=True):
            mask = trajectory.token_mask()
            for k in range(trajectory.num_decisions):
                row = (
                    advantage,
                    trajectory.tokens[k],
                    trajectory.behaviour_logprobs[k],
                    mask[k],
                    trajectory.proprio[k],
                )
                for column, value in zip(columns, row, strict=True):
                    column.append(value)
    return [np.array(column) for column in columns]


if __name__ == "__main__":
    main()
