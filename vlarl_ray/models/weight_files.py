"""Tensors of a checkpoint by name, in whichever safetensors files they lie; read one at a time, whole or some rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEADS_FILE = "heads.safetensors"
"""Of our own: heads that only RL needs, beside a checkpoint or in the folder that refers to one."""
MAX_FILE_BYTES = 5_000_000_000
"""Of a file that is written, as Hugging Face cuts checkpoints."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FLOATS = frozenset({"F32", "F16", "BF16"})
_CONVERT = "convert pickles once with `python -m vlarl_ray.models.unpickle {path}`, which runs no code of theirs"
_MAPPED_BYTES = 64 * 1024 * 1024
"""A file is closed after this many bytes were read, as pages of a mapped file count as memory of the process."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and what its file says of it."""

    path: Path
    stored_name: str
    shape: tuple[int, ...]
    dtype: str
    """Of safetensors: `F32`, `BF16`, ..."""

    @property
    def num_values(self) -> int:
        """Product of the shape."""
        return torch.Size(self.shape).numel()


class WeightFiles(Mapping[str, StoredTensor]):
    """A checkpoint's tensors, none of them read yet. Names are those our models use."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = dict(tensors)

    @classmethod
    def of_folder(cls, folder: Path) -> WeightFiles:
        """List the tensors of a checkpoint folder: `model.safetensors`, or several files with an index.

        Raises:
            FileNotFoundError: If there are no weights, or files of the index are missing (all of them are named).
            ValueError: If the weights are pickles, a file is damaged, or index and files disagree.
        """
        index = folder / INDEX
        if not index.exists():
            if not (folder / SINGLE).exists():
                raise _no_weights(folder)
            return cls.of_file(folder / SINGLE)
        try:
            file_of = dict(json.loads(index.read_text())["weight_map"])
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{index} is damaged: {error!r}; download it again.") from error
        files = sorted(set(file_of.values()))
        missing = [name for name in files if not (folder / name).exists()]
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {len(missing)} of the {len(files)} files its index names: {', '.join(missing)}; "
                "download them, or check that the transfer was complete."
            )
        found = {name: tensor for file in files for name, tensor in cls.of_file(folder / file).items()}
        problems = [f"{name} is not in {file}" for name, file in file_of.items() if name not in found]
        problems += [
            f"{found[name].path.name} holds {name}, which the index lacks" for name in found if name not in file_of
        ]
        problems += [
            f"{name} is in {found[name].path.name}, not in {file}"
            for name, file in file_of.items()
            if name in found and found[name].path.name != file
        ]
        if problems:
            raise ValueError(f"{index} does not describe the files beside it: {'; '.join(problems)}.")
        return cls(found)

    @classmethod
    def of_file(cls, path: Path, *, prefix: str = "") -> WeightFiles:
        """List the tensors of one file, with `prefix` put before their names.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no safetensors file, or cut short.
        """
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist.")
        try:
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                tensors = {
                    prefix + name: StoredTensor(path, name, tuple(part.get_shape()), part.get_dtype())
                    for name, part in slices.items()
                }
        except SafetensorError as error:
            raise ValueError(
                f"{path} is no safetensors file, or is cut short ({error}); download it again. A pickle that was "
                f"renamed is refused too: {_CONVERT.format(path=path)}."
            ) from error
        return cls(tensors)

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __or__(self, other: WeightFiles) -> WeightFiles:
        """Join two sets of tensors.

        Raises:
            ValueError: If a name is in both.
        """
        both = sorted(self.keys() & other.keys())
        if both:
            raise ValueError(f"{', '.join(both)}: in {self[both[0]].path} and in {other[both[0]].path}; keep one.")
        return WeightFiles({**self._tensors, **other._tensors})

    def renamed(self, names: Mapping[str, str]) -> WeightFiles:
        """Give some tensors other names (`{old: new}`)."""
        return WeightFiles({names.get(name, name): tensor for name, tensor in self.items()})

    def without(self, names: Iterable[str]) -> WeightFiles:
        """Leave some tensors out."""
        dropped = set(names)
        return WeightFiles({name: tensor for name, tensor in self.items() if name not in dropped})

    @property
    def num_bytes(self) -> int:
        """Size of all files that are read from."""
        return sum(path.stat().st_size for path in {tensor.path for tensor in self.values()})

    def check(self, expected: Mapping[str, Tensor], *, may_lack: tuple[str, ...] = ()) -> None:
        """Require tensors of exactly these names, shapes and kinds of number.

        Args:
            expected: As of a model's `state_dict()`, on the meta device for example.
            may_lack: Name prefixes of tensors that need not be there.

        Raises:
            ValueError: Listing every tensor that is missing, unknown or of another shape or type.
        """
        problems = [f"missing: {n}" for n in expected if n not in self and not n.startswith(may_lack)]
        problems += [f"unknown: {name} {self[name].shape}" for name in self if name not in expected]
        for name in expected.keys() & self.keys():
            want, have = expected[name], self[name]
            if have.shape != tuple(want.shape):
                problems.append(f"shape: {name} is {have.shape}, the config says {tuple(want.shape)}")
            if (have.dtype in _FLOATS) != want.dtype.is_floating_point:
                problems.append(f"type: {name} is {have.dtype}, the model's is {want.dtype}")
        if problems:
            where = ", ".join(sorted({str(tensor.path) for tensor in self.values()})) or "the checkpoint"
            listed = "\n  ".join(sorted(problems))
            raise ValueError(f"{where}: {len(problems)} tensors are not what the config describes:\n  {listed}")

    def read(self, name: str) -> Tensor:
        """Read one tensor, in its stored type."""
        [(_, tensor)] = self.read_rows({name: slice(None)})
        return tensor

    def read_rows(self, wanted: Mapping[str, slice]) -> Iterator[tuple[str, Tensor]]:
        """Read rows of dimension 0 of some tensors, file by file; a tensor is valid until the next is asked for.

        Args:
            wanted: Rows by name; `slice(None)` is the whole tensor. Not in this order.
        """
        by_file: dict[Path, list[str]] = {}
        for name in wanted:
            by_file.setdefault(self[name].path, []).append(name)
        for path, names in by_file.items():
            while names:
                mapped = 0
                with safe_open(path, framework="pt") as file:
                    while names and mapped < _MAPPED_BYTES:
                        name = names.pop()
                        stored, rows = self[name], wanted[name]
                        if stored.shape and rows != slice(None):
                            tensor = file.get_slice(stored.stored_name)[rows]
                        else:
                            tensor = file.get_tensor(stored.stored_name)
                        mapped += tensor.numel() * tensor.element_size()
                        yield name, tensor


def remove_weights(folder: Path) -> None:
    """Delete the files that `write_files` may have written there."""
    for path in (folder / SINGLE, folder / INDEX, *folder.glob("model-*-of-*.safetensors")):
        path.unlink(missing_ok=True)


def _no_weights(folder: Path) -> Exception:
    if not folder.is_dir():
        return FileNotFoundError(f"{folder} is no folder; give the folder of a checkpoint.")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        listed = ", ".join(pickles)
        return ValueError(
            f"{folder} holds pickles ({listed}), which run code when they are loaded, and no {SINGLE}; "
            f"{_CONVERT.format(path=folder)}."
        )
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    return FileNotFoundError(f"{folder} is no checkpoint: it has neither {SINGLE} nor {INDEX}, but {there}.")


def write_files(folder: Path, tensors: Iterable[tuple[str, Tensor]], *, max_file_bytes: int) -> None:
    """Write a stream of tensors as `model.safetensors`, or as numbered files with an index where they need several.

    Holds at most one file's tensors in memory, and leaves a folder without weights until all of them are written.

    Args:
        folder: Exists; gets the files.
        tensors: Name and value; in the order of the files.
        max_file_bytes: A file is ended before it grows beyond this.
    """
    parts: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    waiting_bytes, total_bytes = 0, 0

    def flush() -> None:
        nonlocal waiting_bytes
        save_file(waiting, folder / f".part-{len(parts)}", metadata={"format": "pt"})
        parts.append(list(waiting))
        waiting.clear()
        waiting_bytes = 0

    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if waiting and waiting_bytes + num_bytes > max_file_bytes:
            flush()
        waiting[name] = tensor.detach().cpu().contiguous()
        waiting_bytes += num_bytes
        total_bytes += num_bytes
    if waiting or not parts:
        flush()
    if len(parts) == 1:
        (folder / ".part-0").rename(folder / SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(parts):
        file = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        (folder / f".part-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
