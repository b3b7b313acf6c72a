"""Make a policy folder of a published checkpoint: a description and the heads it lacks; weights stay where they are.

The folder's `config.json` names the checkpoint under `weights_of`, `heads.safetensors` holds what RL adds to it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vlarl_ray.config import ModelConfig
from vlarl_ray.files import write_whole
from vlarl_ray.models.chunk_policy import ChunkPolicyModel
from vlarl_ray.models.heads import HEADS
from vlarl_ray.models.initialization import draw_heads
from vlarl_ray.models.official import OfficialPolicy, read_official
from vlarl_ray.models.policy import FORMAT
from vlarl_ray.models.weight_files import HEADS_FILE
from vlarl_ray.registry import MODELS, resolve


def import_policy(source: Path, folder: Path, wanted: ModelConfig, *, unnorm_key: str | None, seed: int) -> Path:
    """Write a policy folder that refers to a checkpoint in a published layout.

    Args:
        source: The checkpoint; it must stay there, where every process that loads the policy can read it.
        folder: Policy folder to write.
        wanted: What the checkpoint leaves open, see `read_official`.
        unnorm_key: Dataset whose statistics to take.
        seed: Of the value head, and of whichever other head the checkpoint lacks.

    Raises:
        FileNotFoundError: If a file of the checkpoint is missing.
        ValueError: If the checkpoint is none, is damaged, or is not of the model that its files describe.
    """
    policy = read_official(source, wanted, unnorm_key=unnorm_key)
    model = _empty(policy)
    policy.weights.check(model.state_dict(), may_lack=HEADS)
    lacking = {name.partition(".")[0] for name in model.state_dict() if name not in policy.weights}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_new_heads(model, lacking, seed), folder / HEADS_FILE)
    if policy.tokenizer is not None:
        policy.tokenizer.save(folder / "tokenizer.json")
    proprio = policy.proprio_normalizer
    description = {
        "format": FORMAT,
        "weights_of": str(source.resolve()),
        "model": asdict(policy.model),  # type: ignore[call-overload]
        "action_statistics": asdict(policy.normalizer),
        "proprio_statistics": None if proprio is None else asdict(proprio),
        "metadata": policy.metadata,
    }
    write_whole(folder / "config.json", json.dumps(description, indent=2) + "\n")
    return folder


def _empty(policy: OfficialPolicy) -> ChunkPolicyModel:
    with torch.device("meta"):
        return resolve(MODELS, policy.model.architecture, what="model.architecture")(
            policy.model,
            policy.tokenizer,
            normalizer=policy.normalizer,
            proprio_normalizer=policy.proprio_normalizer,
            metadata=policy.metadata,
        )


def _new_heads(model: ChunkPolicyModel, names: set[str], seed: int) -> dict[str, Tensor]:
    """Give some heads of a model on the meta device their first values."""
    heads = nn.ModuleDict({name: model.get_submodule(name).to_empty(device="cpu") for name in sorted(names)})
    draw_heads(heads, seed)
    return {name: tensor.contiguous() for name, tensor in heads.state_dict().items()}
