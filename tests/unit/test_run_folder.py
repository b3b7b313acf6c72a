"""One process at a time writes to a run folder, and a resumed run is the one that was begun."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from vlarl_ray.config import ExperimentConfig, LearnerConfig
from vlarl_ray.config_loader import config_to_json
from vlarl_ray.run_folder import RunFolderBusyError, check_evaluation_dir, check_run_dir, sole_writer

HOLD = """
import sys, time
from vlarl_ray.run_folder import sole_writer
with sole_writer(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def begun(tmp_path, **changes):
    cfg = ExperimentConfig(run_dir=str(tmp_path), **changes)
    (tmp_path / "config.json").write_text(config_to_json(cfg))
    return cfg


def test_a_second_process_is_refused_until_the_first_has_ended_however(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunFolderBusyError, match=rf"process {holder.pid} on "), sole_writer(tmp_path):
            pass
        holder.kill()
        holder.wait()
    with sole_writer(tmp_path):
        pass


def test_a_config_of_an_earlier_version_lacks_fields_that_then_have_their_defaults(tmp_path):
    cfg = begun(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["learner"]["train_scale_head"], saved["model"]["action_head"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert check_run_dir(cfg, resume=True) == []
    [problem] = check_run_dir(replace(cfg, learner=LearnerConfig(train_scale_head=False)), resume=True)
    assert "learner.train_scale_head differ" in problem.message


def test_the_number_of_iterations_may_change_where_nothing_is_stretched_over_them(tmp_path):
    cfg = begun(tmp_path)
    assert check_run_dir(replace(cfg, num_iterations=99), resume=True) == []
    (tmp_path / "annealed").mkdir()
    cfg = begun(tmp_path / "annealed", learner=LearnerConfig(final_learning_rate_fraction=0.1))
    [problem] = check_run_dir(replace(cfg, num_iterations=99), resume=True)
    assert "num_iterations differ" in problem.message


def test_an_evaluation_on_another_env_does_not_go_into_a_run_s_folder(tmp_path):
    cfg = begun(tmp_path)
    assert check_evaluation_dir(replace(cfg, num_iterations=1)) == []
    [problem] = check_evaluation_dir(replace(cfg, env=replace(cfg.env, max_env_steps=7)))
    assert "env.max_env_steps differ" in problem.message
    assert check_evaluation_dir(replace(cfg, run_dir=str(tmp_path / "new"))) == []


def test_a_run_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    [problem] = check_run_dir(ExperimentConfig(run_dir=str(tmp_path / "file" / "run")), resume=False)
    assert "file cannot be written to; choose another --run-dir" in problem.message
