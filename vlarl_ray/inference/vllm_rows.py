"""Rows of a request as vLLM sees them: a generation for each, or one for each token that is scored.

instruction ─► vLLM's renderer, once ─► template ─┐
frames, tokens, noise key of a row ───────────────┴─► input and sampling parameters ─► `AsyncLLM.generate`
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Num, UInt8

from vlarl_ray.inference.vllm_start import together
from vlarl_ray.models.chunk_policy import ChunkPolicyModel
from vlarl_ray.types import ActRequest

_IMAGE, _FRAMES = "image", "frames"
"""What the plug-in's processor calls a frame, and its bytes."""


class Rows:
    """Sends rows to an engine and waits for what it makes of them; every method runs on the engine's event loop.

    Args:
        engine: `AsyncLLM`.
        policy: Encodes prompts, and says which tokens are actions.
        num_bins: Action tokens that a token is chosen from.
    """

    def __init__(self, engine: Any, policy: ChunkPolicyModel, *, num_bins: int) -> None:
        self._engine = engine
        self._policy = policy
        first = policy.first_action_token
        self._action_ids = list(range(first, first + num_bins))
        self._templates: dict[str, Any] = {}
        self._names = itertools.count()
        self.lora_request: Any = None
        """Adapters that vLLM applies itself; None where they are merged."""

    async def sampled(self, request: ActRequest) -> list[Any]:
        """Sample the action tokens of every row; their log-probabilities come with them."""
        group, size = f"request-{next(self._names)}", len(request)
        inputs = await asyncio.to_thread(self._inputs, request, [(row, ()) for row in range(size)])
        seeds: list[dict[str, Any]] = [{} for _ in inputs]
        if request.temperature > 0:
            seeds = [{"seed": request_seed(key)} for key in request.noise_keys]
        options = [
            {"max_tokens": self._policy.num_action_tokens, "logprobs": 0, "extra_args": together(group, size), **seed}
            for seed in seeds
        ]
        return await self._completed(request.temperature, inputs, options)

    async def scored(self, request: ActRequest, tokens: Num[np.ndarray, "B L"]) -> Float32[np.ndarray, "B L"]:
        """Score given tokens: each is asked for after those before it, in a generation of its own."""
        cells = list(np.ndindex(*tokens.shape))
        wanted = [int(tokens[cell]) for cell in cells]
        parts = [(row, tokens[row, :index].tolist()) for row, index in cells]
        inputs = await asyncio.to_thread(self._inputs, request, parts)
        options = [{"max_tokens": 1, "logprobs": 1, "logprob_token_ids": [token]} for token in wanted]
        completions = await self._completed(request.temperature, inputs, options)
        scores = [c.logprobs[0][token].logprob for c, token in zip(completions, wanted, strict=True)]
        return np.array(scores, np.float32).reshape(tokens.shape)

    def _inputs(self, request: ActRequest, parts: list[tuple[int, Any]]) -> list[Any]:
        """Inputs of vLLM: for each part a row of the request, and tokens after its prompt."""
        from vllm.inputs.engine import mm_input
        from vllm.multimodal.inputs import MultiModalKwargsItem, MultiModalKwargsItems

        frames = torch.from_numpy(np.array(request.images))  # a copy: shared memory is read-only
        # A frame's name is its content. Rows and tokens that share it go through the towers once, and an embedding that
        # outlived its weights is found by the probe, whose frames are the same in each publication.
        names = [[_content(frame) for frame in views] for views in request.images]
        inputs = []
        for row, tokens in parts:
            template = self._template(request.instructions[row], request.images[row])
            items = [
                MultiModalKwargsItem({_FRAMES: replace(item[_FRAMES], data=frame)})
                for item, frame in zip(template["mm_kwargs"][_IMAGE], frames[row], strict=True)
            ]
            inputs.append(
                mm_input(
                    [*template["prompt_token_ids"], *tokens],
                    MultiModalKwargsItems({_IMAGE: items}),
                    {_IMAGE: names[row]},
                    template["mm_placeholders"],
                )
            )
        return inputs

    def _template(self, instruction: str, frames: UInt8[np.ndarray, "V H W 3"]) -> Any:
        """Let vLLM render an instruction's prompt: a millisecond of work, and only frames differ from row to row."""
        if instruction not in self._templates:
            from vllm.renderers.inputs.preprocess import parse_model_prompt

            ids, lengths = self._policy.encode_prompts([instruction])
            prompt = {
                "prompt_token_ids": ids[0, : int(lengths[0])].tolist(),
                "multi_modal_data": {_IMAGE: list(frames)},
            }
            parsed = parse_model_prompt(self._engine.model_config, prompt)
            [self._templates[instruction]] = self._engine.renderer.render_cmpl([parsed])
        return self._templates[instruction]

    async def _completed(self, temperature: float, inputs: list[Any], options: list[dict[str, Any]]) -> list[Any]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        async def completion(prompt: Any, option: dict[str, Any]) -> Any:
            parameters = SamplingParams(
                temperature=temperature,
                allowed_token_ids=self._action_ids,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                skip_clone=True,  # nobody else holds it
                **option,
            )
            answers = self._engine.generate(
                prompt, parameters, request_id=str(next(self._names)), lora_request=self.lora_request
            )
            return [answer async for answer in answers][-1].outputs[0]

        return await all_or_none([completion(*both) for both in zip(inputs, options, strict=True)])


async def all_or_none(work: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Wait for all results; where one fails, the others are cancelled and waited for: none outlives its request."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def request_seed(noise_key: np.ndarray) -> int:
    """Turn the noise key of a decision, see `TaskSpec.noise_key`, into the 63-bit seed of a vLLM request."""
    digest = hashlib.blake2b(np.ascontiguousarray(noise_key, "<u8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _content(frame: np.ndarray) -> str:
    return hashlib.blake2b(frame.tobytes(), digest_size=16).hexdigest()
