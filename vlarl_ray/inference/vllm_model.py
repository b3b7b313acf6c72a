"""OpenVLA inside vLLM: our towers and projector, vLLM's Llama. Imported in vLLM's processes only.

request: [BOS, text...] + uint8 frames ─► BOS, one placeholder per patch of each camera, text ─► preprocessing, towers
and projector fill the placeholders' embeddings ─► Llama ─► logits
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from transformers import BatchFeature
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptIndexTargets,
    PromptInsertion,
    PromptUpdateDetails,
)

from vlarl_ray.config import ModelConfig
from vlarl_ray.inference.vllm_folder import BOS_TOKEN_ID, placeholder_token
from vlarl_ray.models.heads import HEADS
from vlarl_ray.models.openvla import Projector, VisionBackbone
from vlarl_ray.models.preprocessing import preprocess
from vlarl_ray.vllm_sizes import num_patches


class _Info(BaseProcessingInfo):
    """How many frames a request holds, and how many tokens each becomes."""

    @property
    def policy(self) -> ModelConfig:
        return _policy(self.get_hf_config())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": self.policy.num_cameras}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        del seq_len, mm_counts
        return {"image": num_patches(self.policy)}


class _DummyInputs(BaseDummyInputsBuilder[_Info]):
    """Frames for vLLM's own measurements at start."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        del mm_counts
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> Any:
        del seq_len, mm_options
        side = self.info.policy.image_size
        return {"image": [np.zeros((side, side, 3), np.uint8)] * mm_counts.get("image", 0)}


class _Processor(BaseMultiModalProcessor[_Info]):
    """Passes frames on as bytes: normalising them here would send four times as much to the worker."""

    requires_tokenizer = False

    def get_dummy_inputs(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> ProcessorInputs:
        data = self.dummy_inputs.get_dummy_mm_data(seq_len, mm_counts, mm_options)
        # without BOS in the prompt there would be no place to put the patches
        return ProcessorInputs(prompt=[BOS_TOKEN_ID], mm_data_items=self.info.parse_mm_data(data, validate=False))

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        del hf_kwargs
        frames = np.stack([np.asarray(frame) for frame in hf_data["images"]])  # a copy: shared memory is read-only
        return BatchFeature({"frames": torch.from_numpy(frames)})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        del hf_inputs, hf_processor_mm_kwargs
        return {"frames": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptInsertion]:
        del mm_items, hf_processor_mm_kwargs, out_mm_kwargs
        policy = self.info.policy
        token = placeholder_token(policy)
        patches = PromptUpdateDetails.select_token_id([token] * num_patches(policy), embed_token_id=token)
        after_bos = PromptIndexTargets.prefix([BOS_TOKEN_ID])
        return [PromptInsertion(modality="image", target=after_bos, insertion=lambda _: patches)]


@MULTIMODAL_REGISTRY.register_processor(_Processor, info=_Info, dummy_inputs=_DummyInputs)
class VlarlOpenVLAForActionPrediction(nn.Module, SupportsMultiModal, SupportsPP, SupportsLoRA):
    """The policy, under the official parameter names; heads that only the learner computes are left out."""

    packed_modules_mapping = {  # noqa: RUF012 - vLLM reads a plain class attribute
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.policy = policy = _policy(self.config)
        with self._mark_tower_model(vllm_config, "image"):
            self.vision_backbone = VisionBackbone(policy)
            self.projector = Projector(policy.dino.dim + policy.siglip.dim, policy.hidden_size)
        with self._mark_language_model(vllm_config):
            self.language_model: Any = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=self.config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Requests come as token ids, so there is no text for a frame."""
        del modality, i

    def get_language_model(self) -> Any:
        """The Llama."""
        return self.language_model

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Turn frames into embeddings, one row per patch."""
        frames = kwargs.get("frames")
        if frames is None:
            return []
        batches = [frames] if isinstance(frames, Tensor) else [frame[None] for frame in frames]
        return torch.cat([self._embed(batch) for batch in batches])

    def _embed(self, frames: Tensor) -> Tensor:
        dtype = self.projector.fc1.weight.dtype
        pixels = preprocess(frames[:, None], self.policy.preprocessing, image_size=self.policy.image_size, dtype=dtype)
        return self.projector(self.vision_backbone(pixels))

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the decoder."""
        del kwargs
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits of the whole vocabulary; requests allow the action tokens only."""
        return self.language_model.compute_logits(hidden_states)

    def get_mm_mapping(self) -> MultiModelKeys:
        """Names of the parts."""
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector="projector", tower_model="vision_backbone"
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors by official name, all but the heads."""
        return AutoWeightsLoader(self).load_weights(
            (name, tensor) for name, tensor in weights if not name.startswith(HEADS)
        )


def _policy(config: Any) -> ModelConfig:
    return TypeAdapter(ModelConfig).validate_python(config.policy)
