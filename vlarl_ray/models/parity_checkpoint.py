"""A reference checkpoint with inputs and outputs beside it, and our models with its weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from vlarl_ray.comparison import NotComparableError, Row, compare_one, missing, read_arrays, read_json
from vlarl_ray.config import ModelConfig
from vlarl_ray.models.base import PolicyInputs
from vlarl_ray.models.official import OfficialPolicy, read_official
from vlarl_ray.models.openvla import VisionLanguagePolicy
from vlarl_ray.registry import MODELS, resolve

LONE_SPACE = 29871
"""Llama's token before the actions, where a checkpoint names no other."""
IGNORED = -100
"""Label of what is not scored."""
_REL_GRAD_TOLERANCE, _ABS_GRAD_TOLERANCE = 1e-3, 1e-6


class ReferenceCheckpoint:
    """Files of a reference folder; everything about its sizes is read from them."""

    def __init__(self, folder: Path, *, wanted: ModelConfig, metadata: Mapping[str, Any]) -> None:
        """Read the arrays, and whatever says what they are.

        Args:
            folder: Checkpoint, `inputs.npz`, `outputs.npz`, and `meta.json` if there is one.
            wanted: What the checkpoint leaves open.
            metadata: Content of `meta.json`.
        """
        self.folder, self.wanted, self.meta = folder, wanted, metadata
        self.config = read_json(folder / "config.json")
        self.tiny: Mapping[str, Any] = self.config.get("tiny", {})
        self.inputs = read_arrays(folder / "inputs.npz")
        self.outputs = read_arrays(folder / "outputs.npz")
        self.trailing_token_id = int(self.tiny.get("trailing_token_id", LONE_SPACE))
        self._policies: dict[str | None, OfficialPolicy] = {}
        self._tensors: dict[str, Tensor] = {}

    def listed_but_missing(self) -> list[Row]:
        """Fail for arrays that `meta.json` lists and the folder lacks."""
        return [
            row
            for part in ("inputs", "outputs")
            for row in missing(self.meta.get(part), getattr(self, part), file=f"{part}.npz")
        ]

    def input(self, name: str) -> Tensor:
        """Give an array of `inputs.npz`, integers in 64 bit.

        Raises:
            NotComparableError: If it is not there.
        """
        if name not in self.inputs:
            raise NotComparableError(f"inputs.npz lacks {name}")
        return as_tensor(self.inputs[name])

    def output(self, name: str) -> Tensor | None:
        """Give an array of `outputs.npz`, to compute with, or None."""
        return as_tensor(self.outputs[name]) if name in self.outputs else None

    def pixels(self) -> Float[Tensor, "B C H W"]:
        """Give the pixels of all rows."""
        return self.input("pixel_values").float()

    def prompt_indices(self) -> list[int]:
        """Numbers of the prompts that `inputs.npz` holds."""
        found = (re.fullmatch(r"prompt(\d+)_input_ids", name) for name in self.inputs)
        return sorted(int(match[1]) for match in found if match)

    def prompt_ids(self, index: int) -> Int64[Tensor, " N"]:
        """Give a prompt as the model gets it: ended by the trailing token."""
        return self.with_trailing(self.input(f"prompt{index}_input_ids"), f"prompt{index}_attention_mask")[0]

    def with_trailing(self, ids: Int64[Tensor, "B N"], mask_name: str) -> Int64[Tensor, "B N1"]:
        """Append the trailing token where it is not the last one already.

        Raises:
            NotComparableError: If prompts are padded.
        """
        if mask_name in self.inputs and not self.inputs[mask_name].all():
            raise NotComparableError(f"{mask_name} has zeros: a padded prompt's mask is mis-sized in the reference")
        if (ids[:, -1] == self.trailing_token_id).all():
            return ids
        return torch.cat([ids, torch.full((len(ids), 1), self.trailing_token_id)], dim=1)

    def unnorm_key(self, index: int) -> str | None:
        """Name the statistics that a prompt's actions are un-normalised with; None where there are one set only."""
        keys = self.meta.get("unnorm_keys")
        if keys is not None:
            return keys[index] if index < len(keys) else keys[0]
        return self.meta.get("unnorm_key")

    def policy(self, index: int = 0) -> OfficialPolicy:
        """Read the checkpoint, with the statistics of a prompt."""
        key = self.unnorm_key(index)
        if key not in self._policies:
            self._policies[key] = read_official(self.folder, self.wanted, unnorm_key=key)
        return self._policies[key]

    def model(self, index: int = 0, *, config: ModelConfig | None = None) -> Any:
        """Build our model with the checkpoint's weights, in fp32.

        Args:
            index: Prompt, whose statistics it gets.
            config: Other than the checkpoint's; modules that it does without are left out.
        """
        policy = self.policy(index)
        config = config or policy.model
        reads_proprio = bool(config.proprio_dim)
        with torch.device("meta"):
            model: VisionLanguagePolicy = resolve(MODELS, config.architecture, what="architecture")(
                config,
                policy.tokenizer,
                normalizer=policy.normalizer,
                proprio_normalizer=policy.proprio_normalizer if reads_proprio else None,
            )
        expected = model.state_dict()
        unused = [name for name in policy.weights if name not in expected]
        weights = policy.weights if config == policy.model else policy.weights.without(unused)
        weights.check(expected, may_lack=("value_head.",))
        for name in weights.keys() - self._tensors.keys():
            self._tensors[name] = weights.read(name).float()
        tensors = {name: self._tensors[name] for name in weights}
        # nothing of the reference is read from the value head
        tensors |= {name: torch.zeros_like(t, device="cpu") for name, t in expected.items() if name not in weights}
        model.load_state_dict(tensors, assign=True)
        return model.eval()

    def policy_inputs(self, prompts: Sequence[Tensor], proprio: Float[Tensor, "B P"] | None = None) -> PolicyInputs:
        """Batch prompts, padded on the right; there are no frames, as `with_pixels` gives the model its pixels."""
        lengths = torch.tensor([len(ids) for ids in prompts])
        padded = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
        for row, ids in zip(padded, prompts, strict=True):
            row[: len(ids)] = ids
        images = torch.zeros(len(prompts), 1, 1, 1, 3, dtype=torch.uint8)
        return PolicyInputs(images, padded, lengths, torch.zeros(len(prompts), 1) if proprio is None else proprio)

    def with_pixels(self, model: Any, rows: slice) -> Any:
        """Let a model read rows of the reference's pixels, which are random and come from no frames."""
        pixels = self.pixels()[rows]
        model.preprocess = lambda images: pixels
        return model

    def first_action_token(self) -> int:
        """Vocabulary id of the lowest action token."""
        return self.policy().model.text_vocab_size

    def are_actions(self, tokens: Int64[Tensor, ...]) -> bool:
        """Whether all tokens are action tokens."""
        first, count = self.first_action_token(), self.policy().model.num_action_bins
        return bool(((tokens >= first) & (tokens < first + count)).all())


def as_tensor(array: np.ndarray) -> Tensor:
    """Make a tensor to compute with, integers in 64 bit."""
    return torch.from_numpy(array.astype(np.int64) if array.dtype.kind in "iu" else array)


def layer_states(model: Any, embeddings: Float[Tensor, "B T H"], **attention: Any) -> list[Float[Tensor, "B T H"]]:
    """Run the decoder and keep its input and the output of each layer; the last one comes after the final norm."""
    decoder, states = model.language_model.model, [embeddings]
    hooks = [
        layer.register_forward_hook(lambda module, args, output: states.append(output[0]))
        for layer in decoder.layers[:-1]
    ]
    every = torch.arange(embeddings.shape[1]).expand(embeddings.shape[:2])
    try:
        states.append(decoder(embeddings, every, **attention)[0])
    finally:
        for hook in hooks:
            hook.remove()
    return states


def gradient_rows(
    folder: Path, loss: Callable[[], tuple[Tensor, torch.nn.Module]], own_name: Callable[[str], str]
) -> Iterator[Row]:
    """Compare the norm of the loss's gradient for each parameter that `grad_norms.json` lists, where there is one.

    Args:
        folder: Of the reference. A norm of None says that no gradient reaches the parameter.
        loss: Gives the reference's loss, computed with our model, and that model.
        own_name: Gives our parameter name for one of theirs.
    """
    expected: Mapping[str, float | None] = read_json(folder / "grad_norms.json")
    if not expected:
        return
    try:
        total, model = loss()
    except NotComparableError as error:
        yield Row("grad_norms.json", f"{len(expected)} norms", "not covered", detail=str(error))
        return
    except (ValueError, RuntimeError) as error:
        yield Row("grad_norms.json", f"{len(expected)} norms", "FAIL", detail=f"cannot be computed: {error}")
        return
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    norms = {
        name: 0.0 if gradient is None else gradient.double().norm().item()
        for name, gradient in zip(parameters, gradients, strict=True)
    }
    for name, norm in expected.items():
        reached = norm or 0.0
        tolerance = max(_REL_GRAD_TOLERANCE * abs(reached), _ABS_GRAD_TOLERANCE if reached else 0.0)
        if own_name(name) in norms:
            yield compare_one(f"gradient of {name}", reached, norms[own_name(name)], tolerance=tolerance)
        else:
            yield Row(f"gradient of {name}", "scalar", "FAIL", detail="there is no such parameter here")
    for own in norms.keys() - {own_name(name) for name in expected}:
        if norms[own]:
            yield Row(f"gradient of {own}", "scalar", "not covered", detail="grad_norms.json does not list it")


def label_positions(labels: Int64[Tensor, "B N"]) -> Int64[Tensor, "L 2"]:
    """List (row, index in the text) of every label."""
    return (labels != IGNORED).nonzero()
