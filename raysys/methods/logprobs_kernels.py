"""What is done to a block of logits between its matrix products, in plain torch; `raysys.methods.logprobs_cuda` has the same in Triton.

Legend: n positions, w a block's width, K ids asked for at each position. A block [n, w] comes as the product h U^T makes it, in float32
(float64); its logits are z = (block + bias) / temperature.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """One block and what its logits are made with."""

    product: Tensor
    """[n, w], the function's to overwrite."""
    bias: Tensor | None
    """[w]"""
    temperature: float
    ids: Tensor
    """[n, K] int64, counted from the start of the vocabulary."""
    start: int
    """The block's first id."""


@dataclass(frozen=True)
class Running:
    """Sums of n positions over the blocks so far; a function writes into them."""

    selected: Tensor
    """[n, K] asked-for logits."""
    peak: Tensor
    """[n] the largest logit."""
    mass: Tensor
    """[n] sum e^(z - peak); float64 where a draw follows."""
    moment: Tensor | None
    """[n] sum (z - peak) e^(z - peak), where an entropy is asked for."""
    own: Tensor | None
    """[n] float64 sum e^(z - peak) of the last block alone, where a draw follows."""

    def at(self, rows: slice) -> Running:
        moment, own = (None if x is None else x[rows] for x in (self.moment, self.own))
        return Running(self.selected[rows], self.peak[rows], self.mass[rows], moment, own)


@dataclass(frozen=True)
class Kernels:
    fold: Callable[[Block, Running, bool], None]
    """Adds a block to the sums. With True the product is left as a backward pass takes it, otherwise it may hold anything afterwards."""
    slope: Callable[[Block, Tensor, Tensor, Tensor, torch.dtype], Tensor]
    """(block, log_z [n], grad [n, K], total [n], dtype) to total e^(z - log_z) + sum_k grad_k 1[v = id_k] in that dtype [n, w]."""
    leaves_products: bool = False
    """What `fold` leaves with True is the product as it came; otherwise e^(z - peak)."""


def kernels_for(product: Tensor) -> Kernels:
    """Triton's for float32 on CUDA where Triton is installed, else torch's."""
    if product.is_cuda and product.dtype == torch.float32 and importlib.util.find_spec("triton") is not None:
        from raysys.methods import logprobs_cuda

        return Kernels(logprobs_cuda.fold, logprobs_cuda.slope, leaves_products=True)
    return Kernels(fold, slope)


def logits(block: Block) -> Tensor:
    """The block's logits, in place of its product."""
    if block.bias is not None:
        block.product.add_(block.bias)
    return block.product if block.temperature == 1.0 else block.product.div_(block.temperature)


def fold(block: Block, sums: Running, keep: bool) -> None:
    z = logits(block)
    local, inside = _inside(block)
    sums.selected.copy_(torch.where(inside, z.gather(1, local), sums.selected))
    top = torch.maximum(z.amax(1), sums.peak)
    fall = sums.peak - top
    z.sub_(top[:, None])
    if sums.moment is None:
        weights = z.exp_()
    else:
        # 0 e^-inf is a 0 here: the floor keeps the product from -inf * 0.
        depths = z.clamp(min=torch.finfo(z.dtype).min)
        weights = z.exp_()
        sums.moment.add_(fall * sums.mass).mul_(fall.exp()).add_(depths.mul_(weights).sum(1))
    own = _row_sums(weights, sums.mass.dtype)
    sums.mass.mul_(fall.to(own.dtype).exp_()).add_(own)
    sums.peak.copy_(top)
    if sums.own is not None:
        sums.own.copy_(own)


def slope(block: Block, log_z: Tensor, grad: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
    out = logits(block).sub_(log_z[:, None]).exp_().mul_(total[:, None])
    return add_asked(out, block.ids, block.start, grad).to(dtype)


def add_asked(out: Tensor, ids: Tensor, start: int, grad: Tensor) -> Tensor:
    """Adds grad [n, K] to the columns of the ids of this block."""
    local, inside = _local(ids, start, out.shape[1])
    share = torch.where(inside, grad, 0.0)
    for k in range(ids.shape[1]):  # one entry a row and call: no two additions race for a place
        out.scatter_add_(1, local[:, k : k + 1], share[:, k : k + 1])
    return out


def _inside(block: Block) -> tuple[Tensor, Tensor]:
    return _local(block.ids, block.start, block.product.shape[1])


def _local(ids: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Ids counted from `start` (any valid number where they are not in this block), and which are in it."""
    local = ids - start
    return local.clamp(0, width - 1), (local >= 0) & (local < width)


def _row_sums(block: Tensor, dtype: torch.dtype) -> Tensor:
    """[n] in `dtype`. To float64 by way of float32 sums of 64: their errors are as small as the numbers' own, and torch's reduction of one
    dtype into another is several times slower."""
    if block.dtype == dtype:
        return block.sum(1)
    even = block.shape[1] // 64 * 64
    return block[:, :even].unflatten(1, (even // 64, 64)).sum(2).sum(1, dtype=dtype) + block[:, even:].sum(1)
