"""Weights out of a DeepSpeed engine, in buckets of bounded bytes, under their Hugging Face names. For actors only."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysys.buckets import UNDER_WAY, Bucket, Layout, Packed, Placed, Plan, aligned, digest
from raysys.memory import Slots


class Packer:
    """Packs tensors in buckets as its `plan` says.

    Tied tensors travel once a name: an engine may keep a copy of its own under each (vLLM on CPU does).

    Args:
        engine: a DeepSpeed engine around a transformers model, or a `Whole` one.
        max_bytes: of a bucket; a larger tensor gets one of its own.
    """

    def __init__(self, engine: Any, max_bytes: int):
        self._engine = engine
        tensors: dict[str, Tensor] = engine.module.state_dict(keep_vars=True)
        entries = {name: (shape_of(tensor), dtype_name(tensor), nbytes(tensor)) for name, tensor in tensors.items()}
        cut = bucketed({name: size for name, (_, _, size) in entries.items()}, max_bytes)
        self._layouts = [Layout.of({name: entries[name] for name in names}) for names in cut]
        self._tensors = [[tensors[name] for name in names] for names in cut]
        self._gaps = [layout.gaps() for layout in self._layouts]
        self.plan = Plan.of(self._layouts)
        self._slots = Slots(min(UNDER_WAY, len(self._layouts)))
        self._memory = np.zeros(0, np.uint8)
        self._rooms: dict[int, tuple[str, list[Tensor]]] = {}
        """Where each bucket was packed last, in a file or here (""), cut in tensors: to cut takes longer than to fill."""

    def gather(self, index: int, in_place: bool = False) -> Packed | Placed | None:
        """Bucket `index` on rank 0, None elsewhere. Collective under ZeRO-3, local otherwise.

        Its bytes stay until the next is gathered: whoever keeps it, copies. With `in_place` they stay in this node's shared memory until
        `UNDER_WAY` more are, and only their place is given (`raysys.buckets.Placed`).
        """
        with self._gathered(index):
            return self._packed(index, in_place) if _first_rank() else None

    def digests(self, index: int) -> list[str]:
        """Digest of each tensor of bucket `index` on rank 0, nothing elsewhere. Collective under ZeRO-3."""
        bucket = self.gather(index)
        return self._layouts[index].digests(bucket.data) if isinstance(bucket, Packed) else []

    def close(self) -> None:
        """Removes what `gather` placed; whoever reads it has done so."""
        self._rooms, self._memory = {}, np.zeros(0, np.uint8)
        self._slots.close()

    def send(self, index: int, sender: Any) -> str:
        """Hands bucket `index` to rank 0's `sender.send` on the device. Gives the digest of what left, on rank 0. Collective."""
        with self._gathered(index):
            if sender is None:
                return ""
            packed = self._on_device(index)
        layout = self._layouts[index]
        sender.send(zip(layout.names, layout.tensors(packed), strict=True))
        return digest(packed.cpu().numpy())

    def offer(self, index: int, sender: Any) -> Bucket | None:
        """Bucket `index` packed on this rank's device, as `sender.offer` gives it; with its digest on rank 0. Collective under ZeRO-3.

        Without a sender nothing is offered, and rank 0 alone says what would have been.
        """
        first = _first_rank()
        with self._gathered(index):
            if sender is None and not first:
                return None
            packed = self._on_device(index)
        bucket = Bucket(self.plan.mark, index, digest(packed.cpu().numpy()) if first else "")
        return bucket if sender is None else sender.offer(bucket, packed)

    def _packed(self, index: int, in_place: bool) -> Packed | Placed:
        layout = self._layouts[index]
        path, room = self._room(index, in_place)
        data = room[: layout.nbytes]
        if index not in self._rooms or self._rooms[index][0] != path:
            self._rooms[index] = (path, layout.tensors(torch.from_numpy(data)))
        self._fill(index, self._rooms[index][1])
        data[self._gaps[index]] = 0  # another bucket's bytes may be there
        mark = digest(data)
        return Placed(self.plan.mark, index, mark, path) if in_place else Packed(self.plan.mark, index, mark, data)

    def _room(self, index: int, in_place: bool) -> tuple[str, np.ndarray]:
        size = max(layout.nbytes for layout in self._layouts)
        if in_place:
            return self._slots.room(index, size)
        if not len(self._memory):
            self._memory = np.empty(size, np.uint8)
        return "", self._memory

    def _on_device(self, index: int) -> Tensor:
        layout = self._layouts[index]
        packed = torch.zeros(layout.nbytes, dtype=torch.uint8, device=self._tensors[index][0].device)
        self._fill(index, layout.tensors(packed))
        if packed.is_cuda:
            torch.cuda.synchronize()  # what was gathered goes, and readers in other processes know no stream of this one
        return packed

    def _fill(self, index: int, room: list[Tensor]) -> None:
        with torch.no_grad():
            # One call: ten thousand small ones would take longer than the copies.
            torch._foreach_copy_(room, self._tensors[index])  # type: ignore[reportPrivateImportUsage]

    def _gathered(self, index: int) -> Any:
        return gathered(self._engine, self._tensors[index])


@dataclass(frozen=True)
class Whole:
    """A model that no engine has in parts, in a process that is one of no group."""

    module: Any

    def zero_optimization_stage(self) -> int:
        return 0


def _first_rank() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


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
        if not buckets or aligned(size) > room:
            buckets.append([])
            room = max_bytes
        buckets[-1].append(name)
        room -= aligned(size)
    return buckets


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Of the whole tensor, also where a rank holds a part only."""
    return tuple(int(size) for size in getattr(tensor, "ds_shape", tensor.shape))


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def nbytes(tensor: Tensor) -> int:
    return math.prod(shape_of(tensor)) * tensor.element_size()
