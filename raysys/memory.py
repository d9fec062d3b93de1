"""Files in a node's shared memory, by which one process hands bytes to another in place. Imports neither torch nor Ray."""

from __future__ import annotations

import contextlib
import mmap
import os
import uuid
from pathlib import Path

import numpy as np

from raysys.errors import InfrastructureError

FOLDER = Path("/dev/shm")
PREFIX = "raysys-push-"


def whose() -> str:
    """Names this process's shared memory: equal for two processes that see each other's files, on one node or in one container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{FOLDER.stat().st_dev}"
    except OSError:
        return ""


def new_path() -> Path:
    """A name for a file of this process, which `sweep` knows by it."""
    return FOLDER / f"{PREFIX}{os.getpid()}-{uuid.uuid4().hex}"


def sweep() -> None:
    """Removes what killed processes left, and this process's own; files of other living ones stay."""
    for path in FOLDER.glob(f"{PREFIX}*"):
        owner = path.name.removeprefix(PREFIX).partition("-")[0]
        if not (Path("/proc") / owner).exists() or int(owner) == os.getpid():
            with contextlib.suppress(OSError):  # gone meanwhile, or another user's: only that one can remove it
                path.unlink()


class Slots:
    """A few pieces of shared memory that are written again and again: their pages exist, so a write is a copy and nothing else.

    Args:
        count: slots. Whoever writes slot `i` makes sure that nobody reads it any more.
    """

    def __init__(self, count: int):
        self._files: list[tuple[Path, np.ndarray] | None] = [None] * count

    def room(self, index: int, nbytes: int) -> tuple[str, np.ndarray]:
        """Path and bytes (uint8, `nbytes` of them) of slot `index` modulo their number.

        Raises:
            InfrastructureError: the node's shared memory has no room for it.
        """
        place = index % len(self._files)
        known = self._files[place]
        if known is None or len(known[1]) < nbytes:
            self._drop(place)
            known = self._files[place] = _made(nbytes)
        return str(known[0]), known[1][:nbytes]

    def close(self) -> None:
        """Removes the files. Readers that have them mapped keep what they see."""
        for place in range(len(self._files)):
            self._drop(place)

    def _drop(self, place: int) -> None:
        known, self._files[place] = self._files[place], None
        if known is not None:
            known[0].unlink(missing_ok=True)


def _made(nbytes: int) -> tuple[Path, np.ndarray]:
    path = new_path()
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, max(1, nbytes))  # without it a full memory is a signal in the middle of a write
        return path, np.frombuffer(mmap.mmap(descriptor, max(1, nbytes)), np.uint8)
    except OSError as error:
        path.unlink(missing_ok=True)
        remedy = "lower weights.bucket_mib, or give the container more (--shm-size)"
        raise InfrastructureError(f"no room for {nbytes >> 20} MiB in {FOLDER}: {error.strerror}", remedy) from None
    finally:
        os.close(descriptor)
