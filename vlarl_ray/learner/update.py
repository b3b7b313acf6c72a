"""The optimiser steps of one update.

minibatch -> micro-batches: forward, loss / global count, backward -> all-reduce (losses, KL, gradient norms)
          -> stop by KL, or raise on NaN, or clip and step: every rank decides the same, before anything moves
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from vlarl_ray.algorithms.base import Algorithm, LossRows, LossTerms, Normalizers
from vlarl_ray.algorithms.losses import cloning_loss
from vlarl_ray.learner.batch import BatchReader, DealtRows, DemoReader, MicroBatch
from vlarl_ray.learner.fsdp import Ranks
from vlarl_ray.learner.optimizer import ShardOptimizer
from vlarl_ray.models.base import VLAModel
from vlarl_ray.models.lora import adapter_dropout
from vlarl_ray.types import TrainBatch


class NonFiniteError(RuntimeError):
    """A loss or gradient is infinite or NaN; nothing was stepped."""


@dataclass(frozen=True)
class Minibatch:
    """One optimiser step."""

    rows: Int[np.ndarray, " M"]
    """Of all ranks, for the global denominators."""
    passes: Sequence[DealtRows]
    """This rank's share."""
    num_clone_tokens: float = 0.0
    """Action tokens to clone, of all ranks."""
    clone_passes: Sequence[DealtRows] = ()
    """This rank's share of the rows to clone."""


class Updater:
    """Runs minibatches of one algorithm on one rank's model.

    Args:
        model: Sharded or not.
        algorithm: Gives the loss.
        ranks: The group.
        actor: Optimiser of the policy.
        critic: Optimiser of the value head; None where the algorithm has no critic.
        sync_every_pass: Reduce gradients after every pass, not once per minibatch: less memory where everything trains.
    """

    def __init__(
        self,
        model: VLAModel,
        algorithm: Algorithm,
        ranks: Ranks,
        *,
        actor: ShardOptimizer,
        critic: ShardOptimizer | None,
        sync_every_pass: bool,
    ) -> None:
        self._model = model
        self._algorithm = algorithm
        self._ranks = ranks
        self._actor = actor
        self._critic = critic
        self._sync_every_pass = sync_every_pass

    def warms_up(self, batch: TrainBatch) -> bool:
        """Whether the critic alone learns from a batch."""
        return self._critic is not None and batch.policy_version < self._algorithm.cfg.critic_warmup_updates

    def run(
        self,
        batch: TrainBatch,
        minibatches: Iterable[Minibatch],
        reader: BatchReader,
        demo_reader: DemoReader | None = None,
        *,
        first: AbstractContextManager[object] | None = None,
    ) -> dict[str, float]:
        """Step through the minibatches, or until one exceeds the KL limit. Collective.

        Args:
            batch: The same on every rank.
            minibatches: At least one.
            reader: Of the batch.
            demo_reader: Of the rows to clone, if there are any.
            first: Context for the passes of the first minibatch.

        Returns:
            Means over the minibatches (maxima for `*_max`), without the `learn/` prefix.

        Raises:
            NonFiniteError: Naming the tensor and the version.
        """
        cfg, warms_up = self._algorithm.cfg, self.warms_up(batch)
        self._actor.require_grad(not warms_up)
        records: list[dict[str, float]] = []
        num_steps, stopped = 0, False
        for index, minibatch in enumerate(minibatches):
            with first if first and index == 0 else nullcontext():
                records.append(self._accumulate(batch, minibatch, reader, demo_reader, warms_up=warms_up))
            stopped = cfg.target_kl is not None and records[-1].get("approx_kl", 0.0) > cfg.target_kl
            if stopped:
                self._drop_gradients()
                break
            self._step(records[-1], warms_up=warms_up)
            num_steps += 1
        return {
            **_combine(records),
            "first_ratio_error": records[0].get("ratio_error", 0.0),
            "num_optimizer_steps": float(num_steps),
            "stopped_by_kl": float(stopped),
            "critic_warmup": float(warms_up),
        }

    def _accumulate(
        self,
        batch: TrainBatch,
        minibatch: Minibatch,
        reader: BatchReader,
        demo_reader: DemoReader | None,
        *,
        warms_up: bool,
    ) -> dict[str, float]:
        """Add up the gradients of a minibatch; returns its global statistics."""
        normalizers = self._algorithm.normalizers(batch, minibatch.rows)
        sums: dict[str, Tensor] = {}
        maxima: dict[str, Tensor] = {}
        for index, dealt in enumerate(minibatch.passes):
            self._sync_gradients(is_last=index == len(minibatch.passes) - 1)
            with adapter_dropout(self._model, dealt.dropout_seeds):
                terms, faults = self._backward(reader.read(dealt), batch, normalizers, warms_up=warms_up)
            shares = {"policy_loss": terms.policy.detach(), "value_loss": terms.value.detach(), **terms.sums, **faults}
            for name, value in shares.items():
                sums[name] = sums[name] + value if name in sums else value
            for name, value in terms.maxima.items():
                maxima[name] = torch.maximum(maxima[name], value) if name in maxima else value
        if demo_reader is not None and not warms_up:
            sums |= self._clone(batch, minibatch, demo_reader)
        sums["squared_grad_norm_actor"] = self._actor.squared_grad_norm()
        if self._critic is not None:
            sums["squared_grad_norm_critic"] = self._critic.squared_grad_norm()
        statistics = self._reduce(sums, maxima)
        self._check(statistics, batch.policy_version)
        for name in ("actor", "critic"):
            statistics[f"grad_norm_{name}"] = math.sqrt(statistics.pop(f"squared_grad_norm_{name}", 0.0))
        for name in ("policy", "bc"):
            if (square := statistics.pop(f"squared_grad_norm_{name}", None)) is not None:
                statistics[f"grad_norm_{name}"] = math.sqrt(square)
        return statistics

    def _clone(self, batch: TrainBatch, minibatch: Minibatch, reader: DemoReader) -> dict[str, Tensor]:
        """Add the weighted gradient of cloning to that of the other terms, and measure both by themselves."""
        sums = {"squared_grad_norm_policy": self._actor.squared_grad_norm()}
        others = self._actor.take_gradients()
        for index, dealt in enumerate(minibatch.clone_passes):
            self._sync_gradients(is_last=index == len(minibatch.clone_passes) - 1)
            rows = reader.read(dealt)
            with adapter_dropout(self._model, dealt.dropout_seeds):
                output = self._model(rows.inputs, rows.tokens)
                logprobs = output.actions.log_prob(rows.tokens, temperature=batch.temperature)
                loss = cloning_loss(logprobs, rows.mask, normalizer=minibatch.num_clone_tokens)
                (loss * self._ranks.world_size + 0.0 * output.values.sum()).backward()
            share = loss.detach()
            sums["bc_loss"] = sums["bc_loss"] + share if "bc_loss" in sums else share
        sums["squared_grad_norm_bc"] = self._actor.squared_grad_norm()
        self._actor.add_gradients(others, scale=batch.bc_weight)
        return sums

    def _sync_gradients(self, *, is_last: bool) -> None:
        """Reduce gradients over ranks in the coming pass, or leave that to the last one."""
        if isinstance(self._model, FSDPModule):
            self._model.set_requires_gradient_sync(is_last or self._sync_every_pass)

    def _backward(
        self, rows: MicroBatch, batch: TrainBatch, normalizers: Normalizers, *, warms_up: bool
    ) -> tuple[LossTerms, dict[str, Tensor]]:
        temperature = batch.temperature
        reference = None
        if self._algorithm.needs_reference:
            with torch.no_grad(), self._model.adapters_disabled():
                reference = self._model(rows.inputs, rows.tokens).actions.log_prob(rows.tokens, temperature=temperature)
        output = self._model(rows.inputs, rows.tokens)
        logprobs = output.actions.log_prob(rows.tokens, temperature=temperature)
        with torch.set_grad_enabled(self._algorithm.has_entropy_bonus and not warms_up):
            entropy = output.actions.entropy(temperature=temperature)
        terms = self._algorithm.loss(
            LossRows(
                logprobs=logprobs,
                entropy=entropy,
                values=output.values,
                reference_logprobs=reference,
                old_logprobs=rows.old_logprobs,
                old_values=rows.old_values,
                advantages=rows.advantages,
                returns=rows.returns,
                token_mask=rows.token_mask,
                weights=rows.weights,
                num_actions=batch.num_actions_per_decision,
                policy_weight=batch.policy_weight,
            ),
            normalizers,
        )
        loss = terms.value if warms_up else terms.policy + terms.value
        # FSDP averages gradients over ranks, but the loss is a share of a global mean already. The value stays in the
        # graph whatever the loss: all ranks must have gradients for the same parameters.
        (loss * self._ranks.world_size + 0.0 * output.values.sum()).backward()
        faults = {
            "nonfinite_logprobs": (~torch.isfinite(logprobs.detach())).sum(),
            "nonfinite_values": (~torch.isfinite(output.values.detach())).sum(),
        }
        return terms, faults

    def _reduce(self, sums: dict[str, Tensor], maxima: dict[str, Tensor]) -> dict[str, float]:
        """Combine statistics over ranks: two collectives and one copy to the host for a whole minibatch."""
        summed = self._ranks.sum(_pack(sums))
        if not maxima:
            return dict(zip(sums, summed.tolist(), strict=True))
        largest = self._ranks.max(_pack(maxima))
        return dict(zip([*sums, *maxima], torch.cat([summed, largest]).tolist(), strict=True))

    def _check(self, statistics: dict[str, float], version: int) -> None:
        faults = [f"the model's {name}" for name in ("logprobs", "values") if statistics.pop(f"nonfinite_{name}")]
        losses = ("policy_loss", "value_loss", "bc_loss")
        faults += [name for name in losses if not math.isfinite(statistics.get(name, 0.0))]
        if not faults and not all(math.isfinite(value) for name, value in statistics.items() if "grad_norm" in name):
            faults = [f"gradient of {name}" for name in self._nonfinite_gradients()[:3]] or ["squared gradient norm"]
        if faults:
            self._drop_gradients()
            raise NonFiniteError(
                f"update from version {version}: {', '.join(faults)} not finite; nothing was stepped. "
                "Lower learner.actor_learning_rate and learner.critic_learning_rate, or check the rewards."
            )

    def _step(self, statistics: dict[str, float], *, warms_up: bool) -> None:
        if not warms_up:
            self._actor.step(statistics["grad_norm_actor"])
        if self._critic is not None:
            self._critic.step(statistics["grad_norm_critic"])

    def _optimizers(self) -> list[ShardOptimizer]:
        return [self._actor] if self._critic is None else [self._actor, self._critic]

    def _drop_gradients(self) -> None:
        for optimizer in self._optimizers():
            optimizer.drop_gradients()

    def _nonfinite_gradients(self) -> list[str]:
        return [name for optimizer in self._optimizers() for name in optimizer.nonfinite_gradients()]


def _pack(named: dict[str, Tensor]) -> Tensor:
    return torch.stack([value.detach().double() for value in named.values()])


def _combine(records: Sequence[dict[str, float]]) -> dict[str, float]:
    columns = {name: [record[name] for record in records] for name in records[0]}
    return {name: max(c) if name.endswith("_max") else sum(c) / len(c) for name, c in columns.items()}
