"""Every shipped preset is a valid config, short, and holds only differences from the defaults."""

import pathlib
from dataclasses import is_dataclass

import pytest
import yaml

from vlarl_ray import libero_tasks
from vlarl_ray.config import ExperimentConfig
from vlarl_ray.config_loader import ConfigError, load_config

JOBS = pathlib.Path(__file__).parents[2] / "jobs"
PRESETS = sorted(JOBS.glob("*.yaml"))


def test_there_are_presets():
    assert {"smoke.yaml", "laptop.yaml", "metaworld_mt10_ppo.yaml"} <= {path.name for path in PRESETS}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_is_valid_and_short(path, monkeypatch):
    monkeypatch.chdir(JOBS.parent)
    load_config(str(path), [], purpose="other")
    text = path.read_text()
    assert len(text.splitlines()) <= 40
    assert text.startswith("# "), "the first line says what it is for"


def repeats(tree, config, prefix=""):
    for key, value in tree.items():
        default = getattr(config, key)
        if is_dataclass(default):
            yield from repeats(value, default, f"{prefix}{key}.")
        elif value == (list(default) if isinstance(default, tuple) else default):
            yield prefix + key


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_repeats_no_default(path):
    assert list(repeats(yaml.safe_load(path.read_text()), ExperimentConfig())) == []


@pytest.mark.parametrize(
    "path", [path for path in PRESETS if path.stem.startswith("libero")], ids=lambda path: path.stem
)
def test_libero_presets_are_published_protocols_and_lack_the_policy_only(path, tmp_path):
    cfg = load_config(str(path), [])
    assert cfg.env.tasks == ("all",)
    assert cfg.env.render_profile == "full"
    assert cfg.env.eval_seed == 0
    is_quest = cfg.env.options.get("protocol") == "quest"
    assert cfg.env.max_env_steps == (600 if is_quest else libero_tasks.MAX_ENV_STEPS[cfg.env.suite])
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), ["--run-dir", str(tmp_path)], purpose="train")
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["policy = null"]


def test_smoke_is_deterministic_and_small():
    cfg = load_config(str(JOBS / "smoke.yaml"), [])
    assert cfg.trust.deterministic
    assert cfg.learner.num_ranks == 1
    assert cfg.num_iterations == 2
