"""Policies for users: save one as a folder, load it from a folder or URI, act and score with it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from vlarl_ray.config import ModelConfig
from vlarl_ray.files import write_whole
from vlarl_ray.models.action_tokens import ActionNormalizer
from vlarl_ray.models.base import PolicyInputs
from vlarl_ray.models.chunk_policy import ChunkPolicyModel
from vlarl_ray.models.distributions import samples_to_numpy, samples_to_torch
from vlarl_ray.models.heads import HEADS
from vlarl_ray.models.lora import lora_layers
from vlarl_ray.models.official import official_weights
from vlarl_ray.models.proprio import ProprioNormalizer
from vlarl_ray.models.tokenizer import PromptTokenizer
from vlarl_ray.models.weight_files import HEADS_FILE, MAX_FILE_BYTES, WeightFiles, remove_weights, write_files
from vlarl_ray.registry import MODELS, resolve
from vlarl_ray.types import ActionChunk, Observation

FORMAT = "vlarl_ray.policy.1"
DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MAX_ROWS = 64
"""Of one forward pass of `Policy`."""


class Policy:
    """A model in use: turns observations into action chunks, in one process, for notebooks and checks."""

    def __init__(self, model: ChunkPolicyModel) -> None:
        self.model = model.eval()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.value_head[0].weight.device  # type: ignore[return-value]

    def act(
        self, observations: Sequence[Observation], *, temperature: float = 0.0, seed: int | None = None
    ) -> list[ActionChunk]:
        """Choose one action chunk per observation.

        Args:
            observations: Any number of them.
            temperature: 0 decodes greedily, and `logprobs` are then those of temperature 1.
            seed: Of the sampling noise, unsigned 64 bits; None draws one. Row i's noise depends on (seed, i).
        """
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
        chunks: list[ActionChunk] = []
        for start in range(0, len(observations), _MAX_ROWS):
            inputs = self._inputs(observations[start : start + _MAX_ROWS])
            noise = None
            if temperature > 0:
                keys = np.array([[seed, start + row] for row in range(len(inputs.images))], dtype=np.uint64)
                noise = self.model.draw_noise(keys).to(self.device)
            tokens, logprobs = self.model.sample(inputs, temperature=temperature, noise=noise)
            actions = self.model.decode_actions(tokens)
            rows = (actions.cpu().numpy(), samples_to_numpy(tokens), logprobs.cpu().numpy())
            chunks += [ActionChunk(*row) for row in zip(*rows, strict=True)]
        return chunks

    def log_probs(
        self, observations: Sequence[Observation], chunks: Sequence[ActionChunk], *, temperature: float = 1.0
    ) -> Float32[np.ndarray, "B L"]:
        """Score chunks: log-probability of each number under the distribution it would be drawn from.

        Raises:
            ValueError: If there is not one chunk per observation, or a chunk holds a token that is no action.
        """
        if len(chunks) != len(observations):
            raise ValueError(
                f"got {len(observations)} observations and {len(chunks)} chunks; give one chunk per observation."
            )
        scores = []
        for start in range(0, len(observations), _MAX_ROWS):
            tokens = samples_to_torch(np.stack([chunk.tokens for chunk in chunks[start : start + _MAX_ROWS]]))
            self.model.check_samples(tokens)
            tokens = tokens.to(self.device)
            with torch.no_grad():
                output = self.model(self._inputs(observations[start : start + _MAX_ROWS]), tokens)
            scores.append(output.actions.log_prob(tokens, temperature=temperature).cpu().numpy())
        return np.concatenate(scores) if scores else np.zeros((0, self.model.num_action_tokens), np.float32)

    def save(self, folder: Path) -> None:
        """Write a policy folder."""
        self.model.save(folder)

    def _inputs(self, observations: Sequence[Observation]) -> PolicyInputs:
        prompt_ids, lengths = self.model.encode_prompts([observation.instruction for observation in observations])
        images = torch.from_numpy(np.stack([observation.images for observation in observations]))
        proprio = torch.from_numpy(np.stack([observation.proprio for observation in observations]))
        return PolicyInputs(images, prompt_ids, lengths, proprio).to(self.device)


def save_policy(model: ChunkPolicyModel, folder: Path) -> None:
    """Write `config.json`, `model.safetensors` (official names) and `tokenizer.json`.

    Raises:
        ValueError: If adapters are attached; merge them into a plain model first.
    """
    if lora_layers(model):
        raise ValueError(
            "the model has adapters; a policy folder holds plain weights. Save the adapters, or merge them first."
        )
    description = {
        "format": FORMAT,
        "model": asdict(model.model_config),  # type: ignore[call-overload]
        "action_statistics": asdict(model.normalizer),
        "proprio_statistics": None if model.proprio_normalizer is None else asdict(model.proprio_normalizer),
        "metadata": model.metadata,
    }
    _write_folder(folder, description, model.tokenizer, model.state_dict().items())


def copy_policy(
    source: Path, folder: Path, tensors: Iterable[tuple[str, Tensor]], *, metadata: Mapping[str, Any]
) -> Path:
    """Write a policy folder that is another one with other weights, never holding more than a file of them in memory.

    Args:
        source: Policy folder.
        folder: Policy folder to write; one that is there is replaced, once the new one is whole.
        tensors: Name and value of every tensor.
        metadata: Facts to add to the source's.
    """
    description = json.loads((source / "config.json").read_text())
    description["metadata"] = {**description.get("metadata", {}), **metadata}
    description.pop("weights_of", None)
    path = source / "tokenizer.json"
    tokenizer = PromptTokenizer.load(path) if path.exists() else None
    _write_folder(folder, description, tokenizer, tensors)
    return folder


def _write_folder(
    folder: Path,
    description: Mapping[str, Any],
    tokenizer: PromptTokenizer | None,
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Write all files beside their place, and move them there; `config.json` is last, so a folder with it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
        new = Path(partial)
        write_files(new, tensors, max_file_bytes=MAX_FILE_BYTES)
        if tokenizer is not None:
            tokenizer.save(new / "tokenizer.json")
        (folder / "config.json").unlink(missing_ok=True)
        remove_weights(folder)
        for path in new.iterdir():
            path.rename(folder / path.name)
    write_whole(folder / "config.json", json.dumps(description, indent=2) + "\n")


def load_policy(
    folder_or_uri: str | Path, *, dtype: Literal["float32", "bfloat16"] = "float32", device: str = "cpu"
) -> Policy:
    """Load a policy folder.

    Args:
        folder_or_uri: Folder, or a `pyarrow.fs` URI of one (`s3://...`), which is copied to a temporary folder first.
        dtype: Precision of everything but the heads (of value, action and scale), which are fp32 always.
        device: A torch device.

    Raises:
        FileNotFoundError: If a file of the folder is missing.
        ValueError: If the files don't describe a policy: names, shapes and types of all tensors are checked.
    """
    return Policy(load_model(folder_or_uri, dtype=dtype, device=device))


def load_model(
    folder_or_uri: str | Path, *, dtype: Literal["float32", "bfloat16"] = "float32", device: str = "cpu"
) -> ChunkPolicyModel:
    """Load the bare model of a policy folder, to train or serve it; arguments and errors as in `load_policy`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype!r} is unknown; allowed: {', '.join(DTYPES)}.")
    with _local(folder_or_uri) as folder:
        model, weights = empty_model(folder)
        if dtype not in model.dtypes:
            raise ValueError(
                f"dtype = {dtype!r}: a {model.model_config.architecture} policy computes in "
                f"{' or '.join(model.dtypes)} only; set inference.dtype and learner.dtype to that."
            )
        for name, module in model.named_children():
            module.to(torch.float32 if f"{name}." in HEADS else DTYPES[dtype])
        for own in (*model.parameters(recurse=False), *model.buffers(recurse=False)):
            if own.is_floating_point():
                own.data = own.data.to(DTYPES[dtype])
        dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        # Copies: what was read lies in a mapped file, which others may replace. Cast one by one, or the whole model is
        # there twice, in the file's dtype and in its own.
        every = weights.read_rows(dict.fromkeys(weights, slice(None)))
        tensors = {name: tensor.to(device, dtypes[name], copy=True) for name, tensor in every}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def empty_model(folder: Path) -> tuple[ChunkPolicyModel, WeightFiles]:
    """Build the model of a policy folder on the meta device, and find the tensors that belong to it; none is read.

    Raises:
        FileNotFoundError: If a file of the folder is missing.
        ValueError: If its tensors are not those of the model it describes.
    """
    description = describe_policy(folder)
    proprio = description["proprio_statistics"]
    tokenizer_path = folder / "tokenizer.json"
    config: ModelConfig = description["model"]
    with torch.device("meta"):
        model = _model_class(config)(
            config,
            PromptTokenizer.load(tokenizer_path, config.prompt_style) if tokenizer_path.exists() else None,
            normalizer=ActionNormalizer(**description["action_statistics"]),
            proprio_normalizer=None if proprio is None else ProprioNormalizer(**proprio),
            metadata=description["metadata"],
        )
    weights = policy_weights(folder)
    weights.check(model.state_dict())
    return model, weights


def policy_weights(folder: Path) -> WeightFiles:
    """Find the tensors of a policy folder, or of the published checkpoint that it refers to; none is read.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged.
    """
    description = json.loads((folder / "config.json").read_text())
    source = description.get("weights_of")
    if source is None:
        return WeightFiles.of_folder(folder)
    if not Path(source).is_dir():
        raise FileNotFoundError(
            f"{folder} has its weights from {source}, which is not there; put the checkpoint back, or import it again."
        )
    weights = official_weights(Path(source), describe_policy(folder)["model"])
    return weights | WeightFiles.of_file(folder / HEADS_FILE)


def _model_class(config: ModelConfig) -> type[ChunkPolicyModel]:
    return resolve(MODELS, config.architecture, what="model.architecture")


def describe_policy(folder: Path) -> dict[str, Any]:
    """Read a policy folder's `config.json`.

    Returns:
        `model` (ModelConfig), `action_statistics` and `proprio_statistics` (keyword arguments of their normalisers; the
        latter None where there are none), `metadata`.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it does not describe a policy.
    """
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; a policy folder holds config.json and model.safetensors, and so does a published "
            "checkpoint."
        )
    try:
        description = json.loads(path.read_text())
        if not isinstance(description, dict):
            raise ValueError(f"{path} holds no JSON object; this is no policy folder.")
        if description.get("format") != FORMAT:
            raise ValueError(
                f"{path}: format = {description.get('format')!r}, expected {FORMAT!r}; this is no policy "
                "folder, nor a checkpoint of OpenVLA (model_type: openvla) or QueST (autoencoder, policy_prior)."
            )
        description["model"] = TypeAdapter(ModelConfig).validate_python(description["model"])
        description["action_statistics"] = _with_tuples(description["action_statistics"])
        description["proprio_statistics"] = _with_tuples(description.get("proprio_statistics"))
        description.setdefault("metadata", {})
    except (json.JSONDecodeError, KeyError, ValidationError) as error:
        raise ValueError(f"{path} is damaged or from another version: {error}") from error
    return description


def _with_tuples(statistics: dict[str, Any] | None) -> dict[str, Any] | None:
    if statistics is None:
        return None
    return {name: tuple(value) if isinstance(value, list) else value for name, value in statistics.items()}


@contextmanager
def _local(folder_or_uri: str | Path) -> Iterator[Path]:
    """Give a local copy of a folder behind a URI, or the folder itself."""
    if "://" not in str(folder_or_uri):
        yield Path(folder_or_uri)
        return
    from pyarrow import fs  # tens of MB that local folders don't need

    with tempfile.TemporaryDirectory() as copy:
        fs.copy_files(str(folder_or_uri), copy)
        yield Path(copy)
