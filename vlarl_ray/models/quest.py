"""QueST: a policy that chooses skills, a few discrete codes each of which a frozen decoder turns into actions.

    frames, proprioception, instruction ─► context ─► prior ─► codes ─► decoder ─► the first K of a block of actions

One decision is one skill. Its L codes belong to the chunk as a whole: L need be no multiple of K, and all are scored
once any of its env steps was executed. QueST itself samples among the five likeliest codes, while RIPT-VLA scores the
full softmax. Here sampler and scorer share one distribution, over all codes and at one temperature, so nothing is
truncated.

RL trains the prior and the value head. What lies before the prior and behind it stays as it is: RIPT-VLA trains on
cached context tokens, and a decoder that moved would change the meaning of what was sampled.

Source:
    Mete et al. 2024 (arXiv:2407.15840); as trained by RL: Tan et al. 2025, RIPT-VLA (arXiv:2505.17016).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int64, UInt8, UInt64
from torch import Tensor, nn

from vlarl_ray.config import ModelConfig
from vlarl_ray.models.action_tokens import ActionNormalizer, gumbel_noise
from vlarl_ray.models.base import PolicyInputs, PolicyOutput
from vlarl_ray.models.chunk_policy import ChunkPolicyModel
from vlarl_ray.models.distributions import Samples, TokenDistribution
from vlarl_ray.models.heads import ValueHead
from vlarl_ray.models.lora import CRITIC, use_adapter
from vlarl_ray.models.proprio import ProprioNormalizer
from vlarl_ray.models.quest_autoencoder import PositionalCode, SkillAutoencoder
from vlarl_ray.models.quest_encoders import ImageEncoder, LowdimEncoder, SpatialSoftmax
from vlarl_ray.models.quest_prior import SelfAttention, SkillPrior
from vlarl_ray.models.tokenizer import PromptTokenizer
from vlarl_ray.quest_checks import quest_problems

_NUM_CONTEXT = 2
"""Context tokens of the prior: task and observation."""
_MAX_LISTED = 12
"""Instructions named in an error."""


class QueST(ChunkPolicyModel):
    """QueST with a value head, read at the last context token (h0), before any code.

    `metadata["instructions"]` lists the instructions the policy knows: row i of `task_embeddings` is the vector of the
    i-th, or row i of the task encoder where that is an embedding. A prompt is one id, its row.
    """

    tokens_of_chunk = True
    dtypes = ("float32",)
    task_embeddings: Tensor

    frozen_modules = ("autoencoder.", "image_encoders.", "lowdim_encoders.", "obs_proj.", "task_encoder.")

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: PromptTokenizer | None = None,
        *,
        normalizer: ActionNormalizer | None = None,
        proprio_normalizer: ProprioNormalizer | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """As `ChunkPolicyModel`; there is no tokenizer.

        Raises:
            ValueError: If sizes contradict each other, or `task_size` rows don't hold the instructions.
        """
        for _, message in quest_problems(config):
            raise ValueError(message)
        super().__init__(
            config, tokenizer, normalizer=normalizer, proprio_normalizer=proprio_normalizer, metadata=metadata
        )
        quest, width = config.quest, config.quest.prior_dim
        self.first_action_token = 0
        instructions = self.metadata.setdefault("instructions", [])
        self._rows = {text: row for row, text in reversed(list(enumerate(instructions)))}
        self.image_encoders = nn.ModuleDict(
            {name: ImageEncoder(config.image_size, quest.image_embed_dim) for name in quest.cameras}
        )
        self.lowdim_encoders = nn.ModuleDict(
            {n: LowdimEncoder(size, quest.lowdim_hidden_sizes, quest.lowdim_embed_dim) for n, size in quest.lowdim}
        )
        features = len(quest.cameras) * quest.image_embed_dim + len(quest.lowdim) * quest.lowdim_embed_dim
        self.obs_proj = nn.Linear(features, width)
        if quest.task_encoding == "vector":
            self.task_encoder = nn.Linear(quest.task_size, width)
            self.register_buffer("task_embeddings", torch.zeros(len(instructions), quest.task_size))
        elif len(instructions) > quest.task_size:
            raise ValueError(
                f"model.quest.task_size = {quest.task_size}, but there are {len(instructions)} instructions; "
                "each needs a row of its own, so set at least that."
            )
        else:
            self.task_encoder = nn.Embedding(quest.task_size, width)
        self.autoencoder = SkillAutoencoder(quest, config.action_dim)
        self.policy_prior = SkillPrior(quest)
        self.value_head = ValueHead(width, config.value_hidden_sizes)

    @classmethod
    def sample_space(cls, config: ModelConfig) -> tuple[int, range]:
        """Number of codes of a skill, and their indices."""
        return config.quest.num_codes, range(config.quest.codebook_size)

    @classmethod
    def for_instructions(
        cls,
        config: ModelConfig,
        instructions: Sequence[str],
        *,
        normalizer: ActionNormalizer | None = None,
        proprio_normalizer: ProprioNormalizer | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> QueST:
        """Make a model that knows `instructions`; its weights are arbitrary."""
        known = list(dict.fromkeys(instructions))
        return cls(
            config,
            normalizer=normalizer,
            proprio_normalizer=proprio_normalizer,
            metadata={**(metadata or {}), "instructions": known},
        )

    @property
    def block_length(self) -> int:
        """Actions that a skill stands for."""
        return self.model_config.quest.block_length

    @property
    def output_layer(self) -> nn.Linear:
        """The prior's output layer."""
        return self.policy_prior.head

    def forward(self, inputs: PolicyInputs, tokens: Samples | None = None) -> PolicyOutput:
        """Give the distribution of every code given those before it, and the value.

        Raises:
            ValueError: If `tokens` is None, or the observation is not what the model takes.
        """
        if tokens is None:
            raise ValueError("tokens must be given: the prior scores each code of a skill given those before it.")
        context = self.context(inputs)
        logits, read_out = self.policy_prior(context, tokens[:, :-1])
        if self.critic == "separate":
            with use_adapter(self, CRITIC):
                read_out = self.policy_prior.read_out(context)
        return PolicyOutput(TokenDistribution(logits, 0), self.value_head(read_out, detach=self.detach_value))

    def sample(
        self, inputs: PolicyInputs, *, temperature: float, noise: Float[Tensor, "B L *N"] | None
    ) -> tuple[Samples, Float[Tensor, "B L"]]:
        """Draw skills code by code, with their log-probabilities."""

        def choose(logits: Tensor, index: int) -> Tensor:
            here = None if noise is None else noise[:, index : index + 1]
            return TokenDistribution(logits, 0).sample(temperature=temperature, noise=here)

        with torch.no_grad():
            logits, codes = self.policy_prior.sample(self.context(inputs), choose)
            return codes, TokenDistribution(logits, 0).log_prob(codes, temperature=temperature)

    def key_value_bytes(self, rows: int) -> int:
        """Keys and values of the prior's layers, at its context, its start and all codes but the last."""
        quest, head = self.model_config.quest, self.output_layer
        positions = _NUM_CONTEXT + self.num_action_tokens
        return rows * positions * 2 * quest.prior_layers * quest.prior_dim * head.weight.element_size()

    def draw_noise(self, keys: UInt64[np.ndarray, "B 2"]) -> Float[Tensor, "B L *N"]:
        """Draw the Gumbel noise of one skill per key."""
        return torch.from_numpy(gumbel_noise(keys, (self.num_action_tokens, self.model_config.quest.codebook_size)))

    def context(self, inputs: PolicyInputs) -> Float[Tensor, "B 2 W"]:
        """Encode observations into two tokens, task and observation.

        Raises:
            ValueError: If there are other cameras or proprioception than the model takes.
        """
        quest = self.model_config.quest
        if inputs.images.shape[1] != len(quest.cameras):
            raise ValueError(
                f"images hold {inputs.images.shape[1]} cameras per observation; this model takes "
                f"{len(quest.cameras)}: {', '.join(quest.cameras)}."
            )
        if quest.lowdim and inputs.proprio.shape[1] != self.model_config.proprio_dim:
            raise ValueError(
                f"proprio has {inputs.proprio.shape[1]} numbers per observation; this model takes "
                f"{self.model_config.proprio_dim}: {', '.join(f'{name} ({size})' for name, size in quest.lowdim)}."
            )
        features = [encoder(self.pixels(inputs.images[:, i])) for i, encoder in enumerate(self.image_encoders.values())]
        sizes = [size for _, size in quest.lowdim]
        parts = self.normalized_proprio(inputs).float().split(sizes, dim=1) if sizes else ()
        features += [e(part) for e, part in zip(self.lowdim_encoders.values(), parts, strict=True)]
        row = inputs.prompt_ids[:, 0]
        task = self.task_encoder(self.task_embeddings[row] if quest.task_encoding == "vector" else row)
        return torch.stack([task, self.obs_proj(torch.cat(features, dim=-1))], dim=1)

    def pixels(self, images: UInt8[Tensor, "B H W 3"]) -> Float[Tensor, "B 3 S S"]:
        """Scale one camera's frames to [0, 1] and to the model's size (bilinear, not antialiased, as RIPT-VLA does)."""
        pixels = images.permute(0, 3, 1, 2).float().div(255)
        size = self.model_config.image_size
        if pixels.shape[-2:] != (size, size):
            pixels = F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False)
        return pixels

    def encode_prompts(self, instructions: Sequence[str]) -> tuple[Int64[Tensor, "B 1"], Int64[Tensor, " B"]]:
        """Look up the row of each instruction.

        Raises:
            ValueError: If an instruction is unknown, listing those that are known, the nearest first.
        """
        for text in instructions:
            if text not in self._rows:
                raise ValueError(f"instruction {text!r} is unknown to this policy; {self._known(text)}.")
        ids = torch.tensor([[self._rows[text]] for text in instructions], dtype=torch.int64).view(-1, 1)
        return ids, torch.ones(len(ids), dtype=torch.int64)

    def check_samples(self, samples: Samples) -> None:
        """Refuse indices that are no code.

        Raises:
            ValueError: If an index is out of range.
        """
        size = self.model_config.quest.codebook_size
        wrong = samples[(samples < 0) | (samples >= size)]
        if len(wrong):
            raise ValueError(f"{int(wrong[0])} is no code; allowed are 0..{size - 1}. It comes from another model.")

    def decode_actions(self, tokens: Samples) -> Float[Tensor, "B K D"]:
        """Turn codes into env actions: the first K of the block they stand for (fp32, env units)."""
        with torch.no_grad():
            block = self.autoencoder.decode_indices(tokens.to(self._device))
        return self.normalizer.unnormalize(block[:, : self.chunk_length].float())

    def encode_actions(self, actions: Float[Tensor, "B T D"]) -> Samples:
        """Turn the actions of 1 to `block_length` env steps into codes.

        A shorter run of actions is continued by repeating its last one. Codes lose detail, and the executed part of a
        skill says little of the rest, so this need not give back the codes that were drawn.

        Raises:
            ValueError: If there are more actions than a block holds.
        """
        surplus = actions.shape[1] - self.block_length
        if surplus > 0:
            raise ValueError(
                f"{actions.shape[1]} actions don't fit a skill of {self.block_length} (model.quest.block_length)."
            )
        numbers = self.normalizer.normalize(actions.to(self._device).float())
        numbers = torch.cat([numbers, numbers[:, -1:].expand(-1, -surplus, -1)], dim=1)
        with torch.no_grad():
            return self.autoencoder.indices(numbers)

    def reconstruction_loss(self, actions: Float[Tensor, "B T D"]) -> Float[Tensor, ""]:
        """Mean absolute error of blocks of actions after the autoencoder, normalised action units: the first stage.

        Args:
            actions: Of `block_length` env steps, env units.
        """
        numbers = self.normalizer.normalize(actions)
        return F.l1_loss(self.autoencoder(numbers), numbers)

    def fsdp_units(self) -> Iterator[nn.Module]:
        """Yield the prior's layers, then the value head."""
        yield from self.policy_prior.decoder.layers
        yield self.value_head

    def reset_special(self, generator: torch.Generator) -> None:
        """Set constants and draw packed weights; task vectors are random directions until real ones are set."""
        for module in self.modules():
            if isinstance(module, PositionalCode | SpatialSoftmax):
                module.reset_buffers()
            elif isinstance(module, SelfAttention):
                module.reset_parameters(generator)
            elif isinstance(module, nn.MultiheadAttention):
                nn.init.normal_(module.in_proj_weight, 0.0, module.embed_dim**-0.5, generator=generator)
                nn.init.zeros_(module.in_proj_bias)
        if self.model_config.quest.task_encoding == "vector":
            vectors = torch.randn(self.task_embeddings.shape, generator=generator)
            self.task_embeddings.copy_(F.normalize(vectors, dim=-1))

    @property
    def _device(self) -> torch.device:
        return self.autoencoder.action_proj.weight.device

    def _known(self, text: str) -> str:
        if not self._rows:
            return "it knows none, as it was loaded without a table of task vectors; load it with instructions"
        ratios = {known: difflib.SequenceMatcher(None, text, known).ratio() for known in self._rows}
        nearest = [repr(known) for known in sorted(ratios, key=lambda known: (-ratios[known], known))]
        more = f", ... ({len(nearest)} in all)" if len(nearest) > _MAX_LISTED else ""
        return f"known, the nearest first: {', '.join(nearest[:_MAX_LISTED])}{more}"
