"""Turn PyTorch pickles into safetensors files beside them, without running code that a pickle may carry.

    python -m vlarl_ray.models.unpickle FILE_OR_FOLDER ...

A `module.` that data-parallel training put before names is taken off. A file with more than weights (an optimiser's
state, say) gives its `model` or `state_dict` entry. Several `pytorch_model-*.bin` become one file each, with an index.
"""

from __future__ import annotations

import argparse
import json
import logging
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlarl_ray.models.weight_files import INDEX, PICKLE_SUFFIXES, SINGLE

_LOG = logging.getLogger(__name__)
_WEIGHT_ENTRIES = ("model", "state_dict")
_HUB_SINGLE, _HUB_PART = "pytorch_model", "pytorch_model-"


def unpickle(path: Path) -> Path:
    """Write the tensors of a pickle to a safetensors file of the same name.

    Args:
        path: A file that `torch.save` wrote.

    Returns:
        The new file.

    Raises:
        FileNotFoundError: If there is no such file.
        FileExistsError: If the new file is there already.
        ValueError: If the pickle holds more than tensors and plain values, or no tensors.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    target = path.with_name(_new_name(path))
    if target.exists():
        raise FileExistsError(f"{target} is there already; move it away to convert {path.name} again.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} holds more than tensors and plain values, or is no file of torch.save: {error}; "
            "only someone who trusts its origin can convert it, with torch.load(..., weights_only=False)."
        ) from error
    tensors = _weights(content)
    if not tensors:
        raise ValueError(f"{path} holds no tensors by name; it is no checkpoint.")
    whole = target.with_name(f".{target.name}")
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, whole, metadata={"format": "pt"})
    whole.rename(target)
    return target


def unpickle_folder(folder: Path) -> list[Path]:
    """Convert every pickle of a folder, and its `pytorch_model.bin.index.json` if there is one."""
    pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if not pickles:
        raise FileNotFoundError(f"{folder} holds no pickle; nothing to convert.")
    written = [unpickle(path) for path in pickles]
    index = folder / "pytorch_model.bin.index.json"
    if index.exists():
        description = json.loads(index.read_text())
        description["weight_map"] = {n: _new_name(Path(f)) for n, f in description["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(description, indent=2) + "\n")
    return written


def _new_name(path: Path) -> str:
    if path.stem == _HUB_SINGLE:
        return SINGLE
    stem = path.stem.replace(_HUB_PART, "model-") if path.stem.startswith(_HUB_PART) else path.stem
    return f"{stem}.safetensors"


def _weights(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    for entry in _WEIGHT_ENTRIES:
        if isinstance(content.get(entry), Mapping):
            return _weights(content[entry])
    return {n.removeprefix("module."): t for n, t in content.items() if isinstance(n, str) and isinstance(t, Tensor)}


def main() -> None:
    """Convert the files and folders of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        for path in parser.parse_args().paths:
            for written in unpickle_folder(path) if path.is_dir() else [unpickle(path)]:
                _LOG.info("wrote %s", written)
    except (FileNotFoundError, FileExistsError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
