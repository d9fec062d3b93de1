"""A rank's state by the parameters' names, one file a tensor: for what DeepSpeed's own shards do not fit. For actors only.

Split experts it keeps of one rank only, and its converter to other layouts asks every parameter for AdamW's moments. What is written here
can be loaded under any number of ranks, ZeRO stage 0 to 2 and expert parallelism.

    layout.json                  steps and updates so far: written last
    named/<parameter>/<key>.pt   whole tensors, `fp32` and the optimiser's states
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from raysys.errors import CheckpointError
from raysys.training.checkpoint import LAYOUT, full_disks
from raysys.training.deep import Rank
from raysys.training.expert_states import load_states, whole_states
from raysys.training.named_states import WEIGHT, named_states, put_named_states

NAMED = "named"


class NamedRank(Rank, Protocol):
    """One that can tell which states its optimiser keeps."""

    def moments(self, name: str) -> tuple[str, ...]:
        """States of a parameter's shape."""
        ...


def save(engine: NamedRank, folder: Path) -> None:
    """Rank 0 writes, the others help to put tensors together. Collective; complete on every rank when it returns on one.

    Raises:
        CheckpointError: the disk does not take it.
    """
    failed: list[str | None] = [None]
    for name, key, tensor in _tensors(engine):
        if engine.rank == 0 and tensor is not None and failed[0] is None:
            path = folder / NAMED / name / f"{key}.pt"
            try:
                with full_disks(folder):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    torch.save(tensor.cpu(), path)
            except CheckpointError as error:  # told once everyone is here, for all wait for this rank's part in the next tensor
                failed = [str(error)]
    if engine.rank == 0 and failed[0] is None:
        record = {"layout": engine.layout, "step": engine.step_index, "updates": engine.updates}
        (folder / LAYOUT).write_text(json.dumps(record))
    if engine.world > 1:
        dist.broadcast_object_list(failed, src=0)
    if failed[0] is not None:
        raise CheckpointError(failed[0], "make room")


def load(engine: NamedRank, folder: Path) -> None:
    """Goes on where `save` was, under whatever layout. Collective.

    Raises:
        CheckpointError: nothing complete is there, or it is of another model.
    """
    try:
        record = json.loads((folder / LAYOUT).read_text())
        step, updates = int(record["step"]), int(record["updates"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} is no complete trainer checkpoint: {error}", "go back to the resume point before it") from None

    def read(name: str, key: str) -> Tensor:
        path = folder / NAMED / name / f"{key}.pt"
        if not path.is_file():
            raise CheckpointError(f"the checkpoint has no {key} of {name}", "it is of another model or optimiser")
        return torch.load(path, map_location="cpu", weights_only=True)

    if _split(engine):
        try:
            load_states(
                engine.engine, lambda name, key: read(name, WEIGHT if key == "weight" else key), updates, engine.idle_step, engine.moments
            )
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}", "it is of another model") from None
    else:
        put_named_states(engine.engine, _stored(folder, [name for name, _ in engine.engine.module.named_parameters()], read, updates))
    engine.step_index, engine.updates = step, updates


def _stored(folder: Path, names: list[str], read: Callable[[str, str], Tensor], updates: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for name in names:
        keys = sorted(path.stem for path in (folder / NAMED / name).glob("*.pt"))
        states = {key: read(name, key) for key in keys or [WEIGHT]}
        if len(states) > 1:
            states.setdefault("step", torch.tensor(float(updates)))
        yield name, states


def _tensors(engine: NamedRank) -> Iterator[tuple[str, str, Tensor | None]]:
    if _split(engine):
        for name, key, tensor in whole_states(engine.engine, engine.moments):
            yield name, WEIGHT if key == "weight" else key, tensor
        return
    for name, states in named_states(engine.engine):
        for key, tensor in states.items():
            yield name, key, tensor


def _split(engine: Any) -> bool:
    return engine.model.expert_group is not None
