import pytest
import torch

from vlarl_ray.models.proprio import ProprioNormalizer, ProprioProjector


def test_bounds_go_to_plus_and_minus_one_and_what_lies_beyond_is_clipped():
    normalizer = ProprioNormalizer.from_statistics([-0.5, 2.0], [0.3, 6.0], None)
    proprio = torch.tensor([[-0.5, 6.0], [-0.1, 3.0], [-9.0, 99.0]], dtype=torch.float64)
    expected = torch.tensor([[-1.0, 1.0], [0.0, -0.5], [-1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(normalizer.normalize(proprio), expected, rtol=0, atol=1e-6)


def test_a_masked_dimension_is_clipped_only():
    normalizer = ProprioNormalizer.from_statistics([0.0, 0.0], [10.0, 10.0], [True, False])
    assert normalizer.normalize(torch.tensor([[5.0, 0.5], [10.0, 3.0]])).tolist() == [[0.0, 0.5], [1.0, 1.0]]


def test_a_constant_dimension_gives_its_bounds_and_no_nan():
    normalizer = ProprioNormalizer.from_statistics([0.5], [0.5], None)
    assert normalizer.normalize(torch.tensor([[0.5], [0.4], [0.6]])).tolist() == [[-1.0], [-1.0], [1.0]]


def test_statistics_that_are_none_are_refused():
    with pytest.raises(ValueError, match="proprio statistics: q01, q99, mask have 1, 2, 1 entries"):
        ProprioNormalizer((0.0,), (1.0, 2.0), (True,))
    with pytest.raises(ValueError, match=r"proprio statistics: q01 = 2\.0 is above q99 = 1\.0"):
        ProprioNormalizer((2.0,), (1.0,), (True,))


def test_the_projector_is_linear_exact_gelu_linear():
    projector = ProprioProjector(3, 5)
    proprio = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    hidden = proprio @ projector.fc1.weight.T + projector.fc1.bias
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(projector(proprio), hidden @ projector.fc2.weight.T + projector.fc2.bias)
