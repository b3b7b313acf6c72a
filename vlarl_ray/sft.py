"""Warm start: cross-entropy on the action tokens of demonstrations.

Data flow: demonstrations -> one row per env step (frame, prompt, the chunk that starts there) -> shuffled batches ->
shifted and re-coloured frames -> `model.forward` -> masked cross-entropy -> AdamW.

A model whose tokens are codes of an autoencoder learns that one first, by reconstruction, and then the codes it gives.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch import Tensor, nn

from vlarl_ray.config import SFTConfig
from vlarl_ray.demos.store import chunks
from vlarl_ray.models.base import PolicyInputs, VLAModel
from vlarl_ray.models.distributions import ActionDistribution, Samples
from vlarl_ray.types import spread_mask

_LOG_EVERY_STEPS = 100
_WARM_UP_FRACTION = 0.1
_FINAL_FRACTION = 0.02
"""Of the peak learning rate; also that of training past `num_steps`."""


@runtime_checkable
class Demonstration(Protocol):
    """What is read of a demonstration of T env steps."""

    @property
    def instruction(self) -> str:
        """The task."""
        ...

    @property
    def frames(self) -> UInt8[np.ndarray, "T1 V H W 3"]:
        """RGB, upright; before every env step, and after the last."""
        ...

    @property
    def actions(self) -> Float32[np.ndarray, "T D"]:
        """Executed actions, env units."""
        ...

    @property
    def proprio(self) -> Float32[np.ndarray, "T1 P"]:
        """Proprioception with each frame."""
        ...


@runtime_checkable
class HasAutoencoder(Protocol):
    """A model (QueST) whose tokens are codes of blocks of actions, which have to be learned before the tokens are."""

    autoencoder: nn.Module

    @property
    def block_length(self) -> int:
        """Actions of a block."""
        ...

    def reconstruction_loss(self, actions: Float[Tensor, "B T D"]) -> Float[Tensor, ""]:
        """Error of blocks of actions after the autoencoder."""
        ...


@dataclass(frozen=True)
class ChunkDataset:
    """One row per env step of all demonstrations: what is seen there and the chunk of actions that starts there."""

    inputs: PolicyInputs
    tokens: Samples
    mask: Bool[Tensor, "M L"]
    """False where the chunk reaches past the end of its demonstration."""

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def build(cls, model: VLAModel, demonstrations: Sequence[Demonstration]) -> ChunkDataset:
        """Tokenise demonstrations.

        Raises:
            ValueError: If there are none, or their actions don't have the model's dimensions.
        """
        _check_demonstrations(model, demonstrations)
        tokens, masks = [], []
        for demonstration in demonstrations:
            actions, executed = chunks(demonstration.actions, model.block_length)
            tokens.append(model.encode_actions(torch.from_numpy(actions)))
            mask = spread_mask(executed, model.num_action_tokens, of_chunk=model.tokens_of_chunk)
            masks.append(torch.from_numpy(mask))
        ids, lengths = model.encode_prompts([demonstration.instruction for demonstration in demonstrations])
        owner = torch.repeat_interleave(torch.tensor([len(demonstration.actions) for demonstration in demonstrations]))
        frames = np.concatenate(
            [demonstration.frames[: len(demonstration.actions)] for demonstration in demonstrations]
        )
        proprio = np.concatenate(
            [demonstration.proprio[: len(demonstration.actions)] for demonstration in demonstrations]
        )
        inputs = PolicyInputs(torch.from_numpy(frames), ids[owner], lengths[owner], torch.from_numpy(proprio))
        return cls(inputs, torch.cat(tokens), torch.cat(masks))


def shift_frames(images: UInt8[Tensor, "B V H W 3"], offsets: Int64[Tensor, "B 2"]) -> UInt8[Tensor, "B V H W 3"]:
    """Translate each row's frames by (down, right) pixels; what comes in repeats the edge, nothing wraps around."""
    height, width = images.shape[2:4]
    y = (torch.arange(height) - offsets[:, :1]).clamp(0, height - 1)
    x = (torch.arange(width) - offsets[:, 1:]).clamp(0, width - 1)
    rows = torch.arange(len(images))[:, None, None]
    return images[rows, :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2, 4)


def jitter_colors(
    images: UInt8[Tensor, "B V H W 3"], contrast: Float[Tensor, " B"], brightness: Float[Tensor, " B"]
) -> UInt8[Tensor, "B V H W 3"]:
    """Scale each row's frames around mid-grey by `contrast` and add `brightness` (1 = full scale)."""
    shape = (-1, 1, 1, 1, 1)
    scaled = (images.float() - 127.5) * contrast.view(shape) + (127.5 + 255 * brightness.view(shape))
    return scaled.round_().clamp_(0, 255).to(torch.uint8)


def learning_rate(step: int, cfg: SFTConfig) -> float:
    """One cycle: linear rise over the first tenth, cosine decay to 2 % of the peak at `num_steps`, constant after."""
    warm_up = max(1, round(_WARM_UP_FRACTION * cfg.num_steps))
    if step < warm_up:
        return cfg.learning_rate * (step + 1) / warm_up
    progress = min(1.0, (step - warm_up) / max(1, cfg.num_steps - warm_up))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.learning_rate * (_FINAL_FRACTION + (1 - _FINAL_FRACTION) * cosine)


def imitation_loss(actions: ActionDistribution, samples: Samples, mask: Bool[Tensor, "B L"]) -> Float[Tensor, ""]:
    """Mean negative log-likelihood of the unmasked numbers, nats; masked ones get no gradient."""
    return _masked_mean(-actions.log_prob(samples, temperature=1.0), mask)


def _masked_mean(values: Float[Tensor, "B L"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, ""]:
    return torch.where(mask, values, 0.0).sum() / mask.sum()


def run_sft(
    model: VLAModel,
    demonstrations: Sequence[Demonstration],
    cfg: SFTConfig,
    *,
    chunk_length: int,
    seed: int,
    log: Callable[[str], object] | None = None,
) -> dict[str, float]:
    """Fine-tune everything but the value head, in place, on the negative log-likelihood of the demonstrated actions.

    A model with an autoencoder has that fitted first (`fit_autoencoder`), in as many steps, and frozen then.

    Args:
        model: Model to train; it is left in evaluation mode.
        demonstrations: Each contributes a row per env step.
        cfg: Steps, batch, augmentation. With `max_seconds` training goes on past `num_steps` until then.
        chunk_length: K, which must be the model's.
        seed: Of batches, augmentation and dropout.
        log: Is given a line of progress now and then.

    Returns:
        `sft/loss` and `sft/mode_error` (means over the last steps), `sft/steps`, `sft/steps_per_s`, `sft/seconds`; of
        an autoencoder also `sft/reconstruction_error`.

    Raises:
        ValueError: If there are no demonstrations, or they don't fit the model.
    """
    if chunk_length != model.chunk_length:
        raise ValueError(f"chunk_length = {chunk_length}, but the model has {model.chunk_length}; they must be equal.")
    left_out, fitted = ("value_head.",), {}
    if isinstance(model, HasAutoencoder):
        left_out = ("value_head.", "autoencoder.")
        fitted = fit_autoencoder(model, demonstrations, cfg, seed=seed, log=log)
    data = ChunkDataset.build(model, demonstrations)
    generator = torch.Generator().manual_seed(seed)
    parameters = [parameter for name, parameter in model.named_parameters() if not name.startswith(left_out)]
    optimizer = torch.optim.AdamW(parameters, weight_decay=cfg.weight_decay, fused=True)
    start, step, window = time.monotonic(), 0, _Window()
    with _threads(cfg.num_threads), _training(model, seed):
        for rows in _batches(len(data), cfg.batch_size, generator):
            past_time = cfg.max_seconds is None or time.monotonic() - start >= cfg.max_seconds
            if step >= cfg.num_steps and past_time:
                break
            optimizer.param_groups[0]["lr"] = learning_rate(step, cfg)
            loss, error = _train_step(model, data, rows, cfg, generator)
            torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            window.add(loss, error)
            if log is not None and (step % _LOG_EVERY_STEPS == 0 or step == cfg.num_steps):
                log(f"fine-tuning step {step}/{cfg.num_steps}: {window.describe()}, {time.monotonic() - start:.0f} s")
    seconds = time.monotonic() - start
    rate = step / seconds if step else 0.0
    return {**fitted, **window.means(), "sft/steps": float(step), "sft/steps_per_s": rate, "sft/seconds": seconds}


def fit_autoencoder(
    model: VLAModel,
    demonstrations: Sequence[Demonstration],
    cfg: SFTConfig,
    *,
    seed: int,
    log: Callable[[str], object] | None = None,
) -> dict[str, float]:
    """Train a model's autoencoder, in place, to reconstruct the blocks of actions that start at every env step.

    Past the end of a demonstration its last action is repeated. Nothing else of the model is touched.

    Args:
        model: Model to train; it is left in evaluation mode.
        demonstrations: Their actions are used.
        cfg: `num_steps`, batch, learning rate.
        seed: Of batches and dropout.
        log: Is given a line of progress now and then.

    Returns:
        `sft/reconstruction_error`: mean absolute error over the last steps, normalised action units.

    Raises:
        ValueError: If there are no demonstrations, or they or the model don't fit.
    """
    if not isinstance(model, HasAutoencoder):
        raise ValueError(f"a {type(model).__name__} has no autoencoder to fit; this is for architecture quest.")
    _check_demonstrations(model, demonstrations)
    cut = [chunks(demonstration.actions, model.block_length)[0] for demonstration in demonstrations]
    blocks = torch.from_numpy(np.concatenate(cut))
    parameters = list(model.autoencoder.parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=cfg.weight_decay, fused=True)
    rows = _batches(len(blocks), cfg.batch_size, torch.Generator().manual_seed(seed))
    errors: list[float] = []
    with _threads(cfg.num_threads), _training(model, seed):
        for step in range(cfg.num_steps):
            optimizer.param_groups[0]["lr"] = learning_rate(step, cfg)
            loss = model.reconstruction_loss(blocks[next(rows)])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            errors.append(float(loss.detach()))
            if log is not None and ((step + 1) % _LOG_EVERY_STEPS == 0 or step + 1 == cfg.num_steps):
                recent = np.mean(errors[-_LOG_EVERY_STEPS:])
                log(f"autoencoder step {step + 1}/{cfg.num_steps}: reconstruction error {recent:.4f}")
    return {"sft/reconstruction_error": float(np.mean(errors[-_LOG_EVERY_STEPS:]))} if errors else {}


def augment(
    images: UInt8[Tensor, "B V H W 3"], cfg: SFTConfig, generator: torch.Generator
) -> UInt8[Tensor, "B V H W 3"]:
    """Shift and re-colour each row's frames at random."""
    batch = len(images)
    if cfg.shift_pixels:
        offsets = torch.randint(-cfg.shift_pixels, cfg.shift_pixels + 1, (batch, 2), generator=generator)
        images = shift_frames(images, offsets)
    if cfg.color_jitter:
        draws = cfg.color_jitter * (2 * torch.rand(2, batch, generator=generator) - 1)
        images = jitter_colors(images, 1 + draws[0], draws[1])
    return images


class _Window:
    """Means over the recent steps."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._errors: list[float] = []

    def add(self, loss: float, error: float) -> None:
        self._losses = [*self._losses, loss][-_LOG_EVERY_STEPS:]
        self._errors = [*self._errors, error][-_LOG_EVERY_STEPS:]

    def means(self) -> dict[str, float]:
        if not self._losses:
            return {}
        return {"sft/loss": float(np.mean(self._losses)), "sft/mode_error": float(np.mean(self._errors))}

    def describe(self) -> str:
        return f"loss {np.mean(self._losses):.3f}, error of the most likely action {np.mean(self._errors):.3f}"


def _train_step(
    model: VLAModel, data: ChunkDataset, rows: Tensor, cfg: SFTConfig, generator: torch.Generator
) -> tuple[float, float]:
    inputs = data.inputs.rows(rows)
    inputs = PolicyInputs(
        augment(inputs.images, cfg, generator), inputs.prompt_ids, inputs.prompt_lengths, inputs.proprio
    )
    tokens, mask = data.tokens[rows], data.mask[rows]
    actions = model(inputs, tokens).actions
    loss = imitation_loss(actions, tokens, mask)
    loss.backward()
    with torch.no_grad():
        return float(loss), float(_masked_mean(actions.mode_error(tokens), mask))


def _check_demonstrations(model: VLAModel, demonstrations: Sequence[Demonstration]) -> None:
    if not demonstrations:
        raise ValueError("there are no demonstrations to fine-tune on; collect some, or check demos.path.")
    for demonstration in demonstrations:
        if demonstration.actions.shape[1] != model.action_dim:
            raise ValueError(
                f"a demonstration has {demonstration.actions.shape[1]} action dimensions, but model.action_dim = "
                f"{model.action_dim}; set it to that of the suite."
            )


def _batches(num_rows: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield row indices without end; each pass over the rows has an order of its own."""
    pending = torch.empty(0, dtype=torch.int64)
    while True:
        while len(pending) < batch_size:
            pending = torch.cat([pending, torch.randperm(num_rows, generator=generator)])
        yield pending[:batch_size]
        pending = pending[batch_size:]


@contextmanager
def _training(model: nn.Module, seed: int) -> Iterator[None]:
    """Training mode, with dropout drawn from `seed`; then evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model.train()
        try:
            yield
        finally:
            model.eval()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
