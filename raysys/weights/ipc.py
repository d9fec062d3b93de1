"""Weights from a trainer rank to the engine on the same GPU: a bucket is packed there, the engine maps that memory and copies out of it.

What crosses is CUDA's handle of the memory as numbers and bytes (vLLM's own `ipc` backend would have them pickled); each rank serves
the engine that lives where it does. Digests are of the bytes as they left: what proves those that arrived is the parity probe.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from raysys.buckets import UNDER_WAY, Bucket
from raysys.weights.receive import SharedMemoryReceiver


@dataclass(frozen=True)
class Handle:
    """Packed memory of another process, as torch shares it: all that `rebuild_cuda_tensor` needs, and no object to unpickle."""

    device: str
    """UUID of the GPU, which is the same for all processes whatever they call it."""
    memory: bytes
    """CUDA's handle of the allocation that the bucket is a part of."""
    size: int
    start: int
    """Bytes of the bucket, and where they begin in the allocation."""
    counter: bytes
    counter_start: int
    """File and place of the count of readers: the memory is not used anew while it is above 0."""
    event: bytes
    wait: bool
    """What a reader waits for before it reads, and whether it has to."""


@dataclass(frozen=True)
class Offer(Bucket):
    """A bucket whose bytes stay on the GPU."""

    handle: Handle


class IpcSender:
    """A trainer rank's half. What it offers stays alive until `UNDER_WAY` more offers are made, or `free` is called.

    So each offer must have been answered before the next but one is asked for. An engine that dies while it reads leaves
    its bucket's memory occupied: torch goes on counting it as a reader.
    """

    def __init__(self) -> None:
        self._offered: deque[Any] = deque(maxlen=UNDER_WAY)

    def offer(self, bucket: Bucket, packed: Any) -> Offer:
        """`bucket` with the handle of `packed`, its bytes as a uint8 tensor that nothing else is a view of. Must be read by one engine."""
        self._offered.append(packed)
        return Offer(**vars(bucket), handle=self._handle(packed))

    def free(self) -> None:
        """Gives back all that was offered; readers are done."""
        self._offered.clear()
        self._collect()

    def _handle(self, packed: Any) -> Handle:
        import torch
        from torch.multiprocessing.reductions import reduce_tensor

        shared: Any = reduce_tensor(packed)[1]  # the arguments of `rebuild_cuda_tensor`, in its order
        memory, size, start = shared[7:10]
        counter, counter_start, event, wait = shared[11:15]
        return Handle(str(torch.cuda.get_device_properties(packed.device).uuid), memory, size, start, counter, counter_start, event, wait)

    def _collect(self) -> None:
        import torch

        torch.cuda.ipc_collect()


class IpcReceiver(SharedMemoryReceiver):
    """The rollout actor's half: as over shared memory, but a bucket brings a handle in place of its bytes."""

    def engine_arguments(self) -> dict[str, Any]:
        from vllm.config import WeightTransferConfig

        return super().engine_arguments() | {"weight_transfer_config": WeightTransferConfig(backend="raysys_ipc")}

    async def update(self, engine: Any, bucket: Bucket) -> None:
        """Returns when the engine has copied what it needs: the trainer may have its memory back. Takes an `Offer`."""
        assert isinstance(bucket, Offer)
        self._expect(bucket)
        await self._hand(engine, {"index": bucket.index, "handle": asdict(bucket.handle)})
        self._arrived[bucket.index] = ""  # bytes that stay on the GPU are not hashed where they arrive
