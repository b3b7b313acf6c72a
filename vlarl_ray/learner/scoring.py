"""Score trajectories under the current weights: values of all observations, log-probabilities of all decisions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Num
from torch import Tensor

from vlarl_ray.learner.batch import Fetch, PromptCache, deal_trajectories, stack_frames
from vlarl_ray.learner.fsdp import Ranks, reshard
from vlarl_ray.models.base import PolicyInputs, VLAModel
from vlarl_ray.models.distributions import samples_to_torch
from vlarl_ray.types import ActRequest, Scores, Trajectory


class Scorer:
    """Forward passes without gradients, at the temperature the tokens were sampled with."""

    def __init__(
        self, model: VLAModel, ranks: Ranks, *, micro_batch_size: int, prompts: PromptCache, device: torch.device
    ) -> None:
        self._model = model
        self._ranks = ranks
        self._micro_batch_size = micro_batch_size
        self._prompts = prompts
        self._device = device

    def score(self, trajectories: Sequence[Trajectory], fetch: Fetch) -> list[Scores]:
        """Score this rank's share (see `deal_trajectories`), micro-batched across trajectories. Collective.

        Raises:
            ValueError: If trajectories were sampled at several temperatures.
        """
        if not trajectories:
            return []
        temperature = _common_temperature(trajectories)
        sizes = [trajectory.num_decisions + 1 for trajectory in trajectories]
        shares = deal_trajectories(sizes, self._ranks.world_size)
        own = shares[self._ranks.rank]
        owners = own or [0]  # a rank without a share must still run its passes
        frames = dict(zip(owners, fetch([trajectories[i].frames for i in owners]), strict=True))
        rows = [(i, s) for i in owners for s in range(sizes[i])]
        most = max(sum(sizes[i] for i in share) for share in shares)
        num_passes = -(-most // self._micro_batch_size)
        size = -(-most // num_passes)
        rows = [*rows, *[rows[0]] * (num_passes * size - len(rows))][: num_passes * size]
        values, logprobs = [], []
        for start in range(0, len(rows), size):
            inputs, tokens = self._gather(trajectories, frames, rows[start : start + size])
            pass_values, pass_logprobs = self._forward(inputs, tokens, temperature)
            values.append(pass_values)
            logprobs.append(pass_logprobs)
        reshard(self._model)
        all_values, all_logprobs = torch.cat(values).cpu().numpy(), torch.cat(logprobs).cpu().numpy()
        scores, at = [], 0
        for i in own:
            end = at + sizes[i]
            # Copies, so that one trajectory's scores do not keep the whole batch alive.
            scores.append(Scores(values=all_values[at:end].copy(), logprobs=all_logprobs[at : end - 1].copy()))
            at = end
        return scores

    def logprobs(self, request: ActRequest, tokens: Num[np.ndarray, "B L"]) -> Float[Tensor, "B L"]:
        """Score given tokens for the observations of a request, all rows on every rank. Collective."""
        ids, lengths = self._prompts.encode(request.instructions)
        # Copies: arrays from the object store are read-only, which torch does not support.
        images, proprio = torch.tensor(request.images), torch.tensor(request.proprio)
        inputs = PolicyInputs(images, ids, lengths, proprio)
        taken = samples_to_torch(tokens)
        parts = []
        for start in range(0, len(request), self._micro_batch_size):
            rows = slice(start, start + self._micro_batch_size)
            part = self._forward(inputs.rows(rows).to(self._device), taken[rows].to(self._device), request.temperature)
            parts.append(part[1])
        reshard(self._model)
        return torch.cat(parts)

    def _gather(
        self, trajectories: Sequence[Trajectory], frames: dict[int, np.ndarray], rows: Sequence[tuple[int, int]]
    ) -> tuple[PolicyInputs, Tensor]:
        indices, decisions = [i for i, _ in rows], [s for _, s in rows]
        ids, lengths = self._prompts.encode([trajectories[i].task.instruction for i in indices])
        proprio = np.stack([trajectories[i].proprio[s] for i, s in rows])
        # The last observation has no decision; any tokens do for its value, which is read before them.
        tokens = np.stack([trajectories[i].tokens[min(s, trajectories[i].num_decisions - 1)] for i, s in rows])
        inputs = PolicyInputs(
            torch.from_numpy(stack_frames(frames, indices, decisions)), ids, lengths, torch.from_numpy(proprio)
        )
        return inputs.to(self._device), samples_to_torch(tokens).to(self._device)

    @torch.no_grad()
    def _forward(self, inputs: PolicyInputs, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        output = self._model(inputs, tokens)
        return output.values, output.actions.log_prob(tokens, temperature=temperature)


def _common_temperature(trajectories: Sequence[Trajectory]) -> float:
    temperatures = {trajectory.task.temperature for trajectory in trajectories}
    if len(temperatures) != 1:
        raise ValueError(
            f"One score pass needs one sampling temperature, got {sorted(temperatures)}; "
            "do not mix evaluation and training episodes."
        )
    return temperatures.pop()
