"""The passes over blocks of the vocabulary behind `raysys.methods.logprobs`: normaliser, draw, gradients.

Legend: N positions, n of them in one block, D width, V vocabulary, w a block's width, B blocks, K ids asked for at each position.

The vocabulary is the outer loop and positions the inner one, so a block of the unembedding's gradient is finished before the next begins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raysys.methods.tensors import chunks, compute_dtype

# Logits that exist at once. On CPU a block should stay in cache between its passes, on a GPU it should fill the device.
CPU_BLOCK = 2**19
GPU_BLOCK = 2**24


@dataclass(frozen=True)
class Head:
    """hidden [N, D], unembedding [V, D], bias [V] or None, the temperature, and how many positions one block may have."""

    hidden: Tensor
    unembedding: Tensor
    bias: Tensor | None
    temperature: float
    chunk: int

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.hidden)

    def parts(self) -> list[slice]:
        return chunks(len(self.hidden), self.chunk)

    def blocks(self) -> list[tuple[int, int]]:
        """Ranges of the vocabulary of equal width, no sliver at the end."""
        budget = GPU_BLOCK if self.hidden.is_cuda else CPU_BLOCK
        size, rows = len(self.unembedding), max(1, min(self.chunk, len(self.hidden)))
        width = max(256, budget // rows)
        width = math.ceil(size / math.ceil(size / width))
        return [(start, min(start + width, size)) for start in range(0, size, width)]

    def logits(self, rows: slice | Tensor, start: int, stop: int) -> Tensor:
        """A new block [n, w] in float32 (float64), the caller's to overwrite."""
        block = product(self.hidden[rows], self.unembedding[start:stop].t())
        if self.bias is not None:
            block += self.bias[start:stop]
        return block if self.temperature == 1.0 else block.div_(self.temperature)


@dataclass(frozen=True)
class Sums:
    """What one pass learns of each position."""

    selected: Tensor
    """[N, K] asked-for logits."""
    log_z: Tensor
    """[N] log of the normaliser."""
    entropy: Tensor
    """[N] nats; empty unless asked for."""
    tops: Tensor
    """[N, B] the largest logit up to and with each block; empty unless a draw follows."""
    masses: Tensor
    """[N, B] float64 sum of e^(z - top) over each block alone; empty unless a draw follows."""


def normalise(head: Head, ids: Tensor, entropy: bool = False, drawing: bool = False) -> Sums:
    """One pass over the vocabulary with an online log-sum-exp."""
    n, dtype, tiny = len(head.hidden), head.dtype, torch.finfo(head.dtype).min
    blocks = head.blocks()
    selected = head.hidden.new_zeros(ids.shape, dtype=dtype)
    peak = head.hidden.new_full((n,), tiny, dtype=dtype)
    # Where a draw follows, sums are float64: a boundary between two ids is a sum over up to V of them, and a float32 one would be wrong
    # by as much as one id of 150,000 is worth.
    mass = head.hidden.new_zeros(n, dtype=torch.float64 if drawing else dtype)
    moment = torch.zeros_like(peak)  # sum (z-peak) e^(z-peak)
    tops = peak.new_zeros(n, len(blocks) if drawing else 0)
    masses = mass.new_zeros(tops.shape)
    for index, (start, stop) in enumerate(blocks):
        for rows in head.parts():
            block = head.logits(rows, start, stop)
            local, inside = _inside(ids[rows], start, stop)
            selected[rows] = torch.where(inside, block.gather(1, local), selected[rows])
            # The floor keeps a row whose logits are all -inf so far from becoming inf - inf.
            top = torch.maximum(block.amax(1), peak[rows])
            shrink = (peak[rows] - top).exp_()
            shifted = block.sub_(top[:, None])
            weights = shifted.exp() if entropy else shifted.exp_()
            if entropy:
                moment[rows] = shrink * (moment[rows] + (peak[rows] - top) * mass[rows]) + (weights * shifted.clamp_(min=tiny)).sum(1)
            own = weights.sum(1, dtype=mass.dtype)
            mass[rows] = mass[rows] * shrink + own
            peak[rows] = top
            if drawing:
                tops[rows, index], masses[rows, index] = top, own
    log_mass = mass.log().to(dtype)
    spread = log_mass - moment / mass.to(dtype) if entropy else peak.new_zeros(0)
    return Sums(selected, peak + log_mass, spread, tops, masses)


def draw(head: Head, sums: Sums, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """[N] ids by inversion of the cumulative distribution at `uniform` [N], and their log-probs; of logits, only the blocks that hold them are
    made again."""
    blocks, n = head.blocks(), len(head.hidden)
    ids, logprobs = torch.zeros(n, dtype=torch.long, device=uniform.device), torch.zeros_like(sums.log_z)
    if not n:
        return ids, logprobs
    shares = sums.masses * (sums.tops.double() - sums.log_z.double()[:, None]).exp_()
    # A block all of whose probabilities are 0 in `head.dtype` holds nothing that could be found in it.
    shares = shares * (shares >= torch.finfo(head.dtype).tiny * len(head.unembedding))
    index, inner = _invert(shares, uniform)
    order = index.argsort(stable=True)
    ends = torch.bincount(index, minlength=len(blocks)).cumsum(0).tolist()
    for (start, stop), first, last in zip(blocks, [0, *ends], ends, strict=False):
        for part in order[first:last].split(head.chunk):
            block = head.logits(part, start, stop).sub_(sums.log_z[part, None])
            place, _ = _invert(block.exp(), inner[part])
            ids[part] = place + start
            # A logit made again may differ from the first one in its last bits, and so stand above the normaliser.
            logprobs[part] = block.gather(1, place[:, None])[:, 0].clamp_(max=0)
    return ids, logprobs


def _invert(shares: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The column of `shares` [n, m] whose part of the row's sum holds `uniform` [n], and where within that column, in [0, 1].

    Columns of 0 are not found. Rows that hold NaN give some valid column.
    """
    sums = shares.cumsum(1, dtype=torch.float64)
    target = uniform[:, None] * sums[:, -1:]
    # A number that rounding has pushed to the very end belongs to the last column that is not 0: the first to reach the whole sum.
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())
    found = torch.minimum(torch.searchsorted(sums, target, right=True), last).clamp_(max=shares.shape[1] - 1)
    own = shares.gather(1, found).double()
    inner = ((target - sums.gather(1, found) + own) / own).nan_to_num_(0.0).clamp_(0.0, 1.0)
    return found[:, 0], inner[:, 0]


def gradients(
    head: Head, ids: Tensor, log_z: Tensor, grad: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, unembedding and bias where wanted, given that of the log-probs `grad` [N, K]."""
    hidden, unembedding, dtype = head.hidden, head.unembedding, log_z.dtype
    to_hidden = torch.zeros_like(hidden, dtype=dtype) if wanted[0] else None
    to_unembedding = torch.empty_like(unembedding) if wanted[1] else None
    to_bias = torch.empty_like(head.bias) if head.bias is not None and wanted[2] else None
    grad = grad / head.temperature
    total = grad.sum(1, keepdim=True).neg_()
    parts = head.parts()
    for start, stop in head.blocks():
        weight = unembedding[start:stop]
        weight_sum = hidden.new_zeros(weight.shape, dtype=dtype) if to_unembedding is not None and len(parts) != 1 else None
        bias_sum = hidden.new_zeros(stop - start, dtype=dtype) if to_bias is not None else None
        for rows in parts:
            block = head.logits(rows, start, stop)
            block.sub_(log_z[rows, None]).exp_().mul_(total[rows])
            local, inside = _inside(ids[rows], start, stop)
            share = torch.where(inside, grad[rows], 0.0)
            for k in range(ids.shape[1]):  # one entry a row and call: no two additions race for a place
                block.scatter_add_(1, local[:, k : k + 1], share[:, k : k + 1])
            if bias_sum is not None:
                bias_sum += block.sum(0)
            low = block.to(hidden.dtype)
            if to_hidden is not None:
                _add_product(to_hidden[rows], low, weight)
            if weight_sum is not None:
                _add_product(weight_sum, low.t(), hidden[rows])
            elif to_unembedding is not None:
                torch.mm(low.t(), hidden[rows], out=to_unembedding[start:stop])
        if to_unembedding is not None and weight_sum is not None:
            to_unembedding[start:stop] = weight_sum
        if to_bias is not None and bias_sum is not None:
            to_bias[start:stop] = bias_sum
    return None if to_hidden is None else to_hidden.to(hidden.dtype), to_unembedding, to_bias


def product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, added up and returned in float32 (float64), whatever the dtype of the two."""
    dtype = compute_dtype(left)
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda:  # the product's own float32 accumulator, not rounded on its way out
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += product(left, right)


def _inside(ids: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Ids counted from `start` (any valid number where they are not in this block), and which are in it."""
    inside = (ids >= start) & (ids < stop)
    return (ids - start).clamp_(0, stop - start - 1), inside
