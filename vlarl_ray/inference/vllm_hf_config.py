"""The config class that transformers and vLLM know our models by; at module level, as it is sent to processes."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

from vlarl_ray.inference.vllm_plugin import MODEL_TYPE


class VlarlOpenVLAConfig(PreTrainedConfig):
    """A policy folder's model config in the form vLLM reads: `policy` (ours) and `text_config` (Llama's)."""

    model_type = MODEL_TYPE

    def __init__(self, policy: dict[str, Any] | None = None, text_config: Any = None, **kwargs: Any) -> None:
        self.policy = policy or {}
        self.text_config = text_config if isinstance(text_config, LlamaConfig) else LlamaConfig(**text_config or {})
        super().__init__(**kwargs)
