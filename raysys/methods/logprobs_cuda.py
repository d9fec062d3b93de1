"""`fold` and `slope` of `raysys.methods.logprobs_kernels` in Triton: one launch and one pass over memory for what takes torch six to nine.

Legend: n positions, w a block's width, K ids asked for at each position.

The products stay cuBLAS's: a block of 2^24 float32 logits is written and read once by each kernel, which at D = 1,536 in bfloat16 is less
time than the product takes, and a product of one's own inside the kernel would have to be as fast as cuBLAS's to gain from that.

Only imported where a CUDA tensor comes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from raysys.methods.logprobs_kernels import Block, Running

TILE = 4096
"""Logits that one program holds at a time."""


def fold(block: Block, sums: Running, _keep: bool) -> None:
    """Only reads the product, whether it is to be kept or not."""
    n, width = block.product.shape
    if not n:
        return
    asked, empty = block.ids.shape[1], sums.peak
    _fold[(n,)](
        block.product,
        block.product if block.bias is None else block.bias,
        block.ids,
        sums.selected,
        sums.peak,
        sums.mass,
        empty if sums.moment is None else sums.moment,
        empty if sums.own is None else sums.own,
        block.product.stride(0),
        block.ids.stride(0),
        block.ids.stride(1),
        sums.selected.stride(0),
        width,
        block.start,
        asked,
        1.0 / block.temperature,
        HAS_BIAS=block.bias is not None,
        ENTROPY=sums.moment is not None,
        DRAWING=sums.own is not None,
        TILE=TILE,
        num_warps=8,  # pyright: ignore[reportCallIssue]
    )


def slope(block: Block, log_z: Tensor, grad: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
    n, width = block.product.shape
    out = block.product if dtype == block.product.dtype else torch.empty_like(block.product, dtype=dtype)
    if not n:
        return out
    _slope[(n, triton.cdiv(width, TILE))](
        block.product,
        out,
        block.product if block.bias is None else block.bias,
        block.ids,
        log_z,
        grad,
        total,
        block.product.stride(0),
        out.stride(0),
        block.ids.stride(0),
        block.ids.stride(1),
        grad.stride(0),
        grad.stride(1),
        width,
        block.start,
        block.ids.shape[1],
        1.0 / block.temperature,
        HAS_BIAS=block.bias is not None,
        TILE=TILE,
        num_warps=8,  # pyright: ignore[reportCallIssue]
    )
    return out


@triton.jit
def _fold(
    product,
    bias,
    ids,
    selected,
    peak,
    mass,
    moment,
    own,
    product_stride,
    ids_stride,
    ids_column,
    selected_stride,
    width,
    start,
    asked,
    scale,
    HAS_BIAS: tl.constexpr,
    ENTROPY: tl.constexpr,
    DRAWING: tl.constexpr,
    TILE: tl.constexpr,
):
    """One row: its logits once, tile by tile, into its sums. The sums of a draw are float64, two numbers a row."""
    row = tl.program_id(0).to(tl.int64)
    line = product + row * product_stride
    total_type = tl.float64 if DRAWING else tl.float32
    old_peak = tl.load(peak + row)
    top = old_peak
    own_mass = tl.full((), 0.0, total_type)
    own_moment = tl.full((), 0.0, tl.float32)
    for offset in range(0, width, TILE):
        columns = offset + tl.arange(0, TILE)
        real = columns < width
        z = tl.load(line + columns, mask=real, other=float("-inf"))
        if HAS_BIAS:
            z += tl.load(bias + columns, mask=real, other=0.0).to(tl.float32)
        z *= scale
        new_top = tl.maximum(top, tl.max(z, 0))
        fall = top - new_top
        weights = tl.exp(z - new_top)
        if ENTROPY:
            depths = tl.where(weights > 0, (z - new_top) * weights, 0.0)
            # Sums before this tile move to the new peak: each of their terms grows by `fall` in its depth.
            shrink = tl.exp(fall)
            own_moment = tl.sum(depths, 0) + tl.where(shrink > 0, shrink * (own_moment + fall * own_mass.to(tl.float32)), 0.0)
        own_mass = own_mass * tl.exp(fall.to(total_type)) + tl.sum(weights, 0).to(total_type)
        top = new_top
    for k in range(asked):
        column = tl.load(ids + row * ids_stride + k * ids_column) - start
        if (column >= 0) & (column < width):
            logit = tl.load(line + column)
            if HAS_BIAS:
                logit += tl.load(bias + column).to(tl.float32)
            tl.store(selected + row * selected_stride + k, logit * scale)
    since = old_peak - top
    old_mass = tl.load(mass + row)
    if ENTROPY:
        left = tl.exp(since)
        before = tl.where(left > 0, left * (tl.load(moment + row) + since * old_mass.to(tl.float32)), 0.0)
        tl.store(moment + row, before + own_moment)
    tl.store(mass + row, old_mass * tl.exp(since.to(total_type)) + own_mass)
    tl.store(peak + row, top)
    if DRAWING:
        tl.store(own + row, own_mass)


@triton.jit
def _slope(
    product,
    out,
    bias,
    ids,
    log_z,
    grad,
    total,
    product_stride,
    out_stride,
    ids_stride,
    ids_column,
    grad_stride,
    grad_column,
    width,
    start,
    asked,
    scale,
    HAS_BIAS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of one row; `out` may be `product`."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    real = columns < width
    z = tl.load(product + row * product_stride + columns, mask=real, other=float("-inf"))
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=real, other=0.0).to(tl.float32)
    rise = tl.load(total + row) * tl.exp(z * scale - tl.load(log_z + row))
    for k in range(asked):
        column = tl.load(ids + row * ids_stride + k * ids_column) - start
        rise += tl.where(columns == column, tl.load(grad + row * grad_stride + k * grad_column), 0.0)
    tl.store(out + row * out_stride + columns, rise.to(out.dtype.element_ty), mask=real)
