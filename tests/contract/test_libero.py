"""LIBERO itself, on one task: needs `requirements-libero.lock`, and its assets beside the checkout."""

import importlib.util
import os

import numpy as np
import pytest

from tests.golden_data import GOLDEN
from vlarl_ray.envs import make_env, shared_init_states, single_task
from vlarl_ray.envs.base import SimEnv, Suite
from vlarl_ray.envs.libero import LiberoGoal, LiberoObject
from vlarl_ray.envs.libero_simulation import LiberoUnavailableError, package_folder, read_init_states
from vlarl_ray.libero_tasks import TASKS

ASSETS = GOLDEN.parent / "libero_assets"
TASK = "open_the_middle_drawer_of_the_cabinet"
CAMERAS = ("agentview", "robot0_eye_in_hand")
ACTIONS = np.random.default_rng(2).uniform(-1.2, 1.2, (3, 7)).astype(np.float32)

pytestmark = [
    pytest.mark.sim,
    pytest.mark.skipif(
        importlib.util.find_spec("robosuite") is None, reason="LIBERO is not installed: ./run.sh libero"
    ),
]


@pytest.fixture(scope="module")
def suite():
    if not ASSETS.is_dir():
        message = f"{ASSETS} is not there: LIBERO's assets are not shipped with the package"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    made = LiberoGoal((TASK,), image_size=64, camera=CAMERAS, assets=str(ASSETS))
    yield made
    made.close()


@pytest.fixture
def env(suite):
    made = suite.make_env()
    yield made
    made.close()


def play(env, task):
    """Everything that is seen of an episode, and MuJoCo's state at its end."""
    seen = [env.reset(task)]
    for action in ACTIONS:
        env.step(action)
        seen.append(env.observe())
    data = env.simulation._env.sim.data._data
    return [*(part for o in seen for part in (o.images, o.proprio)), data.qpos.copy(), data.qvel.copy()]


def equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_episode_is_the_same_to_the_bit_whatever_ran_before(suite, env):
    assert isinstance(suite, Suite)
    assert isinstance(env, SimEnv)
    for split in ("train", "eval"):
        task = single_task(suite, TASK, 1, split)
        np.random.seed(5)
        first = play(env, task)
        assert np.random.uniform() == np.random.RandomState(5).uniform(), "numpy's global generator is not ours"
        assert first[0].shape == (2, 64, 64, 3)
        assert first[1].shape == (8,)
        assert all(frame.std() > 10 for frame in first[0])
        other = suite.make_env()
        assert not equal(first, play(other, single_task(suite, TASK, 2, split)))
        assert equal(first, play(other, task))
        other.close()


def test_full_frames_and_proprioception_are_libero_s_own_turned_by_180_degrees(suite):
    full = LiberoGoal((TASK,), image_size=64, camera=CAMERAS, render_profile="full", assets=str(ASSETS))
    env = full.make_env()
    observed = [env.reset(single_task(suite, TASK, 3, "eval"))]
    for action in ACTIONS:
        env.step(action)
    observed.append(env.observe())
    from libero.libero.envs import OffScreenRenderEnv
    from robosuite.utils.transform_utils import quat2axisangle

    np.random.seed(1042 + 3)
    file = package_folder() / "bddl_files" / "libero_goal" / f"{TASK}.bddl"
    stock = OffScreenRenderEnv(bddl_file_name=str(file), camera_heights=64, camera_widths=64, hard_reset=False)
    stock.env.reset()
    stock.set_init_state(read_init_states("libero_goal", TASK)[3])
    for _ in range(10):
        first = stock.step([0.0] * 6 + [-1.0])[0]
    for action in np.clip(ACTIONS.astype(float), -1, 1):
        opens = action[-1] > 0.5
        last = stock.step([*action[:-1], -1.0 if opens else 1.0])[0]
    for ours, theirs in zip(observed, (first, last), strict=True):
        expected = np.stack([theirs[f"{name}_image"][::-1, ::-1] for name in CAMERAS])
        assert np.array_equal(ours.images, expected)
        rotation = quat2axisangle(theirs["robot0_eef_quat"].copy())
        state = np.concatenate([theirs["robot0_eef_pos"], rotation, theirs["robot0_gripper_qpos"]])
        assert np.array_equal(ours.proprio, state.astype(np.float32))
    stock.close()
    full.close()


def test_success_is_the_task_s_goal_and_ends_nothing(suite, env):
    env.reset(single_task(suite, TASK, 0, "eval"))
    still = np.float32([0, 0, 0, 0, 0, 0, 1])
    assert not env.step(still).success
    sim = env.simulation._env.sim
    [drawer] = [name for name in sim.model.joint_names if "middle" in name]
    sim.data.set_joint_qpos(drawer, -0.16)
    results = [env.step(still) for _ in range(2)]
    assert results[-1].success
    assert not any(result.terminated or result.truncated for result in results)


def test_actions_are_clipped_and_one_opens_the_gripper(suite, env):
    env.reset(single_task(suite, TASK, 0))
    widths = []
    for gripper in (0.0, 1.0, -3.0, 3.0):
        for _ in range(8):
            env.step(np.float32([0, 0, 0, 0, 0, 0, gripper]))
        widths.append(float(np.ptp(env.observe().proprio[-2:])))
    closed, opened, closed_again, opened_again = widths
    assert min(opened, opened_again) - max(closed, closed_again) > 0.01
    for wrong in (np.zeros(4, np.float32), np.full(7, np.nan, np.float32)):
        with pytest.raises(ValueError, match="must be 7 finite numbers"):
            env.step(wrong)
    with pytest.raises(NotImplementedError, match="libero_goal has no scripted expert"):
        env.expert_action()


def test_training_states_are_others_than_the_held_out_ones_but_drawn_alike(suite):
    assert shared_init_states(suite) == frozenset()
    stored = read_init_states("libero_goal", TASK)
    assert len(stored) == suite.num_init_states(TASK, "eval") == 50
    starts = []
    for state in range(3):
        simulation = suite.simulate(single_task(suite, TASK, state, "train"))
        starts.append(simulation._env.sim.data._data.qpos.copy())
        simulation.close()
    drawn, positions = np.array(starts), stored[:, 1 : 1 + starts[0].size]
    varied = np.ptp(positions, axis=0) > 0.01
    assert varied.sum() > 10
    margin = 0.02 + 0.3 * np.ptp(positions, axis=0)
    assert (drawn > positions.min(axis=0) - margin)[:, varied].all()
    assert (drawn < positions.max(axis=0) + margin)[:, varied].all()
    assert (np.ptp(drawn, axis=0)[varied] > 1e-3).all()


def test_an_object_without_assets_is_named(suite):
    env = LiberoObject(image_size=32, assets=str(ASSETS)).make_env()
    with pytest.raises(LiberoUnavailableError, match=r"lacks what pick_up_the_alphabet_soup.* needs \(.*No such file"):
        env.reset(single_task(env.suite, TASKS["libero_object"][0]))


def test_quest_s_protocol_gives_frames_as_libero_does_and_other_proprioception(suite):
    env = make_env("libero_goal", task=TASK, image_size=64, camera="agentview", assets=str(ASSETS), protocol="quest")
    observation = env.reset(single_task(env.suite, TASK, 0, "eval"))
    assert observation.proprio.shape == (12,)
    hand = env.simulation.hand_position()
    assert np.array_equal(observation.proprio[7:10], hand.astype(np.float32))
    fast = observation.images[0].astype(float).mean(axis=-1)
    turned = suite.make_env().reset(single_task(suite, TASK, 0, "eval")).images[0].astype(float).mean(axis=-1)
    assert np.corrcoef(fast[::-1, ::-1].ravel(), turned.ravel())[0, 1] > 0.99
    env.suite.close()
