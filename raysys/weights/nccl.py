"""Weights from a trainer's GPU to engines on other GPUs through vLLM's own `nccl` backend; no byte passes the host.

The trainer's first rank is rank 0 of a group of its own with all engine ranks. Digests are of the bytes as they left: those that
arrive stay on the GPU, so what proves them is the parity probe.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from raysys.buckets import Bucket
from raysys.weights.receive import SharedMemoryReceiver


class NcclReceiver(SharedMemoryReceiver):
    """The rollout actor's half: as over shared memory, but a bucket comes without its bytes, and vLLM is told anew what is in each."""

    def engine_arguments(self) -> dict[str, Any]:
        from vllm.config import WeightTransferConfig

        return super().engine_arguments() | {"weight_transfer_config": WeightTransferConfig(backend="nccl")}

    async def ready(self, engine: Any, model: str) -> None:
        await self._learn(engine, model)

    async def join(self, engine: Any, address: str, port: int, first_rank: int, world_size: int) -> None:
        """Leaves its group and joins this one; returns once all ranks are there, so trainer and workers are asked at the same time.

        Args:
            address, port: where the trainer's first rank listens.
            first_rank: of this engine's ranks in the group; rank 0 is the trainer's.
            world_size: all engines' ranks and the trainer's.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await engine.collective_rpc("raysys_leave")
        group = {"master_address": address, "master_port": port, "rank_offset": first_rank, "world_size": world_size, "packed": True}
        await engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=group))

    async def update(self, engine: Any, bucket: Bucket) -> None:
        """Takes part in the broadcast of one bucket; `NcclSender.send` is the other part and must run at the same time."""
        self._expect(bucket)
        layout = self._layouts[bucket.index]
        shapes = [list(shape) for shape in layout.shapes]
        await self._hand(engine, {"names": list(layout.names), "dtype_names": list(layout.dtypes), "shapes": shapes})
        self._arrived[bucket.index] = bucket.digest


class NcclSender:
    """The trainer's half, in its first rank's process. Opening it waits for all receivers to join.

    Args:
        address, port: where to listen; free, and reachable from the engines.
        world_size: all engines' ranks and this one.
    """

    def __init__(self, address: str, port: int, world_size: int):
        from vllm.distributed.weight_transfer.nccl_common import trainer_init

        self._group: Any = trainer_init({"master_address": address, "master_port": port, "world_size": world_size})

    def send(self, tensors: Iterable[tuple[str, Any]]) -> None:
        """Broadcasts a bucket's (name, tensor) in the order in which the receivers were told. Blocks until it has left."""
        import torch
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        packed_nccl_broadcast_producer(iterator=iter(tensors), group=self._group, src=0, post_iter_func=lambda item: item[1])
        torch.cuda.synchronize()

    def close(self) -> None:
        self._group.destroy()
