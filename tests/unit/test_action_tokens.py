import numpy as np
import pytest
import torch

from vlarl_ray.models import ActionNormalizer, ActionTokenizer, action_entropy, action_logprobs, gumbel_noise
from vlarl_ray.models.action_tokens import choose_columns

OFFICIAL = ActionTokenizer(32000)


def test_tokens_of_landmark_actions_f21():
    assert OFFICIAL.encode(torch.tensor([-1.0, 0.0, 1.0])).tolist() == [31999, 31872, 31744]
    assert OFFICIAL.first_token == 31744


def test_round_trip_error_is_at_most_half_a_bin_f21():
    grid = torch.linspace(-1, 1, 10_000)
    error = (OFFICIAL.decode(OFFICIAL.encode(grid)) - grid).abs().max().item()
    assert 0.0039 < error <= 0.0039216 + 1e-7


def test_actions_beyond_the_bounds_take_the_token_of_the_bound():
    assert OFFICIAL.encode(torch.tensor([-7.0, 7.0])).tolist() == [31999, 31744]


@pytest.mark.parametrize("token", [31743, 32000, 0, -1])
def test_tokens_outside_the_action_range_are_refused_not_clipped_f21(token):
    with pytest.raises(ValueError, match=r"31744\.\.31999"):
        OFFICIAL.decode(torch.tensor([31800, token]))


def test_actions_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        OFFICIAL.encode(torch.tensor([0.0, float("nan")]))


def test_clipping_as_the_published_tokenizer_does_is_there_to_compare_with_it():
    ids = torch.tensor([-5, 0, 31743, 31744, 31745, 31998, 31999, 32000, 32063])
    decoded = OFFICIAL.decode(ids, clip=True)
    assert torch.equal(decoded[3:7], OFFICIAL.decode(ids[3:7]))
    assert decoded[:3].tolist() == decoded[3:4].tolist() * 3
    assert decoded[7:].tolist() == decoded[6:7].tolist() * 2


def test_infinite_actions_are_those_of_the_bound_where_that_is_asked_for():
    infinite = torch.tensor([-float("inf"), float("inf")])
    assert OFFICIAL.encode(infinite, allow_infinite=True).tolist() == [31999, 31744]
    with pytest.raises(ValueError, match="not finite"):
        OFFICIAL.encode(infinite)
    with pytest.raises(ValueError, match="not finite"):
        OFFICIAL.encode(torch.tensor([float("nan")]), allow_infinite=True)


def test_quantiles_map_to_the_bounds_and_back_and_masked_dimensions_pass_through_f22():
    normalizer = ActionNormalizer.from_statistics([-0.5, 2.0, 0.0], [0.3, 6.0, 1.0], [True, True, False])
    low, high = torch.tensor([-0.5, 2.0, 0.7]), torch.tensor([0.3, 6.0, 0.7])
    torch.testing.assert_close(normalizer.normalize(low), torch.tensor([-1.0, -1.0, 0.7]))
    torch.testing.assert_close(normalizer.normalize(high), torch.tensor([1.0, 1.0, 0.7]))
    values = torch.randn(20, 3)
    torch.testing.assert_close(normalizer.unnormalize(normalizer.normalize(values)), values)


def test_a_missing_mask_means_every_dimension():
    normalizer = ActionNormalizer.from_statistics([0.0, 0.0], [4.0, 2.0], None)
    assert normalizer.unnormalize(torch.zeros(2)).tolist() == [2.0, 1.0]


def test_useless_statistics_are_refused():
    with pytest.raises(ValueError, match="not below"):
        ActionNormalizer((1.0,), (1.0,), (True,))
    with pytest.raises(ValueError, match="one per action dimension"):
        ActionNormalizer((1.0,), (2.0, 3.0), (True,))


def test_an_epsilon_widens_the_range_in_both_directions():
    """OpenVLA-OFT adds 1e-8; with it a dimension may be constant."""
    normalizer = ActionNormalizer.from_statistics([0.0, 0.5], [1.0, 0.5], None, epsilon=0.5)
    actions = torch.tensor([1.5, 1.0])
    assert normalizer.normalize(actions).tolist() == [1.0, 1.0]
    assert normalizer.unnormalize(torch.ones(2)).tolist() == [1.5, 1.0]
    tiny = ActionNormalizer.from_statistics([0.5], [0.5], None, epsilon=1e-8)
    assert tiny.unnormalize(torch.tensor([0.3])).tolist() == [0.5]
    with pytest.raises(ValueError, match="not below"):
        ActionNormalizer.from_statistics([0.6], [0.5], None, epsilon=1e-8)


def test_temperature_divides_the_logits_of_score_and_sample_alike_f44():
    logits, columns = torch.randn(5, 3, 8), torch.randint(0, 8, (5, 3))
    expected = torch.log_softmax(logits / 1.5, -1).gather(-1, columns[..., None])[..., 0]
    torch.testing.assert_close(action_logprobs(logits, columns, temperature=1.5), expected, rtol=0, atol=1e-6)
    noise = torch.from_numpy(gumbel_noise(np.arange(10, dtype=np.uint64).reshape(5, 2), (3, 8)))
    assert torch.equal(choose_columns(logits, temperature=1.5, gumbel=noise), (logits / 1.5 + noise).argmax(-1))


def test_greedy_decoding_is_scored_at_temperature_one():
    logits, columns = torch.randn(2, 3, 8), torch.randint(0, 8, (2, 3))
    assert torch.equal(
        action_logprobs(logits, columns, temperature=0.0), action_logprobs(logits, columns, temperature=1.0)
    )


def test_logprobs_of_half_precision_logits_are_computed_in_fp32():
    logits, columns = torch.randn(2, 3, 256).bfloat16(), torch.randint(0, 256, (2, 3))
    scored = action_logprobs(logits, columns, temperature=1.0)
    assert scored.dtype == torch.float32
    torch.testing.assert_close(scored, action_logprobs(logits.float(), columns, temperature=1.0), rtol=0, atol=0)


def test_entropy_is_that_of_the_tempered_distribution():
    assert action_entropy(torch.zeros(1, 1, 256), temperature=0.7).item() == pytest.approx(np.log(256), abs=1e-5)
    logits = torch.randn(4, 2, 9)
    expected = torch.distributions.Categorical(logits=logits / 2).entropy()
    torch.testing.assert_close(action_entropy(logits, temperature=2.0), expected)


def test_noise_must_come_with_a_positive_temperature_and_only_then():
    logits = torch.zeros(1, 1, 4)
    with pytest.raises(ValueError, match="noise"):
        choose_columns(logits, temperature=1.0, gumbel=None)
    with pytest.raises(ValueError, match="noise"):
        choose_columns(logits, temperature=0.0, gumbel=logits)
    with pytest.raises(ValueError, match="negative"):
        action_logprobs(logits, torch.zeros(1, 1, dtype=torch.int64), temperature=-1.0)


def test_noise_depends_on_the_rows_key_alone():
    keys = np.array([[1, 2], [3, 4], [1, 2], [1, 3]], dtype=np.uint64)
    noise = gumbel_noise(keys, (20, 256))
    assert noise.dtype == np.float32
    assert np.array_equal(noise[0], noise[2])
    assert np.array_equal(noise[1:2], gumbel_noise(keys[1:2], (20, 256)))
    assert not np.array_equal(noise[0], noise[3])
    assert np.isfinite(noise).all()


def test_samples_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    keys = np.stack([np.full(20_000, 7), np.arange(20_000)], 1).astype(np.uint64)
    noise = torch.from_numpy(gumbel_noise(keys, (4,)))
    drawn = choose_columns(logits.expand(20_000, 4), temperature=1.0, gumbel=noise)
    frequency = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(frequency, logits.softmax(-1), rtol=0, atol=0.012)
