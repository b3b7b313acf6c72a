"""Episodes, seats and halves of an env worker."""

from __future__ import annotations

import numpy as np
import pytest

from tests.counting_env import CountingEnv, EchoClient, make_task
from vlarl_ray.rollout.env_worker import EnvWorker
from vlarl_ray.rollout.episode import EpisodeFailure
from vlarl_ray.types import Trajectory


def run(tasks, *, num_envs: int = 4, crash_slots: frozenset[int] = frozenset()):
    log: list = []
    client = EchoClient()
    worker = EnvWorker(lambda: CountingEnv(log, crash_slots), client, num_envs=num_envs)
    for task in tasks:
        worker.submit(task)
    ended = []
    while not worker.is_idle:
        ended += worker.turn()
    return {outcome.task.slot: outcome for outcome in ended}, log, client


def test_episodes_that_end_at_steps_3_8_and_10_take_1_2_and_3_decisions_f42():
    done, log, _ = run([make_task(i, init_state_id=n) for i, n in enumerate([3, 8, 10])])
    assert [done[i].num_decisions for i in range(3)] == [1, 2, 3]
    assert [done[i].first_success_env_step for i in range(3)] == [3, 8, 10]
    # The action of a step names the episode it was meant for: none of an old chunk reaches a new episode.
    assert all(entry[2] == pytest.approx(entry[1] / 100) for entry in log if entry[0] == "step")


def test_success_at_step_10_with_chunks_of_4_masks_the_tail_and_pays_once_f6_f46():
    done, _, _ = run([make_task(0, init_state_id=10)])
    trajectory = done[0]
    assert trajectory.num_env_steps.tolist() == [4, 4, 2]
    assert trajectory.rewards.sum(axis=1).tolist() == [0, 0, 1]
    assert trajectory.rewards[2].tolist() == [0, 1, 0, 0]
    assert trajectory.executed_mask()[2].tolist() == [True, True, False, False]
    assert trajectory.token_mask()[2].tolist() == [True] * 4 + [False] * 4
    assert (trajectory.executed_actions[2, 2:] == 0).all()


def test_a_seat_freed_by_success_at_step_5_takes_the_next_episode_at_once_f41():
    tasks = [make_task(0, init_state_id=5), make_task(1, init_state_id=0), make_task(2, init_state_id=5)]
    _, log, client = run(tasks, num_envs=2)
    resets = [entry[1] for entry in log if entry[0] == "reset"]
    assert resets == [0, 1, 2]
    last_step_of_0 = max(i for i, entry in enumerate(log) if entry[:2] == ("step", 0))
    reset_of_2 = log.index(("reset", 2))
    between = [entry for entry in log[last_step_of_0 + 1 : reset_of_2] if entry[0] == "step"]
    assert between == []  # no simulator stepped between the end of one episode and the start of the next in its seat
    assert max(len(request) for request in client.requests) == 1  # halves of one


def test_the_time_limit_truncates_and_does_not_terminate():
    done, _, _ = run([make_task(0, init_state_id=0, max_env_steps=10)])
    assert (done[0].terminated, done[0].truncated, done[0].success) == (False, True, False)
    assert done[0].total_env_steps == 10
    assert done[0].first_success_env_step is None


def test_success_at_the_time_limit_is_termination():
    done, _, _ = run([make_task(0, init_state_id=10, max_env_steps=10)])
    assert (done[0].terminated, done[0].truncated, done[0].success) == (True, False, True)


def test_an_episode_that_runs_on_after_success_tells_any_step_from_last_step_f67():
    done, _, _ = run([make_task(0, init_state_id=3, max_env_steps=9, stop_on_success=False)])
    trajectory = done[0]
    assert trajectory.total_env_steps == 9
    assert trajectory.success
    assert not trajectory.success_at_last_step
    assert trajectory.episode_return == 1.0  # paid once
    assert trajectory.truncated


def test_frames_are_taken_at_decision_points_only():
    done, log, _ = run([make_task(0, init_state_id=10)])
    assert sum(entry[0] == "observe" for entry in log) == 4  # three decisions and the last state
    assert done[0].frames[:, 0, 0, 0, 0].tolist() == [0, 4, 8, 10]


def test_while_one_half_waits_the_other_half_steps():
    """No two requests in a row come from one half while both have work."""
    tasks = [make_task(i, init_state_id=0, max_env_steps=12) for i in range(4)]
    _, _, client = run(tasks, num_envs=4)
    asked = [tuple(sorted(int(key[1] >> 20) & 0xFFFFF for key in r.noise_keys)) for r in client.requests]
    assert asked == [(0, 1), (2, 3)] * 3


def test_few_tasks_are_spread_over_both_halves():
    _, _, client = run([make_task(i, init_state_id=0, max_env_steps=4) for i in range(2)], num_envs=8)
    assert [len(request) for request in client.requests] == [1, 1]


def test_a_crash_of_a_simulator_costs_one_episode():
    done, log, _ = run([make_task(i, init_state_id=5) for i in range(6)], crash_slots=frozenset({2}))
    assert isinstance(done[2], EpisodeFailure)
    assert "simulator broke" in done[2].reason
    assert all(isinstance(done[i], Trajectory) and done[i].success for i in (0, 1, 3, 4, 5))
    assert ("close",) in log


def test_the_noise_of_a_decision_depends_on_seed_iteration_slot_and_decision_only():
    task = make_task(3)
    assert task.noise_key(2) == (7, 3 << 20 | 2)
    assert make_task(3, iteration=5).noise_key(2) == (7, 5 << 40 | 3 << 20 | 2)
    with pytest.raises(ValueError, match="decision"):
        task.noise_key(1 << 20)


def test_the_cpu_time_of_inference_is_shared_by_rows():
    done, _, _ = run([make_task(0, init_state_id=8), make_task(1, init_state_id=4)])
    assert done[0].timing.inference_s == pytest.approx(0.5)
    assert done[1].timing.inference_s == pytest.approx(0.25)


@pytest.mark.parametrize("num_envs", [0, 1, 3])
def test_an_odd_number_of_simulators_is_refused(num_envs):
    with pytest.raises(ValueError, match=f"envs_per_worker = {num_envs}"):
        EnvWorker(CountingEnv, EchoClient(), num_envs=num_envs)


def test_proprio_has_one_row_more_than_decisions():
    done, _, _ = run([make_task(0, init_state_id=10)])
    assert done[0].proprio.shape == (4, 1)
    assert done[0].proprio.dtype == np.float32


def test_cancelled_episodes_leave_the_worker_idle_and_ready_for_the_next_version():
    client = EchoClient()
    worker = EnvWorker(CountingEnv, client, num_envs=4)
    for slot in range(8):
        worker.submit(make_task(slot, max_env_steps=12))
    for _ in range(3):
        worker.turn()
    worker.cancel_all()
    assert worker.is_idle
    worker.submit(make_task(50, init_state_id=3, policy_version=1))
    ended = []
    while not worker.is_idle:
        ended += worker.turn()
    assert [(t.task.slot, t.first_success_env_step) for t in ended] == [(50, 3)]
    assert client.requests[-1].policy_version == 1
