"""JSONL and Parquet files as units that can be read apart: which lines or row group, and where they lie. Plain pyarrow, no Ray."""

from __future__ import annotations

import fnmatch
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as filesystems
import pyarrow.parquet as parquet

from raysys.errors import ConfigError, DataError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIXES = (".parquet", ".pq")
UNIT_ROWS = 1024
"""Lines of a JSONL unit. A Parquet unit is a row group."""
_CHUNK = 1 << 22
_WILD = frozenset("*?[")


@dataclass(frozen=True)
class Unit:
    """Rows that are read together.

    Attributes:
        path: within the file system.
        name: what people call the file; stable wherever the folder lies.
        first: number of the first row, from 1.
        rows: lines (blank ones count) or Parquet rows.
        start, stop: bytes of a JSONL unit; for Parquet `start` is the row group and `stop` -1.
    """

    path: str
    name: str
    first: int
    rows: int
    start: int
    stop: int = -1


@dataclass(frozen=True)
class Raw:
    """A row as the file has it: `record`, or the `error` that kept it from being read. Both empty: a blank line."""

    number: int
    record: Any = None
    error: str = ""


@dataclass(frozen=True)
class Files:
    """A data set: its file system and units, in the order of names and lines. Pickles, so tasks can read on other nodes."""

    system: filesystems.FileSystem
    units: tuple[Unit, ...]

    def read(self, unit: Unit, skip: int = 0, count: int | None = None) -> Iterator[Raw]:
        """The unit's rows: all, or `count` of them behind the first `skip`. Raises DataError: a file changed or is damaged."""
        if unit.stop < 0:
            return self._parquet(unit, skip, count)
        return itertools.islice(self._lines(unit), skip, None if count is None else skip + count)

    def _lines(self, unit: Unit) -> Iterator[Raw]:
        with self.system.open_input_file(unit.path) as file:
            file.seek(unit.start)
            data = file.read(unit.stop - unit.start)
        lines = data.removesuffix(b"\n").split(b"\n")
        if len(lines) != unit.rows:
            raise DataError(f"{unit.name} changed while it was being read", "start again, and leave the data alone while a run reads it")
        for number, line in enumerate(lines, unit.first):
            yield _parsed(number, line)

    def _parquet(self, unit: Unit, skip: int, count: int | None) -> Iterator[Raw]:
        try:
            with self.system.open_input_file(unit.path) as file:
                table = parquet.ParquetFile(file).read_row_group(unit.start)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{unit.name}: row group {unit.start} cannot be read: {first_line(error)}", "the file is damaged; write it again"
            ) from None
        for number, record in enumerate(table.slice(skip, count).to_pylist(), unit.first + skip):
            yield Raw(number, record)


def _parsed(number: int, line: bytes) -> Raw:
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
    if not line.strip():
        return Raw(number)
    try:
        return Raw(number, json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return Raw(number, error=f"invalid JSON: not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return Raw(number, error=f"invalid JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets nested without end
        return Raw(number, error=f"invalid JSON: {first_line(error)}")


def open_files(path: str) -> Files:
    """The data set at a path: a file, a folder (searched to the bottom) or a glob; local or a URI that pyarrow knows, or hf://.

    JSONL files are read through once, to find out where lines begin.

    Raises:
        ConfigError: nothing there, nothing of a known kind, or a file system that cannot be reached; an empty data set.
        DataError: a damaged Parquet file.
    """
    system, base, wildcard = locate(path)
    found = listed(system, base, wildcard, path)
    wanted = [info for info in found if info.path.endswith(JSON_SUFFIXES + PARQUET_SUFFIXES)]
    if not wanted:
        held = f"holds only {', '.join(sorted(Path(info.path).name for info in found)[:5])}" if found else "matches no file"
        raise ConfigError(f"data.path={path} {held}", f"expected files ending in {', '.join(JSON_SUFFIXES + PARQUET_SUFFIXES)}")
    units: list[Unit] = []
    for info in sorted(wanted, key=lambda info: info.path):
        name = info.path.removeprefix(base).lstrip("/") or Path(info.path).name
        units += _row_groups(system, info.path, name) if info.path.endswith(PARQUET_SUFFIXES) else _line_units(system, info.path, name)
    if not units:
        raise ConfigError(f"data.path={path} is empty: {len(wanted)} files, no row", "check data.path")
    return Files(system, tuple(units))


def locate(path: str, key: str = "data.path") -> tuple[filesystems.FileSystem, str, str | None]:
    """File system, the folder or file below which to look, and the pattern of paths if there is one. `key`: what errors call the path."""
    parts = path.split("/")
    signs = _WILD - {"?"} if "://" in path else _WILD  # a URI's question mark begins its options
    wild = None if Path(path).exists() else next((number for number, part in enumerate(parts) if signs & set(part)), None)
    plain = path if wild is None else "/".join(parts[:wild]) or ("/" if path.startswith("/") else ".")
    try:
        if plain.startswith("hf://"):
            from huggingface_hub import HfFileSystem

            system: filesystems.FileSystem = filesystems.PyFileSystem(filesystems.FSSpecHandler(HfFileSystem()))
            base = plain.removeprefix("hf://")
        elif "://" in plain:
            system, base = filesystems.FileSystem.from_uri(plain)
        else:
            system, base = filesystems.LocalFileSystem(), str(Path(plain).expanduser().absolute())
    except (pa.ArrowException, OSError, ValueError, ImportError) as error:
        raise ConfigError(f"{key}={path} cannot be reached: {first_line(error)}", "check the address and the credentials") from None
    base = base.rstrip("/") or "/"
    return system, base, None if wild is None else "/".join([base.rstrip("/"), *parts[wild:]])


def listed(
    system: filesystems.FileSystem, base: str, wildcard: str | None, path: str, key: str = "data.path"
) -> list[filesystems.FileInfo]:
    """The files there, in no order. Raises ConfigError: nothing there, or it cannot be reached."""
    try:
        info = system.get_file_info(base)
        if info.type == filesystems.FileType.File:
            return [info]
        if info.type == filesystems.FileType.NotFound:
            raise ConfigError(f"{key}={path} does not exist", f"check {key}")
        inside = system.get_file_info(filesystems.FileSelector(base, recursive=True))
    except ConfigError:
        raise
    except Exception as error:  # each remote file system has errors of its own
        raise ConfigError(f"{key}={path} cannot be reached: {first_line(error)}", "check the address and the credentials") from None
    files = [info for info in inside if info.type == filesystems.FileType.File]
    if wildcard is not None:
        return [info for info in files if _matches(info.path, wildcard)]
    # In a folder, .json files describe the data set more often than they hold it, and dotted names are bookkeeping.
    return [info for info in files if not info.path.endswith(".json") and not info.base_name.startswith((".", "_"))]


def _matches(path: str, wildcard: str) -> bool:
    """Part by part, so that `*` stays within a folder; `**` stands for any folders."""
    return _match_parts(path.split("/"), wildcard.split("/"))


def _match_parts(path: list[str], wild: list[str]) -> bool:
    if not wild:
        return not path
    if wild[0] == "**":
        return any(_match_parts(path[skip:], wild[1:]) for skip in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], wild[0]) and _match_parts(path[1:], wild[1:])


def _line_units(system: filesystems.FileSystem, path: str, name: str) -> Iterator[Unit]:
    starts, lines, size = [0], 0, 0
    last = b"\n"
    with system.open_input_stream(path, compression=None) as stream:
        while chunk := stream.read(_CHUNK):
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10)
            # Every UNIT_ROWS-th line end of the file, wherever the chunks fall.
            starts += (ends[(UNIT_ROWS - 1 - lines) % UNIT_ROWS :: UNIT_ROWS] + size + 1).tolist()
            lines, size, last = lines + len(ends), size + len(chunk), chunk[-1:]
    lines += last != b"\n"
    for number, start in enumerate(starts):
        rows = min(UNIT_ROWS, lines - number * UNIT_ROWS)
        if rows > 0:
            yield Unit(path, name, number * UNIT_ROWS + 1, rows, start, starts[number + 1] if number + 1 < len(starts) else size)


def _row_groups(system: filesystems.FileSystem, path: str, name: str) -> Iterator[Unit]:
    try:
        with system.open_input_file(path) as file:
            metadata = parquet.ParquetFile(file).metadata
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name} is not a Parquet file: {first_line(error)}", "the file is damaged or misnamed") from None
    if not {"prompt", "messages"} & set(columns := metadata.schema.to_arrow_schema().names):
        raise DataError(f"{name} has no column `prompt` or `messages`, only {', '.join(columns)}", "rename the column")
    first = 1
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if rows:
            yield Unit(path, name, first, rows, group)
        first += rows


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
