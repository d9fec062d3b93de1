"""Quantised layers as the weights that they stand for, in a plain Hugging Face folder: for levels that no packed format holds."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from raysys.compression.shards import ABOUT, HEAD, INDEX, Checkpoint, header
from raysys.errors import CheckpointError
from raysys.files import write_atomically, write_json, writing
from raysys.methods.d2quant import Quantized


class Plain:
    """A folder that fills layer by layer, as `raysys.compression.export.Export` does, at the source's size.

    Args:
        folder: made if it is not there.
        source: what is quantised.
        about: facts that belong to the result.
    """

    def __init__(self, folder: Path, source: Checkpoint, about: Mapping[str, Any]):
        self._folder, self._source, self._about = folder, source, dict(about)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the weights: the source's."""
        return self._source.layer(0)["self_attn.o_proj.weight"].dtype

    def have(self, i: int) -> bool:
        return self._path(i).is_file()

    def write(self, i: int, quantized: Mapping[str, Quantized], others: Mapping[str, Tensor]) -> None:
        """One layer. Raises CheckpointError."""
        weights = {f"{name}.weight": one.dequantize() for name, one in quantized.items()}
        weights |= {name: tensor.to(self.dtype) for name, tensor in others.items()}
        self._save(self._path(i), {f"model.layers.{i}.{name}": tensor for name, tensor in weights.items()})

    def finish(self, rest: Iterable[tuple[str, Tensor]] | None = None) -> None:
        """Everything outside of the layers (None: the source's), and the files that describe the model. Raises CheckpointError."""
        if missing := [i for i in range(self._source.layers) if not self.have(i)]:
            raise CheckpointError(f"{self._folder}: layers {', '.join(map(str, missing))} are not written yet", "quantise them first")
        tensors = dict(self._source.rest() if rest is None else rest)
        self._save(self._folder / "rest.safetensors", tensors)
        config = {key: value for key, value in self._source.config.items() if key != "auto_map"}
        if rest is not None and HEAD in tensors:
            config["tie_word_embeddings"] = False
        where = {name: path.name for path in sorted(self._folder.glob("*.safetensors")) for name in header(path)}
        if any(name.endswith("mlp.down_proj.bias") for name in where):
            config["mlp_bias"] = True
        with writing(self._folder):
            for path in sorted(self._source.folder.iterdir()):
                if path.suffix in (".json", ".jinja", ".txt", ".model") and path.name not in ("config.json", INDEX, ABOUT):
                    shutil.copyfile(path, self._folder / path.name)
            total = sum((self._folder / name).stat().st_size for name in set(where.values()))
            write_json(self._folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
            write_json(self._folder / ABOUT, self._about)
            write_atomically(self._folder / "config.json", json.dumps(config, indent=2) + "\n")

    def _path(self, i: int) -> Path:
        return self._folder / f"layer-{i:05}.safetensors"

    def _save(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        draft = path.with_name(f".{path.name}.draft")
        with writing(path):
            save_file(
                {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, draft, metadata={"format": "pt"}
            )
            os.replace(draft, path)
