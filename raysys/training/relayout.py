"""A checkpoint under another number of ranks, ZeRO stage, dtype or split of experts: parameter by parameter, by name. For actors only.

DeepSpeed's shards fit one layout. Its converter to "universal" files gives one file a parameter and state; those are
put back as `raysys.training.expert_states` puts them, whatever holds a parameter's parts.
"""

from __future__ import annotations

import contextlib
import io
import math
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal
from torch import Tensor
from torch import distributed as dist

from raysys.config.parallel import effective_stage
from raysys.errors import CheckpointError
from raysys.training.deep import Rank
from raysys.training.expert_states import WEIGHT, adamw_moments, load_states
from raysys.training.weights import shape_of

_REMEDY = "resume with the trainer.ranks, zero_stage and dtype that wrote it"


def load_relaid(engine: Rank, state: Path, written: dict[str, Any], updates: int) -> None:
    """Loads `state`, DeepSpeed's folder of a checkpoint that layout `written` made after so many optimiser updates. Collective.

    Raises:
        CheckpointError: it cannot be converted, or is of another model.
    """
    relaid = state.with_name(f".relaid_{state.name}")
    _on_first(engine, lambda: _relay(state, relaid, effective_stage(written["zero_stage"], written["dtype"]), list(engine.names)))

    def read(name: str, key: str) -> Tensor:
        return _read(relaid / "zero" / name / f"{'fp32' if key == WEIGHT else key}.pt", shape_of(engine.names[name]))

    try:
        load_states(engine.engine, read, updates, engine.idle_step)
    except ValueError as error:
        raise CheckpointError(f"{state}: {error}", "it is of another model") from None
    dist.barrier()
    _on_first(engine, lambda: shutil.rmtree(relaid, ignore_errors=True))


def _on_first(engine: Rank, action: Callable[[], None]) -> None:
    """Rank 0 acts, all wait, and all raise what it raised."""
    outcome: list[str | None] = [None]
    if engine.rank == 0:
        try:
            action()
        except Exception as error:  # whatever a torn file makes the converter raise
            outcome = [f"{type(error).__name__}: {error}"]
    if engine.world > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise CheckpointError(f"the checkpoint cannot be brought to this layout: {outcome[0]}", _REMEDY)


def _relay(state: Path, relaid: Path, stage: int, names: list[str]) -> None:
    shutil.rmtree(relaid, ignore_errors=True)
    relaid.mkdir()
    if stage == 0:
        _relay_whole(state, relaid, names)
        return
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True, "inject_missing_state": True}
    with contextlib.redirect_stdout(io.StringIO()):
        ds_to_universal.main(Namespace(input_folder=str(state), output_folder=str(relaid), **options))


def _relay_whole(state: Path, relaid: Path, names: list[str]) -> None:
    """Stage 0: everything is in one file, the optimiser's states by the parameters' numbers."""
    saved = torch.load(state / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    for number, name in enumerate(names):
        folder = relaid / "zero" / name
        folder.mkdir(parents=True)
        moments = saved["optimizer"]["state"][number]
        torch.save(saved["module"][name], folder / "fp32.pt")
        for key in adamw_moments(name):
            torch.save(moments[key], folder / f"{key}.pt")


def _read(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The converter writes plain tensors (flat under stage 3), or dicts with one under `param`. `shape`: of what a rank holds of it."""
    if not path.is_file():
        raise CheckpointError(f"the checkpoint has no {path.stem} of {path.parent.name}", "it is of another model")
    saved = torch.load(path, map_location="cpu", weights_only=False)
    tensor = saved["param"] if isinstance(saved, dict) else saved
    parts, over = divmod(tensor.numel(), math.prod(shape))
    if over or not parts:
        raise CheckpointError(f"{path.parent.name} has {tensor.numel()} numbers in the checkpoint, the model has {list(shape)}")
    return tensor.detach().reshape(shape if parts == 1 else (-1, *shape[1:])).float()
