"""OpenVLA: two vision towers, a projector, a Llama, 256 action bins; one class from a million to 7 billion weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor, nn

from vlarl_ray.config import ModelConfig
from vlarl_ray.models.base import PolicyInputs, PolicyOutput
from vlarl_ray.models.chunk_policy import ChunkPolicyModel
from vlarl_ray.models.heads import HEADS, ValueHead
from vlarl_ray.models.llama import LanguageModel, LlamaDims
from vlarl_ray.models.lora import CRITIC, use_adapter
from vlarl_ray.models.preprocessing import preprocess
from vlarl_ray.models.vit import VisionTransformer


class VisionBackbone(nn.Module):
    """DINOv2 and SigLIP towers on the same image, features concatenated."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        common = {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "official_unused": config.official_unused,
        }
        self.featurizer = VisionTransformer(config.dino, num_register_tokens=config.num_register_tokens, **common)
        self.fused_featurizer = VisionTransformer(config.siglip, num_register_tokens=None, **common)

    def fsdp_units(self) -> Iterator[nn.Module]:
        """Yield what a pass should gather piece by piece."""
        yield from self.featurizer.fsdp_units()
        yield from self.fused_featurizer.fsdp_units()

    def forward(self, pixels: Float[Tensor, "B 6 H W"]) -> Float[Tensor, "B P C"]:
        """Return patch features; channels 0-2 are normalised for DINOv2, 3-5 for SigLIP."""
        return torch.cat([self.featurizer(pixels[:, :3]), self.fused_featurizer(pixels[:, 3:])], dim=-1)


class Projector(nn.Module):
    """Three linear layers from vision features to Llama embeddings."""

    def __init__(self, vision_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_dim, 4 * vision_dim)
        self.fc2 = nn.Linear(4 * vision_dim, hidden_size)
        self.fc3 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Float[Tensor, "B P C"]) -> Float[Tensor, "B P H"]:
        """Project patch features."""
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(features)))))


class VisionLanguagePolicy(ChunkPolicyModel):
    """What OpenVLA and OpenVLA-OFT share: towers, projector and Llama, under the official parameter names."""

    def __init__(
        self, config: ModelConfig, *args: Any, num_cameras: int = 1, has_lm_head: bool = True, **kwargs: Any
    ) -> None:
        """As `ChunkPolicyModel`, which takes `args` and `kwargs`.

        Args:
            config: Dimensions.
            args: See there.
            num_cameras: V, frames per observation.
            has_lm_head: Whether the Llama has its output layer.
            kwargs: See there.
        """
        super().__init__(config, *args, **kwargs)
        self.num_cameras = num_cameras
        self.num_patches = num_cameras * (config.image_size // config.patch_size) ** 2

        self.vision_backbone = VisionBackbone(config)
        self.projector = Projector(config.dino.dim + config.siglip.dim, config.hidden_size)
        dims = LlamaDims(
            vocab_size=padded_vocab_size(config),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
        )
        self.language_model = LanguageModel(dims, has_lm_head=has_lm_head)

    def fsdp_units(self) -> Iterator[nn.Module]:
        """Yield the towers' blocks, the projector, the parts of the language model, and the heads (alone: fp32)."""
        yield from self.vision_backbone.fsdp_units()
        yield self.projector
        yield from self.language_model.fsdp_units()
        yield from (module for name, module in self.named_children() if f"{name}." in HEADS)

    @property
    def unused_modules(self) -> tuple[str, ...]:
        """Name prefixes of modules that are carried but not computed; they get no adapters."""
        backbone = "vision_backbone"
        towers = {"featurizer": self.model_config.dino, "fused_featurizer": self.model_config.siglip}
        last_blocks = tuple(f"{backbone}.{name}.blocks.{tower.depth - 1}." for name, tower in towers.items())
        norms = tuple(f"{backbone}.{name}.norm." for name in towers)
        return (*last_blocks, *norms, f"{backbone}.fused_featurizer.attn_pool.")

    def preprocess(self, images: UInt8[Tensor, "B V H W 3"]) -> Float[Tensor, "B 6*V S S"]:
        """Turn frames into pixels for both towers, as `config.preprocessing` declares (see `models.preprocessing`).

        Returns:
            Six channels for each camera: three for DINOv2, then three for SigLIP.

        Raises:
            ValueError: If there are not as many cameras as the model takes.
        """
        if images.shape[1] != self.num_cameras:
            raise ValueError(
                f"images hold {images.shape[1]} cameras per observation; this model takes {self.num_cameras}."
            )
        config, dtype = self.model_config, self.language_model.model.norm.weight.dtype
        return preprocess(images, config.preprocessing, image_size=config.image_size, dtype=dtype)

    def _action_logits(self, hidden: Float[Tensor, "B R H"]) -> Float32[Tensor, "B R N"]:
        """Logits of the action bins; everything else has probability zero."""
        last = self.first_action_token + self.model_config.num_action_bins
        return self.language_model.lm_head(hidden)[..., self.first_action_token : last].float()


class OpenVLA(VisionLanguagePolicy):
    """OpenVLA with a value head.

    A row's sequence is BOS, patches, the rest of its prompt, its action positions, then padding. Padding comes last, so
    plain causal attention at positions 0, 1, 2, ... never sees it, and needs no masks or corrected positions. Logits of
    action token i are read at the last prompt token (h0) for i = 0, at action position i-1 after; the value at h0.
    """

    def __init__(self, config: ModelConfig, *args: Any, **kwargs: Any) -> None:
        """As `ChunkPolicyModel`."""
        super().__init__(config, *args, **kwargs)
        if config.decoding == "parallel" and self.num_action_tokens > 1:
            self.action_queries = nn.Parameter(torch.zeros(self.num_action_tokens - 1, config.hidden_size))
        self.value_head = ValueHead(config.hidden_size, config.value_hidden_sizes)

    @property
    def output_layer(self) -> nn.Linear:
        """The language model's output layer."""
        return self.language_model.lm_head

    def forward(self, inputs: PolicyInputs, tokens: Int64[Tensor, "B L"] | None = None) -> PolicyOutput:
        """Give the distribution of every action token given `tokens` before it, and the value.

        Raises:
            ValueError: If decoding is autoregressive and `tokens` is None.
        """
        if self.model_config.decoding == "autoregressive" and tokens is None:
            raise ValueError("tokens must be given: autoregressive decoding scores each token given those before it.")
        embeddings = self._embed(inputs, tokens, num_slots=self.num_action_tokens - 1)
        hidden, _ = self.language_model.model(embeddings, self._read_positions(inputs, self.num_action_tokens))
        read_out = hidden[:, 0]
        if self.critic == "separate":
            with use_adapter(self, CRITIC):
                read_out = self._read_out(inputs)
        actions = self.distribution(self._action_logits(hidden))
        return PolicyOutput(actions, self.value_head(read_out, detach=self.detach_value))

    def sample(
        self, inputs: PolicyInputs, *, temperature: float, noise: Float[Tensor, "B L N"] | None
    ) -> tuple[Int64[Tensor, "B L"], Float[Tensor, "B L"]]:
        """Draw chunks, with their log-probabilities; the value head is not computed."""
        with torch.no_grad():
            if self.model_config.decoding == "parallel":
                embeddings = self._embed(inputs, None, num_slots=self.num_action_tokens - 1)
                read = self._read_positions(inputs, self.num_action_tokens)
                actions = self.distribution(self._action_logits(self.language_model.model(embeddings, read)[0]))
                tokens = actions.sample(temperature=temperature, noise=noise)
            else:
                logits, tokens = self._decode(inputs, temperature, noise)
                actions = self.distribution(logits)
            return tokens, actions.log_prob(tokens, temperature=temperature)

    def key_value_bytes(self, rows: int) -> int:
        """Keys and values of all layers at all positions, where decoding is autoregressive."""
        config = self.model_config
        if config.decoding == "parallel":
            return 0
        positions = config.max_prompt_tokens + self.num_patches + self.num_action_tokens - 1
        head_dim = config.hidden_size // config.num_heads
        per_position = 2 * config.num_layers * config.num_kv_heads * head_dim
        return rows * positions * per_position * self.language_model.lm_head.weight.element_size()

    def _embed(
        self, inputs: PolicyInputs, tokens: Int64[Tensor, "B L"] | None, *, num_slots: int
    ) -> Float[Tensor, "B T H"]:
        """Lay out BOS, patches, text, `num_slots` action positions and padding (T = N + patches + slots)."""
        patches = self.projector(self.vision_backbone(self.preprocess(inputs.images)))
        ids = F.pad(inputs.prompt_ids, (0, num_slots))
        slot = torch.arange(ids.shape[1], device=ids.device) - inputs.prompt_lengths[:, None]
        is_slot, slot = (slot >= 0) & (slot < num_slots), slot.clamp(0, max(num_slots - 1, 0))
        if num_slots and tokens is not None and self.model_config.decoding == "autoregressive":
            ids = torch.where(is_slot, tokens.gather(1, slot), ids)
        text = self.language_model.model.embed_tokens(ids)
        if num_slots and self.model_config.decoding == "parallel":
            text = torch.where(is_slot[..., None], F.embedding(slot, self.action_queries), text)
        return torch.cat([text[:, :1], patches, text[:, 1:]], dim=1)

    def _read_positions(self, inputs: PolicyInputs, count: int) -> Int64[Tensor, "B R"]:
        """Positions of the last prompt token and the `count - 1` after it."""
        last = inputs.prompt_lengths - 1 + self.num_patches
        return last[:, None] + torch.arange(count, device=last.device)

    def _read_out(self, inputs: PolicyInputs) -> Float[Tensor, "B H"]:
        """Hidden state of the last prompt token (h0), from a pass over the prompt alone."""
        return self.language_model.model(self._embed(inputs, None, num_slots=0), self._read_positions(inputs, 1))[0][
            :, 0
        ]

    def _decode(
        self, inputs: PolicyInputs, temperature: float, noise: Tensor | None
    ) -> tuple[Float32[Tensor, "B L N"], Int64[Tensor, "B L"]]:
        """Draw token by token with cached keys and values; returns the logits of every step and the tokens drawn."""
        decoder = self.language_model.model
        positions = self._read_positions(inputs, self.num_action_tokens)
        embeddings = self._embed(inputs, None, num_slots=self.num_action_tokens - 1)
        hidden, caches = decoder(embeddings, positions[:, :1], keep_cache=True)
        logits, tokens = [], []
        for index in range(self.num_action_tokens):
            if index:
                hidden = decoder.decode(decoder.embed_tokens(tokens[-1]), positions[:, index], caches)
            logits.append(self._action_logits(hidden))
            here = None if noise is None else noise[:, index : index + 1]
            tokens.append(self.distribution(logits[-1]).sample(temperature=temperature, noise=here))
        return torch.cat(logits, dim=1), torch.cat(tokens, dim=1)


def padded_vocab_size(config: ModelConfig) -> int:
    """Rows of the embedding matrix: text ids, action bins, one padding id, rounded up.

    Example:
        >>> padded_vocab_size(ModelConfig(text_vocab_size=31744, num_action_bins=256, pad_to_multiple_of=64))
        32064
    """
    used = config.text_vocab_size + config.num_action_bins + 1
    return -(-used // config.pad_to_multiple_of) * config.pad_to_multiple_of
