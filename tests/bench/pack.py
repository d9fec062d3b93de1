"""Packing codes into dense words and back, bytes of packed words a second on one core, beside a copy of those words (memcpy).

All three make their own result. Beyond some size the allocator asks the system for each, whose pages are then touched for the first time:
that is part of all figures, and most of what unpacking many codes takes.

Times are processor time, the least of some rounds in turn: other work on the machine stretches the wall clock. The first call of a width
compiles (once a machine, where a folder can be written): `first_seconds` is its wall time.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from raysys.compression.packing import pack, unpack

DEFAULTS: dict[str, Any] = {"rows": 12288, "columns": 4096, "bits": [2, 3, 4, 5, 6, 8], "rounds": 7}


def run(rows: int, columns: int, bits: list[int], rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return {
        "shape": [rows, columns],
        "bits": {str(width): _measured(rows, columns, width, rounds) for width in bits},
        "targets": {"pack_gb_per_second": 1.0},
    }


def table(figures: dict[str, Any]) -> list[list[Any]]:
    keys = list(next(iter(figures["bits"].values())))
    return [["bits", *keys], *([width, *(found[key] for key in keys)] for width, found in figures["bits"].items())]


def _measured(rows: int, columns: int, width: int, rounds: int) -> dict[str, float]:
    codes = torch.randint(-(2 ** (width - 1)), 2 ** (width - 1), (rows, columns), dtype=torch.int8)
    began = time.perf_counter()
    packed = pack(codes, width)
    first = time.perf_counter() - began
    assert torch.equal(unpack(packed, width, columns), codes)
    jobs = {
        "pack": lambda: pack(codes, width),
        "unpack": lambda: unpack(packed, width, columns),
        "memcpy": lambda: packed.clone(),
    }
    least = dict.fromkeys(jobs, float("inf"))
    for _ in range(rounds):
        for name, job in jobs.items():
            began = time.process_time()
            job()
            least[name] = min(least[name], time.process_time() - began)
    speeds = {name: packed.nbytes / seconds / 1e9 for name, seconds in least.items()}
    return {
        "pack_gb_per_second": speeds["pack"],
        "unpack_gb_per_second": speeds["unpack"],
        "memcpy_gb_per_second": speeds["memcpy"],
        "codes_per_ns": codes.numel() / least["pack"] / 1e9,
        "first_seconds": first,
    }
