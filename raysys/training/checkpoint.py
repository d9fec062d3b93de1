"""A rank's state on disk: DeepSpeed's shards, random states, and the layout that wrote them. For actors only.

    layout.json          ranks, ZeRO stage, dtype, steps and optimiser updates so far: written last
    state/               DeepSpeed's shards
    random_rank00000.pt  random states

The caller makes the whole folder appear at once (`raysys.ledger`); nothing here is atomic.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import distributed as dist

from raysys.errors import CheckpointError
from raysys.training.deep import Rank

LAYOUT, TAG = "layout.json", "state"


def save(engine: Rank, folder: Path) -> None:
    """Writes this rank's part. Collective; complete on every rank when it returns on one.

    Raises:
        CheckpointError: the disk does not take it.
    """
    with full_disks(folder):
        folder.mkdir(parents=True, exist_ok=True)
        engine.engine.save_checkpoint(str(folder), tag=TAG, client_state={}, save_latest=False)
        torch.save(_random_states(), folder / _random_file(engine.rank))
    dist.barrier()
    if engine.rank == 0:
        with full_disks(folder):
            (folder / LAYOUT).write_text(json.dumps({"layout": engine.layout, "step": engine.step_index, "updates": engine.updates}))
    dist.barrier()


@contextmanager
def full_disks(folder: Path) -> Iterator[None]:
    """torch's writer says of a full disk that a position is not what it should be, as a RuntimeError like that of a lost peer; that of
    safetensors has an error of its own."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        first = str(error).partition("\n")[0]
        if isinstance(error, OSError) or any(sign in first for sign in ("inline_container", "PytorchStreamWriter", "os error")):
            there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            free = shutil.disk_usage(there).free >> 20
            raise CheckpointError(f"{folder} could not be written ({free} MiB are free there): {first}", "make room") from None
        raise


def load(engine: Rank, folder: Path) -> None:
    """Goes on where `save` was: bit by bit under the same layout, else to rounding (`raysys.training.relayout`). Collective.

    Raises:
        CheckpointError: nothing complete is there, or it is of another model.
    """
    try:
        record = json.loads((folder / LAYOUT).read_text())
        written, step, updates = record["layout"], int(record["step"]), int(record["updates"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} is no complete trainer checkpoint: {error}", "go back to the resume point before it") from None
    if written == engine.layout:
        _load_shards(engine, folder)
        _restore_random_states(folder / _random_file(engine.rank))
    else:
        from raysys.training.relayout import load_relaid

        load_relaid(engine, folder / TAG, written, updates)
    engine.step_index, engine.updates = step, updates


def _load_shards(engine: Rank, folder: Path) -> None:
    try:
        path, _ = engine.engine.load_checkpoint(str(folder), tag=TAG)
    except (OSError, RuntimeError, KeyError, AssertionError, ValueError) as error:
        raise CheckpointError(
            f"{folder / TAG} cannot be loaded: {str(error).splitlines()[0]}", "go back to the resume point before it"
        ) from error
    if path is None:
        raise CheckpointError(f"{folder / TAG} holds no DeepSpeed checkpoint", "go back to the resume point before it")


def _random_file(rank: int) -> str:
    return f"random_rank{rank:05d}.pt"


def _random_states() -> dict[str, Any]:
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _restore_random_states(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing", "go back to the resume point before it")
    states = torch.load(path, weights_only=False, map_location="cpu")
    torch.set_rng_state(states["torch"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
