"""Small files of a run: appended line by line, or replaced as a whole. A disk that is full is one clear error."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raysys.errors import CheckpointError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises CheckpointError, naming the file, for what the system says while it is written."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}", "make room; the newest resume point is intact") from None


def append_json(path: Path, record: Mapping[str, Any]) -> None:
    """One more line. Floats keep every bit. Raises CheckpointError."""
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_json_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(line, record) of each line that is whole; [] without the file. A kill may have torn the last one."""
    found = []
    if path.is_file():
        for raw in path.read_bytes().split(b"\n"):  # `splitlines` of a text would cut inside it at U+2028 and its like
            try:
                line = raw.decode("utf-8")  # one by one: a torn line may end inside a character
                found.append((line, json.loads(line)))
            except ValueError:
                continue
    return found


def write_json(path: Path, record: Mapping[str, Any] | Sequence[Any]) -> None:
    write_atomically(path, json.dumps(record, indent=1))


def write_shared_json(path: Path, record: Mapping[str, Any] | Sequence[Any]) -> None:
    """As `write_json`, of a file that several processes may write simultaneously; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f".{path.name}.{os.getpid()}")
    write_json(own, record)
    os.replace(own, path)


def write_atomically(path: Path, text: str) -> None:
    """The file holds the old text or the new one, never half of it. Raises CheckpointError."""
    draft = path.with_name(f".{path.name}.draft")
    with writing(path), open(draft, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def sync(path: Path) -> None:
    """Has a file or folder on the disk when it returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
