"""Index folders: built in a draft, published in one step, and refused if they were made from something else."""

from __future__ import annotations

import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from raysys.errors import ConfigError, DataError
from raysys.files import sync, write_json

MANIFEST = "manifest.json"
FORMAT = 1


def open_or_build(folder: Path, wanted: Mapping[str, Any], build: Callable[[Path], None], rebuild: bool = False) -> dict[str, Any]:
    """The manifest of an index folder that fits, made first if there is none.

    Args:
        wanted: what the index must have been made from; `corpus` is the corpus' hash.
        build: fills an empty folder.
        rebuild: make it anew, whatever is there.

    Raises:
        ConfigError: what is there was made from another corpus or with other settings, or the folder cannot be written.
        DataError: what is there is damaged.
    """
    if rebuild or not folder.exists():
        _build(folder, wanted, build, replace=rebuild)
    return _checked(folder, wanted)


def mapped(folder: Path, *names: str) -> list[np.ndarray]:
    """The arrays `NAME.npy` of an index folder, read from disk as they are needed. Raises DataError for a damaged one."""
    try:
        return [np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in names]
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"index {folder} is damaged: {error}", "give --rebuild") from None


def _build(folder: Path, wanted: Mapping[str, Any], build: Callable[[Path], None], replace: bool) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        draft = folder.with_name(f"{_draft_name(folder)}{os.getpid()}-{uuid.uuid4().hex[:8]}")
        draft.mkdir()
    except OSError as error:
        raise _unwritable(folder, error) from None
    try:
        build(draft)
        write_json(draft / MANIFEST, {"format": FORMAT, **wanted})
        for path in draft.iterdir():
            sync(path)
        _publish(draft, folder, replace)
    except OSError as error:
        raise _unwritable(folder, error) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _publish(draft: Path, folder: Path, replace: bool) -> None:
    """Whoever comes second keeps what the first has published, unless it is to be replaced."""
    if replace and folder.exists():
        old = draft.with_name(draft.name + "-old")
        os.rename(folder, old)
        shutil.rmtree(old, ignore_errors=True)
    try:
        os.rename(draft, folder)
    except OSError:
        if not (folder / MANIFEST).is_file():
            raise
    sync(folder.parent)


def _draft_name(folder: Path) -> str:
    return f".{folder.name}.draft-{socket.gethostname()}-"


def _sweep(folder: Path) -> None:
    """Removes drafts of builds that were killed on this machine."""
    for path in folder.parent.glob(f"{_draft_name(folder)}*"):
        pid = path.name.removeprefix(_draft_name(folder)).partition("-")[0]
        if not (Path("/proc") / pid).exists():
            shutil.rmtree(path, ignore_errors=True)


def _checked(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}", f"{folder} is no index or is damaged: delete it, or give --rebuild") from None
    if found.get("corpus") != wanted["corpus"]:
        raise ConfigError(
            f"{folder} was built from another corpus: it has hash {found.get('corpus')}, the corpus given has {wanted['corpus']}",
            "give the corpus it was built from, another --index, or --rebuild",
        )
    other = [f"{key} {found.get(key)!r}, now {value!r}" for key, value in {"format": FORMAT, **wanted}.items() if found.get(key) != value]
    if other:
        raise ConfigError(f"{folder} was built with other settings: {'; '.join(other)}", "give another --index, or --rebuild")
    return found


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"index {folder} cannot be written: {error}", "make room, or give another folder with --index")
