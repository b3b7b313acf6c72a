"""Every registered suite, and the example of one's own, through the same checks."""

from dataclasses import replace

import numpy as np
import pytest

from vlarl_ray import libero_tasks
from vlarl_ray.config import EnvConfig
from vlarl_ray.envs import make_suite, shared_init_states, single_task
from vlarl_ray.envs.base import SimEnv, Suite
from vlarl_ray.registry import SUITES
from vlarl_ray.types import Observation, StepResult

CONFIGS = {
    "metaworld": EnvConfig(tasks=("window-open-v3", "reach-v3")),
    "toy": EnvConfig(suite="toy", tasks=("reach-a", "reach-c"), image_size=48),
    "example": EnvConfig(suite="examples.my_simulator:MySuite", tasks=("stop",), image_size=32),
}
pytestmark = pytest.mark.sim


@pytest.fixture(scope="module", params=CONFIGS)
def suite(request):
    made = make_suite(CONFIGS[request.param])
    yield made
    getattr(made, "close", lambda: None)()


@pytest.fixture
def env(suite):
    made = suite.make_env()
    yield made
    made.close()


@pytest.fixture
def image_size(request, suite):
    return CONFIGS[request.node.callspec.params["suite"]].image_size


def actions(env, num: int = 12, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(1).uniform(-1, 1, (num, env.action_dim))).astype(np.float32)


def play(env, task, chosen) -> list:
    seen = [env.reset(task)]
    for action in chosen:
        result = env.step(action)
        seen += [result, env.observe()]
    return seen


def equal(a: list, b: list) -> bool:
    def same(x, y) -> bool:
        if isinstance(x, Observation):
            return np.array_equal(x.images, y.images) and np.array_equal(x.proprio, y.proprio)
        return x == y

    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def test_every_registered_suite_is_checked_here_or_in_test_libero():
    assert set(SUITES) <= {*CONFIGS, *libero_tasks.TASKS}


def test_protocols_are_met(suite, env):
    assert isinstance(suite, Suite)
    assert isinstance(env, SimEnv)


def test_shapes_and_types(suite, env, image_size):
    for task_id in suite.task_ids:
        task = single_task(suite, task_id)
        for observation in (env.reset(task), env.observe()):
            assert observation.images.shape == (1, image_size, image_size, 3)
            assert observation.images.dtype == np.uint8
            assert observation.images.any()
            assert observation.proprio.shape == (env.proprio_dim,)
            assert observation.proprio.dtype == np.float32
            assert observation.instruction == suite.instruction(task_id) != ""
        result = env.step(actions(env, 1)[0])
        assert isinstance(result, StepResult)
        assert {type(v) for v in (result.success, result.terminated, result.truncated)} == {bool}


def test_same_initial_state_and_actions_give_the_same_episode(suite, env):
    other = suite.make_env()
    chosen = actions(env)
    for task_id in suite.task_ids:
        task = single_task(suite, task_id, 2)
        first = play(env, task, chosen)
        play(other, single_task(suite, suite.task_ids[0], 1, "eval"), chosen[::-1])
        assert equal(first, play(env, replace(task, slot=9, iteration=4, policy_version=3), chosen))
        assert equal(first, play(other, task, chosen))
        assert not equal(first, play(env, single_task(suite, task_id, 3), chosen))
    other.close()


def test_observations_belong_to_the_caller(suite, env):
    """Frames of an episode are collected: a buffer used again would turn them all into the last one."""
    first = env.reset(single_task(suite, suite.task_ids[0]))
    kept = first.images.copy(), first.proprio.copy()
    for action in actions(env, 20):
        env.step(action)
    env.observe()
    assert np.array_equal(first.images, kept[0])
    assert np.array_equal(first.proprio, kept[1])
    assert not np.array_equal(env.observe().images, kept[0])


def test_step_does_not_render(suite, env, monkeypatch):
    """R-2: a frame per sub-action is drawn, shipped and thrown away; only the one a decision needs may be drawn."""
    import vlarl_ray.envs.toy

    drawn = []
    if hasattr(suite, "draw"):
        draw = suite.draw
        monkeypatch.setattr(suite, "draw", lambda simulation: (drawn.append(1), draw(simulation))[1])
    elif suite.name == "toy":
        draw = vlarl_ray.envs.toy._draw
        monkeypatch.setattr(vlarl_ray.envs.toy, "_draw", lambda *a: (drawn.append(1), draw(*a))[1])
    else:
        observe = env.observe
        env.observe = lambda: (drawn.append(1), observe())[1]
    env.reset(single_task(suite, suite.task_ids[0]))
    assert len(drawn) == 1
    for action in actions(env, 5):
        env.step(action)
    assert len(drawn) == 1
    env.observe()
    assert len(drawn) == 2


def test_observing_changes_nothing(suite, env):
    task, chosen = single_task(suite, suite.task_ids[0]), actions(env)
    watched = play(env, task, chosen)[-1]
    env.reset(task)
    for action in chosen:
        env.step(action)
    assert equal([watched], [env.observe()])


def test_actions_outside_the_bounds_are_clipped_to_them(suite, env):
    task = single_task(suite, suite.task_ids[0])
    wild = actions(env, scale=3.0)
    assert not np.array_equal(wild, np.clip(wild, -1, 1))
    assert equal(play(env, task, wild), play(env, task, np.clip(wild, -1, 1)))


def test_actions_are_not_written_to(suite, env):
    env.reset(single_task(suite, suite.task_ids[0]))
    action = np.full(env.action_dim, 2.0, dtype=np.float32)
    env.step(action)
    assert (action == 2.0).all()


def test_a_long_episode_is_neither_terminated_nor_truncated_by_the_simulator(suite, env):
    """Truncation is the caller's, by `max_env_steps`; ending is not failing, and neither is merged into the other."""
    env.reset(single_task(suite, suite.task_ids[0], max_env_steps=200))
    results = [env.step(np.zeros(env.action_dim, np.float32)) for _ in range(200)]
    assert not any(result.terminated or result.truncated for result in results)


def test_the_expert_succeeds_from_most_initial_states(suite, env):
    for task_id in suite.task_ids:
        solved = []
        for state in range(4):
            env.reset(single_task(suite, task_id, state))
            solved.append(any(env.step(env.expert_action()).success for _ in range(160)))
        assert sum(solved) >= 3, (task_id, solved)


def test_splits_are_disjoint_and_every_state_has_its_digest(suite):
    assert shared_init_states(suite) == frozenset()
    for task_id in suite.task_ids:
        for split in ("train", "eval"):
            count = suite.num_init_states(task_id, split)
            digests = {suite.init_state_hash(task_id, split, state) for state in range(count)}
            assert len(digests) == count > 0


def test_digests_do_not_depend_on_the_object(suite, request):
    again = make_suite(CONFIGS[request.node.callspec.params["suite"]])
    task_id = suite.task_ids[-1]
    assert again.init_state_hash(task_id, "eval", 5) == suite.init_state_hash(task_id, "eval", 5)


def test_options_a_suite_does_not_take_are_refused():
    with pytest.raises(ValueError, match=r"takes no \['colour'\]; it takes"):
        make_suite(replace(CONFIGS["metaworld"], options={"colour": "blue"}))
    with pytest.raises(ValueError, match="did you mean 'metaworld'"):
        make_suite(replace(CONFIGS["metaworld"], suite="metawordl"))
