"""Weights out of a DeepSpeed engine, in buckets of bounded bytes, under their Hugging Face names. For actors only."""

from __future__ import annotations

from contextlib import nullcontext
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
        engine: a DeepSpeed engine around a transformers model.
        max_bytes: of a bucket; a larger tensor gets one of its own.
    """

    def __init__(self, engine: Any, max_bytes: int):
        self._engine = engine
        self._tensors: dict[str, Tensor] = engine.module.state_dict(keep_vars=True)
        self.manifest = {name: (shape_of(tensor), dtype_name(tensor)) for name, tensor in self._tensors.items()}
        self.buckets = bucketed({name: nbytes(tensor) for name, tensor in self._tensors.items()}, max_bytes)
        self._largest = max(self._offsets(names)[-1] for names in self.buckets)
        self._slots = Slots(min(UNDER_WAY, len(self.buckets)))
        self._pieces: dict[int, tuple[str, list[Tensor], list[np.ndarray]]] = {}

    def gather(self, index: int, in_place: bool = False) -> Bucket | None:
        """Bucket `index` on rank 0, None elsewhere. Collective under ZeRO-3, local otherwise.

        With `in_place` its bytes stay in this node's shared memory until `UNDER_WAY` more buckets are gathered, and only their place is
        given (`raysys.batch.Placed`).
        """
        names = self.buckets[index]
        first = torch.distributed.get_rank() == 0
        with gathered(self._engine, [self._tensors[name] for name in names]):
            return None if not first else self._placed(index) if in_place else self._pack(names)

    def close(self) -> None:
        """Removes what `gather` placed; whoever reads it has done so."""
        self._pieces = {}
        self._slots.close()

    def header(self, index: int) -> Bucket:
        """Bucket `index` without its bytes: what receivers of a broadcast are told first."""
        names = self.buckets[index]
        return self._bucket(names, [0] * len(names), [""] * len(names))

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
        first = torch.distributed.get_rank() == 0
        offsets = self._offsets(names)
        with gathered(self._engine, [self._tensors[name] for name in names]):
            if sender is None and not first:
                return None
            packed = torch.empty(offsets[-1], dtype=torch.uint8, device=self._tensors[names[0]].device)
            pieces = [packed[start : start + nbytes(self._tensors[name])] for name, start in zip(names, offsets)]
            for name, piece in zip(names, pieces, strict=True):
                piece.copy_(self._bytes(name))
            if packed.is_cuda:
                torch.cuda.synchronize()  # what was gathered goes, and readers in other processes know no stream of this one
        digests = [blake3(piece.cpu().numpy().data, max_threads=blake3.AUTO).hexdigest() if first else "" for piece in pieces]
        bucket = self._bucket(names, offsets[:-1], digests)
        return bucket if sender is None else sender.offer(bucket, packed)

    def _pack(self, names: list[str]) -> Bucket:
        offsets = self._offsets(names)
        data = np.zeros(offsets[-1], np.uint8)
        return self._bucket(names, offsets[:-1], self._fill(names, *self._cut(names, data)), data)

    def _placed(self, index: int) -> Placed:
        names = self.buckets[index]
        path, room = self._slots.room(index, self._largest)
        if index not in self._pieces or self._pieces[index][0] != path:
            self._pieces[index] = (path, *self._cut(names, room))
        digests = self._fill(names, *self._pieces[index][1:])
        return Placed(**vars(self._bucket(names, self._offsets(names)[:-1], digests)), path=path)

    def _cut(self, names: list[str], room: np.ndarray) -> tuple[list[Tensor], list[np.ndarray]]:
        """Where each tensor goes, as tensors of its shape and as bytes."""
        raw = [room[start : start + nbytes(self._tensors[name])] for name, start in zip(names, self._offsets(names))]
        kinds = [self.manifest[name] for name in names]
        return [torch.from_numpy(one).view(getattr(torch, dtype)).view(shape) for one, (shape, dtype) in zip(raw, kinds)], raw

    def _fill(self, names: list[str], pieces: list[Tensor], raw: list[np.ndarray]) -> list[str]:
        """Copies the tensors there; gives their digests."""
        with torch.no_grad():
            # One call: ten thousand small ones would take longer than the copies.
            torch._foreach_copy_(pieces, [self._tensors[name] for name in names])  # type: ignore[reportPrivateImportUsage]
        return [blake3(one.data, max_threads=blake3.AUTO).hexdigest() for one in raw]

    def _offsets(self, names: list[str]) -> list[int]:
        """Where each tensor of a bucket begins, and where the last one ends."""
        return np.concatenate([[0], np.cumsum([_aligned(nbytes(self._tensors[name])) for name in names])]).tolist()

    def _bytes(self, name: str) -> Tensor:
        return self._tensors[name].detach().contiguous().flatten().view(torch.uint8)

    def _bucket(self, names: list[str], offsets: list[int], digests: list[str], data: np.ndarray | None = None) -> Bucket:
        return Bucket(
            names=tuple(names),
            shapes=tuple(self.manifest[name][0] for name in names),
            dtypes=tuple(self.manifest[name][1] for name in names),
            offsets=tuple(offsets),
            digests=tuple(digests),
            data=np.zeros(0, np.uint8) if data is None else data,
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
