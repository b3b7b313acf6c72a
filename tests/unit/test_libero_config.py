"""What is known of LIBERO without it: tables, config checks, and what is said where it is missing."""

import pickle
import zipfile

import numpy as np
import pytest

from tests.unit.test_config import problems
from vlarl_ray.config_loader import load_config
from vlarl_ray.envs import make_suite
from vlarl_ray.envs.libero import Libero90, LiberoGoal
from vlarl_ray.envs.libero_simulation import LiberoUnavailableError, read_init_states
from vlarl_ray.libero_tasks import MAX_ENV_STEPS, PROTOCOLS, TASKS, instruction_of
from vlarl_ray.registry import SUITES

GOAL = ["--env.suite", "libero_goal", "--env.tasks", "[all]", "--env.camera", "agentview", "--model.action_dim", "7"]
TWO = ["--model.architecture", "openvla_oft", "--model.oft.num_cameras", "2"]
BROKEN = {
    "task": (
        [*GOAL, "--env.tasks", "[turn_on_stove]"],
        "env.tasks: 'turn_on_stove' is no task of libero_goal; did you mean 'turn_on_the_stove'?",
    ),
    "task of another suite": (
        [*GOAL, "--env.suite", "libero_spatial", "--env.tasks", "[turn_on_the_stove]"],
        "env.tasks: 'turn_on_the_stove' is no task of libero_spatial",
    ),
    "no task": ([*GOAL, "--env.tasks", "[]"], "env.tasks = []: must name at least one task; write [all]."),
    "task twice": ([*GOAL, "--env.tasks", "[all, turn_on_the_stove]"], "'turn_on_the_stove' more than once"),
    "camera": ([*GOAL, "--env.camera", "agent"], "env.camera = 'agent' is no LIBERO camera; did you mean 'agentview'?"),
    "wrist camera missing": ([*GOAL, *TWO], "env.camera names 1 camera (agentview), but a policy of openvla_oft takes"),
    "action": ([*GOAL, "--model.action_dim", "4"], "model.action_dim = 4: LIBERO has 7 action dimensions; set 7."),
    "states": (
        [*GOAL, "--evaluation.states_per_task", "51"],
        "evaluation.states_per_task = 51: LIBERO has 50 held-out initial states a task",
    ),
    "protocol": (
        [*GOAL, "--env.options", "{protocol: openvla-oft}"],
        "env.options.protocol = 'openvla-oft' is unknown; did you mean 'openvla'?",
    ),
    "proprioception": (
        [*GOAL, "--model.architecture", "openvla_oft", "--model.proprio_dim", "12"],
        "model.proprio_dim = 12: protocol openvla has 8: robot0_eef_pos (3), robot0_eef_axis_angle (3), "
        "robot0_gripper_qpos (2); set that, 0, or another env.options.protocol.",
    ),
    "turned twice": (
        [*GOAL, "--model.preprocessing.frame_steps", "[rotate180, jpeg]"],
        "model.preprocessing.frame_steps names rotate180, but frames of libero_goal come turned already",
    ),
    "assets": ([*GOAL, "--env.assets", "/not/there"], "env.assets = '/not/there': no such folder"),
    "assets of another suite": (["--env.assets", "tests"], "env.assets = 'tests': metaworld has none; leave it out."),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_libero_config_is_refused_by_one_precise_message(case):
    overrides, expected = BROKEN[case]
    found = problems(*overrides)
    assert len(found) == 1, found
    assert expected in found[0]


def test_a_run_needs_something_to_start_from(tmp_path):
    run_dir = ["--run-dir", str(tmp_path / "run")]
    [message] = problems(*GOAL, *run_dir, purpose="train")
    assert message.startswith("policy = null: libero_goal has no scripted expert")
    assert load_config(None, [*GOAL, *run_dir]).policy is None  # to plan for, and to evaluate others


def test_every_suite_has_its_tasks():
    assert set(TASKS) == set(MAX_ENV_STEPS) == {name for name in SUITES if name.startswith("libero")}
    assert {name: len(tasks) for name, tasks in TASKS.items()} == dict.fromkeys(TASKS, 10) | {"libero_90": 90}
    assert len({task for tasks in TASKS.values() for task in tasks}) == 130
    assert instruction_of("LIVING_ROOM_SCENE2_pick_up_the_butter") == "pick up the butter"
    assert {name: protocol.proprio_dim for name, protocol in PROTOCOLS.items()} == {"openvla": 8, "quest": 12}


def test_a_suite_is_described_without_libero(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    suite = make_suite(load_config(None, [*GOAL, "--env.options", "{protocol: quest, num_train_states: 7}"]).env)
    assert suite.task_ids == TASKS["libero_goal"]
    assert (suite.name, suite.proprio_dim) == ("libero_goal", 12)
    assert suite.instruction("turn_on_the_stove") == "turn on the stove"
    assert [suite.num_init_states("turn_on_the_stove", split) for split in ("train", "eval")] == [7, 50]
    with pytest.raises(LiberoUnavailableError, match=r"not installed; run pip install .* -r requirements-libero"):
        suite.make_env()


def test_missing_assets_say_where_they_were_looked_for(tmp_path, monkeypatch):
    (tmp_path / "package" / "libero" / "bddl_files").mkdir(parents=True)
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "package")]})()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(LiberoUnavailableError, match=r"package/libero/assets nor in .*/home/\.cache/libero/assets\."):
        LiberoGoal().make_env()
    with pytest.raises(LiberoUnavailableError, match=rf"env\.assets = {tmp_path}: .* are not in {tmp_path}\."):
        LiberoGoal(assets=str(tmp_path)).make_env()


def test_training_states_are_many_and_have_digests_of_their_own():
    suite = Libero90(num_train_states=60)
    tasks = suite.task_ids[:3]
    digests = {suite.init_state_hash(task, "train", state) for task in tasks for state in range(60)}
    seeds = {suite.init_state(task, "train", state)[0] for task in tasks for state in range(60)}
    assert len(digests) == len(seeds) == 180
    assert suite.init_state(tasks[0], "train", 5) == Libero90().init_state(tasks[0], "train", 5)
    assert suite.init_state(tasks[0], "train", 5) != Libero90(train_seed=1).init_state(tasks[0], "train", 5)
    with pytest.raises(ValueError, match=r"the train split of .* holds 0\.\.59"):
        suite.init_state(tasks[0], "train", 60)


class Harmful:
    def __reduce__(self):
        return eval, ("print('run')",)


@pytest.mark.parametrize(
    ("content", "message"), [(Harmful(), r"builtins\.eval|__builtin__\.eval"), ([1], "holds list")]
)
def test_initial_states_are_arrays_or_refused(tmp_path, monkeypatch, capsys, content, message):
    folder = tmp_path / "libero" / "init_files" / "libero_goal"
    folder.mkdir(parents=True)
    (tmp_path / "libero" / "bddl_files").mkdir()
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    with zipfile.ZipFile(folder / "turn_on_the_stove.pruned_init", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match=message):
        read_init_states("libero_goal", "turn_on_the_stove")
    assert capsys.readouterr().out == ""
    states = np.arange(6.0).reshape(2, 3)
    with zipfile.ZipFile(folder / "turn_on_the_stove.pruned_init", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(states, protocol=2))
    assert np.array_equal(read_init_states("libero_goal", "turn_on_the_stove"), states)
    suite = LiberoGoal(("turn_on_the_stove",), eval_seed=3)
    seed, state = suite.init_state("turn_on_the_stove", "eval", 1)
    assert (seed, state.tolist()) == (4, [3.0, 4.0, 5.0])
    assert suite.init_state_hash("turn_on_the_stove", "eval", 0) != suite.init_state_hash(
        "turn_on_the_stove", "eval", 1
    )
