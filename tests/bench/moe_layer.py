"""The mixture-of-experts block, forward and backward, against transformers' Qwen3-MoE block in its experts' implementations, with the
same weights and router, and against the matrix products alone.

Of its implementations two need kernels from a hub (`deepgemm`, `sonicmoe`), and `batched_mm` copies the matrices of every choice of an
expert: 206 GB in float32 for 4,096 tokens of 8 choices each at the 1B layer's sizes. `peers` names them where they can run.

The products alone: nine of each expert's, of as many rows as it gets if all get the same, into memory that is there already. Time: sides
alternate in one process, medians over the repeats. Memory: peak beyond weights and input, the gradients included, in a fresh process each
(on CPU its high-water mark of resident memory).
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
from torch import Tensor, nn

from raysys.models.moe import Mixture, MoeShape
from raysys.models.routing import Routing
from tests.bench.peak import own_memory

DEFAULTS: dict[str, Any] = {
    "tokens": 4096,
    "width": 1024,
    "experts": 64,
    "top_k": 8,
    "expert_width": 512,
    "dtype": None,
    "repeats": 3,
    "peers": ["eager", "grouped_mm"],
}
MIB = 2**20


def run(repeats: int, peers: list[str], **size: Any) -> dict[str, Any]:
    """Figures by side; ratios are to the best peer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size |= {"device": device, "dtype": size["dtype"] or ("bfloat16" if device == "cuda" else "float32")}
    sides = ["ours", *peers, "products"]
    memory = {side: _peak(size, side) for side in sides}
    blocks = {side: _block(size, side) for side in sides}
    x = _input(size)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    outputs: dict[str, Tensor] = {}
    for repeat in range(repeats + 1):
        for side in sides:
            started = time.perf_counter()
            outputs[side] = blocks[side](x)
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first round warms caches and the allocator
                seconds[side].append(time.perf_counter() - started)
    wall = {side: statistics.median(values) for side, values in seconds.items()}
    rows = [
        {
            "side": side,
            "seconds": wall[side],
            "all_seconds": seconds[side],
            "speed": wall[side] and min(wall[peer] for peer in peers) / wall[side],
            "share_of_products": wall["products"] / wall[side],
            "mib": memory[side],
            "gap": None if side == "products" else (outputs[side] - outputs["ours"]).abs().max().item(),
        }
        for side in sides
    ]
    return {"size": size, "threads": torch.get_num_threads(), "rows": rows, "targets": {"speed": 1.2 if device == "cpu" else 1.0}}


def table(figures: dict[str, Any]) -> list[list[Any]]:
    heads = {"side": "side", "seconds": "s", "speed": "speed to the best peer", "share_of_products": "share of the products' speed"}
    heads |= {"mib": "peak MiB", "gap": "largest gap to ours"}
    return [list(heads.values()), *(["" if row[key] is None else row[key] for key in heads] for row in figures["rows"])]


def _shape(size: dict[str, Any]) -> MoeShape:
    rest = {"vocabulary": 8, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 64, "routing": Routing(mpi=False)}
    return MoeShape(**rest, **{key: size[key] for key in ("width", "experts", "top_k", "expert_width")})


def _input(size: dict[str, Any]) -> Tensor:
    made = torch.randn(size["tokens"], size["width"], generator=torch.Generator().manual_seed(1))
    return made.to(size["device"], getattr(torch, size["dtype"]))


def _block(size: dict[str, Any], side: str) -> Any:
    """A function from x to the output, after which x and all weights have their gradients."""
    shape, kind = _shape(size), {"device": size["device"], "dtype": getattr(torch, size["dtype"])}
    if side == "products":
        return _products(size, kind)
    block = _ours(shape) if side == "ours" else _theirs(shape, side)
    block.to(**kind)

    def once(x: Tensor) -> Tensor:
        block.zero_grad(set_to_none=True)
        given = x.detach().requires_grad_()
        out = block(given)[0] if side == "ours" else block(given[None])[0]
        out.backward(torch.ones_like(out))
        return out.detach()

    return once


def _ours(shape: MoeShape) -> Mixture:
    block, generator = Mixture(shape), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0.0, 0.02, generator=generator)
        block.router.weight.mul_(10)  # as spread as a trained one's
    return block


def _theirs(shape: MoeShape, implementation: str) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=shape.width,
        moe_intermediate_size=shape.expert_width,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=False,
    )
    config._experts_implementation = implementation
    block, ours = Qwen3MoeSparseMoeBlock(config), _ours(shape)
    with torch.no_grad():
        block.gate.weight.copy_(ours.router.weight)
        block.experts.gate_up_proj.copy_(torch.cat([ours.experts.gate, ours.experts.up], dim=1))
        block.experts.down_proj.copy_(ours.experts.down)
    return block


def _products(size: dict[str, Any], kind: dict[str, Any]) -> Any:
    rows, inner, width = size["tokens"] * size["top_k"] // size["experts"], size["expert_width"], size["width"]
    gate, up, down = (torch.randn(size["experts"], *two).to(**kind) for two in ((inner, width), (inner, width), (width, inner)))
    x, hidden = torch.randn(rows, width).to(**kind), torch.randn(rows, inner).to(**kind)
    wide, narrow = torch.empty_like(x), torch.empty_like(hidden)
    made = [torch.empty_like(one) for one in (gate, up, down)]

    def once(_: Tensor) -> Tensor:
        for e in range(size["experts"]):
            for matrix in (gate[e], up[e]):
                torch.mm(x, matrix.T, out=narrow)
                torch.mm(hidden, matrix, out=wide)
            torch.mm(hidden, down[e].T, out=wide)
            torch.mm(x, down[e], out=narrow)
            for one in made[:2]:
                torch.mm(hidden.T, x, out=one[e])
            torch.mm(x.T, hidden, out=made[2][e])
        return wide

    return once


def _peak(size: dict[str, Any], side: str) -> float:
    """MiB beyond weights and input, in a process of its own."""
    code = f"from tests.bench import moe_layer; moe_layer.measure({size!r}, {side!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{side} failed: {done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(size: dict[str, Any], side: str) -> None:
    """Prints that figure; called in the fresh process."""
    block, x = _block(size, side), _input(size)
    small = _block({**size, "tokens": 64, "width": 64, "expert_width": 64}, side)
    small(_input({**size, "tokens": 64, "width": 64}))  # what libraries take once is not the block's
    if size["device"] == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        block(x)
        print((torch.cuda.max_memory_allocated() - before) / MIB)
        return
    before = own_memory("VmRSS")
    block(x)
    print((own_memory("VmHWM") - before) / MIB)
