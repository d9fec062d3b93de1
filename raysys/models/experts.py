"""SwiGLU experts stored as stacks, and tokens sent to them: sorted by expert, one block of rows each, none dropped.

Legend: T tokens, N experts, K of them a token, D width, d expert width.

    y_t = sum_k w_tk down_e (silu(gate_e x_t) * (up_e x_t)),   e = index_tk
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from raysys.models.grouped import ALIGNED, Grouped

if TYPE_CHECKING:
    from raysys.models.expert_parallel import ExpertGroup


class Experts(nn.Module):
    """`gate` and `up` [N, d, D], `down` [N, D, d]: each as `nn.Linear` stores one. With a `group`, the part of them that is here."""

    def __init__(self, experts: int, width: int, inner: int, group: ExpertGroup | None = None):
        super().__init__()
        self.group = group
        self.gate = nn.Parameter(torch.empty(experts, inner, width))
        self.up = nn.Parameter(torch.empty(experts, inner, width))
        self.down = nn.Parameter(torch.empty(experts, width, inner))

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """[T, D] from x [T, D], and weights and indices [T, K] of a router."""
        apply = mixture if self.group is None else self.group.mixture
        return apply(x, weights, indices, self.gate, self.up, self.down)


def mixture(x: Tensor, weights: Tensor, indices: Tensor, gate: Tensor, up: Tensor, down: Tensor, chosen: int | None = None) -> Tensor:
    """What the chosen experts make of each token, weighted: [T, D] in x's dtype.

    On CUDA in bfloat16, grouped matrix products; elsewhere expert by expert, without ever holding K copies of the tokens.

    Args:
        x: [T, D].
        weights, indices: [T, K]; gradients reach the weights.
        gate, up: [N, d, D]; down: [N, D, d].
        chosen: how many of the indices are of these experts; the others are N and add nothing. None: all.
    """
    order = indices.flatten().argsort(stable=True)[:chosen]
    counts = indices.flatten().bincount(minlength=len(gate))[: len(gate)]
    if x.is_cuda and x.dtype == torch.bfloat16 and len(order) and not any(width % ALIGNED for width in gate.shape[1:]):
        return Grouped.apply(x, weights, order, counts, gate, up, down)  # type: ignore[return-value]
    return _Blocked.apply(x, weights, order, counts.tolist(), gate, up, down)  # type: ignore[return-value]


class _Blocked(torch.autograd.Function):
    """Expert by expert; keeps the products of gate and up, and gives each matrix its gradient in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, order: Tensor, counts: list[int], gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        inner = gate.shape[1]
        tokens, scale = order // weights.shape[1], weights.flatten().index_select(0, order).to(x.dtype).unsqueeze(-1)
        gates, ups = x.new_empty(len(order), inner), x.new_empty(len(order), inner)
        out = torch.zeros_like(x)
        for expert, rows in _blocks(counts):
            mine = x.index_select(0, tokens[rows])
            torch.mm(mine, gate[expert].T, out=gates[rows])
            torch.mm(mine, up[expert].T, out=ups[rows])
            made = (functional.silu(gates[rows]) * ups[rows]) @ down[expert].T
            out.index_add_(0, tokens[rows], made.mul_(scale[rows]))
        ctx.save_for_backward(x, weights, order, gates, ups, gate, up, down)
        ctx.counts = counts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        x, weights, order, gates, ups, gate, up, down = ctx.saved_tensors
        tokens, scale = order // weights.shape[1], weights.flatten().index_select(0, order).to(x.dtype).unsqueeze(-1)
        dx, dscale = torch.zeros_like(x), x.new_zeros(len(order))
        # Experts without tokens have a gradient too: zeros.
        dgate, dup, ddown = (torch.empty_like(one) for one in (gate, up, down))
        for expert in (expert for expert, count in enumerate(ctx.counts) if not count):
            for one in (dgate, dup, ddown):
                one[expert].zero_()
        for expert, rows in _blocks(ctx.counts):
            mine, theirs = x.index_select(0, tokens[rows]), grad.index_select(0, tokens[rows])
            sigma = gates[rows].sigmoid()
            opened = gates[rows] * sigma
            hidden = opened * ups[rows]
            back = theirs @ down[expert]
            dscale[rows] = (back * hidden).sum(dim=-1)
            back.mul_(scale[rows])
            torch.mm((theirs * scale[rows]).T, hidden, out=ddown[expert])
            to_up = back * opened
            to_gate = back.mul_(ups[rows]).mul_(sigma + opened * (1 - sigma))
            torch.mm(to_gate.T, mine, out=dgate[expert])
            torch.mm(to_up.T, mine, out=dup[expert])
            dx.index_add_(0, tokens[rows], torch.addmm(to_gate @ gate[expert], to_up, up[expert]))
        dweights = x.new_zeros(weights.numel()).index_copy_(0, order, dscale).view_as(weights).to(weights.dtype)
        return dx, dweights, None, None, dgate, dup, ddown


def _blocks(counts: list[int]) -> list[tuple[int, slice]]:
    """Experts with tokens, and where theirs are."""
    found, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            found.append((expert, slice(start, start + count)))
        start += count
    return found
