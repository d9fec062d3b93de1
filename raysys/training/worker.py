"""One rank of the trainer as an actor. Torch and DeepSpeed are imported when it starts, with its environment set."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raysys import memory
from raysys.batch import Batch, Ragged
from raysys.buckets import Bucket, Plan
from raysys.processes import imports
from raysys.training.spec import Share, Tally, TrainerSpec

if TYPE_CHECKING:
    from raysys.training.engine import Engine


class TrainerWorker:
    """A plain class; `ray.remote(TrainerWorker)` makes it an actor.

    All ranks' methods are collective: the group calls them on every rank, in the same order.
    """

    def __init__(self, spec: TrainerSpec, rank: int, ranks: int):
        self.spec, self.rank, self.ranks = spec, rank, ranks
        self._engine: Engine | None = None
        self._sender: Any = None
        self._packer: Any = None

    def address(self) -> tuple[str, int]:
        """This node's address as other nodes see it, and a port free on it: where the ranks meet. Asked of rank 0."""
        import ray.util

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, host: str, port: int) -> dict[str, Any]:
        """Joins the other ranks and loads the model. Returns what is held.

        Raises:
            ConfigError: the folder holds no model that can be trained.
        """
        os.environ |= {
            "RANK": str(self.rank),
            "LOCAL_RANK": "0",  # Ray shows an actor its own GPU only
            "WORLD_SIZE": str(self.ranks),
            "LOCAL_SIZE": "1",
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
            "DS_ACCELERATOR": "cuda" if self.spec.device == "gpu" else "cpu",
        }
        with imports():
            self._quieten()
            from raysys.training.engine import Engine
        self._engine = Engine(self.spec)
        engine = self._engine
        return {"rank": self.rank, "parameters": engine.parameters, "dtype": self.spec.dtype, "padded": engine.padded, "pid": os.getpid()}

    def _quieten(self) -> None:
        """DeepSpeed's log goes to a file (or nowhere), errors also to the screen."""
        import deepspeed  # noqa: F401  its import sets the logger's handlers up

        for name in ("DeepSpeed", "deepspeed"):
            logger = logging.getLogger(name)
            for handler in logger.handlers:
                handler.setLevel(logging.ERROR)
            if self.spec.log_dir is not None:
                Path(self.spec.log_dir).mkdir(parents=True, exist_ok=True)
                logger.addHandler(logging.FileHandler(Path(self.spec.log_dir) / f"trainer_rank{self.rank}.log"))

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("start() has not been called")
        return self._engine

    def step(self, batch: Batch, shares: Sequence[Share]) -> Tally:
        """See `Engine.step`."""
        return self.engine.step(batch, shares)

    def logprobs(self, batch: Batch, share: Share) -> Ragged:
        """See `Engine.logprobs`."""
        return self.engine.logprobs(batch, share)

    def draw(self, batch: Batch, share: Share) -> Ragged:
        """See `Engine.draw`."""
        return self.engine.draw(batch, share)

    def probe_logprobs(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """See `Engine.probe_logprobs`."""
        return self.engine.probe_logprobs(ids)

    def bucket_plan(self, max_bytes: int) -> Plan:
        """See `raysys.training.weights.Packer`."""
        from raysys.training.weights import Packer

        if self._packer is not None:
            self._packer.close()
        self._packer = Packer(self.engine.engine, max_bytes)
        return self._packer.plan

    def gather_bucket(self, index: int, in_place: bool = False) -> Bucket | None:
        """Bucket `index` of the last `bucket_plan`, on rank 0; the other ranks help to gather it. See `Packer.gather`."""
        return self._packer.gather(index, in_place)

    def share_bucket(self, index: int, in_place: bool = False) -> tuple[Bucket | None, None]:
        """`gather_bucket` as two results: the second says that it is there, and can be waited for without fetching the bytes."""
        return self.gather_bucket(index, in_place), None

    def memory(self) -> str:
        """See `raysys.memory.whose`."""
        return memory.whose()

    def tensor_digests(self, index: int) -> list[str]:
        """See `raysys.training.weights.Packer.digests`."""
        return self._packer.digests(index)

    def open_sender(self, sender: Callable[[str, int, int], Any], address: str, port: int, world_size: int) -> None:
        """On rank 0: makes the sender that `send_bucket` hands tensors to. Returns once all receivers have joined."""
        if self._sender is not None:
            self._sender.close()  # of those that were there before: nothing else gives its GPU memory back
            self._sender = None
        self._sender = sender(address, port, world_size)

    def send_bucket(self, index: int) -> str:
        """See `raysys.training.weights.Packer.send`."""
        return self._packer.send(index, self._sender)

    def offer_bucket(self, index: int, sender: Callable[[], Any], wanted: bool) -> Bucket | None:
        """See `raysys.training.weights.Packer.offer`. The first call makes the sender, which keeps what it offers alive."""
        self._sender = self._sender or sender()
        return self._packer.offer(index, self._sender if wanted else None)

    def withdraw_buckets(self) -> None:
        """Frees what was offered or placed."""
        if self._sender is not None:
            self._sender.free()
        if self._packer is not None:
            self._packer.close()

    def release_cache(self) -> None:
        """Gives back the GPU memory that torch holds and nothing uses, for another process on the same GPU."""
        import torch

        if self.spec.device == "gpu":
            torch.cuda.empty_cache()

    def save(self, folder: str) -> None:
        """See `raysys.training.checkpoint.save`."""
        from raysys.training.checkpoint import save

        save(self.engine, Path(folder))

    def load(self, folder: str) -> None:
        """See `raysys.training.checkpoint.load`."""
        from raysys.training.checkpoint import load

        load(self.engine, Path(folder))

    def export(self, folder: str) -> None:
        """See `raysys.training.export.export`."""
        from raysys.training.export import export

        export(self.engine, Path(folder))

    def close(self) -> None:
        """Leaves the process group. Only a process that goes on needs it (tests); an actor is simply ended."""
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()
        self._engine = None
