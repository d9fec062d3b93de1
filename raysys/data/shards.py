"""Files of a token cache: one Parquet shard a unit and split, put in place whole, in a folder or at a URI that all workers see."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.fs as filesystems
import pyarrow.parquet as parquet

from raysys.data.files import first_line, locate
from raysys.errors import ConfigError, DataError, InfrastructureError

Split = Literal["train", "validation"]
_NOTE = b"raysys"
_STALE_SECONDS = 3600
"""Age from which on a draft is of a task that was killed."""


@dataclass(frozen=True)
class Folder:
    """A place for files that are either there as a whole or not at all. Pickles."""

    system: filesystems.FileSystem
    base: str

    @classmethod
    def at(cls, path: str) -> Folder:
        """Raises ConfigError: a file system that cannot be reached."""
        system, base, wildcard = locate(path, "data.cache")
        if wildcard is not None:
            raise ConfigError(f"data.cache={path} is a glob", "name one folder")
        return cls(system, base)

    def write(self, name: str, data: Any) -> int:
        """Puts a file in place of what was there. Returns its bytes. Raises InfrastructureError: disk full and its like."""
        data = memoryview(data)
        try:
            if isinstance(self.system, filesystems.LocalFileSystem):
                self._write_local(Path(self.base) / name, data)
            else:  # an object appears when it is complete
                with self.system.open_output_stream(f"{self.base}/{name}") as stream:
                    stream.write(data)
        except OSError as error:
            raise InfrastructureError(
                f"the token cache's {self.base}/{name} could not be written: {first_line(error)}", "make room, or set data.cache"
            ) from None
        return data.nbytes

    def _write_local(self, path: Path, data: memoryview) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.draft")  # two jobs may fill the same cache
        try:
            with open(draft, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)

    def read(self, name: str) -> bytes | None:
        """A small file; None if it is not there."""
        try:
            with self.system.open_input_file(f"{self.base}/{name}") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def stamp(self, name: str) -> tuple[int, int] | None:
        """Differs when the file was replaced."""
        info = self.system.get_file_info(f"{self.base}/{name}")
        return None if info.type != filesystems.FileType.File else (int(info.mtime_ns or 0), int(info.size or 0))

    def sizes(self) -> dict[str, int]:
        """Bytes of every file, by name."""
        found = self.system.get_file_info(filesystems.FileSelector(self.base, recursive=True, allow_not_found=True))
        return {
            info.path.removeprefix(self.base).lstrip("/"): int(info.size or 0) for info in found if info.type == filesystems.FileType.File
        }

    def sweep(self) -> None:
        """Takes away what killed tasks left behind."""
        if isinstance(self.system, filesystems.LocalFileSystem):
            for draft in Path(self.base).glob("shards/.*.draft"):
                try:
                    if time.time() - draft.stat().st_mtime > _STALE_SECONDS:
                        draft.unlink()
                except FileNotFoundError:  # another job was faster
                    continue


def shard_name(key: str, split: Split) -> str:
    return f"shards/{key}.parquet" if split == "train" else f"shards/{key}.validation.parquet"


def write_shard(folder: Folder, key: str, split: Split, table: pa.Table, note: Mapping[str, Any]) -> int:
    """Writes packed sequences with a note about them. Returns bytes."""
    sink = pa.BufferOutputStream()
    table = table.replace_schema_metadata({_NOTE: json.dumps(note).encode()})
    parquet.write_table(table, sink, compression="zstd", use_dictionary=False, write_statistics=False, write_page_checksum=True)
    return folder.write(shard_name(key, split), sink.getvalue())


def read_note(folder: Folder, key: str) -> dict[str, Any] | None:
    """What was noted beside the training shard; None if that is not whole."""
    try:
        with folder.system.open_input_file(f"{folder.base}/{shard_name(key, 'train')}") as file:
            note = (parquet.ParquetFile(file).schema_arrow.metadata or {}).get(_NOTE)
        return None if note is None else json.loads(note)
    except (pa.ArrowException, OSError, ValueError):
        return None


@dataclass(frozen=True)
class Shard:
    """Sequences as flat arrays: row r has `ids[starts[r]:starts[r + 1]]` and `lengths[pieces[r]:pieces[r + 1]]`.

    Attributes:
        ids, lengths: int32; tokens, and tokens of each document (or part of one) in a sequence.
        starts, pieces: int64 [rows + 1].
    """

    ids: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    pieces: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.starts) - 1


def read_shard(folder: Folder, key: str, split: Split, rows: int) -> Shard:
    """Raises DataError: gone, damaged, or with another number of rows."""
    name = shard_name(key, split)
    try:
        with folder.system.open_input_file(f"{folder.base}/{name}") as file:
            table = parquet.ParquetFile(file, page_checksum_verification=True).read(columns=["ids", "lengths"], use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"the token cache's {folder.base}/{name} cannot be read: {first_line(error)}", "delete this file and start again"
        ) from None
    if table.num_rows != rows:
        raise DataError(
            f"the token cache's {folder.base}/{name} has {table.num_rows} rows, {rows} were written", "delete this file and start again"
        )
    return Shard(*_flat(table.column("ids")), *_flat(table.column("lengths")))


def _flat(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    lists: Any = column.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):
        lists = pa.concat_arrays(lists.chunks) if lists.num_chunks else pa.array([], column.type)
    starts = lists.offsets.to_numpy().astype(np.int64)
    return lists.flatten().to_numpy(), starts - starts[0]
