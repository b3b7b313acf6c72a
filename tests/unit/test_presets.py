"""Every shipped preset is a valid config, short, and holds only differences from the defaults."""

import pathlib
from dataclasses import is_dataclass

import pytest
import yaml

from vlarl_ray.config import ExperimentConfig
from vlarl_ray.config_loader import load_config

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


def test_smoke_is_deterministic_and_small():
    cfg = load_config(str(JOBS / "smoke.yaml"), [])
    assert cfg.trust.deterministic
    assert cfg.learner.num_ranks == 1
    assert cfg.num_iterations == 2
