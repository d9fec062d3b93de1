"""Blockwise log-probs against the plain form (logits, log_softmax, gather) at a real vocabulary, forward and backward.

Time: both forms alternate in one process, medians over the repeats; beside the wall clock the ratio of processor time,
which other work on a shared machine does not touch when `threads=1`. Memory: peak beyond the inputs, gradients of hidden and
unembedding included; on a GPU the allocator's own peak, on CPU the high-water mark of resident memory of a fresh process each.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raysys.methods.logprobs import token_logprobs

DEFAULTS: dict[str, Any] = {
    "tokens": None,
    "width": None,
    "vocabulary": 151_936,
    "chunk_tokens": 1024,
    "repeats": 5,
    "dtype": None,
    "threads": None,
}
FORMS = ("plain", "blockwise")
PASSES = ("forward", "forward and backward")
MIB = 2**20


def run(
    tokens: int | None, width: int | None, vocabulary: int, chunk_tokens: int, repeats: int, dtype: str | None, threads: int | None
) -> dict[str, Any]:
    """Figures by dtype and pass. Null sizes: 1,024 x 256 on CPU, 8,192 x 2,560 on a GPU; null dtype: float32, on a GPU bfloat16 too."""
    gpu = torch.cuda.is_available()
    if threads:
        torch.set_num_threads(threads)
    size = {
        "tokens": tokens or (8192 if gpu else 1024),
        "width": width or (2560 if gpu else 256),
        "vocabulary": vocabulary,
        "chunk_tokens": chunk_tokens,
        "device": "cuda" if gpu else "cpu",
        "threads": torch.get_num_threads(),
    }
    kinds = [dtype] if dtype else ["bfloat16", "float32"] if gpu else ["float32"]
    rows = [_compare({**size, "dtype": kind}, name, repeats) for kind in kinds for name in PASSES]
    return {"size": size, "rows": rows, "targets": {"memory_ratio": 1 / 8, "time_ratio": 1.1}}


def table(figures: dict[str, Any]) -> list[list[Any]]:
    head = [
        "dtype",
        "pass",
        "plain s",
        "blockwise s",
        "time ratio",
        "processor ratio",
        "plain MiB",
        "blockwise MiB",
        "memory ratio",
        "largest gap",
    ]
    keys = [
        "dtype",
        "pass",
        "plain_seconds",
        "blockwise_seconds",
        "time_ratio",
        "processor_ratio",
        "plain_mib",
        "blockwise_mib",
        "memory_ratio",
        "largest_gap",
    ]
    return [head, *([row[key] for key in keys] for row in figures["rows"])]


def _compare(size: dict[str, Any], name: str, repeats: int) -> dict[str, Any]:
    memory = {form: _peak(size, form, name) / MIB for form in FORMS}
    inputs = _inputs(size)
    backward = name != PASSES[0]
    gap = (_once("plain", inputs, size, False) - _once("blockwise", inputs, size, False)).abs().max().item()
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    processor: dict[str, list[float]] = {form: [] for form in FORMS}
    for repeat in range(repeats + 1):
        for form in FORMS:
            started, spent = time.perf_counter(), time.process_time()
            _once(form, inputs, size, backward)
            _wait(size)
            if repeat:  # the first round warms caches and the allocator
                seconds[form].append(time.perf_counter() - started)
                processor[form].append(time.process_time() - spent)
    middle = {form: statistics.median(values) for form, values in seconds.items()}
    return {
        "dtype": size["dtype"],
        "pass": name,
        **{f"{form}_seconds": middle[form] for form in FORMS},
        **{f"{form}_all_seconds": seconds[form] for form in FORMS},
        "time_ratio": middle["blockwise"] / middle["plain"],
        "processor_ratio": statistics.median(processor["blockwise"]) / statistics.median(processor["plain"]),
        **{f"{form}_mib": memory[form] for form in FORMS},
        "memory_ratio": memory["blockwise"] / memory["plain"],
        "largest_gap": gap,
    }


def _inputs(size: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    kind = {"dtype": getattr(torch, size["dtype"]), "device": size["device"]}
    hidden = torch.randn(size["tokens"], size["width"], generator=generator).to(**kind).requires_grad_()
    # In place: a temporary copy would count towards the high-water mark.
    unembedding = (
        torch.randn(size["vocabulary"], size["width"], generator=generator).mul_(size["width"] ** -0.5).to(**kind).requires_grad_()
    )
    ids = torch.randint(0, size["vocabulary"], (size["tokens"],), generator=generator).to(size["device"])
    return hidden, unembedding, ids


def _once(form: str, inputs: tuple[Tensor, Tensor, Tensor], size: dict[str, Any], backward: bool) -> Tensor:
    hidden, unembedding, ids = inputs
    hidden.grad = unembedding.grad = None
    with torch.set_grad_enabled(backward):
        if form == "plain":
            out = torch.log_softmax((hidden @ unembedding.T).float(), -1).gather(1, ids[:, None])[:, 0]
        else:
            out = token_logprobs(hidden, unembedding, ids, chunk_tokens=size["chunk_tokens"])
    if backward:
        out.backward(torch.linspace(-1, 1, len(out), device=out.device))
    return out.detach()


def _wait(size: dict[str, Any]) -> None:
    if size["device"] == "cuda":
        torch.cuda.synchronize()


def _peak(size: dict[str, Any], form: str, name: str) -> int:
    """Bytes at the peak beyond the inputs."""
    if size["device"] == "cuda":
        return _measure(size, form, name)
    call = [sys.executable, "-m", "tests.bench.logprobs", json.dumps([size, form, name])]
    return int(subprocess.run(call, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]).stdout)


def _measure(size: dict[str, Any], form: str, name: str) -> int:
    # A small pass first: libraries, threads and their buffers are no part of either form.
    small = {**size, "tokens": 4, "vocabulary": 512}
    _once(form, _inputs(small), small, True)
    inputs = _inputs(size)
    if size["device"] == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _once(form, inputs, size, name != PASSES[0])
        return torch.cuda.max_memory_allocated() - before
    before = _status("VmRSS")
    _once(form, inputs, size, name != PASSES[0])
    return _status("VmHWM") - before


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM at the highest since the process began."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    torch.set_num_threads(wanted[0]["threads"])
    print(_measure(*wanted))
