"""NSDS on one layer of a large model's shapes (random weights), and what the whole model takes, against decomposing [D, D] circuits.

* `ours`: `methods.nsds.layer_series`, measured whole; and `basis`, the unembedding, once a model: measured on an eighth of its rows, and
  eightfold but for its one decomposition.
* `dense`: the other route, extrapolated: one [D, D] matrix is decomposed (float64, all vectors), times two for each query head and three
  for the MLP. That is a lower bound, since [F, D] takes longer than [D, D] and products and kurtosis are left out.

The model is extrapolated from one layer: `layers` times it and the basis, over `cores`. Seconds are processor time of one thread. Memory is
the high-water mark of resident memory of a fresh process, beyond what it had with the layer's weights loaded, over the bytes of these.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raysys.methods.nsds import layer_series, unembedding_basis
from tests.bench.peak import own_memory

DEFAULTS: dict[str, Any] = {
    "width": 4096,
    "inner": 12288,
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "vocabulary": 151936,
    "layers": 36,
    "cores": 2,
    "dtype": "bfloat16",
}
MIB = 2**20


def run(layers: int, cores: int, **size: Any) -> dict[str, Any]:
    call = [sys.executable, "-m", "tests.bench.nsds", json.dumps(size)]
    done = subprocess.run(call, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    found = json.loads(done.stdout.splitlines()[-1])
    dense = (2 * size["heads"] + 3) * found["square_seconds"]
    return {
        **found,
        "dense_layer_seconds_extrapolated": dense,
        "share_of_dense": found["layer_seconds"] / dense,
        "model_minutes_extrapolated": (layers * found["layer_seconds"] + found["basis_seconds"]) / cores / 60,
        "targets": {"share_of_dense": 1 / 20, "model_minutes_extrapolated": 60, "peak_over_layer": 0.1},
    }


def table(figures: dict[str, Any]) -> list[list[Any]]:
    return [["figure", "value"], *([name, value] for name, value in figures.items() if name != "targets")]


def _layer(width: int, inner: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = {
        "q_proj": (heads * head_dim, width),
        "k_proj": (kv_heads * head_dim, width),
        "v_proj": (kv_heads * head_dim, width),
        "o_proj": (width, heads * head_dim),
        "gate_proj": (inner, width),
        "up_proj": (inner, width),
        "down_proj": (width, inner),
    }
    return {name: (torch.randn(shape) * width**-0.5).to(dtype) for name, shape in shapes.items()}


def _measure(vocabulary: int, dtype: str, **size: Any) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kind, width = getattr(torch, dtype), size["width"]
    head = (torch.randn(vocabulary // 8, width) * width**-0.5).to(kind)
    began = time.process_time()
    basis = unembedding_basis(head)
    eighth = time.process_time() - began
    gram = head[:width].double().T @ head[:width].double()
    began = time.process_time()
    torch.linalg.eigh(gram)
    took = {"eigh_seconds": time.process_time() - began}
    took["basis_seconds"] = 8 * max(0.0, eighth - took["eigh_seconds"]) + took["eigh_seconds"]
    del head, gram
    layer = _layer(**size, dtype=kind)
    held, before = sum(weight.nbytes for weight in layer.values()), own_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    started = time.perf_counter()
    began = time.process_time()
    layer_series(layer, basis, size["heads"], size["kv_heads"], size["head_dim"])
    took["layer_seconds"] = time.process_time() - began
    took["layer_wall_seconds"] = time.perf_counter() - started
    extra = own_memory("VmHWM") - before
    del layer
    square = torch.randn(width, width, dtype=torch.float64)
    began = time.process_time()
    torch.linalg.svd(square)
    took["square_seconds"] = time.process_time() - began
    return {**took, "layer_mib": held / MIB, "extra_mib": extra / MIB, "peak_over_layer": extra / held}


if __name__ == "__main__":
    print(json.dumps(_measure(**json.loads(sys.argv[1]))))
