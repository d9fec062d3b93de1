"""The passes over blocks of the vocabulary behind `raysys.methods.logprobs`: normaliser, draw, gradients.

Legend: N positions, D width, V vocabulary, w a block's width, B blocks, K ids asked for at each position.

The vocabulary is the outer loop and positions the inner one, so a block of the unembedding's gradient is finished before the next begins.
Extra memory is one block of logits, float32 [N, D], and a float32 block of the unembedding's gradient where that is of lower precision.

A backward pass that recomputes every block does four matrix products to the plain form's three. So on CPU, where products are nearly all of
the time, the first blocks are kept: as many bytes as the unembedding's gradient will take, since each is let go as its part of that
gradient is written, and in any case a third of what all logits would take (a ninth of the plain form's peak).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from raysys.methods.logprobs_kernels import Block, Running, add_asked, kernels_for, logits
from raysys.methods.tensors import chunks, compute_dtype

# Logits that exist at once. On CPU a block should stay in cache between its passes, on a GPU it should fill the device.
CPU_BLOCK, CPU_ROWS, CPU_WIDTH = 2**19, 512, 2048
GPU_BLOCK = 2**24
KEPT_SHARE = 1 / 3
"""Of the bytes of all logits in float32 (float64)."""
KEPT_FLOOR = 2**26
"""Bytes of blocks that are kept whatever their share."""
WHOLE_SHARE, WHOLE_FLOOR = 3 / 4, 2**26
"""Logits of positions whose gradients are made in the forward pass: of the unembedding's bytes, and so many in any case."""
KEPT_ROWS = 2048
"""Positions of a kept block that go into one product: each adds to all of the block's part of the unembedding's gradient."""
SLAB = 2**26
"""Kept blocks are allocated at least so many bytes at a time: the C library gives smaller pieces back to itself, not to the system."""


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

    @property
    def rows(self) -> int:
        most = max(1, min(self.chunk, len(self.hidden)))
        return most if self.hidden.is_cuda else min(most, CPU_ROWS)

    def parts(self, most: int | None = None) -> list[slice]:
        return even(len(self.hidden), most or self.rows)

    def wholes(self) -> list[slice]:
        """Positions, as evenly split as can be, so many at a time as all their logits may exist at once."""
        room = max(WHOLE_SHARE * self.unembedding.numel() * self.dtype.itemsize, WHOLE_FLOOR)
        return self.parts(max(1, int(room / (len(self.unembedding) * self.dtype.itemsize))))

    def at(self, rows: slice) -> Head:
        return replace(self, hidden=self.hidden[rows])

    def blocks(self) -> list[tuple[int, int]]:
        """Ranges of the vocabulary, of equal width but the last."""
        size, budget = len(self.unembedding), GPU_BLOCK if self.hidden.is_cuda else CPU_BLOCK
        width = max(256, budget // self.rows)
        if not self.hidden.is_cuda:
            width = min(width, CPU_WIDTH)
        width = 64 * math.ceil(size / math.ceil(size / width) / 64)
        return [(start, min(start + width, size)) for start in range(0, size, width)]

    def factors(self) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
        """(start, stop, unembedding, bias) of each block, as the products take them."""
        for start, stop in self.blocks():
            yield start, stop, factor(self.unembedding[start:stop]), None if self.bias is None else self.bias[start:stop]

    def space(self) -> Tensor:
        """Room for one block after the other; on a GPU the allocator has it at hand."""
        start, stop = self.blocks()[0]
        return self.hidden.new_empty(0 if self.hidden.is_cuda else self.rows * (stop - start), dtype=self.dtype)


@dataclass
class Kept:
    """Blocks e^(z - top) [N, w], or the products, that the forward pass leaves to the backward pass, which takes each once."""

    dtype: torch.dtype = torch.float32
    limit: int = 0
    """Blocks."""
    blocks: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By number; with the tops [N]."""
    products: dict[tuple[int, int], Tensor] | None = None
    """By the block's number and the first position of those in it [n, w]; None where exponentials are kept."""
    _room: list[Tensor] = field(default_factory=list)

    @classmethod
    def plan(cls, head: Head, unembedding_wanted: bool) -> Kept:
        # A float16 would lose what is small beside 1.
        dtype = torch.float32 if head.hidden.dtype == torch.float16 else head.hidden.dtype
        blocks = head.blocks()
        start, stop = blocks[0]
        one = len(head.hidden) * (stop - start) * dtype.itemsize
        gradient = head.unembedding.nbytes if unembedding_wanted else 0
        share = int(KEPT_SHARE * len(head.hidden) * len(head.unembedding) * head.dtype.itemsize)
        return cls(dtype, 0 if head.hidden.is_cuda or not one else min(len(blocks), max(gradient, share, KEPT_FLOOR) // one))

    @classmethod
    def whole(cls, head: Head) -> Kept:
        """All blocks: for so few positions that their logits may exist at once."""
        if kernels_for(head.hidden.new_empty(0, dtype=head.dtype)).leaves_products:
            return cls(head.dtype, products={})
        dtype = torch.float32 if head.hidden.dtype == torch.float16 else head.hidden.dtype
        return cls(dtype, len(head.blocks()))

    def room(self, index: int, like: Tensor, width: int) -> Tensor | None:
        """[N, width] to keep this block in, or None."""
        if index >= self.limit:
            return None
        if not self._room:
            many = min(self.limit - index, math.ceil(SLAB / max(1, len(like) * width * self.dtype.itemsize)))
            self._room = list(like.new_empty(many, len(like), width, dtype=self.dtype).unbind())
        return self._room.pop(0)[:, :width]


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


def normalise(head: Head, ids: Tensor, entropy: bool, drawing: bool, kept: Kept) -> Sums:
    """One pass over the vocabulary with an online log-sum-exp; leaves blocks in `kept`."""
    states, blocks = factor(head.hidden), len(head.blocks())
    space = head.space() if kept.products is None else None
    zeros = states.new_zeros(len(states), dtype=head.dtype)
    # A boundary between two ids is a sum over up to V of them: in float32 it would be off by as much as one id of 150,000 is worth.
    mass = zeros.to(torch.float64) if drawing else zeros
    # The floor keeps a row whose logits are all -inf so far from becoming inf - inf.
    peak = torch.full_like(zeros, torch.finfo(head.dtype).min)
    moment, own = zeros.clone() if entropy else None, torch.zeros_like(mass) if drawing else None
    running = Running(zeros.new_zeros(ids.shape), peak, mass.clone(), moment, own)
    tops, masses = zeros.new_empty(len(zeros), blocks if drawing else 0), mass.new_empty(len(zeros), blocks if drawing else 0)
    fold, products = kernels_for(zeros).fold, kept.products
    for index, (start, stop, weight, bias) in enumerate(head.factors()):
        room = kept.room(index, states, stop - start)
        for rows in head.parts():
            block = Block(product(states[rows], weight.t(), space), bias, head.temperature, ids[rows], start)
            fold(block, running.at(rows), room is not None or products is not None)
            if products is not None:
                products[index, rows.start] = block.product
            if room is not None:
                room[rows] = block.product
        if room is not None:
            kept.blocks[index] = room, running.peak.clone()
        if running.own is not None:
            tops[:, index], masses[:, index] = running.peak, running.own
    log_mass = running.mass.log().to(head.dtype)
    spread = zeros.new_zeros(0) if running.moment is None else log_mass - running.moment / running.mass.to(head.dtype)
    return Sums(running.selected, running.peak + log_mass, spread, tops, masses)


def draw(head: Head, sums: Sums, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """[N] ids by inversion of the cumulative distribution at `uniform` [N], and their log-probs.

    A position's logits are made again for the one block that holds its number.
    """
    n, blocks = len(head.hidden), len(head.blocks())
    ids, logprobs = torch.zeros(n, dtype=torch.long, device=uniform.device), torch.zeros_like(sums.log_z)
    if not n:
        return ids, logprobs
    shares = sums.masses * (sums.tops.double() - sums.log_z.double()[:, None]).exp_()
    # A block all of whose probabilities are 0 in `head.dtype` holds nothing that could be found in it.
    shares = shares * (shares >= torch.finfo(head.dtype).tiny * len(head.unembedding))
    index, inner = _invert(shares, uniform)
    order = index.argsort(stable=True)
    ends = torch.bincount(index, minlength=blocks).cumsum(0).tolist()
    for (start, stop), first, last in zip(head.blocks(), [0, *ends], ends, strict=False):
        if first == last:
            continue
        weight, bias = factor(head.unembedding[start:stop]), None if head.bias is None else head.bias[start:stop]
        for part in order[first:last].split(head.rows):
            made = product(factor(head.hidden[part]), weight.t())
            block = logits(Block(made, bias, head.temperature, ids[part, None], start)).sub_(sums.log_z[part, None])
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


@dataclass
class Gradients:
    """Where gradients are added up: of hidden [N, D] in the logits' dtype, of unembedding [V, D] and bias [V]; None where not wanted."""

    hidden: Tensor | None
    unembedding: Tensor | None
    bias: Tensor | None
    empty: bool = True
    """Nothing was added to unembedding and bias yet: what they hold means nothing."""

    @classmethod
    def room(cls, head: Head, wanted: tuple[bool, bool, bool], passes: int = 1) -> Gradients:
        """For so many calls of `gradients`, each with some of the positions. Sums of many in a lower precision lose the small ones."""
        dtype = None if passes == 1 else head.dtype
        return cls(
            torch.zeros_like(head.hidden, dtype=head.dtype) if wanted[0] else None,
            torch.empty_like(head.unembedding, dtype=dtype) if wanted[1] else None,
            torch.empty_like(head.bias, dtype=dtype) if head.bias is not None and wanted[2] else None,
        )

    def of(self, head: Head) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """In the dtype of what they are gradients of."""
        if self.empty:
            for total in (self.unembedding, self.bias):
                if total is not None:
                    total.zero_()
        dtype = head.hidden.dtype
        hidden, unembedding, bias = (None if x is None else x.to(dtype) for x in (self.hidden, self.unembedding, self.bias))
        return hidden, unembedding, bias


def gradients(head: Head, ids: Tensor, log_z: Tensor, grad: Tensor, kept: Kept, out: Gradients) -> None:
    """Adds the gradients to `out`, given that of the log-probs `grad` [N, K]. Takes what is `kept`."""
    states, space, grad = factor(head.hidden), head.space(), grad / head.temperature
    total = grad.sum(1).neg_()
    slope = kernels_for(log_z).slope
    for index, (start, stop, weight, bias) in enumerate(head.factors()):
        own = None if out.unembedding is None else out.unembedding[start:stop]
        bias_sum = None if out.bias is None else log_z.new_zeros(stop - start)
        room, tops = kept.blocks.pop(index, (None, log_z))
        fall = total * (tops - log_z).exp()
        parts = head.parts(None if room is None else KEPT_ROWS)
        columns = None if own is None else _Columns(own, head.dtype, len(parts) == 1, out.empty)
        for rows in parts:
            if room is not None:
                made = room[rows].to(head.dtype).mul_(fall[rows, None])
                rise = add_asked(made, ids[rows], start, grad[rows]).to(states.dtype)
            else:
                made = None if kept.products is None else kept.products.pop((index, rows.start))
                made = product(states[rows], weight.t(), space) if made is None else made
                block = Block(made, bias, head.temperature, ids[rows], start)
                rise = slope(block, log_z[rows], grad[rows], total[rows], states.dtype)
            if out.hidden is not None:
                _add_product(out.hidden[rows], rise, weight)
            if columns is not None:
                columns.add(rise.t(), states[rows])
            if bias_sum is not None:
                bias_sum += rise.sum(0, dtype=bias_sum.dtype)
        if columns is not None:
            columns.close()
        if out.bias is not None and bias_sum is not None:
            out.bias[start:stop] = bias_sum if out.empty else out.bias[start:stop] + bias_sum
    out.empty = False


class _Columns:
    """Sum of products in `target` [w, D]; beside it in `dtype` where the target's own is lower and more than one product is added."""

    def __init__(self, target: Tensor, dtype: torch.dtype, one: bool, empty: bool) -> None:
        direct = target.dtype == dtype or (one and target.is_cuda)
        self._target, self._sum = target, target if direct else torch.empty_like(target, dtype=dtype)
        self._empty = empty

    def add(self, left: Tensor, right: Tensor) -> None:
        if self._empty and left.dtype == self._sum.dtype:
            self._sum.addmm_(left, right, beta=0)  # what was there, NaN too, has no effect
        else:
            _add_product(self._sum.zero_() if self._empty else self._sum, left, right)
        self._empty = False

    def close(self) -> None:
        if self._empty:
            self._target.zero_()
        elif self._sum is not self._target:
            self._target.copy_(self._sum)


def even(n: int, most: int) -> list[slice]:
    """Slices that cover range(n), of at most so many and as equal as can be."""
    return chunks(n, math.ceil(n / math.ceil(n / most))) if n else []


def factor(tensor: Tensor) -> Tensor:
    """The tensor as products take it. On CPU that is float32 for lower precisions: their own products round logits to 8 bits, and without
    instructions for them take ten times as long or more."""
    return tensor if tensor.is_cuda else tensor.to(compute_dtype(tensor))


def product(left: Tensor, right: Tensor, space: Tensor | None = None) -> Tensor:
    """`left @ right` in float32 (float64), made in `space` on CPU if there is one."""
    dtype = compute_dtype(left)
    if left.dtype != dtype:  # the product's own float32 accumulator, not rounded on its way out
        return torch.mm(left, right, out_dtype=dtype)
    if left.is_cuda or space is None:
        return left @ right
    size = (len(left), right.shape[1])
    return torch.mm(left, right, out=space[: size[0] * size[1]].view(size))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += product(left, right)
