"""Actions as tokens: 256 bins at the end of the vocabulary, their one distribution, and keyed sampling noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt64
from torch import Tensor


@dataclass(frozen=True)
class ActionTokenizer:
    """Map numbers in [-1, 1] to the last `num_bins` ids of a vocabulary, the largest to the smallest, as OpenVLA does.

    Example:
        >>> ActionTokenizer(32000).encode(torch.tensor([-1.0, 0.0, 1.0])).tolist()
        [31999, 31872, 31744]
    """

    vocab_size: int
    """Of the tokenizer, without the padding of the embedding matrix."""
    num_bins: int = 256
    """Bin edges; there are one fewer centres, so the lowest two ids decode alike."""

    @property
    def first_token(self) -> int:
        """Smallest action id: the id of logits column 0."""
        return self.vocab_size - self.num_bins

    def encode(self, actions: Float[Tensor, "*shape"], *, allow_infinite: bool = False) -> Int64[Tensor, "*shape"]:
        """Return the token of each number; beyond [-1, 1] it is that of the bound.

        Args:
            actions: Normalised.
            allow_infinite: Take infinities for numbers beyond the bounds, as the published tokenizer does, to compare
                with it. In data they are a fault, so they are refused otherwise.

        Raises:
            ValueError: If a number is NaN, or infinite where that is not allowed.
        """
        if actions.isnan().any() or not (allow_infinite or torch.isfinite(actions).all()):
            raise ValueError("actions hold a value that is not finite; it has no token. Check the demonstrations.")
        edges = self._edges(actions.device)
        return self.vocab_size - torch.bucketize(actions.double().clamp(-1.0, 1.0), edges, right=True)

    def columns(self, tokens: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
        """Return the logits column of each token.

        Raises:
            ValueError: If a token is no action token; it is never clipped to one.
        """
        columns = tokens - self.first_token
        if ((columns < 0) | (columns >= self.num_bins)).any():
            wrong = tokens[(columns < 0) | (columns >= self.num_bins)].flatten()[0]
            raise ValueError(
                f"token {int(wrong)} is no action token; allowed are {self.first_token}..{self.vocab_size - 1}. "
                "The tokens come from a model with another vocabulary."
            )
        return columns

    def decode(self, tokens: Int64[Tensor, "*shape"], *, clip: bool = False) -> Float32[Tensor, "*shape"]:
        """Return the bin centre of each token.

        Args:
            tokens: Ids of the vocabulary.
            clip: Decode any id below the action tokens as the lowest of them and any above as the highest, as the
                published tokenizer does, to compare with it. A policy here never gives such an id.

        Raises:
            ValueError: If a token is no action token and `clip` is off.
        """
        edges = self._edges(tokens.device)
        centers = (edges[:-1] + edges[1:]) / 2
        columns = tokens - self.first_token if clip else self.columns(tokens)
        bins = (self.num_bins - 1 - columns).clamp(0, self.num_bins - 2)
        return centers[bins].float()

    def _edges(self, device: torch.device) -> Tensor:
        # numpy's linspace, as in the published tokenizer: torch's differs in the last bit of some edges.
        return torch.from_numpy(np.linspace(-1.0, 1.0, self.num_bins)).to(device)


@dataclass(frozen=True)
class ActionNormalizer:
    """Map between env units and [-1, 1], per dimension.

    `q01` goes to -1 and `q99` to +1 where `mask` is true; other dimensions (the gripper) pass through.

    Source:
        OpenVLA's `norm_stats`; OpenVLA-OFT adds 1e-8 to the range q99 - q01, in both directions.
    """

    q01: tuple[float, ...]
    q99: tuple[float, ...]
    mask: tuple[bool, ...]
    epsilon: float = 0.0
    """Added to the range; above 0, a dimension may be constant (q01 = q99)."""

    def __post_init__(self) -> None:
        if not len(self.q01) == len(self.q99) == len(self.mask):
            raise ValueError(
                f"action statistics: q01, q99, mask have {len(self.q01)}, {len(self.q99)}, {len(self.mask)} entries; "
                "each must have one per action dimension."
            )
        for low, high, used in zip(self.q01, self.q99, self.mask, strict=True):
            if used and not low < high + self.epsilon:
                raise ValueError(f"action statistics: q01 = {low} is not below q99 = {high}; mask this dimension out.")

    @classmethod
    def identity(cls, action_dim: int) -> ActionNormalizer:
        """Pass every dimension through: for suites whose actions are in [-1, 1] already."""
        return cls((-1.0,) * action_dim, (1.0,) * action_dim, (False,) * action_dim)

    @classmethod
    def from_statistics(
        cls, q01: Sequence[float], q99: Sequence[float], mask: Sequence[bool] | None, *, epsilon: float = 0.0
    ) -> ActionNormalizer:
        """Take the `action` entry of OpenVLA's `norm_stats`; a missing mask means all true."""
        return cls(tuple(q01), tuple(q99), (True,) * len(q01) if mask is None else tuple(mask), epsilon)

    def unnormalize(self, actions: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Turn model numbers into env units."""
        low, span, mask = self._tensors(actions)
        return torch.where(mask, 0.5 * (actions + 1) * span + low, actions)

    def normalize(self, actions: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Turn env units into model numbers."""
        low, span, mask = self._tensors(actions)
        return torch.where(mask, 2 * (actions - low) / torch.where(mask, span, 1) - 1, actions)

    def _tensors(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high = (torch.tensor(q, dtype=like.dtype, device=like.device) for q in (self.q01, self.q99))
        return low, high - low + self.epsilon, torch.tensor(self.mask, device=like.device)


def action_logprobs(
    logits: Float[Tensor, "B L N"], columns: Int64[Tensor, "B L"], *, temperature: float
) -> Float32[Tensor, "B L"]:
    """Score action tokens under the masked, tempered distribution: the one that samplers draw from and learners score.

    Args:
        logits: Of the N action bins; everything else has probability zero.
        columns: Logits column of each token (token id minus the model's `first_action_token`).
        temperature: Divides the logits; 0 (greedy decoding) scores at temperature 1.

    Raises:
        ValueError: If the temperature is negative.
    """
    return _log_softmax(logits, temperature).gather(-1, columns[..., None]).squeeze(-1)


def action_entropy(logits: Float[Tensor, "B L N"], *, temperature: float) -> Float32[Tensor, "B L"]:
    """Entropy, in nats, of each token's masked, tempered distribution."""
    logprobs = _log_softmax(logits, temperature)
    return -(logprobs.exp() * logprobs).sum(-1)


def choose_columns(
    logits: Float[Tensor, "... N"], *, temperature: float, gumbel: Float[Tensor, "... N"] | None
) -> Int64[Tensor, ...]:
    """Draw a column from each distribution: the argmax of tempered logits plus Gumbel noise.

    Raises:
        ValueError: If noise is missing at a positive temperature, or given at 0.
    """
    if (temperature > 0) != (gumbel is not None):
        raise ValueError(f"temperature = {temperature}: noise must be given if and only if it is positive.")
    if gumbel is None:
        return logits.argmax(-1)
    return (logits.float() / temperature + gumbel).argmax(-1)


def gumbel_noise(keys: UInt64[np.ndarray, "B 2"], shape: tuple[int, ...]) -> Float32[np.ndarray, "B ..."]:
    """Draw standard Gumbel noise that depends on each row's 128-bit Philox key alone, not on its place in the batch.

    Args:
        keys: One key per row, see `TaskSpec.noise_key`.
        shape: Of one row's noise.
    """
    uniform = np.empty((len(keys), *shape), dtype=np.float32)
    for row, key in zip(uniform, keys, strict=True):
        np.random.Generator(np.random.Philox(key=key)).random(out=row, dtype=np.float32)
    np.clip(uniform, 1e-38, 1 - 2**-24, out=uniform)
    return -np.log(-np.log(uniform))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    if temperature < 0:
        raise ValueError(f"temperature = {temperature} is negative; it must be 0 (greedy) or more.")
    scaled = logits.float()
    return torch.log_softmax(scaled / temperature if temperature > 0 else scaled, dim=-1)
