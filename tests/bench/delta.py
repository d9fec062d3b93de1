"""Would a push of what changed be smaller? How much of a model's bytes one AdamW step leaves as it was, by learning rate.

A small causal model with float32 masters learns random text; after each step it is rounded to bfloat16, as engines get it. Counted are
whole tensors, buckets and single numbers that are bit for bit those of the step before, and the bytes of a sparse form (a 4-byte index and
the value of each number that changed) against all bytes. Steps before `warm` are left out: Adam's first ones are larger.
"""

from __future__ import annotations

import statistics
import tempfile
from typing import Any

DEFAULTS: dict[str, Any] = {"rates": [1e-3, 1e-4, 1e-5, 1e-6], "steps": 12, "warm": 6, "bucket_mib": 1, "hidden_size": 128, "layers": 4}
SPARSE_BYTES = {"float32": 8, "bfloat16": 6}


def run(rates: list[float], steps: int, warm: int, bucket_mib: int, hidden_size: int, layers: int) -> dict[str, Any]:
    """Median shares that are unchanged, by learning rate and dtype."""
    return {f"{rate:g}": _shares(rate, steps, warm, bucket_mib, hidden_size, layers) for rate in rates}


def _shares(rate: float, steps: int, warm: int, bucket_mib: int, hidden_size: int, layers: int) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from raysys.config.runs import NewModel
    from raysys.models.scratch import new_causal

    sizes = NewModel(hidden_size=hidden_size, layers=layers, ffn_size=3 * hidden_size, initializer_range=0.06)
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(new_causal(sizes, folder, seed=0), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.999), weight_decay=0.01)
    dice = torch.Generator().manual_seed(0)
    before: dict[str, list[Any]] = {}
    found: dict[str, list[dict[str, float]]] = {"float32": [], "bfloat16": []}
    for step in range(steps):
        ids = torch.randint(3, model.config.vocab_size, (8, 64), generator=dice)
        model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for dtype in found:
            now = [parameter.detach().to(getattr(torch, dtype), copy=True).flatten() for parameter in model.parameters()]
            if step > warm:
                found[dtype].append(_unchanged(before[dtype], now, bucket_mib << 20, SPARSE_BYTES[dtype]))
            before[dtype] = now
    return {dtype: {key: statistics.median(one[key] for one in rows) for key in rows[0]} for dtype, rows in found.items()}


def _unchanged(before: list[Any], now: list[Any], bucket_bytes: int, sparse_bytes: int) -> dict[str, float]:
    from raysys.training.weights import bucketed

    same = [(old == new) for old, new in zip(before, now, strict=True)]
    whole = [bool(one.all()) for one in same]
    buckets = bucketed({str(index): new.nbytes for index, new in enumerate(now)}, bucket_bytes)
    numbers = sum(one.numel() for one in same)
    changed = numbers - sum(int(one.sum()) for one in same)
    return {
        "tensors": sum(whole) / len(whole),
        "buckets": sum(all(whole[int(name)] for name in bucket) for bucket in buckets) / len(buckets),
        "numbers": 1 - changed / numbers,
        "sparse_bytes": changed * sparse_bytes / sum(new.nbytes for new in now),
    }


def table(figures: dict[str, Any]) -> list[list[Any]]:
    head = ["learning rate", "dtype", "unchanged tensors", "buckets", "numbers", "bytes of a sparse push / all"]
    keys = ("tensors", "buckets", "numbers", "sparse_bytes")
    return [head, *([rate, dtype, *(one[key] for key in keys)] for rate, both in figures.items() for dtype, one in both.items())]
