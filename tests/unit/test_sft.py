import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.small_openvla import INSTRUCTIONS, TINY, tiny
from vlarl_ray.config import SFTConfig
from vlarl_ray.models.distributions import TokenDistribution
from vlarl_ray.sft import ChunkDataset, chunks, imitation_loss, jitter_colors, learning_rate, run_sft, shift_frames

QUICK = SFTConfig(num_steps=40, batch_size=16, learning_rate=3e-3, shift_pixels=1, num_threads=1)


def toy_demonstrations(count=3, steps=8, seed=0):
    """Images whose brightness tells the action; each demonstration has an instruction of its own."""
    rng = np.random.default_rng(seed)
    demonstrations = []
    for index in range(count):
        level = rng.uniform(-1, 1, steps + 1).astype(np.float32)
        frames = np.broadcast_to(((level + 1) * 127)[:, None, None, None, None], (steps + 1, 1, 32, 32, 3))
        demonstrations.append(
            SimpleNamespace(
                instruction=INSTRUCTIONS[index % 3],
                frames=frames.astype(np.uint8).copy(),
                actions=np.stack([np.full(steps, v) for v in (0.5, -0.5, index / 3)], 1).astype(np.float32),
                proprio=np.zeros((steps + 1, 4), np.float32),
            )
        )
    return demonstrations


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_toy_demonstrations_are_learned():
    model = tiny()
    metrics = run_sft(model, toy_demonstrations(), QUICK, chunk_length=2, seed=0)
    data = ChunkDataset.build(model, toy_demonstrations())
    tokens, _ = model.sample(data.inputs, temperature=0.0, noise=None)
    assert (tokens == data.tokens)[data.mask].float().mean() > 0.95
    assert metrics["sft/steps"] == 40
    assert metrics["sft/mode_error"] < 0.7


def test_autoregressive_models_learn_too():
    model = tiny(decoding="autoregressive")
    run_sft(model, toy_demonstrations(), QUICK, chunk_length=2, seed=0)
    data = ChunkDataset.build(model, toy_demonstrations())
    tokens, _ = model.sample(data.inputs, temperature=0.0, noise=None)
    assert (tokens == data.tokens)[data.mask].float().mean() > 0.95


def test_everything_but_the_value_head_is_trained():
    model = tiny()
    before = weights(model)
    run_sft(model, toy_demonstrations(), dataclasses.replace(QUICK, num_steps=2), chunk_length=2, seed=0)
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if not name.startswith("value_head.")}


def test_chunks_start_at_every_env_step_and_mask_the_tail():
    actions = np.arange(8, dtype=np.float32).reshape(4, 2)
    cut, executed = chunks(actions, 3)
    assert cut[1].tolist() == [[2, 3], [4, 5], [6, 7]]
    assert executed.tolist() == [[True] * 3, [True] * 3, [True, True, False], [True, False, False]]


def test_the_tail_past_the_end_has_no_gradient():
    logits = torch.randn(2, 4, 256, requires_grad=True)
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    imitation_loss(TokenDistribution(logits, 40), torch.full((2, 4), 40), mask).backward()
    assert (logits.grad[1, 2:] == 0).all()
    assert (logits.grad[mask].abs().amax(-1) > 0).all()


def test_the_loss_is_the_mean_over_unmasked_tokens():
    logits, columns = torch.randn(2, 3, 256), torch.randint(0, 256, (2, 3))
    mask = torch.tensor([[True, False, False], [True, True, True]])
    expected = -torch.log_softmax(logits, -1).gather(-1, columns[..., None])[..., 0][mask].mean()
    torch.testing.assert_close(imitation_loss(TokenDistribution(logits, 40), columns + 40, mask), expected)


def test_rows_pair_each_frame_with_its_own_prompt_and_chunk():
    demonstrations = toy_demonstrations(steps=5)
    data = ChunkDataset.build(tiny(), demonstrations)
    assert len(data) == 15
    assert torch.equal(data.inputs.images[7], torch.from_numpy(demonstrations[1].frames[2]))
    assert torch.equal(data.inputs.prompt_ids[7], tiny().encode_prompts([INSTRUCTIONS[1]])[0][0])
    expected = tiny().encode_actions(torch.from_numpy(demonstrations[1].actions[None, 2:4]))
    assert torch.equal(data.tokens[7], expected[0])
    assert data.mask[4].tolist() == [True] * 3 + [False] * 3


def test_shifting_repeats_the_edge_and_never_wraps():
    image = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4, 1).expand(2, 1, 4, 4, 3)
    shifted = shift_frames(image, torch.tensor([[1, 0], [0, -2]]))[..., 0]
    assert shifted[0, 0].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert shifted[1, 0].tolist() == [[2, 3, 3, 3], [6, 7, 7, 7], [10, 11, 11, 11], [14, 15, 15, 15]]


def test_colours_are_scaled_per_row_and_clipped():
    image = torch.tensor([0, 100, 255], dtype=torch.uint8).view(1, 1, 1, 3, 1).expand(2, 1, 1, 3, 3)
    jittered = jitter_colors(image, torch.tensor([1.0, 0.5]), torch.tensor([0.1, 0.0]))[..., 0].flatten(1)
    assert jittered[0].tolist() == [26, 126, 255]
    assert jittered[1].tolist() == [64, 114, 191]


def test_learning_rate_rises_falls_and_stays():
    cfg = SFTConfig(num_steps=100, learning_rate=1.0)
    rates = [learning_rate(step, cfg) for step in range(150)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.02, abs=1e-3)
    assert rates[100:] == pytest.approx([0.02] * 50)


def test_training_goes_on_until_max_seconds():
    model = tiny()
    cfg = dataclasses.replace(QUICK, num_steps=1, max_seconds=1.0)
    metrics = run_sft(model, toy_demonstrations(), cfg, chunk_length=2, seed=0)
    assert metrics["sft/steps"] > 2
    assert 1.0 <= metrics["sft/seconds"] < 5.0


def test_same_seed_same_weights_and_another_seed_others():
    results = []
    for seed in (0, 0, 1):
        model = tiny()
        run_sft(model, toy_demonstrations(), dataclasses.replace(QUICK, num_steps=3), chunk_length=2, seed=seed)
        results.append(weights(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert not torch.equal(results[0]["projector.fc1.weight"], results[2]["projector.fc1.weight"])


def test_unfit_demonstrations_are_refused():
    with pytest.raises(ValueError, match=r"demos\.path"):
        run_sft(tiny(), [], QUICK, chunk_length=2, seed=0)
    with pytest.raises(ValueError, match="action_dim = 5"):
        run_sft(tiny(action_dim=5), toy_demonstrations(), QUICK, chunk_length=2, seed=0)
    with pytest.raises(ValueError, match="chunk_length = 3"):
        run_sft(tiny(), toy_demonstrations(), QUICK, chunk_length=3, seed=0)
    assert TINY.chunk_length == 2
