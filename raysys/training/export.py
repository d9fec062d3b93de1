"""The trained model as a Hugging Face folder. For actors only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist
from transformers import AutoConfig

from raysys.training.engine import Engine
from raysys.training.weights import bucketed, gathered, shape_of

SHARD_BYTES = 2**31
INDEX = "model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".h5", ".msgpack", ".gguf")


def export(engine: Engine, folder: Path) -> None:
    """Writes safetensors with the source's config, tokenizer and generation config. Collective; rank 0 writes.

    Weights are in the dtype that the source's config names: from the float32 masters where these are wider than what
    the engine computes with. They leave the ranks in runs of at most `SHARD_BYTES`, each a file. Tied tensors are
    written once, as transformers does. The folder appears complete or not at all.
    """
    draft = folder.with_name(f".draft_{folder.name}")
    first = engine.rank == 0
    if first:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    names = _names(engine.model)
    dtype = _dtype(engine)
    sizes = {name: int(torch.Size(shape_of(tensor)).numel()) * dtype.itemsize for name, tensor in names.items()}
    shards = bucketed(sizes, SHARD_BYTES)
    for number, shard in enumerate(shards):
        tensors = _collect(engine, {name: names[name] for name in shard}, dtype)
        if first:
            save_file(tensors, draft / _file(number, len(shards)), metadata={"format": "pt"})
    if first:
        if len(shards) > 1:
            where = {name: _file(number, len(shards)) for number, shard in enumerate(shards) for name in shard}
            (draft / INDEX).write_text(json.dumps({"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}, indent=2))
        _copy_rest(engine.spec.model, draft)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    dist.barrier()


def _names(model: Any) -> dict[str, Tensor]:
    """State without repeated tensors: of tied ones the first name stays, unless the model ties to another."""
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    for dropped, kept in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if dropped in state and kept in state and state[dropped] is state[kept]:
            del state[dropped]
    return state


def _dtype(engine: Engine) -> torch.dtype:
    named = AutoConfig.from_pretrained(engine.spec.model).dtype  # the loaded model's config names the dtype it was loaded in
    return engine.dtype if named is None else named if isinstance(named, torch.dtype) else getattr(torch, named)


def _collect(engine: Engine, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Whole tensors on CPU on rank 0, nothing elsewhere."""
    found: dict[str, Tensor] = {}
    first = engine.rank == 0
    if dtype.itemsize > engine.dtype.itemsize:
        from deepspeed.utils import safe_get_full_fp32_param

        for name, tensor in tensors.items():
            master = safe_get_full_fp32_param(tensor) if isinstance(tensor, torch.nn.Parameter) else tensor
            if first:
                found[name] = (tensor if master is None else master).detach().reshape(shape_of(tensor)).to("cpu", dtype, copy=True)
        return found
    with gathered(engine.engine, list(tensors.values())):
        if first:
            found = {name: tensor.detach().to("cpu", dtype, copy=True).contiguous() for name, tensor in tensors.items()}
    return found


def _file(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _copy_rest(source: str, folder: Path) -> None:
    """Config, tokenizer, templates: every file of the source that holds no weights."""
    origin = Path(source)
    if not origin.is_dir():
        from huggingface_hub import snapshot_download

        origin = Path(snapshot_download(source, local_files_only=True))
    for path in sorted(origin.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHTS) and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)
