"""The command line: fast to start, precise when refused, with exit codes that a script can rely on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vlarl_ray.cli import COMMANDS, _is_for_the_user, main
from vlarl_ray.config import ExperimentConfig
from vlarl_ray.config_loader import config_to_json
from vlarl_ray.evaluation_stats import steps_to_success

HEAVY = ("torch", "ray", "metaworld", "mujoco", "transformers", "pyarrow", "numpy")


def imported_by(argv):
    """Exit code of the command line in a process of its own, and which heavy packages it imported."""
    code = (
        "import json, sys\n"
        "from vlarl_ray.cli import main\n"
        f"code = main({argv!r})\n"
        f"print(json.dumps([code, [name for name in {HEAVY!r} if name in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(argv):
    assert imported_by(argv) == [0, []]


@pytest.mark.parametrize("command", ["train", "sft", "collect", "evaluate"])
def test_a_bad_config_is_refused_before_anything_heavy_is_imported(command):
    assert imported_by([command, "--seed", "x"]) == [2, []]


def test_help_lists_commands_and_every_field_with_its_sentence(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert (
        "--algorithm.clip_ratio_high  (a number > 0; default 0.28)\n      The ratio is clipped above at 1 + this."
        in text
    )
    assert "--env.render_profile  (one of fast, full; default fast)" in text
    assert "--resume" in text


def test_all_problems_go_to_stderr_without_a_traceback(capsys, tmp_path):
    argv = ["train", str(tmp_path / "no.yaml"), "--rollout.envs_per_worker=3", "--env.imag_size", "2"]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "3 problems" in err
    assert all(name in err for name in ("no.yaml", "rollout.envs_per_worker = 3", "'env.image_size'"))
    assert "Traceback" not in err


def test_preset_is_found_wherever_it_stands_among_overrides(capsys, tmp_path):
    preset = tmp_path / "p.yaml"
    preset.write_text("seed: -3")
    for argv in (["--env.camera", "x", str(preset)], [str(preset), "--env.camera=x"], ["--env.camera=x", str(preset)]):
        assert main(["train", *argv]) == 2
        err = capsys.readouterr().err
        assert "env.camera = 'x'" in err
        assert "seed = -3" in err


def test_flags_are_not_overrides_and_resume_is_told_from_a_new_run(capsys, tmp_path):
    (tmp_path / "config.json").write_text(config_to_json(ExperimentConfig(run_dir=str(tmp_path))))
    assert main(["train", "--run-dir", str(tmp_path)]) == 2
    assert "add --resume" in capsys.readouterr().err
    assert main(["train", "--resume", "--run-dir", str(tmp_path), "--seed", "1"]) == 2
    assert "another configuration (seed differ)" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["tarin"], ["train", "a.yaml", "b.yaml"], ["report", "--resume"]])
def test_a_malformed_command_line_is_a_user_error(argv, capsys):
    assert main(argv) == 2
    assert "usage:" in capsys.readouterr().err


def test_evaluate_without_a_policy_and_report_without_a_folder_say_what_to_add(capsys):
    assert main(["evaluate", "--run-dir", "nowhere"]) == 2
    assert "nowhere/policy_final is no folder" in capsys.readouterr().err
    assert main(["report"]) == 2
    assert "vlarl report RUN_DIR" in capsys.readouterr().err


def test_a_defect_ends_with_its_traceback_and_code_1(capsys):
    assert main(["train", "/proc/self/mem"]) == 1  # a file that cannot be read: an error that no check foresees
    assert "Traceback" in capsys.readouterr().err


def test_only_the_packages_own_value_errors_are_for_the_user():
    with pytest.raises(ValueError, match="horizon") as own:
        steps_to_success([9], 5)
    with pytest.raises(ValueError, match="broadcast") as defect:
        np.zeros(2) + np.zeros(3)
    assert _is_for_the_user(own.value)
    assert not _is_for_the_user(defect.value)


def test_a_folder_that_holds_no_run_is_a_user_error_without_a_traceback(capsys, tmp_path):
    assert main(["report", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "is no run folder" in err
    assert "Traceback" not in err


def test_a_policy_that_is_not_there_or_in_the_way_is_a_user_error_without_a_traceback(capsys, tmp_path):
    assert main(["export", str(tmp_path / "none"), "--to", str(tmp_path / "out")]) == 2
    assert main(["export", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert "config.json does not exist" in printed
    assert "--to is missing" in printed
    assert "Traceback" not in printed


def test_a_pager_that_closes_early_is_no_error():
    command = f"{sys.executable} -m vlarl_ray.cli train --help | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("usage: vlarl train")


@pytest.mark.parametrize("command", ["train", "sft", "collect"])
def test_a_machine_that_cannot_draw_is_told_before_anything_is_written(command, tmp_path):
    folder = tmp_path / "run"
    code = f"""
import sys
from pathlib import Path
from vlarl_ray.envs import gl
gl.describe_gl = lambda backend, **_: (_ for _ in ()).throw(gl.GLUnavailableError(backend + " is not here"))
from vlarl_ray.cli import main
sys.exit(main([{command!r}, "--run-dir", {str(folder)!r}]))
"""
    env = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "env.gl_backend" in done.stderr
    assert "apt-get install" in done.stderr
    assert not folder.exists()


def test_a_suite_of_the_working_directory_is_found_by_the_command(tmp_path):
    root = Path(__file__).parents[2]
    words = ["collect", "--env.suite", "examples.my_simulator:MySuite", "--env.tasks", '["stop"]']
    run = subprocess.run(
        [Path(sys.executable).parent / "vlarl", *words, "--model.action_dim", "2", "--run-dir", tmp_path],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "10 demonstrations" in run.stderr
