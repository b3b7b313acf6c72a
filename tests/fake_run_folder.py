"""A whole run folder without a run, through the package's own writers. As a script: write one to look at."""

import argparse
import dataclasses
import json
import logging
import math
from pathlib import Path

import numpy as np

from tests.fake_episodes import QUIET, TASKS, FakeSuite, make_task, make_trajectory, moving_square
from vlarl_ray.config import ExperimentConfig
from vlarl_ray.evaluation_results import summarize_evaluation
from vlarl_ray.metrics import MetricsLogger, summarize_rollout
from vlarl_ray.metrics.episodes import EpisodeTable
from vlarl_ray.report.video import film_trajectory, video_path, write_before_after_video
from vlarl_ray.summary import RunSummary, describe_machine, installed_versions, write_summary
from vlarl_ray.types import EpisodeTiming


def write_run_folder(folder, *, num_updates=20, finished=True, tasks=TASKS, seed=0, videos=True):
    """A plausible laptop run through the package's own writers."""
    rng = np.random.default_rng(seed)
    config = ExperimentConfig(name="laptop", seed=seed, run_dir=str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2))
    log, table, suite = MetricsLogger(folder, QUIET, num_iterations=num_updates), EpisodeTable(folder), FakeSuite()

    def evaluate(label, iteration, rate):
        episodes = [
            make_trajectory(
                make_task(
                    task,
                    split="eval",
                    init_state_id=s,
                    slot=s,
                    temperature=0.0,
                    max_env_steps=160,
                    policy_version=iteration,
                ),
                first_success=int(rng.integers(50, 120) - 40 * rate) if rng.random() < rate else None,
            )
            for task in tasks
            for s in range(50)
        ]
        result = summarize_evaluation(episodes, suite, task_ids=tasks, states_per_task=50)
        log.log_evaluation(result.to_dict(), result.metrics(), label=label, iteration=iteration, version=iteration)
        table.append(episodes, lambda t: suite.init_state_hash(t.task_id, t.split, t.init_state_id))
        return result

    summary = RunSummary(versions=installed_versions(), machine=describe_machine()).with_evaluation(
        warm_start=evaluate("warm_start", 0, 0.5)
    )
    write_summary(folder, summary)
    for iteration in range(num_updates):
        rate = 0.5 + 0.47 * (1 - math.exp(-iteration / 6))
        episodes = [
            make_trajectory(
                make_task(
                    tasks[i % len(tasks)], iteration=iteration, slot=i, max_env_steps=160, policy_version=iteration
                ),
                first_success=int(rng.integers(60, 130) - 40 * rate) if rng.random() < rate else None,
                timing=EpisodeTiming(0.02, 0.04, 0.16, 0.05),
            )
            for i in range(48)
        ]
        log.log(
            summarize_rollout(episodes, 6.0 + rng.random()),
            _learning(rng, iteration),
            iteration=iteration,
            version=iteration + 1,
        )
        table.append(episodes, lambda t: suite.init_state_hash(t.task_id, t.split, t.init_state_id))
        if finished and iteration == num_updates // 2:
            evaluate("update", iteration + 1, 0.85)
    if videos:
        _films(folder, tasks)
    if finished:
        write_summary(folder, _finished(summary, evaluate("final", num_updates, 0.96), tasks))
    log.close()
    table.close()
    return folder


def _finished(summary, final, tasks):
    fields = {
        **vars(summary),
        "rl_seconds": 262.5,
        "total_seconds": 604.2,
        "env_steps": 93_210,
        "env_steps_per_s": 943.1,
    }
    fields |= {"peak_rss_bytes": 3_412_000_000, "published_bytes_per_update": 702_464.0, "model_bytes": 3_640_000}
    fields |= {"expert_steps_to_success": 78.0, "expert_steps_to_success_per_task": dict.fromkeys(tasks, 78.0)}
    return RunSummary(**fields).with_evaluation(final=final)


def _learning(rng, iteration):
    rollout_s, learn_s = 6.0 + rng.random(), 4.5 + rng.random()
    return {
        "learn/approx_kl": 0.012 + 0.006 * rng.random(),
        "learn/clip_fraction": 0.1 + 0.05 * rng.random(),
        "learn/entropy": 2.4 * math.exp(-iteration / 30),
        "learn/explained_variance": None if iteration == 0 else 0.8 * (1 - math.exp(-iteration / 5)),
        "learn/sampler_ratio_max_error": 2e-6 * (1 + rng.random()),
        "canary/max_abs_logprob_diff": 1e-6 * (1 + rng.random()),
        "publish/bytes": 702_464,
        "publish/model_bytes": 3_640_000,
        "publish/delta_kept": 1.0,
        "time/update_s": rollout_s + learn_s + 1.0,
        "time/rollout_s": rollout_s,
        "time/score_s": 0.4,
        "time/learn_s": learn_s,
        "time/publish_s": 0.08,
    }


def _films(folder, tasks):
    for index, task_id in enumerate(tasks):
        spec = make_task(task_id, split="eval", max_env_steps=160, temperature=0.0)
        before, after = make_trajectory(spec), make_trajectory(spec, first_success=61 + 5 * index)
        write_before_after_video(
            video_path(folder, task_id, 0),
            film_trajectory(before, moving_square(before.num_decisions + 1)),
            film_trajectory(after, moving_square(after.num_decisions + 1, hue=1)),
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--unfinished", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    folder = write_run_folder(arguments.folder, finished=not arguments.unfinished)
    from vlarl_ray.report.html import write_report

    logging.getLogger(__name__).info("wrote %s", write_report(folder))


if __name__ == "__main__":
    main()
