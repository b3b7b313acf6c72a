"""OpenVLA-OFT: OpenVLA that attends in both directions, predicts a whole chunk at once, from several cameras."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vlarl_ray.config import ModelConfig
from vlarl_ray.models.base import PolicyInputs, PolicyOutput
from vlarl_ray.models.distributions import ActionDistribution, Samples
from vlarl_ray.models.heads import ValueHead
from vlarl_ray.models.lora import CRITIC, use_adapter
from vlarl_ray.models.oft_heads import LocationHead, ResidualScaleHead
from vlarl_ray.models.openvla import VisionLanguagePolicy
from vlarl_ray.models.proprio import ProprioProjector

COMPONENTS = ("action_head", "proprio_projector", "scale_head")
"""What official checkpoints keep in files of their own, beside the language model's."""


class OpenVLAOFT(VisionLanguagePolicy):
    """OpenVLA-OFT with a value head, and RIPT-VLA's scale head where the actions have a spread.

    A row's sequence is BOS, the patches of all cameras, one token of proprioception (if it is read), the rest of the
    prompt, L = K*D placeholders, the stop token, then padding. Placeholders have zero embeddings: their positions alone
    tell them apart. Every position sees all that is not padding; padding comes last, at positions that nothing reads,
    so that prompts of several lengths can share a batch. Number i of the chunk is read one position before
    placeholder i, so the first at the last prompt token (h0), as in next-token prediction.

    `model.oft.passes: one` is OpenVLA-OFT. `two` is RIPT-VLA's inference: the prompt, up to the token before its last,
    does not see the last and what follows it. From the second layer on these are different functions: a checkpoint
    must be used with the passes that it was trained with.

    The value is read at h0 in both cases. That position sees the placeholders and the stop token, but these are
    constants: the value is one of the observation alone.

    Heads (`model.action_head`): `l1` regresses the normalised actions; `laplace` and `gaussian` take that prediction as
    their location and add a scale head; `tokens` reads the logits of the action bins at the same positions, as
    SimpleVLA-RL does. Action and scale head are fp32 and are trained whole, the projector of proprioception by adapters
    like all linear layers of the backbone.

    Source:
        Kim et al. 2025 (arXiv:2502.19645); RIPT-VLA (arXiv:2505.17016); SimpleVLA-RL (arXiv:2509.09674).
    """

    def __init__(self, config: ModelConfig, *args: Any, **kwargs: Any) -> None:
        """As `ChunkPolicyModel`.

        Raises:
            ValueError: If decoding is autoregressive, or the stop token no text id.
        """
        if config.decoding != "parallel":
            raise ValueError(f"model.decoding = {config.decoding!r}: openvla_oft predicts all at once; set 'parallel'.")
        oft, is_token = config.oft, config.action_head == "tokens"
        if oft.stop_token_id >= config.text_vocab_size:
            raise ValueError(
                f"model.oft.stop_token_id = {oft.stop_token_id} is no text id; set one below model.text_vocab_size = "
                f"{config.text_vocab_size}."
            )
        has_lm_head = is_token or config.official_unused
        super().__init__(config, *args, num_cameras=oft.num_cameras, has_lm_head=has_lm_head, **kwargs)
        if config.proprio_dim:
            self.proprio_projector = ProprioProjector(config.proprio_dim, config.hidden_size)
        sizes = (config.hidden_size, config.action_dim, oft.head_width or config.hidden_size)
        if not is_token:
            self.action_head = LocationHead(*sizes, num_blocks=oft.num_head_blocks)
        if config.action_head in ("gaussian", "laplace"):
            self.scale_head = ResidualScaleHead(*sizes, num_blocks=oft.num_head_blocks)
        self.value_head = ValueHead(config.hidden_size, config.value_hidden_sizes)

    @property
    def output_layer(self) -> nn.Linear:
        """The language model's output layer, or the last one of the action head."""
        is_token = self.model_config.action_head == "tokens"
        return self.language_model.lm_head if is_token else self.action_head.model.fc2

    @property
    def unused_modules(self) -> tuple[str, ...]:
        """Name prefixes of modules that are carried but not computed; they get no adapters."""
        is_token = self.model_config.action_head == "tokens"
        return super().unused_modules if is_token else (*super().unused_modules, "language_model.lm_head")

    def forward(self, inputs: PolicyInputs, tokens: Samples | None = None) -> PolicyOutput:
        """Give the distribution of the chunk, and the value; `tokens` are not looked at.

        Raises:
            ValueError: If the observations have other cameras or proprioception than the model reads.
        """
        del tokens
        hidden = self._hidden(inputs, self.num_action_tokens)
        read_out = hidden[:, 0]
        if self.critic == "separate":
            with use_adapter(self, CRITIC):
                read_out = self._hidden(inputs, 1)[:, 0]
        return PolicyOutput(self._actions(hidden), self.value_head(read_out, detach=self.detach_value))

    def sample(
        self, inputs: PolicyInputs, *, temperature: float, noise: Float[Tensor, "B L *N"] | None
    ) -> tuple[Samples, Float[Tensor, "B L"]]:
        """Draw chunks, with their log-probabilities; the value head is not computed."""
        with torch.no_grad():
            actions = self._actions(self._hidden(inputs, self.num_action_tokens))
            samples = actions.sample(temperature=temperature, noise=noise)
            return samples, actions.log_prob(samples, temperature=temperature)

    def _actions(self, hidden: Float[Tensor, "B L H"]) -> ActionDistribution:
        kind = self.model_config.action_head
        if kind == "tokens":
            return self.distribution(self._action_logits(hidden))
        return self.distribution(self.action_head(hidden), None if kind == "l1" else self.scale_head(hidden))

    def _hidden(self, inputs: PolicyInputs, count: int) -> Float[Tensor, "B R H"]:
        """Normed hidden states of the last prompt token and the `count - 1` positions after it."""
        oft, decoder = self.model_config.oft, self.language_model.model
        last = self._last_positions(inputs)
        if oft.passes == "one":
            return decoder(self._embed(inputs), last[:, :count], lengths=last[:, -1] + 1)[0]
        with torch.no_grad() if oft.detach_prompt else nullcontext():
            embeddings = self._embed(inputs)
            prompt = embeddings[:, : embeddings.shape[1] - last.shape[1]]
            # Of this pass only the keys and values are wanted; what the last layer reads out is next to nothing.
            _, caches = decoder(prompt, torch.zeros_like(last[:, :1]), lengths=last[:, 0], keep_cache=True)
        rest = embeddings.gather(1, last[..., None].expand(-1, -1, embeddings.shape[-1]))
        return decoder.extend(rest, caches, last[:, 0])[:, :count]

    def _last_positions(self, inputs: PolicyInputs) -> Int64[Tensor, "B R"]:
        """Positions of the last prompt token, the L placeholders and the stop token."""
        first = self.num_visual_tokens + inputs.prompt_lengths - 1
        return first[:, None] + torch.arange(self.num_action_tokens + 2, device=first.device)

    @property
    def num_visual_tokens(self) -> int:
        """Positions between BOS and the rest of the prompt: patches and proprioception."""
        return self.num_patches + bool(self.model_config.proprio_dim)

    def _embed(self, inputs: PolicyInputs) -> Float[Tensor, "B T H"]:
        """Lay out BOS, patches, proprioception, prompt, placeholders, stop token and padding."""
        num_slots = self.num_action_tokens
        ids = F.pad(inputs.prompt_ids, (0, num_slots + 1))
        slot = torch.arange(ids.shape[1], device=ids.device) - inputs.prompt_lengths[:, None]
        text = self.language_model.model.embed_tokens(ids.masked_fill(slot == num_slots, self._stop_token_id))
        text = text.masked_fill(((slot >= 0) & (slot < num_slots))[..., None], 0)
        return torch.cat([text[:, :1], self._embed_visual(inputs), text[:, 1:]], dim=1)

    def _embed_visual(self, inputs: PolicyInputs) -> Float[Tensor, "B S H"]:
        """Embed the patches of each camera in turn, then proprioception."""
        pixels = self.preprocess(inputs.images)
        features = self.vision_backbone(pixels.unflatten(1, (-1, 6)).flatten(0, 1))
        tokens = self.projector(features.unflatten(0, (-1, self.num_cameras)).flatten(1, 2))
        if not self.model_config.proprio_dim:
            return tokens
        proprio = self.proprio_projector(self.normalized_proprio(inputs).to(tokens.dtype))
        return torch.cat([tokens, proprio[:, None]], dim=1)

    @property
    def _stop_token_id(self) -> int:
        return self.model_config.oft.stop_token_id


def component_names(component: str, names: Iterable[str]) -> dict[str, str]:
    """Map the tensor names of a component's file to parameter names of `OpenVLAOFT`.

    Args:
        component: One of `COMPONENTS`; official files are called `<component>--<step>_checkpoint.pt`.
        names: Names in the file. The prefix `module.`, from distributed training, is dropped where it is; RIPT-VLA
            calls the scale head's trunk `scale_trunk`.

    Raises:
        ValueError: If there is no such component.

    Example:
        >>> component_names("action_head", ["module.model.fc1.bias"])
        {'module.model.fc1.bias': 'action_head.model.fc1.bias'}
        >>> component_names("scale_head", ["scale_trunk.fc1.bias"])
        {'scale_trunk.fc1.bias': 'scale_head.trunk.fc1.bias'}
    """
    if component not in COMPONENTS:
        raise ValueError(f"component = {component!r} is unknown; allowed: {', '.join(COMPONENTS)}.")
    own = {}
    for name in names:
        bare = name.removeprefix("module.")
        if component == "scale_head" and bare.startswith("scale_trunk."):
            bare = bare.removeprefix("scale_")
        own[name] = f"{component}.{bare}"
    return own
