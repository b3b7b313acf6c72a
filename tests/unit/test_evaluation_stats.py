"""Evaluation figures against numbers worked out by hand (F67, F68) and against an independent library."""

import numpy as np
import pytest
from scipy.stats import binomtest

from vlarl_ray.evaluation_stats import EpisodeOutcome, results_table, steps_to_success, wilson_interval


def test_f68_wilson_interval_of_450_in_500():
    low, high = wilson_interval(450, 500)
    assert low == pytest.approx(0.871, abs=1e-3)
    assert high == pytest.approx(0.923, abs=1e-3)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (1, 3), (7, 150), (149, 150)])
def test_wilson_interval_agrees_with_scipy(successes, n):
    reference = binomtest(successes, n).proportion_ci(method="wilson")
    np.testing.assert_allclose(wilson_interval(successes, n, z=1.959963984540054), reference, atol=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_counts_are_refused(successes, n):
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, n)


def test_f67_steps_to_success_in_both_conventions():
    assert steps_to_success([10, None, 30], 500) == (20.0, 180.0)


def test_steps_to_success_without_a_success_is_none_not_zero():
    assert steps_to_success([None, None], 160) == (None, 160.0)


@pytest.mark.parametrize("step", [0, 501])
def test_a_step_outside_the_horizon_is_refused(step):
    with pytest.raises(ValueError, match="500"):
        steps_to_success([step], 500)


def outcome(task_id, first, at_last=False):
    return EpisodeOutcome(
        task_id, success=first is not None, success_at_last_step=at_last, first_success_env_step=first
    )


def test_table_has_a_row_per_task_and_one_over_all_episodes():
    rows = results_table([outcome("b", 10, True), outcome("a", None), outcome("b", 30)], horizon=500)
    assert [row.task_id for row in rows] == ["b", "a", "all"]
    assert [row.success_rate for row in rows] == [1.0, 0.0, pytest.approx(2 / 3)]
    assert [row.last_step_success_rate for row in rows] == [0.5, 0.0, pytest.approx(1 / 3)]
    assert [row.steps_to_success for row in rows] == [20.0, None, 20.0]
    assert [row.steps_to_success_all for row in rows] == [20.0, 500.0, 180.0]
    assert (rows[2].ci_low, rows[2].ci_high) == wilson_interval(2, 3)
    assert rows[2].episodes == 3


def test_an_outcome_that_contradicts_itself_is_refused():
    with pytest.raises(ValueError, match="first_success_env_step"):
        results_table([EpisodeOutcome("a", True, False, None)], horizon=10)
    with pytest.raises(ValueError, match="last step"):
        results_table([EpisodeOutcome("a", False, True, None)], horizon=10)
