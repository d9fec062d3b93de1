"""Weights out of a DeepSpeed engine, in buckets of bounded bytes, under their Hugging Face names. For actors only."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from raysys.batch import UNDER_WAY, Bucket, Placed
from raysys.memory import Slots

ALIGNMENT = 64


class BucketPlan:
    """Which tensor travels in which bucket.

    Tied tensors travel once a name: an engine may keep a copy of its own under each (vLLM on CPU does).

    Args:
        engine: a DeepSpeed engine around a transformers model, or a `Whole` one.
        max_bytes: of a bucket; a larger tensor gets one of its own.
    """

    def __init__(self, engine: Any, max_bytes: int):
        self._engine = engine
        self._tensors: dict[str, Tensor] = engine.module.state_dict(keep_vars=True)
        self.manifest = {name: (shape_of(tensor), dtype_name(tensor)) for name, tensor in self._tensors.items()}
        sizes = {name: nbytes(tensor) for name, tensor in self._tensors.items()}
        self.buckets = bucketed(sizes, max_bytes)
        self._sizes = [[sizes[name] for name in names] for names in self.buckets]
        self._headers = [self._header(index) for index in range(len(self.buckets))]
        self._slots = Slots(min(UNDER_WAY, len(self.buckets)))
        self._cuts: dict[int, tuple[str, Cut]] = {}

    def gather(self, index: int, in_place: bool = False) -> Bucket | None:
        """Bucket `index` on rank 0, None elsewhere. Collective under ZeRO-3, local otherwise.

        With `in_place` its bytes stay in this node's shared memory until `UNDER_WAY` more buckets are gathered, and only their place is
        given (`raysys.batch.Placed`).
        """
        names = self.buckets[index]
        first = _first_rank()
        with gathered(self._engine, [self._tensors[name] for name in names]):
            return None if not first else self._placed(index) if in_place else self._packed(index)

    def close(self) -> None:
        """Removes what `gather` placed; whoever reads it has done so."""
        self._cuts = {}
        self._slots.close()

    def header(self, index: int) -> Bucket:
        """Bucket `index` without its bytes and their digests: what receivers of a broadcast are told first."""
        return self._headers[index]

    def send(self, index: int, sender: Any) -> dict[str, str]:
        """Hands bucket `index` to rank 0's `sender.send` on the device. Gives digests of what left, on rank 0. Collective."""
        names = self.buckets[index]
        with gathered(self._engine, [self._tensors[name] for name in names]):
            if sender is None:
                return {}
            tensors = [(name, self._tensors[name].detach().contiguous()) for name in names]
            sender.send(tensors)
            return {name: blake3(tensor.cpu().flatten().view(torch.uint8).numpy().data).hexdigest() for name, tensor in tensors}

    def offer(self, index: int, sender: Any) -> Bucket | None:
        """Bucket `index` packed on this rank's device, as `sender.offer` gives it; with digests on rank 0. Collective under ZeRO-3.

        Without a sender nothing is offered, and rank 0 alone says what would have been.
        """
        names = self.buckets[index]
        first = _first_rank()
        with gathered(self._engine, [self._tensors[name] for name in names]):
            if sender is None and not first:
                return None
            packed = torch.empty(self._length(index), dtype=torch.uint8, device=self._tensors[names[0]].device)
            pieces = self._fill(index, self._cut(index, packed))
            if packed.is_cuda:
                torch.cuda.synchronize()  # what was gathered goes, and readers in other processes know no stream of this one
        digests = digests_of(pieces) if first else self._headers[index].digests
        bucket = replace(self._headers[index], digests=digests)
        return bucket if sender is None else sender.offer(bucket, packed)

    def _packed(self, index: int) -> Bucket:
        data = np.zeros(self._length(index), np.uint8)
        pieces = self._fill(index, self._cut(index, torch.from_numpy(data)))
        return replace(self._headers[index], digests=digests_of(pieces), data=data)

    def _placed(self, index: int) -> Placed:
        path, room = self._slots.room(index, max(map(self._length, range(len(self.buckets)))))
        if self._cuts.get(index, ("",))[0] != path:
            self._cuts[index] = (path, self._cut(index, torch.from_numpy(room)))
        pieces = self._fill(index, self._cuts[index][1])
        return Placed(**vars(replace(self._headers[index], digests=digests_of(pieces))), path=path)

    def _cut(self, index: int, room: Tensor) -> Cut:
        """Where in a buffer each tensor of a bucket goes."""
        bucket = self._headers[index]
        raw = [room[start : start + size] for start, size in zip(bucket.offsets, self._sizes[index], strict=True)]
        kinds = zip(raw, bucket.dtypes, bucket.shapes, strict=True)
        tensors = [one.view(getattr(torch, dtype)).view(shape) for one, dtype, shape in kinds]
        return Cut(tensors, raw if room.is_cuda else [one.numpy() for one in raw])

    def _fill(self, index: int, cut: Cut) -> list[Any]:
        """Copies the tensors there; gives their bytes."""
        with torch.no_grad():
            # One call: ten thousand small ones would take longer than the copies.
            torch._foreach_copy_(cut.tensors, [self._tensors[name] for name in self.buckets[index]])  # type: ignore[reportPrivateImportUsage]
        return cut.raw

    def _length(self, index: int) -> int:
        return self._headers[index].offsets[-1] + _aligned(self._sizes[index][-1])

    def _header(self, index: int) -> Bucket:
        names, sizes = self.buckets[index], self._sizes[index]
        shapes, dtypes = zip(*(self.manifest[name] for name in names), strict=True)
        offsets = [0, *np.cumsum([_aligned(size) for size in sizes[:-1]]).tolist()]
        return Bucket(tuple(names), shapes, dtypes, tuple(offsets), ("",) * len(names), np.zeros(0, np.uint8))


@dataclass(frozen=True)
class Whole:
    """A model that no engine has in parts, in a process that is one of no group."""

    module: Any

    def zero_optimization_stage(self) -> int:
        return 0


def _first_rank() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


@dataclass(frozen=True)
class Cut:
    """A buffer in pieces: as tensors of their shape and dtype, and as bytes."""

    tensors: list[Tensor]
    raw: list[Any]
    """uint8; numpy arrays where the host can read them, else tensors."""


def digests_of(pieces: list[Any]) -> tuple[str, ...]:
    """One a piece (see `Cut`). Threads only where they help: starting them costs more than to hash a small one."""
    read = [piece.cpu().numpy() if isinstance(piece, Tensor) else piece for piece in pieces]
    return tuple(blake3(one.data, max_threads=blake3.AUTO if len(one) > 1 << 20 else 1).hexdigest() for one in read)


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
    return math.prod(shape_of(tensor)) * tensor.element_size()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
