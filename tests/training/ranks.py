"""Trainer ranks in processes that stay, so that many tests pay for their imports once. What they run is in `work.py`."""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any


class Ranks:
    """`ranks(function, **arguments)` calls it on every rank as `function(rank, ranks, port, **arguments)`; results by rank.

    An exception that only a part of the ranks raise may leave the others in a collective: tests let all raise, or none.

    With `imports` these modules are imported once for all ranks, which are forked from there.
    """

    def __init__(self, count: int, imports: list[str] | None = None):
        self.count = count
        self._held = socket.socket()  # so that nobody else gets the port until the ranks meet there, be it in the hundredth test
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the ranks may have it all the same
        self._held.bind(("", 0))
        self.port = self._held.getsockname()[1]
        context = mp.get_context("spawn")
        if imports is not None:
            context = mp.get_context("forkserver")
            context.set_forkserver_preload(imports)
        self._pipes, self._processes = [], []
        for rank in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, count, self.port, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, arguments))
        replies = []
        for pipe in self._pipes:
            assert pipe.poll(240), f"{function.__name__} did not finish"
            replies.append(pipe.recv())
        for result, error in replies:
            if error is not None:
                raise error from RuntimeError(result)
        return [result for result, _ in replies]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._held.close()


def _serve(rank: int, count: int, port: int, pipe: Any) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((function(rank, count, port, **arguments), None))
        except Exception as error:
            pipe.send((traceback.format_exc(), error))
