"""QueST's two stages of fine-tuning: reconstruction of actions, then the codes they have."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.small_openvla import INSTRUCTIONS, tiny
from tests.small_quest import small_quest
from vlarl_ray.config import SFTConfig
from vlarl_ray.sft import ChunkDataset, fit_autoencoder, imitation_loss, run_sft

QUICK = SFTConfig(num_steps=30, batch_size=16, learning_rate=3e-3, shift_pixels=1, num_threads=1)


def demonstrations(count=3, steps=10, seed=0):
    """Smooth motions that start where the proprioception says."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        phase = rng.uniform(0, 3, 3)
        actions = np.sin(phase + 0.4 * np.arange(steps)[:, None]).astype(np.float32)
        made.append(
            SimpleNamespace(
                instruction=INSTRUCTIONS[index % 3],
                frames=rng.integers(0, 256, (steps + 1, 1, 32, 32, 3), dtype=np.uint8),
                actions=actions,
                proprio=np.concatenate([np.r_[actions, actions[-1:]], np.zeros((steps + 1, 1))], 1).astype(np.float32),
            )
        )
    return made


def test_reconstruction_is_learned_and_touches_the_autoencoder_alone():
    model = small_quest(dropout=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blocks = torch.from_numpy(np.stack([demo.actions[:8] for demo in demonstrations()]))
    start = model.reconstruction_loss(blocks).item()
    metrics = fit_autoencoder(model, demonstrations(), dataclasses.replace(QUICK, num_steps=150), seed=0)
    assert model.reconstruction_loss(blocks).item() < 0.6 * start
    assert metrics["sft/reconstruction_error"] < start
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith("autoencoder.") for name in changed)
    assert not model.training


def test_the_second_stage_learns_the_codes_and_leaves_autoencoder_and_value_head():
    model = small_quest(dropout=0.1)
    fitted = small_quest(dropout=0.1)
    fit_autoencoder(fitted, demonstrations(), QUICK, seed=0)
    data = ChunkDataset.build(fitted, demonstrations())
    assert data.mask.all()
    assert torch.equal(
        data.tokens[0], fitted.encode_actions(torch.from_numpy(demonstrations()[0].actions[None, :8]))[0]
    )

    def loss():
        with torch.no_grad():
            return float(imitation_loss(model(data.inputs, data.tokens).actions, data.tokens, data.mask))

    start = loss()
    metrics = run_sft(model, demonstrations(), QUICK, chunk_length=3, seed=0)
    assert loss() < 0.7 * start
    assert {"sft/reconstruction_error", "sft/loss"} <= metrics.keys()
    first, second = fitted.state_dict(), model.state_dict()
    same = {name for name in first if torch.equal(first[name], second[name])}
    parts = {name.partition(".")[0] for name in first.keys() - same}
    assert parts == {"image_encoders", "lowdim_encoders", "obs_proj", "task_encoder", "policy_prior"}
    assert all(name in same for name in first if name.startswith(("autoencoder.", "value_head.")))
    assert not model.training


def test_fine_tuning_is_reproducible_in_spite_of_dropout():
    trained = [small_quest(dropout=0.3), small_quest(dropout=0.3)]
    for model in trained:
        torch.rand(3)  # whatever else was drawn meanwhile
        run_sft(model, demonstrations(), dataclasses.replace(QUICK, num_steps=3), chunk_length=3, seed=5)
    first, second = (model.state_dict() for model in trained)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_models_without_an_autoencoder_have_no_such_stage():
    with pytest.raises(ValueError, match="OpenVLA has no autoencoder"):
        fit_autoencoder(tiny(), demonstrations(), QUICK, seed=0)


def test_chunks_past_the_end_are_scored_whole():
    model = small_quest()
    data = ChunkDataset.build(model, demonstrations(1, steps=4))
    assert data.mask.tolist() == [[True] * 4] * 4
    last = torch.from_numpy(np.repeat(demonstrations(1, steps=4)[0].actions[-1:], 8, axis=0))
    assert torch.equal(data.tokens[3], model.encode_actions(last[None])[0])
