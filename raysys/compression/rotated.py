"""A checkpoint as it reads when its residual stream is turned: the same functions as `Checkpoint` has, rotated on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from raysys.compression.rotation import Rotation, check_family
from raysys.compression.shards import EMBEDDING, HEAD, NORM, Checkpoint
from raysys.errors import ConfigError
from raysys.methods.tensors import compute_dtype

SIZE = 128
"""Of a block, or the largest power of two below that divides the width."""


class Rotated:
    """A view of a checkpoint. Layers are given in float32: halves would be rounded twice.

    Args:
        checkpoint: the original; tied embeddings are given as two.
        seed: of the rotation.

    Raises:
        ConfigError: a family of which it is not known how.
    """

    def __init__(self, checkpoint: Checkpoint, seed: int):
        check(checkpoint)
        self._checkpoint = checkpoint
        width = int(checkpoint.config["hidden_size"])
        self._rotation = Rotation(width, seed, min(SIZE, width & -width))

    @property
    def folder(self) -> Path:
        return self._checkpoint.folder

    @property
    def layers(self) -> int:
        return self._checkpoint.layers

    @property
    def linears(self) -> tuple[str, ...]:
        return self._checkpoint.linears

    def layer(self, i: int) -> dict[str, Tensor]:
        """Raises ConfigError: a layer of another form."""
        wide = {name: tensor.to(compute_dtype(tensor)) for name, tensor in self._checkpoint.layer(i).items()}
        try:
            return self._rotation.layer(wide)
        except ValueError as error:
            raise ConfigError(f"layer {i}: {error}", "set rotation=false") from None

    def tensor(self, name: str) -> Tensor:
        found = self._checkpoint.tensor(name)
        if name == NORM:  # its gain is in the head
            return torch.ones_like(found)
        return self._rotation.stream(found) if name == EMBEDDING else found

    def rest(self) -> Iterator[tuple[str, Tensor]]:
        """Everything outside of the layers; the head is always one of its own."""
        for name, tensor in self._checkpoint.rest():
            if name not in (EMBEDDING, HEAD, NORM):
                yield name, tensor
        ends = self._rotation.ends(self._checkpoint.tensor(EMBEDDING), self._checkpoint.tensor(NORM), self._checkpoint.unembedding())
        yield from zip((EMBEDDING, NORM, HEAD), ends, strict=True)


def check(checkpoint: Checkpoint) -> None:
    """Raises ConfigError unless the checkpoint can be rotated."""
    try:
        check_family(str(checkpoint.config.get("model_type")))
    except ValueError as error:
        raise ConfigError(str(error), "set rotation=false") from None
