"""Weights out of a DeepSpeed engine, in buckets of bounded bytes, under their Hugging Face names. For actors only."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from raysys.batch import Bucket

ALIGNMENT = 64


class BucketPlan:
    """Which tensor travels in which bucket.

    Tied tensors travel once a name: an engine may keep a copy of its own under each (vLLM on CPU does).

    Args:
        engine: a DeepSpeed engine around a transformers model.
        max_bytes: of a bucket; a larger tensor gets one of its own.
    """

    def __init__(self, engine: Any, max_bytes: int):
        self._engine = engine
        self._tensors: dict[str, Tensor] = engine.module.state_dict(keep_vars=True)
        self.manifest = {name: (shape_of(tensor), dtype_name(tensor)) for name, tensor in self._tensors.items()}
        self.buckets = bucketed({name: nbytes(tensor) for name, tensor in self._tensors.items()}, max_bytes)

    def gather(self, index: int) -> Bucket | None:
        """Bucket `index` on rank 0, None elsewhere. Collective under ZeRO-3, local otherwise."""
        names = self.buckets[index]
        first = torch.distributed.get_rank() == 0
        with gathered(self._engine, [self._tensors[name] for name in names]):
            return self._pack(names) if first else None

    def header(self, index: int) -> Bucket:
        """Bucket `index` without its bytes: what receivers of a broadcast are told first."""
        names = self.buckets[index]
        shapes, dtypes = (tuple(self.manifest[name][part] for name in names) for part in (0, 1))
        return Bucket(tuple(names), shapes, dtypes, (0,) * len(names), ("",) * len(names), np.zeros(0, np.uint8))  # type: ignore[arg-type]

    def send(self, index: int, sender: Any) -> dict[str, str]:
        """Hands bucket `index` to rank 0's `sender.send` on the device. Gives digests of what left, on rank 0. Collective."""
        names = self.buckets[index]
        with gathered(self._engine, [self._tensors[name] for name in names]):
            if sender is None:
                return {}
            tensors = [(name, self._tensors[name].detach().contiguous()) for name in names]
            sender.send(tensors)
            return {name: blake3(tensor.cpu().flatten().view(torch.uint8).numpy().data).hexdigest() for name, tensor in tensors}

    def _pack(self, names: list[str]) -> Bucket:
        sizes = [nbytes(self._tensors[name]) for name in names]
        offsets = np.concatenate([[0], np.cumsum([_aligned(size) for size in sizes])]).tolist()
        data = np.zeros(offsets[-1], np.uint8)
        digests = []
        for name, start, size in zip(names, offsets, sizes):
            piece = data[start : start + size]
            torch.from_numpy(piece).copy_(self._tensors[name].detach().contiguous().flatten().view(torch.uint8))
            digests.append(blake3(piece.data, max_threads=blake3.AUTO).hexdigest())
        return Bucket(
            names=tuple(names),
            shapes=tuple(self.manifest[name][0] for name in names),
            dtypes=tuple(self.manifest[name][1] for name in names),
            offsets=tuple(offsets[:-1]),
            digests=tuple(digests),
            data=data,
        )


def gathered(engine: Any, tensors: list[Tensor], writing: bool = False) -> Any:
    """A context in which these tensors are whole; collective under ZeRO-3. With `writing` rank 0's changes reach all ranks' parts."""
    if engine.zero_optimization_stage() < 3:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(
        list({id(t): t for t in tensors if hasattr(t, "ds_id")}.values()), modifier_rank=0 if writing else None
    )


def bucketed(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    """Names in their order, cut where the bytes of a run would exceed `max_bytes`."""
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be positive, got {max_bytes}")
    buckets: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not buckets or _aligned(size) > room:
            buckets.append([])
            room = max_bytes
        buckets[-1].append(name)
        room -= _aligned(size)
    return buckets


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Of the whole tensor, also where a rank holds a part only."""
    return tuple(int(size) for size in getattr(tensor, "ds_shape", tensor.shape))


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def nbytes(tensor: Tensor) -> int:
    return int(np.prod(shape_of(tensor), dtype=np.int64)) * tensor.element_size()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
