from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlarl_ray.config import DemosConfig, EnvConfig
from vlarl_ray.demos.collect import collect_demonstrations, run_expert
from vlarl_ray.demos.store import Demonstration, env_settings, load_demonstrations, read_settings, write_demonstrations
from vlarl_ray.envs import make_suite, single_task
from vlarl_ray.envs.toy import optimal_num_steps

ENV = EnvConfig(suite="toy", tasks=("reach-a", "reach-b"), image_size=32, max_env_steps=40)
DEMOS = DemosConfig(episodes_per_task=4)


def demonstration(num_steps: int = 3, size: int = 8, **changes) -> Demonstration:
    rng = np.random.default_rng(num_steps)
    fields = {
        "task_id": "reach-a",
        "instruction": "reach the cross",
        "init_state_id": 7,
        "frames": rng.integers(0, 256, (num_steps + 1, 1, size, size, 3), dtype=np.uint8),
        "proprio": rng.normal(size=(num_steps + 1, 2)).astype(np.float32),
        "actions": rng.normal(size=(num_steps, 2)).astype(np.float32),
    }
    return Demonstration(**{**fields, **changes})


def same(a: Demonstration, b: Demonstration) -> bool:
    arrays = all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("frames", "proprio", "actions"))
    return arrays and all(
        getattr(a, n) == getattr(b, n) for n in ("task_id", "instruction", "init_state_id", "success")
    )


def test_episodes_come_back_bit_for_bit(tmp_path):
    written = [demonstration(3), demonstration(5, task_id="reach-b")]
    assert write_demonstrations(tmp_path / "a.parquet", written, settings=env_settings(ENV)) == 2
    read = load_demonstrations(tmp_path)
    assert all(same(a, b) for a, b in zip(written, read, strict=True))
    assert read[0].frames.flags.writeable


def test_only_the_tasks_asked_for_are_returned_and_each_must_be_there(tmp_path):
    write_demonstrations(
        tmp_path / "a.parquet", [demonstration(), demonstration(task_id="reach-b")], settings=env_settings(ENV)
    )
    assert [d.task_id for d in load_demonstrations(tmp_path, task_ids=["reach-b"])] == ["reach-b"]
    with pytest.raises(ValueError, match=r"no demonstration of \['reach-c'\]"):
        load_demonstrations(tmp_path, task_ids=["reach-a", "reach-c"])


@pytest.mark.parametrize(
    ("field", "value"),
    [("render_profile", "full"), ("image_size", 64), ("camera", "corner"), ("train_seed", 1042), ("eval_seed", 42)],
)
def test_other_cameras_profiles_and_seeds_are_refused(tmp_path, field, value):
    write_demonstrations(tmp_path / "a.parquet", [demonstration()], settings=env_settings(ENV))
    load_demonstrations(tmp_path, env=ENV)
    with pytest.raises(ValueError, match=f"env.{field} = "):
        load_demonstrations(tmp_path, env=replace(ENV, **{field: value}))


def test_mixed_render_profiles_are_refused(tmp_path):
    write_demonstrations(tmp_path / "a.parquet", [demonstration()], settings=env_settings(ENV))
    full = replace(ENV, render_profile="full")
    write_demonstrations(tmp_path / "b.parquet", [demonstration()], settings=env_settings(full))
    with pytest.raises(ValueError, match=r"\['render_profile'\] differ"):
        load_demonstrations(tmp_path)


def test_another_suite_is_refused(tmp_path):
    write_demonstrations(tmp_path / "a.parquet", [demonstration()], settings=env_settings(ENV))
    with pytest.raises(ValueError, match=r"env\.suite = 'toy'"):
        load_demonstrations(tmp_path, suite="metaworld")


def test_foreign_and_missing_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no Parquet files"):
        load_demonstrations(tmp_path)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="not those of a demonstration store"):
        load_demonstrations(tmp_path)


def test_an_episode_with_a_missing_row_is_refused(tmp_path):
    write_demonstrations(tmp_path / "a.parquet", [demonstration(4)], settings=env_settings(ENV))
    table = pq.read_table(tmp_path / "a.parquet")
    pq.write_table(pa.concat_tables([table.slice(0, 2), table.slice(3)]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="episode 0 of reach-a is not whole"):
        load_demonstrations(tmp_path)


def test_frames_of_two_shapes_do_not_share_a_store(tmp_path):
    with pytest.raises(ValueError, match="one store holds one shape"):
        write_demonstrations(tmp_path / "a.parquet", [demonstration(), demonstration(size=16)], settings={})


def test_expert_episodes_have_a_frame_at_every_env_step(tmp_path):
    path = collect_demonstrations(ENV, DEMOS, seed=3, path=tmp_path / "run" / "demos")
    suite = make_suite(ENV)
    demos = load_demonstrations(path, env=ENV, suite="toy", task_ids=suite.task_ids)
    assert [d.task_id for d in demos] == ["reach-a"] * 4 + ["reach-b"] * 4
    for demo in demos:
        assert demo.success
        assert len(demo.frames) == len(demo.proprio) == len(demo.actions) + 1
        assert len(demo.actions) == optimal_num_steps(suite.init_state("train", demo.init_state_id))
        env = suite.make_env()
        observation = env.reset(single_task(suite, demo.task_id, demo.init_state_id))
        for step, action in enumerate(demo.actions):
            assert np.array_equal(observation.images, demo.frames[step])
            assert np.array_equal(observation.proprio, demo.proprio[step])
            success = env.step(action).success
            observation = env.observe()
        assert success
        assert np.array_equal(observation.images, demo.frames[-1])
    assert len({(d.task_id, d.init_state_id) for d in demos}) == 8


def test_stored_actions_are_those_executed_under_noise():
    suite = make_suite(ENV)
    env, executed = suite.make_env(), []
    step = env.step
    env.step = lambda action: (executed.append(action.copy()), step(action))[1]
    demo = run_expert(env, single_task(suite, "reach-a"), action_noise=0.5, rng=np.random.default_rng(0))
    assert np.array_equal(demo.actions, executed)
    assert np.abs(demo.actions).max() <= 1
    quiet = run_expert(env, single_task(suite, "reach-a"), action_noise=0.0, rng=np.random.default_rng(0))
    assert not np.array_equal(demo.actions[:3], quiet.actions[:3])


def test_failed_episodes_are_not_kept_and_too_few_is_an_error(tmp_path):
    env = replace(ENV, tasks=("reach-a", "impossible"), max_env_steps=5)
    with pytest.raises(ValueError, match="the expert of impossible succeeded in 0 of 2000"):
        collect_demonstrations(env, DemosConfig(episodes_per_task=1), seed=0, path=tmp_path / "demos")
    assert list(tmp_path.iterdir()) == []  # neither the store nor its parts


def test_noise_gives_further_attempts_from_the_same_states(tmp_path):
    many = DemosConfig(episodes_per_task=60, action_noise=0.1)
    few_states = replace(ENV, tasks=("reach-a",), options={"num_train_states": 50})
    path = collect_demonstrations(few_states, many, seed=0, path=tmp_path / "demos")
    assert len(load_demonstrations(path)) == 60
    with pytest.raises(ValueError, match="action_noise > 0"):
        collect_demonstrations(few_states, DemosConfig(episodes_per_task=60), seed=0, path=tmp_path / "other")
    hopeless = replace(few_states, max_env_steps=1)
    with pytest.raises(ValueError, match=r"0 of 400 attempts .* less demos.action_noise"):
        collect_demonstrations(hopeless, many, seed=0, path=tmp_path / "other")


def test_an_equal_store_is_reused_and_another_one_is_not_overwritten(tmp_path):
    path = tmp_path / "demos"
    done: list[tuple[str, int]] = []
    collect_demonstrations(ENV, DEMOS, seed=3, path=path, progress=lambda *call: done.append(call))
    assert done == [("reach-a", 4), ("reach-b", 4)]
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    collect_demonstrations(ENV, DEMOS, seed=3, path=path)
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == before
    with pytest.raises(ValueError, match=r"other settings: \['episodes_per_task'\]"):
        collect_demonstrations(ENV, replace(DEMOS, episodes_per_task=5), seed=3, path=path)
    with pytest.raises(ValueError, match="seed is 3 there and 4 here"):
        collect_demonstrations(ENV, DEMOS, seed=4, path=path)
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == before
    assert read_settings(path)["render_profile"] == "fast"


def test_two_processes_collect_what_one_does(tmp_path):
    noisy = replace(DEMOS, action_noise=0.2)
    one = load_demonstrations(collect_demonstrations(ENV, noisy, seed=1, path=tmp_path / "one"))
    two = load_demonstrations(collect_demonstrations(ENV, noisy, seed=1, path=tmp_path / "two", num_processes=2))
    assert all(same(a, b) for a, b in zip(one, two, strict=True))


def test_a_suite_without_an_expert_is_a_clear_error(tmp_path):
    env = EnvConfig(suite="tests.unit.test_demos:SuiteWithoutExpert", tasks=("reach-a",))
    with pytest.raises(ValueError, match="no scripted expert"):
        collect_demonstrations(env, DEMOS, seed=0, path=tmp_path / "demos")


def SuiteWithoutExpert(tasks, **settings):  # noqa: N802 - stands for a class
    suite = make_suite(replace(ENV, tasks=tuple(tasks)))
    make_env = suite.make_env

    def without_expert():
        env = make_env()

        def expert_action():
            raise NotImplementedError

        env.expert_action = expert_action
        return env

    suite.make_env = without_expert
    return suite


@pytest.mark.sim
def test_meta_world_demonstrations_start_from_training_states_only(tmp_path):
    env = EnvConfig(tasks=("window-open-v3",))
    path = collect_demonstrations(env, DemosConfig(episodes_per_task=2), seed=0, path=tmp_path / "demos")
    suite = make_suite(env)
    demos = load_demonstrations(path, env=env)
    held_out = {suite.init_state_hash("window-open-v3", "eval", i) for i in range(50)}
    for demo in demos:
        assert suite.init_state_hash("window-open-v3", "train", demo.init_state_id) not in held_out
        assert demo.frames.shape[1:] == (1, 64, 64, 3)
        simulator = suite.make_env()
        first = simulator.reset(single_task(suite, "window-open-v3", demo.init_state_id))
        assert np.array_equal(first.images, demo.frames[0])
        assert [simulator.step(action).success for action in demo.actions].index(True) == len(demo.actions) - 1
    size = sum(file.stat().st_size for file in Path(path).iterdir())
    assert size < 0.5 * sum(demo.frames.nbytes for demo in demos)
    suite.close()
