"""One rank of the learner: scores trajectories, updates the weights, gives them out.

Every method marked *collective* must be called on all ranks in the same order; the group (`learner/group.py`) does so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int, Num

from vlarl_ray.algorithms.advantages import explained_variance
from vlarl_ray.algorithms.base import Algorithm
from vlarl_ray.config import LearnerConfig
from vlarl_ray.learner.batch import BatchReader, DealtRows, DemoReader, Fetch, PromptCache, deal_rows, epoch_minibatches
from vlarl_ray.learner.fsdp import Ranks, gather_full, shard
from vlarl_ray.learner.memory import MeasuredMemory, PassMeter, shards
from vlarl_ray.learner.optimizer import ShardOptimizer
from vlarl_ray.learner.scoring import Scorer
from vlarl_ray.learner.update import Minibatch, NonFiniteError, Updater
from vlarl_ray.models.base import VLAModel
from vlarl_ray.models.heads import HEADS
from vlarl_ray.models.lora import CRITIC, POLICY, lora_layers, official_name
from vlarl_ray.models.policy import DTYPES
from vlarl_ray.models.weight_files import WeightFiles
from vlarl_ray.types import ActRequest, Scores, TrainBatch, Trajectory, spread_mask
from vlarl_ray.weights.adapters import expected_adapters
from vlarl_ray.weights.canary import update_digests
from vlarl_ray.weights.merge import expected_checksums
from vlarl_ray.weights.update import WeightUpdate

_LOG = logging.getLogger(__name__)


class Learner:
    """One rank. Without a store address it is the only one, unsharded and without torch.distributed.

    Args:
        cfg: Learner config.
        algorithm: Gives loss and schedule.
        model: Freshly loaded, fp32, with LoRA attached where `cfg.train` is `lora`; the learner takes it over.
        fill: Gives a model that comes on the meta device its values, once it is sharded; needs a process group.
        rank: This rank.
        world_size: Number of ranks.
        store_address: Host and port where ranks meet; rank 0 listens there.
        seed: Of the run; decides the order of rows.
        device: Torch device; None follows `cfg.device`.
        pristine: Weights of the policy folder, which servers merge into; rank 0 needs them for servers that report
            checksums.
    """

    def __init__(
        self,
        cfg: LearnerConfig,
        algorithm: Algorithm,
        model: VLAModel,
        *,
        rank: int = 0,
        world_size: int = 1,
        store_address: tuple[str, int] | None = None,
        seed: int = 0,
        device: str | torch.device | None = None,
        fill: Callable[[VLAModel, Ranks], None] | None = None,
        pristine: WeightFiles | None = None,
    ) -> None:
        _check_supported(cfg, algorithm, model, store_address)
        torch.set_num_threads(cfg.num_threads)
        self._cfg = cfg
        self._algorithm = algorithm
        self._seed = seed
        self._pristine = pristine
        self._device = torch.device(device or _device(cfg))
        self.model = model.eval()  # no dropout: the scored distribution is the sampled one
        if fill is None:
            model.to(self._device)
        self._ranks = Ranks.join(
            rank=rank,
            world_size=world_size,
            store_address=store_address,
            device=self._device,
            timeout_s=cfg.collective_timeout_s,
        )
        has_critic = "values" in algorithm.needs
        actor, critic = _split_trainable(model, has_critic=has_critic)
        self._published = _published_names(model)
        if self._ranks.has_process_group:
            compute_dtype = _to_bfloat16(model) if cfg.dtype == "bfloat16" else None
            shard(
                model,
                self._ranks,
                device=self._device,
                compute_dtype=compute_dtype,
                min_params=cfg.fsdp_min_params,
            )
            if fill is not None:
                model.to_empty(device=self._device)
                fill(model, self._ranks)
        parameters = dict(model.named_parameters())  # sharded now; `fully_shard` keeps names but replaces tensors
        common: dict[str, Any] = {"cfg": cfg, "ranks": self._ranks}
        self._actor = ShardOptimizer(
            {name: parameters[name] for name in actor}, learning_rate=cfg.actor_learning_rate, **common
        )
        self._critic: ShardOptimizer | None = None
        if has_critic:
            named = {name: parameters[name] for name in critic}
            self._critic = ShardOptimizer(named, learning_rate=cfg.critic_learning_rate, **common)
        self._prompts = PromptCache(model)
        self._scorer = Scorer(
            model, self._ranks, micro_batch_size=cfg.micro_batch_size, prompts=self._prompts, device=self._device
        )
        self._updater = Updater(
            model,
            algorithm,
            self._ranks,
            actor=self._actor,
            critic=self._critic,
            sync_every_pass=cfg.train == "full",
        )
        self._summary: tuple[int, int, dict[str, str]] | None = None
        self._memory: MeasuredMemory | None = None

    def score(self, trajectories: Sequence[Trajectory], fetch: Fetch = list) -> list[Scores]:
        """Score this rank's share of the trajectories. Collective.

        Args:
            trajectories: All of the update, the same on every rank; shared out by `batch.deal_trajectories`.
            fetch: Resolves frame references; the default takes frames that are arrays already.

        Returns:
            Values of S+1 observations and log-probabilities of S decisions for each trajectory of the share, ascending.
        """
        return self._scorer.score(trajectories, fetch)

    def update(self, batch: TrainBatch, fetch: Fetch = list) -> dict[str, float]:
        """Run epochs x minibatches of optimiser steps. Collective.

        Args:
            batch: The same on every rank.
            fetch: Resolves frame references; each needed trajectory is fetched once.

        Returns:
            Metrics `learn/...`, the same on every rank.

        Raises:
            NonFiniteError: If a number of the batch, a loss or a gradient is not finite.
            ValueError: If the batch is empty.
        """
        _check_batch(batch)
        factor = 1.0 - batch.progress * (1.0 - self._cfg.final_learning_rate_fraction)
        for optimizer in self.optimizers():
            optimizer.scale_learning_rate(factor)
        minibatches = self._plan(batch)
        rows = np.concatenate([dealt.rows for minibatch in minibatches for dealt in minibatch.passes])
        reader = BatchReader(batch, rows, fetch, self._prompts, self._device)
        demo_reader = None
        if batch.demos is not None:
            cloned = np.concatenate([dealt.rows for minibatch in minibatches for dealt in minibatch.clone_passes])
            demo_reader = DemoReader(batch.demos, cloned, fetch, self._prompts, self.model, self._device)
        metrics = self._run(batch, minibatches, reader, demo_reader)
        metrics["learning_rate"] = factor * self._cfg.actor_learning_rate
        if self._critic is not None:
            metrics["explained_variance"] = explained_variance(batch.old_values, batch.returns)
        _LOG.info("updated version %d in %d steps", batch.policy_version, int(metrics["num_optimizer_steps"]))
        return {f"learn/{name}": value for name, value in metrics.items()}

    def measured_memory(self) -> MeasuredMemory | None:
        """Return what this rank's tensors took in its first update that trained everything; None before that."""
        return self._memory

    def weight_update(self, version: int) -> WeightUpdate | None:
        """Gather what servers need of the current weights, called `version`. Collective; None except on rank 0."""
        wanted = {name for names in self._published.values() for name in names}
        shapes, shards = self._trainable()
        full = gather_full(self._ranks, {n: s for n, s in shapes.items() if n in wanted}, shards)
        if self._ranks.rank != 0:
            return None
        update = WeightUpdate(
            version=version,
            lora_scale=self._cfg.lora.alpha / self._cfg.lora.rank,
            adapters={name: (full[ab[0]], full[ab[1]]) for name, ab in self._published.items() if len(ab) == 2},
            tensors={name: full[own[0]] for name, own in self._published.items() if len(own) == 1},
        )
        self._summary = (version, update.num_bytes, update_digests(update))
        return update

    def weight_update_summary(self, version: int) -> tuple[int, dict[str, str]]:
        """Bytes and digests of the last `weight_update`, computed here, before it left the learner (rank 0).

        Raises:
            ValueError: If the last update was of another version.
        """
        if self._summary is None or self._summary[0] != version:
            raise ValueError(f"weight_update_summary({version}) must follow weight_update({version}) on rank 0.")
        return self._summary[1:]

    def expected_checksums(self, update: WeightUpdate, dtype: str, lora: str = "merged") -> dict[str, str]:
        """Fingerprint what a server must load for an update.

        Args:
            update: Of `weight_update`.
            dtype: The server's precision.
            lora: `merged` into the weights that this run started from, or `native`: adapters alone.
        """
        if lora == "native":
            return expected_adapters(update, dtype=DTYPES[dtype])
        if self._pristine is None:
            raise ValueError("a learner made without its policy folder cannot say what servers must load.")
        return expected_checksums(self._pristine, update, dtype=DTYPES[dtype], device=self._device)

    def logprobs(self, request: ActRequest, tokens: Num[np.ndarray, "B L"]) -> Float32[np.ndarray, "B L"]:
        """Score given tokens under the current weights, for the canary. Collective; every rank returns all rows."""
        return self._scorer.logprobs(request, tokens).float().cpu().numpy()

    def state_dict(self) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
        """Collect what training needs to go on, full tensors on rank 0 (empty elsewhere). Collective.

        Returns:
            fp32 arrays by file and name (`parameters`: name, `optimizer`: `<name>/<moment>`), and JSON state. They load
            into any number of ranks.
        """
        shapes, shards = self._trainable()
        parameters = gather_full(self._ranks, shapes, shards)
        moments: dict[str, np.ndarray] = {}
        for optimizer in self.optimizers():
            moments |= gather_full(self._ranks, optimizer.moment_shapes(), optimizer.moment_shards())
        if self._ranks.rank != 0:
            return {}, {}
        steps = [optimizer.num_steps for optimizer in self.optimizers()]
        return {"parameters": parameters, "optimizer": moments}, {"optimizer_steps": steps}

    def load_state_dict(self, arrays: Mapping[str, Mapping[str, np.ndarray]], state: Mapping[str, Any]) -> None:
        """Restore `state_dict`; call it with the same state on every rank.

        Raises:
            ValueError: If the state is that of another model or set of trainable parameters.
        """
        parameters, moments = arrays["parameters"], arrays["optimizer"]
        own = {name: tuple(shape) for name, shape in self._trainable()[0].items()}
        if own != {name: value.shape for name, value in parameters.items()}:
            odd = sorted(set(own) ^ set(parameters))[:3] or "shapes"
            raise ValueError(f"learner state belongs to another model ({odd} differ); check model and learner.lora.")
        for optimizer, num_steps in zip(self.optimizers(), state["optimizer_steps"], strict=True):
            optimizer.load(parameters, moments, num_steps)

    def shutdown(self) -> None:
        """Leave the process group. Collective."""
        self._ranks.leave()

    def _run(
        self, batch: TrainBatch, minibatches: list[Minibatch], reader: BatchReader, demo_reader: DemoReader | None
    ) -> dict[str, float]:
        """Step through the minibatches; the first one that trains everything is measured."""
        if self._memory is not None or self._updater.warms_up(batch):
            return self._updater.run(batch, minibatches, reader, demo_reader)
        meter = PassMeter(self.model, self._device)
        metrics = self._updater.run(batch, minibatches, reader, demo_reader, first=meter)
        moments = [moment for optimizer in self.optimizers() for moment in optimizer.moment_shards().values()]
        self._memory = MeasuredMemory(
            weights=sum(shard.nbytes for shard in shards(self.model)),
            optimizer=sum(moment.nbytes for moment in moments),
            passes=meter.peak,
            pass_rows=max(len(dealt.rows) for dealt in minibatches[0].passes),
        )
        return metrics

    def _plan(self, batch: TrainBatch) -> list[Minibatch]:
        version, size = batch.policy_version, len(batch)
        minibatches = [
            Minibatch(rows, self._deal(rows, num_rows=size, version=version, minibatch=index))
            for index, rows in enumerate(self._cut(size, version))
        ]
        demos = batch.demos
        if demos is None:
            return minibatches
        model = self.model
        counted = spread_mask(demos.action_mask, model.num_action_tokens, of_chunk=model.tokens_of_chunk).sum(axis=1)
        return [
            replace(
                minibatch,
                num_clone_tokens=float(max(1, counted[rows].sum())),
                clone_passes=self._deal(rows, num_rows=len(demos), version=version, minibatch=index, is_cloning=True),
            )
            for index, (minibatch, rows) in enumerate(zip(minibatches, self._cut(len(demos), version), strict=True))
        ]

    def _cut(self, num_rows: int, version: int) -> list[Int[np.ndarray, " M"]]:
        """Cut every epoch's permutation of rows into minibatches."""
        cfg = self._algorithm.cfg
        return [
            rows
            for epoch in range(cfg.num_epochs)
            for rows in epoch_minibatches(num_rows, cfg.num_minibatches, seed=self._seed, version=version, epoch=epoch)
        ]

    def _deal(
        self, rows: Int[np.ndarray, " M"], *, num_rows: int, version: int, minibatch: int, is_cloning: bool = False
    ) -> list[DealtRows]:
        """Deal a minibatch of a batch of `num_rows`; with dropout, give every row its seed."""
        ranks = self._ranks
        passes = deal_rows(
            rows, rank=ranks.rank, world_size=ranks.world_size, micro_batch_size=self._cfg.micro_batch_size
        )
        if not self._cfg.lora.dropout:
            return passes
        draw = {"seed": self._seed, "version": version, "minibatch": minibatch, "is_cloning": is_cloning}
        return [dealt.with_dropout(num_rows=num_rows, **draw) for dealt in passes]

    def optimizers(self) -> list[ShardOptimizer]:
        """That of the policy and, with a critic, that of the value head."""
        return [self._actor] if self._critic is None else [self._actor, self._critic]

    def _trainable(self) -> tuple[dict[str, torch.Size], dict[str, torch.Tensor]]:
        shapes = {name: shape for optimizer in self.optimizers() for name, shape in optimizer.shapes.items()}
        shards = {name: own for optimizer in self.optimizers() for name, own in optimizer.shards.items()}
        return shapes, shards


def _split_trainable(model: VLAModel, *, has_critic: bool) -> tuple[list[str], list[str]]:
    """Names of actor and critic parameters; the model's frozen modules are frozen, without a critic its parameters."""
    actor, critic = [], []
    for name, parameter in model.named_parameters():
        if name.startswith(model.frozen_modules):
            parameter.requires_grad_(False)
        is_critic = name.startswith("value_head.") or f".lora_A.{CRITIC}." in name or f".lora_B.{CRITIC}." in name
        if is_critic and not has_critic:
            parameter.requires_grad_(False)
        elif parameter.requires_grad:
            (critic if is_critic else actor).append(name)
    return actor, critic


def _published_names(model: VLAModel) -> dict[str, tuple[str, ...]]:
    """Parameter names that make up a weight update, by official name: (A, B) of an adapter, or one whole tensor."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    published: dict[str, tuple[str, ...]] = {}
    for official, layer in lora_layers(model).items():
        published[official] = tuple(names[id(ab[POLICY].weight)] for ab in (layer.lora_A, layer.lora_B))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_A." not in name and ".lora_B." not in name:
            published[official_name(name)] = (name,)
    return published


def _to_bfloat16(model: VLAModel) -> torch.dtype:
    """Store frozen weights in the compute precision (half the memory, nothing to cast); trainable ones stay fp32."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and not name.startswith(HEADS):
            parameter.data = parameter.data.to(torch.bfloat16)
    return torch.bfloat16


def _device(cfg: LearnerConfig) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device


def _check_supported(
    cfg: LearnerConfig, algorithm: Algorithm, model: VLAModel, store_address: tuple[str, int] | None
) -> None:
    if (cfg.train == "lora") != bool(lora_layers(model)):
        raise ValueError(
            f"learner.train = {cfg.train!r}, but the model has {len(lora_layers(model))} adapted layers; "
            "call attach_lora before building the learner if and only if it is 'lora'."
        )
    if cfg.train == "full" and algorithm.needs_reference:
        raise ValueError(
            "algorithm.kl_coef needs a reference policy, which is the one with adapters disabled; "
            "set it to 0 or learner.train to 'lora'."
        )
    trained = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    if algorithm.needs_reference and "action_head" in trained:
        raise ValueError(
            "algorithm.kl_coef needs a reference policy, the one with adapters disabled, but the action head is "
            "trained whole; set algorithm.kl_coef to 0."
        )
    if algorithm.needs_reference and "scale_head" in trained:
        raise ValueError(
            "algorithm.kl_coef needs a reference policy, the one with adapters disabled, but the scale head is trained "
            "whole; set learner.train_scale_head to false, or algorithm.kl_coef to 0."
        )
    if cfg.train == "full" and cfg.critic == "separate":
        raise ValueError("learner.critic = 'separate' needs learner.train = 'lora': it is a second set of adapters.")
    if cfg.dtype not in model.dtypes:
        raise ValueError(
            f"learner.dtype = {cfg.dtype!r}: this model computes in {' or '.join(model.dtypes)} only; set it to that."
        )
    if cfg.dtype == "bfloat16" and store_address is None:
        raise ValueError(
            "learner.dtype = 'bfloat16' needs a process group (it is FSDP's mixed precision); use 'float32'."
        )


def _check_batch(batch: TrainBatch) -> None:
    if not len(batch):
        raise ValueError("The learner got a batch without rows; skip the update when no group was accepted.")
    for name in ("old_logprobs", "advantages", "returns", "old_values", "weights", "proprio"):
        bad = ~np.isfinite(getattr(batch, name).reshape(len(batch), -1)).all(axis=1)
        if bad.any():
            row = int(bad.argmax())
            task = batch.instructions[batch.trajectory_index[row]]
            raise NonFiniteError(
                f"update from version {batch.policy_version}: {name} of row {row} (task {task!r}, decision "
                f"{batch.decision_index[row]}) is not finite; no weight was changed."
            )
