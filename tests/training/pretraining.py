"""What ranks run to pretrain a small mixture of experts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raysys.config.pretraining import PretrainMoeConfig
from raysys.pretraining_points import Storage
from raysys.pretraining_work import Work, _validate
from raysys.training.pretrain_spec import PretrainSpec, Sequences
from raysys.training.pretrainer import Pretrainer

VOCABULARY, SEQUENCE = 50, 24


def config(**values: Any) -> PretrainMoeConfig:
    model = {"width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "experts": 4, "top_k": 2, "expert_width": 12, "deviation": 0.1}
    model |= values.pop("model", {})
    trainer = {"threads": 1, **values.pop("trainer", {})}
    optimiser = {"learning_rate": 3e-3, "clip": 0.5, "epsilon": 1e-4, "warmup_steps": 0, **values.pop("optimiser", {})}
    data = {"sources": {"all": {"path": "x"}}, "tokenizer": "none", "sequence": SEQUENCE}
    whole = {"steps": 8, "batch": 4, "accumulation": 2, "balance_weight": 0.05, "z_weight": 0.01, "data": data, **values}
    return PretrainMoeConfig(**whole, model=model, trainer=trainer, optimiser=optimiser)  # type: ignore[arg-type]


def sequences(step: int, count: int = 4) -> list[Sequences]:
    """Some of several documents, one shorter than the others."""
    rng = np.random.default_rng(step)
    found = []
    for number in range(count):
        size = SEQUENCE if number else SEQUENCE - 7
        cut = int(rng.integers(1, size - 1))
        found.append(Sequences(rng.integers(0, VOCABULARY, size), np.array([cut, size - cut])))
    return found


def joined(parts: list[Sequences]) -> Sequences:
    if not parts:
        return Sequences.none()
    return Sequences(np.concatenate([part.ids for part in parts]), np.concatenate([part.lengths for part in parts]))


def shares(step: int, passes: int, rank: int, ranks: int, empty: bool = False) -> list[Sequences]:
    """This rank's part of each pass. With `empty` the last rank has nothing."""
    per_pass = 4 // passes
    found = []
    for number in range(passes):
        rows = sequences(step)[number * per_pass : (number + 1) * per_pass]
        if empty:
            mine = rows if rank == 0 else []
        else:
            mine = [row for place, row in enumerate(rows) if place * ranks // per_pass == rank]
        found.append(joined(mine))
    return found


def made(rank: int, ranks: int, port: int, of: PretrainMoeConfig, vocabulary: int = VOCABULARY, dtype: str = "float32") -> Pretrainer:
    where = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in where.items()}
    return Pretrainer(PretrainSpec(of, vocabulary, None, "cpu", dtype))


def trained(
    rank: int,
    ranks: int,
    port: int,
    of: PretrainMoeConfig,
    steps: int = 3,
    empty: bool = False,
    folder: str = "",
    load: str = "",
    same: bool = False,
) -> tuple[list[dict[str, float]], dict[str, Any], dict[str, Any]]:
    """Metrics of each step, what is watched of the routers, and the stock tensors at the end."""
    from raysys.models.moe_files import hub_tensors

    pretrainer = made(rank, ranks, port, of)
    if load:
        pretrainer.load(Path(load))
    first = pretrainer.step_index
    metrics = [pretrainer.step(shares(0 if same else step, of.accumulation, rank, ranks, empty)) for step in range(first, first + steps)]
    if folder:
        pretrainer.save(Path(folder))
    watched = pretrainer.routers() | {"validation": pretrainer.validate(shares(99, 2, rank, ranks, empty))}
    tensors = {name: tensor.double().numpy() for name, tensor in hub_tensors(pretrainer.model, pretrainer._opened)}
    return metrics, watched, tensors


def overwritten_by_hand(rank: int, ranks: int, port: int, of: PretrainMoeConfig, steps: int = 3) -> Any:
    """As `trained`, of the in-place mode: a plain router at stage 0, overwritten from outside before the first step and after each."""
    import torch

    from raysys.models.moe_files import hub_tensors

    changed = {"router": of.router.model_copy(update={"mpi": False}), "trainer": of.trainer.model_copy(update={"zero_stage": 0})}
    pretrainer, metrics = made(rank, ranks, port, of.model_copy(update=changed)), []

    @torch.no_grad()
    def overwrite() -> None:
        for mixture in pretrainer.model.mixtures():
            weight, gate = mixture.router.weight, mixture.experts.gate
            rows = torch.einsum("nd,nfd,nfe->ne", weight, gate, gate)
            weight.copy_(of.router.scale / len(weight) ** 0.5 * rows / rows.norm(dim=-1, keepdim=True))

    overwrite()
    for step in range(steps):
        metrics.append(pretrainer.step(shares(step, of.accumulation, rank, ranks)))
        overwrite()
    watched = pretrainer.routers() | {"validation": pretrainer.validate(shares(99, 2, rank, ranks))}
    return metrics, watched, {name: tensor.double().numpy() for name, tensor in hub_tensors(pretrainer.model)}


def overwritten_masters(rank: int, ranks: int, port: int, of: PretrainMoeConfig, steps: int = 2) -> list[tuple[bool, bool]]:
    """In bfloat16, of each layer: whether its router's master became the rows of what it was after the last step, not of the rounded
    weights; and whether the model has these rows, rounded."""
    from raysys.methods.mpi import effective_router
    from raysys.training.expert_states import master

    pretrainer, wanted = made(rank, ranks, port, of, dtype="bfloat16"), []
    overwrite, mixtures = pretrainer._overwrite, list(pretrainer.model.mixtures())

    def watched() -> None:
        before = [master(pretrainer.engine, one.router.weight) for one in mixtures]
        wanted[:] = [effective_router(row, one.experts.gate, of.router.scale / 2) for row, one in zip(before, mixtures, strict=True)]
        overwrite()

    pretrainer._overwrite = watched  # type: ignore[method-assign]
    for step in range(steps):
        pretrainer.step(shares(step, of.accumulation, rank, ranks))
    found = [(master(pretrainer.engine, one.router.weight), one.router.weight) for one in mixtures]
    return [
        (bool((whole == rows).all()), bool((whole.bfloat16() == weight).all())) for (whole, weight), rows in zip(found, wanted, strict=True)
    ]


def gradients(rank: int, ranks: int, port: int, of: PretrainMoeConfig) -> tuple[float, int]:
    """Bytes of gradients that a rank in bfloat16 holds between backward and step, buckets aside; and its parameters."""
    pretrainer = made(rank, ranks, port, of, dtype="bfloat16")
    held: list[int] = []

    def measured() -> None:
        optimizer, parameters = pretrainer.engine.optimizer, list(pretrainer.model.parameters())
        flat = [*getattr(optimizer, "fp32_groups_gradients_flat", []), getattr(optimizer, "grad_partitions_flat_buffer", None)]
        flat += [
            group.flat_partition for group in getattr(optimizer, "averaged_gradients", {}).values() if hasattr(group, "flat_partition")
        ]
        held.append(sum(one.nbytes for one in [*flat, *(parameter.grad for parameter in parameters)] if one is not None))

    step = pretrainer.engine.step
    pretrainer.engine.step = lambda: (measured(), step())
    pretrainer.step(shares(0, of.accumulation, rank, ranks))
    return held[0], pretrainer.parameters


def held_out(rank: int, ranks: int, port: int, of: PretrainMoeConfig, cache: str, plan: str) -> tuple[float, list[int]]:
    """The held-out loss of first weights, as a run measures it, and the sequences of this rank's part of each pass."""
    pretrainer, sizes = made(rank, ranks, port, of, vocabulary=300), []
    forward = pretrainer.validate

    def counted(passes: Sequence[Sequences]) -> float:
        sizes.extend(len(part.ids) // SEQUENCE for part in passes)
        return forward(passes)

    pretrainer.validate = counted  # type: ignore[method-assign]
    storage = Storage.of(Path(cache), None)
    return _validate(pretrainer, Work(pretrainer.spec, Path(cache), "job", "none", cache, plan, storage)), sizes
