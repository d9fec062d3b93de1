"""Weights on their way from a trainer to engines: a plan says once what lies where, buckets carry the bytes.

In a push nothing is said, hashed or compared tensor by tensor, so ten thousand cost about what a hundred of the same bytes do: a
bucket names its plan and its place in it, and has one digest. Imports neither torch nor Ray.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from blake3 import blake3

ALIGNMENT = 64
UNDER_WAY = 2
"""Buckets of a push that exist at the same time: one is read while the next is packed."""


@dataclass(frozen=True)
class Layout:
    """What lies where in a bucket's bytes: a tensor of `shapes[i]` and torch dtype name `dtypes[i]` ("float32") has `sizes[i]` bytes
    from `offsets[i]` on; `names` are Hugging Face parameter names. Bytes between tensors are 0."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, tuple[Sequence[int], str, int]]) -> Layout:
        """Tensors one after another, each (shape, dtype name, bytes) by name."""
        shapes, dtypes, sizes = zip(*tensors.values(), strict=True)
        offsets = [0, *np.cumsum([aligned(size) for size in sizes[:-1]], dtype=int).tolist()]
        return cls(tuple(tensors), tuple(tuple(shape) for shape in shapes), dtypes, tuple(offsets), sizes)

    @property
    def nbytes(self) -> int:
        return self.offsets[-1] + self.sizes[-1]

    def tensors(self, data: Any) -> list[Any]:
        """The tensors in place, of a bucket's bytes as a uint8 torch tensor."""
        import torch

        raw = [data[start : start + size] for start, size in zip(self.offsets, self.sizes, strict=True)]
        kinds = zip(raw, self.dtypes, self.shapes, strict=True)
        return [one.view(getattr(torch, dtype)).view(shape) for one, dtype, shape in kinds]

    def digests(self, data: np.ndarray) -> list[str]:
        """One a tensor. For telling which is wrong: the bucket's own digest tells whether any is."""
        return [digest(data[start : start + size]) for start, size in zip(self.offsets, self.sizes, strict=True)]

    def gaps(self) -> np.ndarray:
        """Places of the bytes between tensors."""
        ends = np.add(self.offsets, self.sizes)[:-1]
        return np.concatenate([np.zeros(0, np.intp), *map(np.arange, ends, self.offsets[1:])])


@dataclass(frozen=True)
class Plan:
    """The layouts of all buckets, in a text that whoever knows its `mark` need not read."""

    mark: str
    text: str

    @classmethod
    def of(cls, layouts: Sequence[Layout]) -> Plan:
        text = json.dumps([list(vars(layout).values()) for layout in layouts])
        return cls(digest(text.encode())[:16], text)

    def layouts(self) -> tuple[Layout, ...]:
        return tuple(
            Layout(tuple(names), tuple(map(tuple, shapes)), tuple(dtypes), tuple(offsets), tuple(sizes))
            for names, shapes, dtypes, offsets, sizes in json.loads(self.text)
        )

    def manifest(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype by name, in the order of travel."""
        parts = [zip(one.names, zip(one.shapes, one.dtypes, strict=True), strict=True) for one in self.layouts()]
        return {name: entry for part in parts for name, entry in part}


@dataclass(frozen=True)
class Bucket:
    """Bucket `index` of the plan with mark `plan`, without its bytes; `digest` is theirs as they left, "" where nobody hashed them."""

    plan: str
    index: int
    digest: str


@dataclass(frozen=True)
class Packed(Bucket):
    """A bucket and its bytes."""

    data: np.ndarray


@dataclass(frozen=True)
class Placed(Bucket):
    """A bucket whose bytes stay in a file of its node's shared memory (`raysys.memory`) until the next but one is packed."""

    path: str


def aligned(size: int) -> int:
    """Bytes from a tensor's start to the next one's."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def digest(data: Any) -> str:
    """Hex digest (BLAKE3) of a buffer's bytes."""
    threads = blake3.AUTO if len(data) > 1 << 20 else 1  # starting them costs more than to hash a small one
    return blake3(data, max_threads=threads).hexdigest()


def fingerprint(plan: str, digests: Sequence[str]) -> str:
    """One digest of all weights, of the plan's mark and its buckets' digests: equal for equal weights in the same plan."""
    return digest("\n".join([plan, *digests]).encode())[:16]
