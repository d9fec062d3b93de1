"""Exported folders read back: sizes from headers alone, and plain weights for readers that do not know the format.

compressed-tensors 0.17 unpacks widths that do not divide 32 in another layout than vLLM and its own newer versions: for 3, 5, 6 and 7 bits
transformers cannot check a file there, a plain copy can.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from raysys.compression.packing import packed_words, unpack
from raysys.compression.shards import ABOUT, INDEX, header
from raysys.errors import ConfigError


@dataclass(frozen=True)
class Sizes:
    """Of an export.

    Attributes:
        total: bytes of all tensors.
        quantised: bytes that stand for quantised weights, scales and shapes included.
        weights: how many weights those are.
    """

    total: int
    quantised: int
    weights: int

    @property
    def bits(self) -> float:
        """Bits that a quantised weight takes, scales included."""
        return 8 * self.quantised / self.weights


def sizes(folder: str | Path) -> Sizes:
    """Read from headers. Raises ConfigError: see `shards.header`."""
    total = quantised = weights = 0
    for path in sorted(Path(folder).glob("*.safetensors")):
        values = header(path)
        for name, value in values.items():
            size = value["data_offsets"][1] - value["data_offsets"][0]
            total += size
            quantised += size if name.endswith((".weight_packed", ".weight_scale", ".weight_shape")) else 0
            if name.endswith(".weight_shape"):
                with safe_open(path, framework="pt") as file:
                    weights += math.prod(file.get_tensor(name).tolist())
    return Sizes(total, quantised, weights)


def predicted_bytes(shapes: Mapping[str, tuple[int, int]], bits: int, group_size: int, dtype: torch.dtype) -> int:
    """Bytes of one layer's quantised linears in the file: words, scales, and 16 for each shape."""
    return sum(rows * (4 * packed_words(inner, bits) + inner // group_size * dtype.itemsize) + 16 for rows, inner in shapes.values())


def restored(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the plain model, quantised weights as the format defines them: code times scale, rounded to the scale's dtype.

    Raises:
        ConfigError: the folder is no finished export, or a file is damaged.
    """
    bits = _bits(Path(folder))
    for path in sorted(Path(folder).glob("*.safetensors")):
        yield from _restored(path, bits)


def write_plain(folder: str | Path, target: str | Path) -> Path:
    """The same model without the format: a folder that loads wherever the source does, at its size.

    Raises:
        ConfigError: see `restored`; the target exists.
    """
    folder, target = Path(folder), Path(target)
    bits = _bits(folder)
    if target.exists():
        raise ConfigError(f"{target} exists", "give another folder, or remove this one")
    draft = target.with_name(f".draft_{target.name}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    where: dict[str, str] = {}
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        tensors = {name: tensor.contiguous().clone() for name, tensor in _restored(path, bits)}
        save_file(tensors, draft / path.name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, path.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (draft / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1))
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in (INDEX, "config.json"):
            shutil.copyfile(path, draft / path.name)
    config = _config(folder)
    del config["quantization_config"]
    (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    draft.rename(target)
    return target


def _config(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if values["quantization_config"]["format"] == "pack-quantized":
            return values
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"{folder} is no finished pack-quantized checkpoint", "finish its export first")


def _bits(folder: Path) -> list[int]:
    """Of each layer."""
    _config(folder)
    return json.loads((folder / ABOUT).read_text(encoding="utf-8"))["bits"]


def _restored(path: Path, bits: list[int]) -> Iterator[tuple[str, Tensor]]:
    names = list(header(path))
    with safe_open(path, framework="pt") as file:
        for name in names:
            module, _, kind = name.rpartition(".")
            if kind in ("weight_scale", "weight_shape"):
                continue
            tensor = file.get_tensor(name)
            if kind == "weight_packed":
                scale, columns = file.get_tensor(f"{module}.weight_scale"), int(file.get_tensor(f"{module}.weight_shape")[1])
                codes = unpack(tensor, bits[int(module.split(".")[2])], columns)
                groups = codes.unflatten(1, (scale.shape[1], -1)).to(scale.dtype)
                name, tensor = f"{module}.weight", (groups * scale.unsqueeze(-1)).flatten(1)
            yield name, tensor
