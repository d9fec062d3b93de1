"""Resume points of a pretraining run: where they are kept, how they get there while training goes on, how they are found again.

A rank writes its part to its node's own disk; Ray Train carries the parts to one place, a folder of the run's or anything that pyarrow
reaches. There a point is whole when every file that its manifest names has its full length, in whatever order they came.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pyarrow as pa
import pyarrow.fs as filesystems

from raysys.data.files import first_line, locate
from raysys.errors import CheckpointError, ConfigError, DeadlineError, InfrastructureError, RaysysError
from raysys.files import append_json
from raysys.ledger import MANIFEST

if TYPE_CHECKING:
    from ray.train import Checkpoint

log = logging.getLogger("raysys")

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's record of a run's checkpoints."""
_POINT, _SCRATCH = "step_", "raysys-checkpoint-"


@dataclass(frozen=True)
class Storage:
    """The place of a run's resume points. Pickles.

    Attributes:
        path, name: what Ray Train calls storage and run; points are in the folder `name` there.
        system, base: that folder.
    """

    path: str
    name: str
    system: filesystems.FileSystem
    base: str

    @classmethod
    def of(cls, folder: Path, storage: str | None, name: str | None = None) -> Storage:
        """That of the run in `folder`. `storage`, `name`: the config's keys. Raises ConfigError: no such kind of place."""
        path, name = (str(folder), "checkpoints") if storage is None else (storage, name or folder.name)
        system, base, wildcard = locate(path, "storage")
        if wildcard is not None:
            raise ConfigError(f"storage={path} is a glob", "name one folder")
        return cls(path, name, system, f"{base.rstrip('/')}/{name}")

    @property
    def shared(self) -> bool:
        """Whether it is a folder: of this machine, or one that all nodes mount."""
        return isinstance(self.system, filesystems.LocalFileSystem)

    def check(self) -> None:
        """Raises ConfigError: it cannot be reached, or its bucket is not there."""
        bucket = self.base.partition("/")[0]
        try:
            if bucket and self.system.get_file_info(bucket).type == filesystems.FileType.NotFound:
                raise ConfigError(f"storage={self.path}: there is no {bucket}", "make it, or correct the address")
            self.names()
        except (InfrastructureError, pa.ArrowException, OSError) as error:
            told = error.message if isinstance(error, RaysysError) else f"storage={self.path} cannot be reached: {first_line(error)}"
            raise ConfigError(told, "check the address and the credentials") from None

    # -- what is there

    def names(self) -> list[str]:
        """Of all points, whole or not, in the order of their steps. Raises InfrastructureError: it cannot be reached."""
        return list(self._files())

    def newest(self) -> str | None:
        """Name of the newest whole point. Raises InfrastructureError: it cannot be reached."""
        held = self._files()
        for name in reversed(held):
            files = self._manifest(name).get("files")
            if files and all(held[name].get(file) == size for file, size in files.items()):
                return name
            log.warning("resume point %s/%s is incomplete; going back to the one before it", self.base, name)
        return None

    def step(self, folder: Path) -> int:
        """Steps that the newest point has behind it, 0 without one. `folder`: the run's.

        Raises:
            ConfigError: it is of another run.
            InfrastructureError: it cannot be reached.
        """
        name = self.newest()
        if name is None:
            return 0
        owner = self._manifest(name).get("run")
        if owner != str(folder):
            raise ConfigError(
                f"storage={self.path}: the resume points in {self.name} are of the run in {owner}, this one is in {folder}",
                f"choose another name= or storage=, or go on with run_dir={owner}",
            )
        return int(name.removeprefix(_POINT))

    def clear(self, unless: Callable[[str], bool]) -> None:
        """Removes points."""
        for name in self.names():
            if not unless(name):
                with suppress(OSError):  # somebody else was faster
                    self.system.delete_dir(f"{self.base}/{name}")

    def begin_anew(self) -> None:
        """Leaves of earlier attempts the newest whole point alone. Where to go on is read from the folders: Ray Train's own record may
        miss the newest, and with one that is gone it would not start."""
        newest = self.newest()
        self.clear(lambda name: name == newest)
        with suppress(OSError):
            self.system.delete_file(f"{self.base}/{SNAPSHOT}")

    def keep(self, count: int) -> None:
        """Leaves the newest points alone: those of attempts that are over Ray Train does not know."""
        newest = self.names()[-count:]
        self.clear(lambda name: name in newest)

    @contextmanager
    def opened(self, name: str, folder: Path, first: bool, together: Callable[[], Any]) -> Iterator[Path]:
        """A point as a folder that all ranks see; a copy in the run's `folder`, if need be. `together` waits for all ranks, of which one is
        `first`. Raises InfrastructureError: it cannot be brought there."""
        if self.shared:
            yield Path(self.base) / name
            return
        copy = folder / "checkpoints" / f".draft_{name}"  # the ledger sweeps drafts
        if first:
            shutil.rmtree(copy, ignore_errors=True)
            try:
                copy.mkdir(parents=True)
                filesystems.copy_files(f"{self.base}/{name}", str(copy), self.system, filesystems.LocalFileSystem())
            except (pa.ArrowException, OSError) as error:
                shutil.rmtree(copy, ignore_errors=True)
                raise InfrastructureError(
                    f"resume point {name} could not be brought from {self.path} to {folder}: {first_line(error)}",
                    "check the address, the credentials, and that there is room",
                ) from None
        together()
        yield copy
        together()
        if first:
            shutil.rmtree(copy, ignore_errors=True)

    def _files(self) -> dict[str, dict[str, int]]:
        """Bytes of each file of each point, by the file's name in it."""
        try:
            infos = self.system.get_file_info(filesystems.FileSelector(self.base, recursive=True, allow_not_found=True))
        except (pa.ArrowException, OSError) as error:
            raise InfrastructureError(
                f"storage={self.path} cannot be reached: {first_line(error)}", "check the address and the credentials"
            ) from None
        found: dict[str, dict[str, int]] = {}
        for info in infos:
            name, _, file = info.path.lstrip("/").removeprefix(self.base.lstrip("/")).lstrip("/").partition("/")
            if name.startswith(_POINT):
                files = found.setdefault(name, {})
                if info.type == filesystems.FileType.File:
                    files[file] = int(info.size or 0)
        return dict(sorted(found.items()))

    def _manifest(self, name: str) -> dict[str, Any]:
        try:
            with self.system.open_input_file(f"{self.base}/{name}/{MANIFEST}") as file:
                return json.loads(file.read())
        except (pa.ArrowException, OSError, ValueError):
            return {}


# -- in a rank


class Carrier:
    """Brings a rank's parts of resume points to the storage, in Ray Train's thread, one at a time: a place that takes them more slowly than
    they come holds training up, rather than a node's disk fill.

    Args:
        run: the run's folder.
        failure: see `tell`.
        seconds: that one may take.
    """

    def __init__(self, storage: Storage, run: Path, failure: Path, seconds: float):
        self.run = run
        self._storage, self._failure, self._seconds = storage, failure, seconds
        self._free = threading.Event()
        self._free.set()

    def ready(self) -> None:
        """Waits until the one before has arrived. Raises DeadlineError."""
        if not self._free.wait(self._seconds):
            raise DeadlineError(self._storage.path, "take a resume point", self._seconds, "deadlines.checkpoint")
        self._free.clear()

    def carry(self, checkpoint: Checkpoint, name: str) -> Checkpoint:
        """What Ray Train calls in its thread. Raises CheckpointError, or InfrastructureError where the next attempt may get through."""
        from ray import train

        storage: Any = train.get_context().get_storage()  # type: ignore[attr-defined]
        try:
            return storage.persist_current_checkpoint(checkpoint, name)
        except (pa.ArrowException, OSError) as error:
            told = f"resume point {self._storage.base}/{name} could not be written: {first_line(error)}"
            if not self._storage.shared:
                raise InfrastructureError(told, "check storage, its credentials and the room there") from None
            for path in (f"{self._storage.base}/{name}", checkpoint.path):  # they would only help to keep a full disk full
                shutil.rmtree(path, ignore_errors=True)
            failed = CheckpointError(told, "make room there; the one before it is intact")
            tell(self._failure, failed)
            raise failed from None
        finally:
            self._free.set()


def tell(failure: Path, error: RaysysError) -> None:
    """Writes down for the driver what starting again would only repeat. On a full disk nothing but an empty file may come of it."""
    with suppress(CheckpointError):
        append_json(failure, {"kind": type(error).__name__, "message": error.message, "remedy": error.remedy})


def scratch(folder: str | None) -> Path:
    """A new folder on this node's own disk. Raises CheckpointError: there is none to be had."""
    try:
        return Path(tempfile.mkdtemp(prefix=f"{_SCRATCH}{socket.gethostname()}-{os.getpid()}-", dir=folder))
    except OSError as error:
        raise CheckpointError(f"{folder or tempfile.gettempdir()} takes no resume point: {error}", "set trainer.scratch") from None


def sweep(folder: str | None) -> None:
    """Removes what killed ranks left in such folders on this node."""
    mine = f"{_SCRATCH}{socket.gethostname()}-"
    for path in Path(folder or tempfile.gettempdir()).glob(f"{mine}*"):
        owner = path.name.removeprefix(mine).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(path, ignore_errors=True)
