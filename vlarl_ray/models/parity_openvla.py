"""Our OpenVLA against a reference folder, array by array.

Pixels of the reference go in behind the preprocessing. Logits, over the whole vocabulary, and hidden states are those
given the reference's tokens. Greedy tokens are compared twice: the sampler's own, which never leave the action bins,
and the likeliest of the vocabulary. Equal tokens, and equal actions of these, make actions equal from end to end.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from vlarl_ray.comparison import Group, NotComparableError, NotCovered, Ours, Row, compare, read_json
from vlarl_ray.config import ModelConfig
from vlarl_ray.models.action_tokens import action_entropy
from vlarl_ray.models.parity_checkpoint import ReferenceCheckpoint, gradient_rows, label_positions, layer_states

ACTION_TOLERANCE = 1e-6
"""Of un-normalised actions, given the reference's tokens or normalised actions."""
OUTSIDE = "the reference's likeliest token is no action token; decoding is restricted to these here"
GREEDY, LIKELIEST = "decoded from the action bins", "likeliest of the vocabulary, given the reference's tokens before"
_Found = Iterator[tuple[str, Ours | NotCovered]]


def rows(folder: Path) -> list[Row]:
    """Compare everything in an OpenVLA folder.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the checkpoint is refused.
    """
    case = ReferenceCheckpoint(folder, wanted=ModelConfig(), metadata=read_json(folder / "meta.json"))
    with torch.no_grad():
        compared = compare(case.outputs, groups(case))
    return [*case.listed_but_missing(), *compared, *gradient_rows(folder, partial(_loss, case), lambda name: name)]


def groups(case: ReferenceCheckpoint) -> list[Group]:
    """List what can be computed from a folder's inputs, with gradients off."""
    return [
        *(Group(rf"prompt{i}_.+|text_embeds_prompt{i}", partial(_prompt, case, i)) for i in case.prompt_indices()),
        Group("dino_.+|siglip_.+|patch_.+|projected_.+", partial(_vision, case)),
        Group("batch_.+", partial(_batch, case)),
    ]


def window(case: ReferenceCheckpoint, width: int) -> slice:
    """Columns of the vocabulary that logits are stored of: as `meta.json` says, or else the last ones."""
    if "logits_window_columns" in case.meta:
        return slice(*case.meta["logits_window_columns"])
    return slice(-width, None)


def _vision(case: ReferenceCheckpoint) -> _Found:
    model, pixels = case.model(), case.pixels()
    yield "dino_patches", Ours(model.vision_backbone.featurizer(pixels[:, :3]))
    yield "siglip_patches", Ours(model.vision_backbone.fused_featurizer(pixels[:, 3:]))
    features = model.vision_backbone(pixels)
    yield "patch_features", Ours(features)
    yield "projected_patches", Ours(model.projector(features))


def _prompt(case: ReferenceCheckpoint, index: int) -> _Found:
    """Decode a prompt greedily, and score the reference's tokens."""
    model = case.with_pixels(case.model(index), slice(index, index + 1))
    ids, name = case.prompt_ids(index), f"prompt{index}_"
    inputs = case.policy_inputs([ids])
    own, _ = model.sample(inputs, temperature=0.0, noise=None)
    tokens = _reference_tokens(case, index)
    if tokens is None:
        tokens = own[0]
    is_covered = case.are_actions(tokens)
    yield name + "generated_ids", Ours(torch.cat([ids, own[0]])[None]) if is_covered else NotCovered(OUTSIDE)
    yield name + "action_tokens", Ours(own[0], detail=GREEDY) if is_covered else NotCovered(OUTSIDE)
    numbers = model.action_tokenizer.decode(tokens, clip=True).double()
    given = "of the reference's tokens"
    yield name + "normalized_actions", Ours(numbers, ACTION_TOLERANCE, given)
    yield name + "actions", Ours(model.normalizer.unnormalize(numbers), ACTION_TOLERANCE, given)

    # one pass over the prompt and all tokens but the last, which nothing reads
    count, text = len(tokens), torch.cat([ids, tokens[:-1]])
    states = layer_states(model, model._embed(case.policy_inputs([text]), None, num_slots=0))
    logits = model.language_model.lm_head(states[-1][0, -count:]).float()
    yield name + "action_tokens", Ours(logits.argmax(-1), detail=LIKELIEST)
    width = case.outputs.get(name + "action_logits_window", np.zeros((0, 0))).shape[-1]
    yield name + "action_logits_window", Ours(logits[:, window(case, width)])
    yield name + "action_logsumexp", Ours(logits.logsumexp(-1))
    yield name + "action_logprobs", Ours(logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0])
    yield name + "full_logits_first_decision", Ours(logits[0])
    for layer, state in enumerate(states):
        yield f"{name}hidden_{layer}", Ours(state[0])
    yield f"text_embeds_prompt{index}", Ours(model.language_model.model.embed_tokens(text))


def _reference_tokens(case: ReferenceCheckpoint, index: int) -> Int64[Tensor, " L"] | None:
    tokens = case.output(f"prompt{index}_action_tokens")
    generated = case.output(f"prompt{index}_generated_ids")
    if tokens is None and generated is not None:
        tokens = generated[0, len(case.prompt_ids(index)) :]
    return tokens


def _batch(case: ReferenceCheckpoint) -> _Found:
    """Score the labels of a padded training batch."""
    model, embeddings = _batch_embeddings(case)
    hidden = layer_states(model, embeddings)[-1]
    labels = case.input("batch_labels")
    logprobs, logits = _target_logprobs(case, model, hidden)
    yield "batch_loss", Ours(-logprobs.mean())
    yield "batch_target_index", Ours(label_positions(labels))
    yield "batch_target_ids", Ours(labels[tuple(label_positions(labels).T)])
    yield "batch_target_logprobs", Ours(logprobs)
    yield "batch_entropy", Ours(action_entropy(logits[None], temperature=1.0)[0])
    width = case.outputs.get("batch_target_logits_window", np.zeros((0, 0))).shape[-1]
    yield "batch_target_logits_window", Ours(logits[:, window(case, width)])
    stored = case.output("batch_last_hidden")
    if stored is not None:
        is_text = case.input("batch_attention_mask").bool()
        # the text's positions with the patches behind BOS
        counts = torch.ones(1, model.num_patches, dtype=torch.bool).expand(len(is_text), -1)
        mask = torch.cat([is_text[:, :1], counts, is_text[:, 1:]], dim=1)[..., None]
        if stored.shape == hidden.shape:
            hidden = torch.where(mask, hidden, stored)
        yield "batch_last_hidden", Ours(hidden, detail="without padding")


def _loss(case: ReferenceCheckpoint) -> tuple[Tensor, nn.Module]:
    model, embeddings = _batch_embeddings(case)
    hidden = layer_states(model, embeddings)[-1]
    return -_target_logprobs(case, model, hidden)[0].mean(), model


def _batch_embeddings(case: ReferenceCheckpoint) -> tuple[Any, Float[Tensor, "B T H"]]:
    """Give the model, and its input for the training batch.

    Raises:
        NotComparableError: If padding does not come last.
    """
    ids, mask = case.input("batch_input_ids"), case.input("batch_attention_mask").bool()
    if not (mask[:, :-1] | ~mask[:, 1:]).all():
        raise NotComparableError("the batch is not padded on the right")
    model = case.with_pixels(case.model(), slice(len(ids)))
    inputs = case.policy_inputs(list(ids))  # its padding follows all that is read, and causal attention never sees it
    return model, model._embed(inputs, None, num_slots=0)


def _target_logprobs(
    case: ReferenceCheckpoint, model: Any, hidden: Float[Tensor, "B T H"]
) -> tuple[Float[Tensor, " L"], Float[Tensor, "L N"]]:
    """Give the log-probability of each label, and the logits it is one of, read one position before it."""
    labels = case.input("batch_labels")
    row, index = label_positions(labels).T
    logits = model.language_model.lm_head(hidden[row, model.num_patches + index - 1]).float()
    targets = labels[row, index]
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0], logits
