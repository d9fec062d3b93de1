"""DAC's biases of norms that the served files have no place for: for evaluation, and for who can add them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from raysys.files import writing

FILE = "corrections.safetensors"
_NAME, _FINAL = "model.layers.{}.post_attention_layernorm.bias", "model.norm.bias"


class Corrections:
    """One file a layer while the run goes on, `corrections.safetensors` at its end.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path):
        self._folder, self._parts = folder, folder / "corrections"

    def write(self, i: int, bias: Tensor | None, final: Tensor | None = None) -> None:
        """[D] of layer i, and of the norm before the head if it is the last one; None: there is none. Raises CheckpointError."""
        path = self._parts / f"{i:05d}.safetensors"
        found = {
            name: one.detach().cpu().float().contiguous() for name, one in ((_NAME.format(i), bias), (_FINAL, final)) if one is not None
        }
        if not found:
            path.unlink(missing_ok=True)
            return
        self._parts.mkdir(exist_ok=True)
        _save(found, path)

    def finish(self) -> None:
        """Joins the parts."""
        parts = sorted(self._parts.glob("*.safetensors"))
        if parts:
            _save({name: tensor for part in parts for name, tensor in load_file(part).items()}, self._folder / FILE)
        shutil.rmtree(self._parts, ignore_errors=True)

    def read(self) -> dict[int, Tensor]:
        """Bias [D] by layer, when `finish` has been called; {} without any."""
        return {int(name.split(".")[2]): tensor for name, tensor in self._all().items() if name != _FINAL}

    def final(self) -> Tensor | None:
        """Bias [D] of the norm before the head, likewise."""
        return self._all().get(_FINAL)

    def _all(self) -> dict[str, Tensor]:
        path = self._folder / FILE
        return load_file(path) if path.is_file() else {}


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    draft = path.with_name(f".{path.name}.draft")
    with writing(path):
        save_file(tensors, draft)
        os.replace(draft, path)
