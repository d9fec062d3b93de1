"""The fused log-probs against the plain form (logits, log_softmax, gather, backward) at a real vocabulary.

Forms: `score`, log-probs of one id a position without gradient; `sft`, the same with gradients of hidden and unembedding, made in the
forward pass as a training step does; `autograd`, the same with a backward pass of its own; `hpd`, one draw a position, then log-probs of it
and of one more id, with a backward pass. The plain form draws with torch.multinomial from float32 probabilities.
On a GPU with liger-kernel installed its fused linear cross-entropy stands beside `sft`.

Time: the sides alternate in one process, medians over the repeats; beside the wall clock the ratio of processor time, which other work on a
shared machine touches less when `threads=1`. Memory: peak beyond the inputs, and how much of it are the gradients, which any form
needs; on a GPU the allocator's own peak, on CPU the high-water mark of resident memory of a fresh process each.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raysys.methods.logprobs import draw_logprobs, surrogate, token_logprobs
from tests.bench.peak import own_memory

DEFAULTS: dict[str, Any] = {
    "tokens": None,
    "width": 1536,
    "vocabulary": 151_936,
    "chunk_tokens": 8192,
    "repeats": 3,
    "dtypes": ["float32", "bfloat16"],
    "forms": ["score", "sft", "hpd"],
    "plain": True,
    "threads": None,
}
TOKENS = {"cuda": {"float32": 8192, "bfloat16": 8192}, "cpu": {"float32": 1024, "bfloat16": 64}}
"""Where `tokens` is null. A processor without instructions for bfloat16 takes minutes for the plain form of a thousand."""
MIB = 2**20

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def run(
    tokens: int | None,
    width: int,
    vocabulary: int,
    chunk_tokens: int,
    repeats: int,
    dtypes: list[str],
    forms: list[str],
    plain: bool,
    threads: int | None,
) -> dict[str, Any]:
    """Figures by dtype and form. `plain=False` leaves the plain side out, for sizes at which it does not fit."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if threads:
        torch.set_num_threads(threads)
    shared = {"width": width, "vocabulary": vocabulary, "chunk_tokens": chunk_tokens, "device": device, "threads": torch.get_num_threads()}
    rows = []
    for dtype in dtypes:
        for form in forms:
            size = {**shared, "tokens": tokens or TOKENS[device][dtype], "dtype": dtype, "form": form}
            sides = ["fused", *(["plain"] if plain else []), *(["liger"] if _liger_runs(size) else [])]
            rows.append(_compare(size, sides, repeats))
    targets = {"memory_ratio": 1 / 8, "time_ratio": 1.05 if device == "cpu" else 1.0}
    return {"size": shared, "rows": rows, "targets": targets}


def table(figures: dict[str, Any]) -> list[list[Any]]:
    heads = {
        "dtype": "dtype",
        "form": "form",
        "tokens": "tokens",
        "plain_seconds": "plain s",
        "fused_seconds": "fused s",
        "time_ratio": "time",
        "processor_ratio": "processor time",
        "plain_mib": "plain MiB",
        "fused_mib": "fused MiB",
        "gradient_mib": "of it gradients",
        "memory_ratio": "memory",
        "liger_time_ratio": "time / Liger's",
        "liger_memory_ratio": "memory / Liger's",
        "largest_gap": "largest gap",
    }
    keys = [key for key in heads if any(row.get(key) is not None for row in figures["rows"])]
    return [[heads[key] for key in keys], *(["" if row.get(key) is None else row[key] for key in keys] for row in figures["rows"])]


def _compare(size: dict[str, Any], sides: list[str], repeats: int) -> dict[str, Any]:
    memory = {side: _peak(size, side) / MIB for side in sides}
    inputs = _inputs(size)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    processor: dict[str, list[float]] = {side: [] for side in sides}
    last: dict[str, Tensor] = {}
    for repeat in range(repeats + 1):
        for side in sides:
            started, spent = time.perf_counter(), time.process_time()
            last[side] = _once(side, inputs, size)
            _wait(size)
            if repeat:  # the first round warms caches and the allocator
                seconds[side].append(time.perf_counter() - started)
                processor[side].append(time.process_time() - spent)
    wall = {side: statistics.median(values) for side, values in seconds.items()}
    spent_by = {side: statistics.median(values) for side, values in processor.items()}
    row: dict[str, Any] = {key: size[key] for key in ("dtype", "form", "tokens")}
    row |= {f"{side}_seconds": wall[side] for side in sides} | {f"{side}_all_seconds": seconds[side] for side in sides}
    row |= {f"{side}_processor_seconds": spent_by[side] for side in sides} | {f"{side}_mib": memory[side] for side in sides}
    row["gradient_mib"] = 0.0 if size["form"] == "score" else sum(x.nbytes for x in inputs[:2]) / MIB
    if "plain" in sides:
        row |= {"time_ratio": wall["fused"] / wall["plain"], "processor_ratio": spent_by["fused"] / spent_by["plain"]}
        row |= {"memory_ratio": memory["fused"] / memory["plain"], "largest_gap": (last["plain"] - last["fused"]).abs().max().item()}
    if "liger" in sides:
        row |= {"liger_time_ratio": wall["fused"] / wall["liger"], "liger_memory_ratio": memory["fused"] / memory["liger"]}
    return row


def _inputs(size: dict[str, Any]) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    kind = {"dtype": getattr(torch, size["dtype"]), "device": size["device"]}
    hidden = torch.randn(size["tokens"], size["width"], generator=generator).to(**kind).requires_grad_()
    # In place: a temporary copy would count towards the high-water mark.
    weight = torch.randn(size["vocabulary"], size["width"], generator=generator).mul_(size["width"] ** -0.5).to(**kind).requires_grad_()
    ids = torch.randint(0, size["vocabulary"], (size["tokens"],), generator=generator).to(size["device"])
    uniform = torch.rand(size["tokens"], generator=generator, dtype=torch.float64).to(size["device"])
    return hidden, weight, ids, uniform


def _once(side: str, inputs: Inputs, size: dict[str, Any]) -> Tensor:
    """Runs one form once; log-probs [N] of the asked-for ids."""
    hidden, unembedding, ids, _ = inputs
    hidden.grad = unembedding.grad = None
    with torch.set_grad_enabled(size["form"] != "score"):
        if side == "liger":
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

            out = -LigerFusedLinearCrossEntropyLoss()(unembedding, hidden, ids)[None]
        elif side == "fused" and size["form"] == "sft":
            return _in_forward(inputs, size)[:, 0]
        else:
            out = (_plain if side == "plain" else _fused)(inputs, size)
    if out.requires_grad:
        out.backward(torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape))
    return out.detach().view(len(out), -1)[:, 0]


def _plain(inputs: Inputs, size: dict[str, Any]) -> Tensor:
    hidden, unembedding, ids, _ = inputs
    logprobs = torch.log_softmax((hidden @ unembedding.T).float(), -1)
    wanted = ids[:, None]
    if size["form"] == "hpd":
        wanted = torch.cat([wanted, torch.multinomial(logprobs.detach().exp(), 1)], 1)
    return logprobs.gather(1, wanted)


def _fused(inputs: Inputs, size: dict[str, Any]) -> Tensor:
    hidden, unembedding, ids, uniform = inputs
    if size["form"] == "hpd":
        return draw_logprobs(hidden, unembedding, ids, uniform, chunk_tokens=size["chunk_tokens"]).logprobs
    return token_logprobs(hidden, unembedding, ids, chunk_tokens=size["chunk_tokens"])[:, None]


def _in_forward(inputs: Inputs, size: dict[str, Any]) -> Tensor:
    """Gradients and log-probs, for the same derivatives that the other sides' backward passes start from."""
    hidden, unembedding, ids, _ = inputs
    slopes = torch.linspace(-1, 1, len(ids), device=ids.device)
    made = surrogate(hidden, unembedding, ids, lambda rows, *_: slopes[rows, None], chunk_tokens=size["chunk_tokens"])
    made.value.backward()
    return made.logprobs[:, None]


def _liger_runs(size: dict[str, Any]) -> bool:
    return size["device"] == "cuda" and size["form"] == "sft" and importlib.util.find_spec("liger_kernel") is not None


def _wait(size: dict[str, Any]) -> None:
    if size["device"] == "cuda":
        torch.cuda.synchronize()


def _peak(size: dict[str, Any], side: str) -> int:
    """Bytes at the peak beyond the inputs."""
    if size["device"] == "cuda":
        return _measure(size, side)
    call = [sys.executable, "-m", "tests.bench.fused_loss", json.dumps([size, side])]
    return int(subprocess.run(call, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]).stdout)


def _measure(size: dict[str, Any], side: str) -> int:
    # A small pass first: libraries, threads and their buffers are no part of either form.
    small = {**size, "tokens": 4, "vocabulary": 512}
    _once(side, _inputs(small), small)
    inputs = _inputs(size)
    if size["device"] == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _once(side, inputs, size)
        return torch.cuda.max_memory_allocated() - before
    before = own_memory("VmRSS")
    _once(side, inputs, size)
    return own_memory("VmHWM") - before


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    torch.set_num_threads(wanted[0]["threads"])
    print(_measure(*wanted))
