"""A JSONL corpus read in place: where each document lies and which id comes first. Texts stay in the file, whatever its size.

A line is `{"id": "7", "contents": "\\"Title\\"\\nBody"}` or `{"id": "7", "title": "Title", "text": "Body"}`; other keys are
ignored, and so are empty lines. Beside the file, 20 bytes a document are kept, memory-mapped: 20 MB for a million. While
they are made, the ids alone are in memory.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from blake3 import blake3

from raysys.errors import ConfigError, DataError
from raysys.retrieval.documents import join_contents
from raysys.retrieval.folders import mapped, open_or_build

_CHUNK = 1 << 22
_SHOWN = 5
_IDS = 1 << 16


class Corpus:
    """Documents by row, which is their order in the file.

    Attributes:
        hash: of the file's bytes.
        rank: [documents], place of each row's id among all ids in their order (as UTF-8 bytes); breaks ties.

    Args:
        path: the JSONL file.
        index: folder for what is derived from it (default: the file's path with `.index`).
        rebuild: derive it again, whatever is there.

    Raises:
        ConfigError: no such file, no document in it, or the folder belongs to another corpus.
        DataError: malformed rows, each with file and line; an id that occurs twice, with both lines.
    """

    def __init__(self, path: str | Path, index: str | Path | None = None, rebuild: bool = False):
        self.path = Path(path)
        if not self.path.is_file():
            raise ConfigError(f"corpus {path} is no file", "check --corpus")
        try:
            self._file = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise ConfigError(f"corpus {path} cannot be read: {error.strerror}", "check --corpus") from None
        before = os.fstat(self._file)
        self.hash = _digest(self._file)
        self.folder = Path(index) if index is not None else self.path.with_name(self.path.name + ".index")
        open_or_build(self.folder / "documents", {"kind": "documents", "corpus": self.hash}, self._build, rebuild)
        self._spans, self.rank = mapped(self.folder / "documents", "spans", "rank")
        after = os.fstat(self._file)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise DataError(f"corpus {path} changed while it was being read", "start again when nobody writes it")

    def __len__(self) -> int:
        return len(self._spans)

    def __del__(self) -> None:
        file = getattr(self, "_file", None)
        if file is not None:
            os.close(file)

    def read(self, rows: Sequence[int]) -> list[tuple[str, str]]:
        """Id and contents of each row. Safe from several threads.

        Raises:
            DataError: the file was written to since it was opened.
        """
        found = []
        for start, end in self._spans[np.asarray(rows, np.int64)].tolist():
            line = os.pread(self._file, end - start, start)
            try:
                found.append(_document(json.loads(line)))
            except (ValueError, RecursionError):  # also _BadRow
                raise DataError(f"corpus {self.path} was changed while it is served", "start the service again") from None
        return found

    def texts(self) -> Iterator[str]:
        """Contents of all rows in order, one at a time."""
        for first in range(0, len(self), _IDS):
            for _, contents in self.read(range(first, min(first + _IDS, len(self)))):
                yield contents

    def _build(self, draft: Path) -> None:
        spans, lines = array("q"), array("q")
        ids: list[pa.Array] = []
        chunk: list[str] = []
        bad: list[str] = []
        for number, start, end, line in _lines(self._file):
            try:
                chunk.append(_document(_loaded(line))[0])
            except _BadRow as reason:
                bad.append(f"{self.path}:{number}: {reason}" if len(bad) < _SHOWN else "")
                continue
            spans.extend((start, end))
            lines.append(number)
            if len(chunk) == _IDS:
                ids.append(pa.array(chunk, pa.large_string()))
                chunk = []
        ids.append(pa.array(chunk, pa.large_string()))
        if bad:
            more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
            raise DataError(f"{len(bad)} rows of the corpus are malformed: {'; '.join(bad[:_SHOWN])}{more}", "correct or remove them")
        if not lines:
            raise ConfigError(f"corpus {self.path} holds no document", "check --corpus")
        np.save(draft / "spans.npy", np.frombuffer(spans, np.int64).reshape(-1, 2))
        np.save(draft / "rank.npy", self._ranked(pa.chunked_array(ids), lines))

    def _ranked(self, ids: pa.ChunkedArray, lines: array[int]) -> np.ndarray:
        order = pc.call_function("sort_indices", [ids]).to_numpy()  # not stable: of equal ids either may come first
        ordered = ids.take(pa.array(order))
        same = np.flatnonzero(pc.call_function("equal", [ordered[1:], ordered[:-1]]).to_numpy())
        if len(same):
            first, second = sorted((lines[order[same[0]]], lines[order[same[0] + 1]]))
            more = f", and {len(same) - 1} more" if len(same) > 1 else ""
            doubled = ordered[int(same[0])].as_py()
            raise DataError(f"{self.path}: id {doubled!r} occurs on lines {first} and {second}{more}", "give each document its own id")
        rank = np.empty(len(order), np.int32)
        rank[order] = np.arange(len(order), dtype=np.int32)
        return rank


class _BadRow(ValueError):
    """Why a line is no document."""


def _digest(file: int) -> str:
    found = blake3()
    offset = 0
    while piece := os.pread(file, _CHUNK, offset):
        found.update(piece)
        offset += len(piece)
    return found.hexdigest(length=16)


def _lines(file: int) -> Iterator[tuple[int, int, int, bytes]]:
    """Number, first byte, byte after the last, and bytes of each line that is not blank."""
    with open(os.dup(file), "rb", buffering=_CHUNK) as stream:
        stream.seek(0)
        end = 0
        for number, line in enumerate(stream, 1):
            start, end = end, end + len(line)
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                start, line = 3, line[3:]
            if line.strip():
                yield number, start, end, line


def _loaded(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadRow(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise _BadRow(f"invalid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets nested without end
        raise _BadRow(f"invalid JSON: {str(error)[:100]}") from None


def _document(record: Any) -> tuple[str, str]:
    """Id and contents of a corpus record. Raises _BadRow."""
    if not isinstance(record, dict):
        raise _BadRow(f"not an object but {type(record).__name__}")
    doc_id = record.get("id")
    if isinstance(doc_id, int) and not isinstance(doc_id, bool):
        doc_id = str(doc_id)
    if not isinstance(doc_id, str) or not doc_id:
        raise _BadRow("no `id` (text or a whole number)")
    if record.get("contents") is not None:
        contents = _text(record, "contents")
    else:
        contents = join_contents(_text(record, "title"), _text(record, "text"))
    if not contents.strip():
        raise _BadRow("no text: expected `contents`, or `title` and `text`")
    try:
        doc_id.encode("utf-8")
        contents.encode("utf-8")
    except UnicodeEncodeError:
        raise _BadRow("not valid Unicode (half a surrogate pair)") from None
    return doc_id, contents


def _text(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _BadRow(f"`{key}` is {type(value).__name__}, expected text")
    return value
