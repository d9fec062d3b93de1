"""The text of a source as units that can be read apart, on any node, in bounded memory. Plain pyarrow, no Ray.

Only Parquet files are opened to plan: a JSONL file is cut by bytes, and a line belongs to the piece in which it begins; a text file is
cut between characters. Small pieces are read together, so that units are about equal.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.fs as filesystems
import pyarrow.parquet as parquet

from raysys.config.corpora import Source
from raysys.data.files import JSON_SUFFIXES, PARQUET_SUFFIXES, first_line, listed, locate
from raysys.data.rows import BadRow
from raysys.errors import ConfigError, DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".tex")
_PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".7z", ".lz4")
_BUFFER = 1 << 20
_ROWS = 64
"""Parquet rows decoded at once."""
_VERSIONS = ("etag", "ETag", "blob_id", "sha256", "generation", "content_md5", "md5Hash", "mtime")


@dataclass(frozen=True)
class Piece:
    """A part of a file.

    Attributes:
        path: within the file system.
        name: what people call the file; stable wherever the folder lies.
        size, version: of the whole file, to notice that it changed: bytes, and time of change or entity tag.
        start, stop: bytes; of Parquet the rows within the row group `group`.
        bytes: about how much text it holds.
    """

    kind: Literal["lines", "rows", "text"]
    path: str
    name: str
    size: int
    version: str
    start: int
    stop: int
    bytes: int
    group: int = -1

    def content(self) -> list[Any]:
        """What it holds, as far as that can be known without reading it."""
        return [self.kind, self.name, self.size, self.version, self.start, self.stop, self.group]


@dataclass(frozen=True)
class Unit:
    """Pieces that are read together. Pickles, so tasks can read on other nodes."""

    system: filesystems.FileSystem
    column: str
    longest_row: int
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        return sum(piece.bytes for piece in self.pieces)

    def key(self, settings: str) -> str:
        """Equal for the same text under the same settings."""
        facts = [settings, self.column, self.longest_row, [[piece.path, *piece.content()] for piece in self.pieces]]
        return digest(facts)

    def documents(self) -> Iterator[Document]:
        """Everything in it, in order. Raises DataError: a file is gone, changed or damaged."""
        for piece in self.pieces:
            _check_unchanged(self.system, piece)
            try:
                yield from _READERS[piece.kind](self, piece)
            except (pa.ArrowException, OSError) as error:
                raise DataError(
                    f"{piece.name} cannot be read: {first_line(error)}", "the file is damaged or out of reach; write it again"
                ) from None


@dataclass(frozen=True)
class Document:
    """Text as it is stored, or why there is none. `last`: nothing of it follows in another unit. `where`: how a person finds it."""

    where: str
    raw: bytes | str | BadRow
    last: bool = True


def digest(facts: Any) -> str:
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()


def plan_units(source: Source, label: str, unit_bytes: int, longest_row: int) -> list[Unit]:
    """The units of a source, in the order of names and places.

    Raises:
        ConfigError: nothing there, nothing that can be read as text, only empty files, or a file system out of reach.
        DataError: a damaged Parquet file, or one without the column.
    """
    key = f"data.sources.{label}.path"
    system, base, wildcard = locate(source.path, key)
    found = sorted(listed(system, base, wildcard, source.path, key), key=lambda info: info.path)
    in_folder = wildcard is None and not (len(found) == 1 and found[0].path == base)
    chosen = _chosen(found, in_folder)
    if not chosen:
        held = f"holds only {', '.join(sorted(Path(info.path).name for info in found)[:5])}" if found else "matches no file"
        known = ", ".join((*JSON_SUFFIXES, *PARQUET_SUFFIXES, *TEXT_SUFFIXES))
        raise ConfigError(f"{key}={source.path} {held}", f"expected files ending in {known}; or name others with a glob")
    if packed := [Path(info.path).name for info in chosen if info.path.endswith(_PACKED)]:
        raise ConfigError(f"{key}={source.path} holds compressed files such as {packed[0]}", "unpack them, or convert them to Parquet")
    pieces = (piece for info in chosen for piece in _pieces(system, info, base, source.column, unit_bytes, label))
    units = [Unit(system, source.column, longest_row, group) for group in _grouped(pieces, unit_bytes)]
    if not units:
        raise ConfigError(f"{key}={source.path} is empty: {len(chosen)} files, no text", f"check {key}")
    return units


def _chosen(found: list[filesystems.FileInfo], in_folder: bool) -> list[filesystems.FileInfo]:
    if not in_folder:
        return found
    rows = [info for info in found if info.path.endswith(JSON_SUFFIXES + PARQUET_SUFFIXES)]
    return rows or [info for info in found if info.path.endswith(TEXT_SUFFIXES)]  # a data set's folder often has a README as well


def _pieces(
    system: filesystems.FileSystem, info: filesystems.FileInfo, base: str, column: str, unit_bytes: int, label: str
) -> Iterator[Piece]:
    name = info.path.removeprefix(base).lstrip("/") or Path(info.path).name
    size, version = int(info.size or 0), _version(system, info)
    if info.path.endswith(PARQUET_SUFFIXES):
        yield from _row_pieces(system, info.path, name, size, version, column, unit_bytes, label)
        return
    kind = "lines" if info.path.endswith(JSON_SUFFIXES) else "text"
    parts = -(-size // unit_bytes)
    for part in range(parts):
        start, stop = size * part // parts, size * (part + 1) // parts
        yield Piece(kind, info.path, name, size, version, start, stop, stop - start)


def _row_pieces(
    system: filesystems.FileSystem, path: str, name: str, size: int, version: str, column: str, unit_bytes: int, label: str
) -> Iterator[Piece]:
    try:
        with system.open_input_file(path) as file:
            metadata = parquet.ParquetFile(file).metadata
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name} is not a Parquet file: {first_line(error)}", "the file is damaged or misnamed") from None
    schema = metadata.schema.to_arrow_schema()
    kind = schema.field(column).type if column in schema.names else None
    if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind)):
        held = ", ".join(schema.names) if kind is None else f"one of type {kind}"
        raise DataError(f"{name} has no text column `{column}`, only {held}", f"set data.sources.{label}.column")
    place = metadata.schema.names.index(column) if column in metadata.schema.names else 0
    for group in range(metadata.num_row_groups):
        rows, text = metadata.row_group(group).num_rows, metadata.row_group(group).column(place).total_uncompressed_size
        parts = min(rows, max(1, -(-text // unit_bytes)))
        for part in range(parts):
            yield Piece("rows", path, name, size, version, rows * part // parts, rows * (part + 1) // parts, text // parts, group)


def _grouped(pieces: Iterable[Piece], unit_bytes: int) -> Iterator[tuple[Piece, ...]]:
    """Neighbours together, as long as they are no more than a unit."""
    group: list[Piece] = []
    held = 0
    for piece in pieces:
        if group and held + piece.bytes > unit_bytes:
            yield tuple(group)
            group, held = [], 0
        group.append(piece)
        held += piece.bytes
    if group:
        yield tuple(group)


def _version(system: filesystems.FileSystem, info: filesystems.FileInfo) -> str:
    if info.mtime_ns is not None:
        return str(info.mtime_ns)
    handler = getattr(system, "handler", None)
    if isinstance(handler, filesystems.FSSpecHandler):  # hubs and some stores know no time of change
        facts = handler.fs.info(info.path)
        return next((str(facts[name]) for name in _VERSIONS if facts.get(name)), "")
    return ""


def _check_unchanged(system: filesystems.FileSystem, piece: Piece) -> None:
    info = system.get_file_info(piece.path)
    if info.type != filesystems.FileType.File or int(info.size or 0) != piece.size or _version(system, info) != piece.version:
        raise DataError(f"{piece.name} changed while the run was reading it", "start again, and leave the data alone while a run reads it")


def _lines(unit: Unit, piece: Piece) -> Iterator[Document]:
    """Lines that begin in the piece. One that is too long is passed over without being held, and read no further than the piece."""
    with unit.system.open_input_file(piece.path) as file:
        reader: Any = io.BufferedReader(file, _BUFFER)  # type: ignore[arg-type]
        at = piece.start
        if at:
            reader.seek(at - 1)  # a line begins here if the byte before ends one
            at = _next_line(reader, at - 1, piece.stop)
        while at < piece.stop:
            line = reader.readline(unit.longest_row + 1)
            if not line:
                return
            where = f"{piece.name} at byte {at}"
            if len(line) > unit.longest_row and not line.endswith(b"\n"):
                yield Document(where, BadRow(f"too long: a row of more than {unit.longest_row} bytes, four times data.unit_bytes"))
                at = _next_line(reader, at + len(line), piece.stop)
                continue
            if line.strip():
                yield Document(where, _parsed(line.removeprefix(b"\xef\xbb\xbf") if at == 0 else line, unit.column))
            at += len(line)


def _next_line(reader: Any, at: int, stop: int) -> int:
    """Where the next line begins, or some place from `stop` on; the reader is there."""
    while at < stop and (part := reader.readline(_BUFFER)):
        at += len(part)
        if part.endswith(b"\n"):
            break
    return at


def _parsed(line: bytes, column: str) -> str | BadRow:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8: at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return BadRow(f"invalid JSON: {first_line(error)}")
    if not isinstance(record, dict):
        return BadRow(f"not an object: found {type(record).__name__}")
    text = record.get(column)
    if not isinstance(text, str):
        return BadRow(f"no text in `{column}`" + ("" if text is None else f": found {type(text).__name__}"))
    return text


def _rows(unit: Unit, piece: Piece) -> Iterator[Document]:
    with unit.system.open_input_file(piece.path) as file:
        batches = parquet.ParquetFile(file).iter_batches(batch_size=_ROWS, row_groups=[piece.group], columns=[unit.column])
        at = 0
        for batch in batches:
            if at >= piece.stop:
                return
            skip = max(0, piece.start - at)
            wanted = batch.column(0).slice(skip, max(0, piece.stop - at - skip))
            # As bytes: one string that is not UTF-8 would spoil the others of its batch.
            for number, value in enumerate(wanted.cast(pa.large_binary()), at + skip):
                yield Document(f"{piece.name} row group {piece.group} row {number}", _value(value, unit))
            at += len(batch)


def _value(value: Any, unit: Unit) -> bytes | BadRow:
    if not value.is_valid:
        return BadRow(f"no text in `{unit.column}`")
    size = value.as_buffer().size
    if size > unit.longest_row:
        return BadRow(f"too long: a row of more than {unit.longest_row} bytes, four times data.unit_bytes")
    return value.as_py()


def _text(unit: Unit, piece: Piece) -> Iterator[Document]:
    """The piece as one document, from the first character that begins in it to the last one."""
    with unit.system.open_input_file(piece.path) as file:
        file.seek(piece.start)
        data = file.read(min(piece.stop + 3, piece.size) - piece.start)
    length = piece.stop - piece.start
    first = _continued(data, 0) if piece.start else 0
    last = length + (_continued(data, length) if piece.stop < piece.size else 0)
    where = piece.name if length == piece.size else f"{piece.name} at byte {piece.start}"
    yield Document(where, data[first:last], piece.stop == piece.size)


def _continued(data: bytes, at: int) -> int:
    """How many of the bytes from `at` on belong to a character that began before: at most 3 in UTF-8."""
    count = 0
    while count < 3 and at + count < len(data) and data[at + count] & 0xC0 == 0x80:
        count += 1
    return count


_READERS = {"lines": _lines, "rows": _rows, "text": _text}
