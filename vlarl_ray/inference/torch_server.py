"""The in-process PyTorch engine: serves merged weights, keeps the pristine base as a memory-mapped file."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Num
from torch import Tensor

from vlarl_ray.config import InferenceConfig
from vlarl_ray.models.base import PolicyInputs, VLAModel
from vlarl_ray.models.distributions import samples_to_numpy, samples_to_torch
from vlarl_ray.models.policy import load_policy, policy_weights
from vlarl_ray.types import ActReply, ActRequest
from vlarl_ray.weights.canary import update_digests
from vlarl_ray.weights.merge import DeltaMeter, as_tensor, merge
from vlarl_ray.weights.update import LoadReport, WeightUpdate

_LOG = logging.getLogger(__name__)


class TorchEngine:
    """Samples action chunks with a `VLAModel` on CPU or GPU.

    Args:
        policy_dir: Policy folder that the learner started from too; its weights are the pristine base.
        cfg: Precision, batch size, threads.
        deterministic: Pad every batch to `cfg.batch_size` rows, so that a row's bits do not depend on its neighbours.
        device: Torch device.
    """

    def __init__(
        self, policy_dir: str | Path, cfg: InferenceConfig, *, deterministic: bool, device: str = "cpu"
    ) -> None:
        self._cfg = cfg
        self._deterministic = deterministic
        self._device = torch.device(device)
        policy = load_policy(str(policy_dir), dtype=cfg.dtype, device=device)
        self.model: VLAModel = policy.model.eval().requires_grad_(False)
        self._parameters = dict(self.model.named_parameters())
        self._pristine = policy_weights(Path(policy_dir))
        self._prompts: dict[str, tuple[Tensor, Tensor]] = {}
        self.version: int | None = None

    def load(self, update: WeightUpdate) -> LoadReport:
        """Merge from the pristine base, one tensor at a time (see `weights.merge`); replaced tensors are copied."""
        start = time.perf_counter()
        self.version = None  # a load that fails half-way must not answer
        meter = DeltaMeter()
        known = {name: slice(None) for name in update.adapters if self._checked(name)}
        with torch.no_grad():
            for name, tensor in self._pristine.read_rows(known):
                served = merge(name, tensor, update, dtype=self._parameters[name].dtype, meter=meter)
                self._assign(name, served)
                if not torch.equal(self._parameters[name].cpu(), served):
                    if not torch.isfinite(served).all():
                        raise ValueError(f"{name} has values that are not finite, in the policy folder or its adapter.")
                    raise RuntimeError(f"{name} does not hold what was merged into it.")
            for name, value in update.tensors.items():
                self._assign(name, as_tensor(value))
        self.version = update.version
        return LoadReport(
            version=update.version,
            digests=update_digests(self._as_served(update)),
            delta_kept=meter.share,
            seconds=time.perf_counter() - start,
        )

    @torch.inference_mode()
    def sample(self, request: ActRequest) -> ActReply:
        """Sample in batches of at most `batch_size` rows."""
        assert self.version is not None
        parts = [self._sample_rows(request, rows) for rows in self._batches(len(request))]
        actions, tokens, logprobs = (torch.cat(column) for column in zip(*parts, strict=True))
        return ActReply(
            actions=actions.float().cpu().numpy(),
            tokens=samples_to_numpy(tokens),
            logprobs=logprobs.float().cpu().numpy(),
            policy_version=self.version,
            tokens_of_chunk=self.model.tokens_of_chunk,
        )

    @torch.inference_mode()
    def logprobs(self, request: ActRequest, tokens: Num[np.ndarray, "B L"]) -> Float32[np.ndarray, "B L"]:
        """Teacher-forced log-probabilities of `tokens` at the request's temperature."""
        parts = []
        for rows in self._batches(len(request)):
            taken = samples_to_torch(tokens[rows]).to(self._device)
            actions = self.model(self._inputs(request, rows), taken).actions
            scored = actions.log_prob(taken, temperature=request.temperature)
            parts.append(scored[: rows.stop - rows.start])
        return torch.cat(parts).float().cpu().numpy()

    def diagnose(
        self,
        request: ActRequest,
        tokens: Num[np.ndarray, "B L"],
        expected: Float32[np.ndarray, "B L"],
        tolerance: float,
    ) -> str:
        """Nothing to say: `load` has read back what it merged, and nothing is cached."""
        del request, tokens, expected, tolerance
        return ""

    def health(self) -> int | None:
        """Return the version in place: the engine lives as long as its process."""
        return self.version

    def close(self) -> None:
        """Nothing outlives the object."""

    def _batches(self, count: int) -> list[slice]:
        size = self._cfg.batch_size
        return [slice(lo, min(lo + size, count)) for lo in range(0, count, size)]

    def _sample_rows(self, request: ActRequest, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        index = self._padded(rows)
        noise = None
        if request.temperature > 0:
            noise = self.model.draw_noise(request.noise_keys[index]).to(self._device)
        tokens, logprobs = self.model.sample(self._inputs(request, index), temperature=request.temperature, noise=noise)
        count = rows.stop - rows.start
        return self.model.decode_actions(tokens)[:count], tokens[:count], logprobs[:count]

    def _padded(self, rows: slice) -> np.ndarray:
        index = np.arange(rows.start, rows.stop)
        if self._deterministic and len(index) < self._cfg.batch_size:
            index = np.concatenate([index, np.full(self._cfg.batch_size - len(index), index[0])])
        return index

    def _inputs(self, request: ActRequest, rows: slice | np.ndarray) -> PolicyInputs:
        index = np.arange(len(request))[rows]
        encoded = [self._prompt(request.instructions[i]) for i in index]
        return PolicyInputs(
            images=torch.from_numpy(request.images[index]),
            prompt_ids=torch.cat([ids for ids, _ in encoded]),
            prompt_lengths=torch.cat([length for _, length in encoded]),
            proprio=torch.from_numpy(request.proprio[index]),
        ).to(self._device)

    def _prompt(self, instruction: str) -> tuple[Tensor, Tensor]:
        if instruction not in self._prompts:
            self._prompts[instruction] = self.model.encode_prompts([instruction])
        return self._prompts[instruction]

    def _as_served(self, update: WeightUpdate) -> WeightUpdate:
        """The update with replaced tensors read back from the model, so that their digests are of what is served."""
        if self._cfg.dtype != "float32":
            return update
        served = {name: self._parameters[name].detach().float().cpu().numpy() for name in update.tensors}
        return replace(update, tensors=served)

    def _checked(self, name: str) -> str:
        if name not in self._parameters:
            raise ValueError(f"weight update names {name!r}, which the served model does not have.")
        return name

    def _assign(self, name: str, value: Tensor) -> None:
        parameter = self._parameters[self._checked(name)]
        if parameter.shape != value.shape:
            raise ValueError(
                f"weight update: {name!r} has shape {tuple(value.shape)}, the model's is {tuple(parameter.shape)}."
            )
        parameter.copy_(value)
