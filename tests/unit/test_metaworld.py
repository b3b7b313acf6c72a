import hashlib
import os
import pickle
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

from vlarl_ray.envs import make_env, shared_init_states, single_task
from vlarl_ray.envs.metaworld import MetaWorldSuite
from vlarl_ray.envs.metaworld_instructions import INSTRUCTIONS
from vlarl_ray.metaworld_tasks import MT10, MT50

pytestmark = pytest.mark.sim

# One task whose goal moves a body, one that ends its reset by moving a joint, one whose python state views into MjData.
TASKS = ("window-open-v3", "window-close-v3", "pick-place-v3")
ACTIONS = np.random.default_rng(5).uniform(-1.2, 1.2, (25, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def suite():
    made = MetaWorldSuite(TASKS)
    yield made
    made.close()


def run(env, task, *, observe_every: int = 5) -> str:
    """Digest of physics, observations, rewards and frames of one episode under fixed actions."""
    digest = hashlib.sha256(env.reset(task).images.tobytes())
    for step, action in enumerate(ACTIONS, start=1):
        result = env.step(action)
        digest.update(np.float64([result.reward, result.success]).tobytes())
        if step % observe_every == 0:
            digest.update(env.observe().images.tobytes())
    digest.update(env.simulation.physics_state().tobytes() + env.simulation.observation.tobytes())
    return digest.hexdigest()


def physics(env, task, **kwargs) -> np.ndarray:
    env.reset(task)
    states = [env.simulation.physics_state()]
    for step, action in enumerate(ACTIONS, start=1):
        env.step(action)
        if kwargs.get("observe") or step == len(ACTIONS):
            env.observe()
        states.append(np.r_[env.simulation.physics_state(), env.simulation.observation])
    return np.concatenate(states)


def test_mt10_and_mt50_are_meta_worlds_own():
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS, MT10_V3

    assert MetaWorldSuite(("mt10",)).task_ids == MT10 == tuple(MT10_V3)
    assert set(MetaWorldSuite(("mt50",)).task_ids) == set(MT50) == set(ALL_V3_ENVIRONMENTS)
    assert len(MT10) == 10
    assert len(MT50) == 50
    assert set(INSTRUCTIONS) == set(MT50)
    assert len(set(INSTRUCTIONS.values())) == 50


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'window-open-v3'"):
        MetaWorldSuite(("window-open",))
    with pytest.raises(ValueError, match="did you mean 'corner2'"):
        MetaWorldSuite(TASKS, camera="corner22")
    with pytest.raises(ValueError, match="at least one task"):
        MetaWorldSuite(())


def reference_goals(task_id: str, seed: int) -> list[np.ndarray]:
    import metaworld

    return [pickle.loads(task.data)["rand_vec"] for task in metaworld.MT1(task_id, seed=seed).train_tasks]


def test_goals_are_those_of_mt1_and_numpys_generator_is_left_alone(suite):
    before = np.random.get_state()[1].copy()
    fresh = MetaWorldSuite(TASKS)
    for split, seed in (("train", 42), ("eval", 1042)):
        goals = [fresh.goal("pick-place-v3", split, i) for i in range(fresh.num_init_states("pick-place-v3", split))]
        assert np.array_equal(goals, reference_goals("pick-place-v3", seed))
    fresh.close()
    assert np.array_equal(np.random.get_state()[1], before)


def test_splits_are_disjoint_and_no_state_counts_twice(suite):
    assert shared_init_states(suite) == frozenset()
    for task_id in TASKS:
        assert suite.num_init_states(task_id, "eval") == 50
        digests = {suite.init_state_hash(task_id, "eval", i) for i in range(50)}
        assert len(digests) == 50


def test_training_goals_that_are_held_out_are_removed():
    leaky = MetaWorldSuite(("reach-v3",), num_train_sets=2)
    leaky._seeds["train"][1] = 1042  # as if the second training set were the held-out one
    assert leaky.num_init_states("reach-v3", "train") == 50
    assert shared_init_states(leaky) == frozenset()
    with pytest.raises(ValueError, match="eval_seed = 42 is one of"):
        MetaWorldSuite(("reach-v3",), train_seed=41, eval_seed=42, num_train_sets=2)


def test_more_training_sets_give_more_training_states():
    many = MetaWorldSuite(("reach-v3",), num_train_sets=3)
    assert many.num_init_states("reach-v3", "train") == 150
    assert many.num_init_states("reach-v3", "eval") == 50


def stock_env(task_id: str, goal: np.ndarray):
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    env = ALL_V3_ENVIRONMENTS[task_id](render_mode="rgb_array", camera_name="corner2", width=64, height=64)
    env._partially_observable = False
    env.__dict__.pop("sawyer_observation_space", None)
    env._set_task_called = env._freeze_rand_vec = True
    env._last_rand_vec = goal.copy()
    return env


def check_equal_to_stock(suite, task_id: str, *, num_states: int) -> None:
    env = suite.make_env()
    for state in range(num_states):
        stock = stock_env(task_id, suite.goal(task_id, "train", state))
        observation, _ = stock.reset()
        env.reset(single_task(suite, task_id, state))
        assert np.array_equal(observation, env.simulation.observation)
        for action in ACTIONS:
            observation, reward, _, _, info = stock.step(np.clip(action, -1, 1))
            result = env.step(action)
            assert np.array_equal(observation, env.simulation.observation)
            assert (reward, bool(info["success"])) == (result.reward, result.success)
        assert np.array_equal(stock.data.qpos, env.simulation.data.qpos)
    env.close()


@pytest.mark.parametrize("task_id", TASKS)
def test_episodes_are_meta_worlds_own_to_the_bit(suite, task_id):
    check_equal_to_stock(suite, task_id, num_states=2)


@pytest.mark.slow
@pytest.mark.parametrize("task_id", MT50)
def test_all_fifty_tasks_are_meta_worlds_own_to_the_bit(task_id):
    one = MetaWorldSuite((task_id,))
    check_equal_to_stock(one, task_id, num_states=2)
    goals = [one.goal(task_id, "train", i) for i in range(50)]
    assert np.array_equal(goals, reference_goals(task_id, 42))
    env, other = one.make_env(), one.make_env()
    task = single_task(one, task_id, 3)
    alone = run(env, task)
    other.reset(single_task(one, task_id, 4))
    other.step(ACTIONS[0])
    assert run(env, task) == alone
    fields_changed = changed_model_fields(env.simulation)
    assert fields_changed <= {"body_pos", "site_pos"}
    one.close()


def changed_model_fields(simulation) -> set[str]:
    """Model arrays that differ from those of a simulator nobody has reset."""
    from vlarl_ray.envs.metaworld_simulation import Simulation, TaskModel

    model = simulation.model
    pristine = TaskModel(simulation.task_model.task_id, camera="corner2", camera_position_m=None)
    Simulation(pristine)
    names = [name for name in dir(model) if isinstance(getattr(model, name, None), np.ndarray)]
    assert len(names) > 100
    return {name for name in names if getattr(model, name).tobytes() != getattr(pristine.model, name).tobytes()}


def test_tasks_write_nothing_into_the_shared_model_but_what_is_swapped(suite):
    env = suite.make_env()
    for task_id in TASKS:
        env.reset(single_task(suite, task_id, 7))
        env.step(ACTIONS[0])
        assert changed_model_fields(env.simulation) <= {"body_pos", "site_pos"}
    env.close()


def test_reset_is_bit_exact_across_repeats_histories_and_simulators(suite):
    first, second = suite.make_env(), suite.make_env()
    for task_id in TASKS:
        task = single_task(suite, task_id, 3)
        expected = run(first, task)
        assert run(first, task) == expected
        run(second, single_task(suite, task_id, 11, "eval"))
        run(second, single_task(suite, TASKS[0], 5))
        assert run(second, task) == expected
        assert run(first, single_task(suite, task_id, 4)) != expected
    first.close()
    second.close()


def test_reset_is_bit_exact_across_processes(suite):
    env = suite.make_env()
    expected = run(env, single_task(suite, "window-open-v3", 3))
    env.close()
    code = (
        "from tests.unit.test_metaworld import *\n"
        "s = MetaWorldSuite(TASKS)\n"
        "print('DIGEST', run(s.make_env(), single_task(s, 'window-open-v3', 3)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert f"DIGEST {expected}" in done.stdout


def test_simulators_of_one_task_do_not_disturb_each_other(suite):
    """They share one MuJoCo model, into which Meta-World writes the goal."""
    envs = [suite.make_env() for _ in range(3)]
    tasks = [single_task(suite, "window-open-v3", state) for state in range(3)]
    alone = [physics(env, task) for env, task in zip(envs, tasks, strict=True)]
    for env, task in zip(envs, tasks, strict=True):
        env.reset(task)
    together = [[env.simulation.physics_state()] for env in envs]
    for action in ACTIONS:
        for env, states in zip(envs, together, strict=True):
            env.step(action)
            states.append(np.r_[env.simulation.physics_state(), env.simulation.observation])
    assert all(np.array_equal(a, np.concatenate(t)) for a, t in zip(alone, together, strict=True))
    for env in envs:
        env.close()


def test_rendering_and_its_profile_leave_the_physics_alone(suite):
    fast = suite.make_env()
    full_suite = MetaWorldSuite(TASKS, render_profile="full")
    full = full_suite.make_env()
    for task_id in TASKS:
        task = single_task(suite, task_id, 6)
        expected = physics(fast, task)
        assert np.array_equal(physics(fast, task, observe=True), expected)
        assert np.array_equal(physics(full, task), expected)  # draws the first and the last state
    fast.close()
    full_suite.close()


def test_full_profile_is_meta_worlds_own_picture_turned_upright():
    suite = MetaWorldSuite(("drawer-close-v3",), render_profile="full")
    env = suite.make_env()
    stock = stock_env("drawer-close-v3", suite.goal("drawer-close-v3", "train", 2))
    stock.reset()
    expected = stock.render()[::-1, ::-1]
    stock.close()
    frame = env.reset(single_task(suite, "drawer-close-v3", 2)).images[0]
    assert np.abs(frame.astype(int) - expected).mean() < 0.1
    suite.close()


def test_frames_are_upright_and_not_mirrored():
    suite = MetaWorldSuite(("button-press-topdown-v3",), image_size=128)
    env = suite.make_env()
    frame = env.reset(single_task(suite, "button-press-topdown-v3", 1)).images[0].astype(int)
    assert frame[:10].max() == 0  # the sky, not drawn by the fast profile
    assert frame[-10:].max() > 0
    # The button box is yellow: it must be where the camera's pose projects it, once the picture is turned upright.
    yellow = (frame[..., 0] > 120) & (frame[..., 1] > 80) & (frame[..., 2] < 40)
    rows, columns = np.nonzero(yellow)
    data, model = env.simulation.data, env.simulation.model
    camera = model.camera("corner2").id
    offset = data.cam_xmat[camera].reshape(3, 3).T @ (data.body("box").xpos - data.cam_xpos[camera])
    scale = 64 / np.tan(np.radians(model.cam_fovy[camera]) / 2)
    row, column = 64 - scale * offset[1] / -offset[2], 64 + scale * offset[0] / -offset[2]
    assert abs(columns.mean() - (127 - column)) < 5
    assert abs(rows.mean() - (127 - row)) < 12
    suite.close()


def test_first_frame_shows_joints_where_they_are(suite):
    """window-close opens the window as the last act of its reset, without updating positions."""
    env = suite.make_env()
    frame = env.reset(single_task(suite, "window-close-v3", 0)).images
    handle = env.simulation.data.site("handleCloseStart").xpos[0]
    env.step(np.zeros(4, np.float32))
    assert abs(env.simulation.data.site("handleCloseStart").xpos[0] - handle) < 0.01
    assert np.abs(env.observe().images.astype(int) - frame).mean() < 1.0
    env.close()


def test_fast_frames_resemble_the_full_ones():
    frames = {}
    for profile in ("fast", "full"):
        env = make_env("metaworld", task="drawer-open-v3", render_profile=profile)
        frames[profile] = env.reset(single_task(env.suite, "drawer-open-v3")).images[0].astype(float).mean(axis=-1)
        env.suite.close()
    ground = slice(30, None)  # below the sky, which only `full` draws
    assert np.corrcoef(frames["fast"][ground].ravel(), frames["full"][ground].ravel())[0, 1] > 0.9


def test_camera_can_be_moved():
    near = MetaWorldSuite(("reach-v3",), camera_position_m=(0.75, 0.075, 0.7))
    far = MetaWorldSuite(("reach-v3",))
    task = single_task(near, "reach-v3")
    assert not np.array_equal(near.make_env().reset(task).images, far.make_env().reset(task).images)
    assert np.array_equal(physics(near.make_env(), task), physics(far.make_env(), task))
    near.close()
    far.close()


def test_several_cameras_give_the_frames_of_each_in_order():
    task_id, names = "reach-v3", ["corner", "corner2", "gripperPOV"]
    several = make_env("metaworld", task=task_id, camera=names)
    task = single_task(several.suite, task_id)
    frames = several.reset(task).images
    assert frames.shape == (3, 64, 64, 3)
    for name, frame in zip(names, frames, strict=True):
        alone = make_env("metaworld", task=task_id, camera=name)
        assert np.array_equal(alone.reset(task).images[0], frame)
        alone.suite.close()
    assert np.array_equal(physics(several, task), physics(make_env("metaworld", task=task_id), task))
    several.suite.close()
    with pytest.raises(ValueError, match="at least one of behindGripper"):
        MetaWorldSuite((task_id,), camera=[])


def test_scripted_expert_succeeds_and_success_is_not_termination(suite):
    env = suite.make_env()
    env.reset(single_task(suite, "window-open-v3", 0))
    results = [env.step(env.expert_action()) for _ in range(110)]
    assert any(result.success for result in results)
    assert not any(result.terminated or result.truncated for result in results)
    env.close()


def test_the_simulators_own_horizon_does_not_bite(suite):
    env = suite.make_env()
    task = single_task(suite, "window-open-v3", 0, max_env_steps=500)
    for _ in range(2):
        env.reset(task)
        assert not any(env.step(np.zeros(4, np.float32)).truncated for _ in range(500))
    with pytest.raises(ValueError, match="max_env_steps = 501"):
        env.reset(replace(task, max_env_steps=501))
    env.close()


def test_bad_actions_name_the_task(suite):
    env = suite.make_env()
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(np.zeros(4, np.float32))
    env.reset(single_task(suite, "window-open-v3"))
    with pytest.raises(ValueError, match="window-open-v3"):
        env.step(np.float32([0, np.nan, 0, 0]))
    with pytest.raises(ValueError, match="4 finite numbers"):
        env.step(np.zeros(3, np.float32))
    env.close()


def test_simulators_are_reused_between_tasks():
    suite = MetaWorldSuite(TASKS)
    envs = [suite.make_env() for _ in range(2)]
    for _ in range(3):
        for task_id in TASKS:
            for state, env in enumerate(envs):
                env.reset(single_task(suite, task_id, state))
    for env in envs:
        env.close()
    assert {task: len(idle) for task, idle in suite.pool._idle.items()} == dict.fromkeys(TASKS, 2)
    suite.close()


def test_drawing_from_another_thread_is_refused(suite):
    env = suite.make_env()
    env.reset(single_task(suite, "window-open-v3"))
    caught = []

    def observe() -> None:
        try:
            env.observe()
        except RuntimeError as error:
            caught.append(str(error))

    thread = threading.Thread(target=observe)
    thread.start()
    thread.join()
    assert "one thread" in caught[0]
    env.close()


def test_two_suites_of_one_process_draw_their_own_size():
    small, large = MetaWorldSuite(("reach-v3",)), MetaWorldSuite(("reach-v3",), image_size=96)
    a, b = small.make_env(), large.make_env()
    task = single_task(small, "reach-v3")
    first = a.reset(task).images
    assert b.reset(task).images.shape == (1, 96, 96, 3)
    assert np.array_equal(a.observe().images, first)
    large.close()
    assert np.array_equal(a.observe().images, first)
    small.close()


def test_suite_travels_to_other_processes_as_its_arguments(suite):
    copy = pickle.loads(pickle.dumps(suite))
    assert copy.settings == suite.settings
    assert copy.task_ids == suite.task_ids


def test_exit_without_closing_prints_no_gl_error():
    code = """
from vlarl_ray.envs import make_env, single_task
for size in (32, 64):  # the first is dropped, the second is alive at exit
    env = make_env(task="reach-v3", image_size=size)
    env.reset(single_task(env.suite, "reach-v3"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0
    assert "Error" not in done.stderr, done.stderr


def test_goals_are_available_where_nothing_can_be_drawn():
    code = """
from vlarl_ray.envs import gl
gl.describe_gl = lambda backend, **_: (_ for _ in ()).throw(gl.GLUnavailableError("none here"))
from vlarl_ray.envs.metaworld import MetaWorldSuite
suite = MetaWorldSuite(("reach-v3",))
assert suite.num_init_states("reach-v3", "eval") == 50
try:
    suite.make_env()
except gl.GLUnavailableError as error:
    assert "apt-get install" in str(error)
else:
    raise SystemExit("made a simulator without GL")
"""
    env = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def frame_of(value: int) -> np.ndarray:
    return np.full((1, 8, 8, 3), value, dtype=np.uint8)


def test_black_frames_are_an_error_that_names_task_and_decision():
    from vlarl_ray.envs.rendering import FrameGuard

    guard = FrameGuard()
    guard.check(frame_of(1), np.zeros(3, np.float32), task_id="reach-v3", decision=0)
    with pytest.raises(RuntimeError, match="reach-v3 at decision 1 is all black"):
        guard.check(frame_of(0), np.zeros(3, np.float32), task_id="reach-v3", decision=1)
    second_black = np.concatenate([frame_of(1), frame_of(0)])
    with pytest.raises(RuntimeError, match="a frame of reach-v3 at decision 2 is all black"):
        FrameGuard().check(second_black, np.zeros(3, np.float32), task_id="reach-v3", decision=2)


def test_frozen_frames_are_an_error_only_if_the_robot_moved():
    from vlarl_ray.envs.rendering import FrameGuard

    still, moving = FrameGuard(), FrameGuard()
    for decision in range(10):
        still.check(frame_of(5), np.zeros(3, np.float32), task_id="reach-v3", decision=decision)
    for decision in range(3):
        moving.check(frame_of(5), np.float32([0.05 * decision, 0, 0]), task_id="reach-v3", decision=decision)
    with pytest.raises(RuntimeError, match="reach-v3 at decision 3 is the same for 3 decisions"):
        moving.check(frame_of(5), np.float32([0.15, 0, 0]), task_id="reach-v3", decision=3)
