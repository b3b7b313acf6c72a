"""Every rank reads its own rows of a policy folder; together they hold what the folder holds, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.e2e.toy_run import toy_config
from tests.learner_runs import run_ranks
from tests.small_quest import QUEST
from vlarl_ray.config import OFTConfig, QuestConfig
from vlarl_ray.models import new_policy
from vlarl_ray.models.lora import adapter_tensors, attach_lora
from vlarl_ray.models.policy import load_model
from vlarl_ray.models.weight_files import write_files

INSTRUCTIONS = ("reach the cross",)


@pytest.fixture(
    scope="module",
    params=[
        {},
        {"architecture": "openvla_oft", "action_head": "laplace", "proprio_dim": 2, "oft": OFTConfig(passes="two")},
        {"architecture": "quest", "proprio_dim": 2, "quest": QuestConfig(**{**QUEST, "lowdim": (("position", 2),)})},
    ],
    ids=["openvla", "openvla_oft", "quest"],
)
def folder(request, tmp_path_factory):
    """A policy in several files, most of whose dimensions no number of ranks divides."""
    path = tmp_path_factory.mktemp("policy")
    config = replace(toy_config(path).model, value_hidden_sizes=(7,), **request.param)
    model = new_policy(config, INSTRUCTIONS, 0)
    for buffer in model.buffers():
        buffer.add_(1)  # so that buffers which were computed rather than read are noticed
    model.save(path)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    write_files(path, tensors.items(), max_file_bytes=30_000)
    assert len(list(path.glob("model-*.safetensors"))) > 2
    return path


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_shards_are_the_folders_tensors(folder, world_size):
    jobs = [("load_folder", {"folder": str(folder), "train": train}) for train in ("full", "lora")]
    ranks = run_ranks(world_size, jobs)
    model = load_model(folder)
    expected = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for full, lora in ranks:  # what is frozen or a buffer is whole on each of them
        held = {**ranks[0][0]["parameters"], **full["whole"]}
        assert held.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(held[name], value, err_msg=name)
            if name in full["whole"]:
                np.testing.assert_array_equal(lora["whole"][name], value, err_msg=name)

    full, lora = ranks[0]
    cfg = toy_config(folder)
    attach_lora(model, cfg.learner.lora, seed=cfg.seed)
    for official, (a, b) in adapter_tensors(model).items():
        module = official.removesuffix(".weight")
        np.testing.assert_array_equal(lora["parameters"][f"{module}.lora_A.default.weight"], a)
        np.testing.assert_array_equal(lora["parameters"][f"{module}.lora_B.default.weight"], b)
    np.testing.assert_array_equal(full["logprobs"], lora["logprobs"])


def test_frozen_weights_are_read_too(folder):
    """LoRA's base is no part of a learner's state, so it is compared by what the model says."""
    jobs = [("load_folder", {"folder": str(folder), "train": "lora"})]
    [alone], [two, _] = run_ranks(1, jobs)[0], [result[0] for result in run_ranks(2, jobs)]
    np.testing.assert_allclose(alone["logprobs"], two["logprobs"], atol=1e-6)
    assert np.ptp(alone["logprobs"]) > 1e-3
