"""What MPI adds to a step: forward and backward of decoder layers at the 1B model's shapes, plain router against MPI, by turns.

Embedding and head are small here, as they are the same on both sides: the share that MPI adds to a whole model's step is smaller still.
A round's ratio compares neighbours in time; the table shows the median of these, and the smallest and the largest.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from raysys.models.moe import MoeDecoder, MoeShape, next_token_loss
from raysys.models.packing import Packing
from raysys.models.routing import Routing, balance_loss

DEFAULTS: dict[str, Any] = {
    "tokens": 4096,
    "sequence": 2048,
    "layers": 1,
    "width": 1024,
    "heads": 8,
    "kv_heads": 8,
    "head_dim": 128,
    "experts": 64,
    "top_k": 8,
    "expert_width": 512,
    "vocabulary": 1024,
    "dtype": None,
    "rounds": 5,
}
SIDES = {"plain": Routing(mpi=False), "mpi": Routing(), "mpi, 10 iterations": Routing(iterations=10)}


def run(tokens: int, sequence: int, dtype: str | None, rounds: int, **size: Any) -> dict[str, Any]:
    """Seconds of a step by side, and each round's ratio to the plain router's."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = getattr(torch, dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    models = {label: MoeDecoder(MoeShape(**size, routing=routing)).initialise(0).to(device, kind) for label, routing in SIDES.items()}
    ids = torch.randint(size["vocabulary"], (tokens,), generator=torch.Generator().manual_seed(0)).to(device)
    rows = Packing([sequence] * (tokens // sequence), device)
    seconds: dict[str, list[float]] = {label: [] for label in models}
    for turn in range(rounds + 1):
        for label in list(models) if turn % 2 else reversed(list(models)):
            took = _step(models[label], ids, rows, device)
            if turn:  # the first round warms caches and the allocator
                seconds[label].append(took)
    found = []
    for label, values in seconds.items():
        ratios = [value / plain for value, plain in zip(values, seconds["plain"], strict=True)]
        found.append({"side": label, "seconds": statistics.median(values), "ratios": ratios})
    return {"device": str(device), "dtype": str(kind), "threads": torch.get_num_threads(), "rows": found}


def table(figures: dict[str, Any]) -> list[list[Any]]:
    body = [
        [row["side"], row["seconds"], statistics.median(row["ratios"]), min(row["ratios"]), max(row["ratios"])] for row in figures["rows"]
    ]
    return [["router", "s a step", "to plain", "lowest", "highest"], *body]


def _step(model: MoeDecoder, ids: torch.Tensor, rows: Packing, device: torch.device) -> float:
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    nll, count, routed = next_token_loss(model, ids, rows)
    (nll / count + 0.01 * torch.stack([balance_loss(one) for one in routed]).mean()).backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
