"""What ranks run in `test_expert_groups.py`: steps of a decoder of experts under DeepSpeed, and the same steps in plain PyTorch on one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysys.config.parallel import effective_stage
from raysys.models.expert_parallel import summed
from raysys.models.moe import MoeDecoder, MoeShape, next_token_loss
from raysys.models.packing import Packing
from raysys.models.routing import Routing, balance_loss, z_loss

SHAPE = MoeShape(
    vocabulary=40, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, experts=4, top_k=2, expert_width=12, context=32, deviation=0.2
)
RATE, EPSILON, CLIP, BALANCE, Z = 3e-3, 1e-4, 0.5, 0.05, 0.01

Micro = list[int]
"""Lengths of a micro-batch's rows."""

STEPS: list[list[list[Micro]]] = [
    # step, rank (of up to four), micro-batches: of different numbers and sizes, and some ranks have none
    [[[5, 3], [4]], [[6, 1, 2]], [[3, 7]], [[4]]],
    [[[7, 2, 5]], [], [], [[3], [5, 2]]],
    [[], [[4, 4], [3], [6]], [[2]], []],
]


def step_ids(step: int) -> Tensor:
    lengths = sum(length for rank in STEPS[step] for micro in rank for length in micro)
    return torch.randint(SHAPE.vocabulary, (lengths,), generator=torch.Generator().manual_seed(step))


def micros(step: int, rank: int, ranks: int) -> list[tuple[Tensor, Micro]]:
    """This rank's micro-batches with their ids. Two ranks share the work of four; one has all in one."""
    found, ids = [], step_ids(step)
    for owner, theirs in enumerate(STEPS[step]):
        for lengths in theirs:
            mine, ids = ids.split([sum(lengths), len(ids) - sum(lengths)])
            if owner * ranks // 4 == rank:
                found.append((mine, lengths))
    return found


def targets(step: int) -> int:
    return sum(length - 1 for rank in STEPS[step] for micro in rank for length in micro)


def tokens(step: int) -> int:
    return len(step_ids(step))


def plain(shape: MoeShape, clip: float = CLIP) -> dict[str, Any]:
    """Three steps on one rank, without DeepSpeed, each as one batch."""
    model = MoeDecoder(shape).initialise(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, eps=EPSILON, weight_decay=0.1)
    losses, norms = [], []
    for step in range(len(STEPS)):
        lengths = [length for rank in STEPS[step] for micro in rank for length in micro]
        loss, count, routed = next_token_loss(model, step_ids(step), Packing(lengths, "cpu"))
        loss = loss / count + sum(BALANCE * balance_loss(one) + Z * z_loss(one) for one in routed)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "weights": {name: one.detach().numpy() for name, one in model.named_parameters()}}


def idle_step(engine: Any) -> None:
    """An optimiser step whose gradient is zero."""
    engine.set_gradient_accumulation_boundary(True)
    loss, _, _ = next_token_loss(engine, torch.zeros(2, dtype=torch.long), Packing([2], "cpu"))
    engine.backward(loss * 0.0, scale_wrt_gas=False)
    engine.step()


def train(
    rank: int,
    ranks: int,
    port: int,
    *,
    expert_parallel: int,
    stage: int,
    routing: Routing,
    dtype: str = "float32",
    steps: tuple[int, ...] = (0, 1, 2),
    checkpointing: bool = False,
    load: Path | None = None,
    save: Path | None = None,
) -> dict[str, Any]:
    """These steps. Losses are this rank's parts; weights are float32, whole, on rank 0; `loaded`: states before the first step."""
    from raysys.training.expert_states import load_states, whole_states

    engine = _engine(rank, ranks, port, expert_parallel, stage, replace(SHAPE, routing=routing), dtype, checkpointing)
    loaded: dict[str, np.ndarray] = {}
    if load is not None:
        saved = torch.load(load)
        load_states(engine, lambda name, key: saved["states"][name, key], saved["updates"], partial(idle_step, engine))
        loaded = {f"{name} {key}": one.numpy() for name, key, one in whole_states(engine) if one is not None}
    losses, norms = [], []
    for step in steps:
        losses.append(_accumulate(engine, step, rank, ranks))
        norms.append(_update(engine, stage))
    found = {(name, key): tensor for name, key, tensor in whole_states(engine) if tensor is not None}
    if save is not None and rank == 0:
        torch.save({"states": found, "updates": steps[-1] + 1}, save)
    return {
        "losses": losses,
        "norms": norms,
        "weights": {name: tensor.float().numpy() for (name, key), tensor in found.items() if key == "weight"},
        "loaded": loaded,
        "states": {f"{name} {key}": tensor.numpy() for (name, key), tensor in found.items()},
    }


def _engine(rank: int, ranks: int, port: int, expert_parallel: int, stage: int, shape: MoeShape, dtype: str, checkpointing: bool) -> Any:
    import os

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(ranks)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    import deepspeed

    from raysys.training import deep
    from raysys.training.expert_groups import expert_group, mark, split_groups

    deep.join("cpu", threads=1, seed=0)
    model = mark(MoeDecoder(shape, checkpointing, expert_group(expert_parallel)).initialise(3).to(getattr(torch, dtype)))
    routers = [one for name, one in model.named_parameters() if name.endswith("router.weight")]
    others = [one for name, one in model.named_parameters() if not name.endswith("router.weight")]
    groups = split_groups([{"params": others, "name": "others"}, {"params": routers, "name": "routers"}])
    assert [group.get("label") for group in groups] == ["others", "others", "routers"][expert_parallel == 1 :]
    optimizer = torch.optim.AdamW(groups, lr=RATE, eps=EPSILON, weight_decay=0.1)
    config = deep.settings(effective_stage(stage, dtype), dtype, CLIP, sum(one.numel() for one in model.parameters()))
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def _accumulate(engine: Any, step: int, rank: int, ranks: int) -> float:
    """Gradients of the step: loads of all micro-batches first, then each part; who has fewer fills up with ones that count for nothing."""
    most = max(len(micros(step, other, ranks)) for other in range(ranks))
    mine = micros(step, rank, ranks)
    todo = [(ids, lengths, 1.0) for ids, lengths in mine] + [(torch.zeros(2, dtype=torch.long), [2], 0.0)] * (most - len(mine))
    with torch.no_grad():
        parts = [torch.stack([one.load for one in engine(ids, Packing(lengths, "cpu"))[1]]) * int(real) for ids, lengths, real in todo]
        loads = summed(torch.stack(parts).sum(0))
    total = 0.0
    for number, (ids, lengths, real) in enumerate(todo):
        loss, _, routed = next_token_loss(engine, ids, Packing(lengths, "cpu"))
        kept = [one.take(torch.arange(len(ids) if real else 0)) for one in routed]
        extra = sum(BALANCE * balance_loss(one, load) + Z * z_loss(one, tokens(step)) for one, load in zip(kept, loads, strict=True))
        loss = loss * real / targets(step) + extra
        engine.set_gradient_accumulation_boundary(number + 1 == len(todo))
        engine.backward(loss * ranks, scale_wrt_gas=False)
        total += loss.item()
    return total


def _update(engine: Any, stage: int) -> float:
    from raysys.training.expert_groups import clip_gradients

    if stage == 0:
        norm = clip_gradients(engine.module, CLIP)
        engine.step()
        return norm
    engine.step()
    return float(engine.get_global_grad_norm())


def native_save(rank: int, ranks: int, port: int, *, folder: Path) -> str:
    """What DeepSpeed's own checkpoint says of split experts."""
    from raysys.errors import CheckpointError

    engine = _engine(rank, ranks, port, 2, 1, SHAPE, "float32", False)
    try:
        engine.save_checkpoint(str(folder), tag="state", save_latest=False)
    except CheckpointError as error:
        return str(error)
    return "saved"


def norms_of(rank: int, ranks: int, port: int, *, value: float) -> tuple[float, np.ndarray]:
    """The norm that `clip_gradients` finds where every gradient is `value`, and what it makes of one of them."""
    from raysys.training.expert_groups import clip_gradients

    model = _engine(rank, ranks, port, 2, 0, SHAPE, "float32", False).module
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    return clip_gradients(model, 1.0), next(model.parameters()).grad.numpy()
