"""Load QueST checkpoints of the published code as models; for notebooks and checks, as runs take their folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from vlarl_ray.models.initialization import init_weights
from vlarl_ray.models.quest import QueST
from vlarl_ray.models.quest_checkpoint import VECTORS, check_vectors, read_quest


def load_quest_official(
    folder: str | Path,
    *,
    instructions: Sequence[str] | None = None,
    task_embeddings: Float[Tensor, "M E"] | None = None,
    value_hidden_sizes: tuple[int, ...] = (128, 64),
    seed: int = 0,
) -> QueST:
    """Load a checkpoint of the published code, and give it a value head.

    The folder holds `config.json`, the sizes in the published code's words, and the checkpoint's `model` entry as
    safetensors, which `python -m vlarl_ray.models.unpickle` makes of it. They may bring what that code looks up
    elsewhere: a list `instructions`, and a tensor `task_embeddings`, in a file of that name or among the weights. Save
    the result as a policy folder with `model.save`.

    Args:
        folder: Where they are.
        instructions: What the policy was taught, in the order of its task ids; None takes the folder's, if it has any.
        task_embeddings: One vector per instruction (CLIP's); None takes the folder's. Not for learned embeddings.
        value_hidden_sizes: Of the value head, whose value is 0 at first, unless the checkpoint has one.
        seed: Of the value head, unless the checkpoint has one.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the weights are a pickle, of a variant that is not supported, or not those of the config; all
            tensors that are missing, unknown or of another shape are then listed.
    """
    checkpoint = read_quest(Path(folder), value_hidden_sizes=value_hidden_sizes)
    weights, size = checkpoint.weights, checkpoint.model.quest.task_size
    known = list(checkpoint.instructions if instructions is None else instructions)
    model = QueST(checkpoint.model, metadata={"instructions": known})
    init_weights(model, seed)
    targets = model.state_dict()
    if targets.pop(VECTORS, None) is not None:
        if task_embeddings is None:
            task_embeddings = weights.read(VECTORS) if VECTORS in weights else torch.zeros(0, size)
        check_vectors(tuple(task_embeddings.shape), len(known), size)
        model.task_embeddings.copy_(task_embeddings)
        weights = weights.without([VECTORS])
    weights.check(targets, may_lack=("value_head.",))
    for name, tensor in weights.read_rows(dict.fromkeys(weights, slice(None))):
        targets[name].copy_(tensor)
    return model.eval()
