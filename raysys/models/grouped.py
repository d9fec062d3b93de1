"""The products of all experts at once on CUDA in bfloat16, and what is between them fused: no copy of what a backward pass can make again.

Legend: T tokens, N experts, K of them a token, D width, d expert width, S rows, one for each choice of an expert that is here, by expert.

    out_t = sum_k w_tk down_e h_tk,   h = silu(g) u,   g = gate_e x_t,   u = up_e x_t

Kept for the backward pass are g and u [S, d]. Rows are gathered from tokens, and tokens from rows in the order of k with float32 sums: no
atomic operation adds anything up, so each run gives the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

ALIGNED = 8
"""Widths that a grouped product takes are multiples of so many numbers (16 bytes)."""


class Grouped(torch.autograd.Function):
    """[T, D] of x [T, D], weights [T, K], order [S] (places of the choices, expert after expert), counts [N], gate, up, down."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, order: Tensor, counts: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        ends = counts.cumsum(0).to(torch.int32)
        places = order.new_full((weights.numel(),), -1).index_copy_(0, order, torch.arange(len(order), device=order.device))
        places = places.view_as(weights)
        rows = x.index_select(0, order // weights.shape[1])
        gates, ups = _mm(rows, gate.mT, ends), _mm(rows, up.mT, ends)
        del rows
        made = _mm(_fused(_opened, x.is_cuda)(gates, ups), down.mT, ends)
        ctx.save_for_backward(x, weights, order, ends, places, gates, ups, gate, up, down)
        return _fused(_weighted, x.is_cuda)(made, places, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        x, weights, order, ends, places, gates, ups, gate, up, down = ctx.saved_tensors
        tokens, on_gpu = order // weights.shape[1], x.is_cuda
        theirs = grad.index_select(0, tokens)
        shares = weights.flatten().index_select(0, order)
        hidden, dshares, dgates, dups = _fused(_closed, on_gpu)(_mm(theirs, down, ends), gates, ups, shares)
        ddown = _mm(theirs.T, hidden, ends)
        del theirs, hidden
        rows = x.index_select(0, tokens)
        dgate, dup = _mm(dgates.T, rows, ends), _mm(dups.T, rows, ends)
        del rows
        dx = _fused(_summed, on_gpu)(_mm(dgates, gate, ends), _mm(dups, up, ends), places)
        dweights = dshares.new_zeros(weights.numel()).index_copy_(0, order, dshares).view_as(weights).to(weights.dtype)
        return dx, dweights, None, None, dgate, dup, ddown


def _mm(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return functional.grouped_mm(left, right, offs=ends)


@functools.cache
def _fused(function: Callable[..., Any], on_gpu: bool) -> Callable[..., Any]:
    """Compiled where it pays: once for all shapes, since those of experts change with every batch."""
    return torch.compile(function, dynamic=True) if on_gpu else function


def _opened(gates: Tensor, ups: Tensor) -> Tensor:
    gates, ups = gates.float(), ups.float()
    return (gates * gates.sigmoid() * ups).bfloat16()


def _closed(back: Tensor, gates: Tensor, ups: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the gradient of h, but for the weights w: w h [S, d], and the gradients of w [S] (float32), g and u [S, d]."""
    back, gates, ups, shares = back.float(), gates.float(), ups.float(), shares.float().unsqueeze(-1)
    sigma = gates.sigmoid()
    opened = gates * sigma
    hidden, weighted = opened * ups, back * shares
    dgates = weighted * ups * (sigma + opened * (1 - sigma))
    return (hidden * shares).bfloat16(), (back * hidden).sum(-1), dgates.bfloat16(), (weighted * opened).bfloat16()


def _weighted(made: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """[T, D] sum over k of rows [S, D] at places [T, K], weighted; -1: of an expert that is not here."""
    rows = made[places.clamp(min=0)].float() * weights.float().unsqueeze(-1)
    return torch.where((places >= 0).unsqueeze(-1), rows, 0.0).sum(1).bfloat16()


def _summed(one: Tensor, other: Tensor, places: Tensor) -> Tensor:
    at = places.clamp(min=0)
    return torch.where((places >= 0).unsqueeze(-1), one[at].float() + other[at].float(), 0.0).sum(1).bfloat16()
