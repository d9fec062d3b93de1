"""Log-probabilities of asked-for ids, and draws, block by block of the vocabulary: `[N, V]` logits never exist at once.

Legend: N positions, D width, V vocabulary, K ids asked for at each position.

    z_i = (h_i U^T + b) / T;  logp_ik = z_i[y_ik] - log sum_v exp z_iv
    dz_iv = sum_k g_ik 1[v = y_ik] - (sum_k g_ik) p_iv
    draw_i = min {a : sum_{v <= a} p_iv > u_i},  u_i uniform in [0, 1)

A draw inverts the cumulative distribution in the vocabulary's order: the pass that finds the normaliser also keeps each block's mass, and
only the block that holds u_i is made again. Gumbel-max would need V random numbers a position instead of one (more work than the softmax
itself), and what it draws would depend on the order in which blocks take numbers from the generator.

Logits are float32 sums (float64 for float64) whatever the inputs are, on every device. The vocabulary is whole here: a form for one that is
split between ranks (tensor parallel) is not provided.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raysys.methods.logprobs_blocks import Gradients, Head, Kept, draw, gradients, normalise
from raysys.methods.tensors import check_chunk, check_ids


@overload
def token_logprobs(
    hidden: Tensor,
    unembedding: Tensor,
    ids: Tensor,
    temperature: float = ...,
    chunk_tokens: int = ...,
    bias: Tensor | None = ...,
    entropy: Literal[False] = ...,
) -> Tensor: ...


@overload
def token_logprobs(
    hidden: Tensor,
    unembedding: Tensor,
    ids: Tensor,
    temperature: float = ...,
    chunk_tokens: int = ...,
    bias: Tensor | None = ...,
    *,
    entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def token_logprobs(
    hidden: Tensor,
    unembedding: Tensor,
    ids: Tensor,
    temperature: float = ...,
    chunk_tokens: int = ...,
    bias: Tensor | None = ...,
    entropy: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def token_logprobs(
    hidden: Tensor,
    unembedding: Tensor,
    ids: Tensor,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    bias: Tensor | None = None,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs in nats of `ids` under softmax((hidden U^T + bias) / temperature).

    Args:
        hidden: [N, D]; float64 stays float64. Lower precisions multiply in their own dtype with float32 sums on a GPU (dz is rounded to
            that dtype before its two products) and in float32 on CPU.
        unembedding: [V, D], same dtype. May be a DeepSpeed ZeRO-3 parameter when called inside its module's forward:
            the parameter object itself is saved, so that backward finds what the module's hook gathered again.
        ids: [N] or [N, K] integers in [0, V).
        temperature: divides the logits; positive.
        chunk_tokens: positions whose logits may be made at once (of a block of the vocabulary only).
        bias: [V], same dtype, or None.
        entropy: also return each position's entropy in nats, [N], without gradient.

    Returns:
        [N] or [N, K] as `ids`, float32 (float64 for float64 input), or that and the entropy. Gradients reach hidden, unembedding and bias.

    Raises:
        ValueError: shapes, dtypes or devices disagree, an id is outside the vocabulary, or temperature or chunk_tokens is not positive.
    """
    _check(hidden, unembedding, ids, temperature, chunk_tokens, bias)
    logprobs, entropies, _ = _apply(hidden, unembedding, bias, _table(ids), None, float(temperature), chunk_tokens, entropy)
    logprobs = logprobs.reshape(ids.shape)
    return (logprobs, entropies) if entropy else logprobs


class Drawn(NamedTuple):
    """What `draw_logprobs` gives of N positions."""

    draws: Tensor
    """[N] int64."""
    logprobs: Tensor
    """[N, K + 1] of the asked-for ids and, last, of the draw; with gradient."""
    entropy: Tensor
    """[N] nats, without gradient; empty unless asked for."""


def draw_logprobs(
    hidden: Tensor,
    unembedding: Tensor,
    ids: Tensor,
    uniform: Tensor,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    bias: Tensor | None = None,
    entropy: bool = False,
) -> Drawn:
    """One draw a position, and log-probs of `ids` and of it with gradient, from one pass: what the draw decides may come before the loss.

    Args:
        ids: [N] or [N, K] integers in [0, V).
        uniform: as in `draw_tokens`.
        hidden, unembedding, temperature, chunk_tokens, bias, entropy: as in `token_logprobs`.

    Raises:
        ValueError: as `token_logprobs` and `draw_tokens`.
    """
    _check(hidden, unembedding, ids, temperature, chunk_tokens, bias)
    _check_uniform(uniform, hidden)
    logprobs, entropies, draws = _apply(hidden, unembedding, bias, _table(ids), uniform, float(temperature), chunk_tokens, entropy)
    return Drawn(draws, logprobs, entropies)


class Surrogate(NamedTuple):
    """What `surrogate` gives of N positions."""

    value: Tensor
    """0-d, sum of slope * log-prob; the only one with a gradient."""
    logprobs: Tensor
    """[N] or [N, K] as `ids`."""
    entropy: Tensor
    """[N] nats; empty unless asked for."""


Slope = Callable[[slice, Tensor, Tensor], Tensor]
"""(positions, their log-probs [n, K], their entropies [n] or empty) to the loss's derivative by each of these log-probs, [n, K]."""


def surrogate(
    hidden: Tensor,
    unembedding: Tensor,
    ids: Tensor,
    slope: Slope,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    bias: Tensor | None = None,
    entropy: bool = False,
) -> Surrogate:
    """A loss over log-probs that is a sum over positions, with its gradient made in the forward pass.

    As soon as a position's log-probs are known so is the loss's derivative by them, while its logits are still at hand: three matrix
    products where a backward pass of its own recomputes logits in a fourth. Some positions at a time, so that their logits take no more
    than 3/4 of the unembedding's bytes (or 64 MiB); beside them there are the gradients, in float32 while they are added up.

    Args:
        slope: see `Slope`. What it gives is a constant. Positions come in order, each once.
        hidden, unembedding, ids, temperature, chunk_tokens, bias, entropy: as in `token_logprobs`.

    Returns:
        `value`, whose backward gives the loss's gradients (once: it may not be called a second time); log-probs and entropy without
        gradient.

    Raises:
        ValueError: as `token_logprobs`, or `slope` gives another shape than it got.
    """
    _check(hidden, unembedding, ids, temperature, chunk_tokens, bias)
    value, logprobs, entropies = _apply(
        hidden, unembedding, bias, _table(ids), slope, float(temperature), chunk_tokens, entropy, kind=_Surrogate
    )
    return Surrogate(value, logprobs.reshape(ids.shape), entropies)


def draw_tokens(
    hidden: Tensor,
    unembedding: Tensor,
    uniform: Tensor,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token a position from softmax((hidden U^T + bias) / temperature), without gradient.

    The same uniform numbers give the same draws whatever the chunk and the blocks, except where a number falls within rounding of the
    boundary between two ids. Ids of probability 0 are never drawn; with logits of NaN some id in [0, V) is, and its log-prob says so.

    Args:
        uniform: [N] float64 in [0, 1), e.g. `torch.rand(n, generator=generator, dtype=torch.float64)`.
        hidden, unembedding, temperature, chunk_tokens, bias: as in `token_logprobs`.

    Returns:
        ids [N] int64, and their log-probs [N] in float32 (float64 for float64 input).

    Raises:
        ValueError: as `token_logprobs`; `uniform` is not float64 [N] on hidden's device, or holds a number outside [0, 1).
    """
    none = torch.empty(len(hidden), 0, dtype=torch.long, device=hidden.device)
    with torch.no_grad():
        drawn = draw_logprobs(hidden, unembedding, none, uniform, temperature, chunk_tokens, bias)
    return drawn.draws, drawn.logprobs[:, 0]


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        unembedding: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        uniform: Tensor | None,
        temperature: float,
        chunk: int,
        entropy: bool,
        backward: bool,
    ):
        head = Head(hidden, unembedding, bias, temperature, chunk)
        ctx.kept = Kept.plan(head, ctx.needs_input_grad[1]) if backward else Kept()
        sums = normalise(head, ids, entropy, uniform is not None, ctx.kept)
        logprobs, draws = sums.selected - sums.log_z[:, None], ids.new_empty(0)
        if uniform is not None:
            draws, drawn = draw(head, sums, uniform)
            ids, logprobs = torch.cat([ids, draws[:, None]], 1), torch.cat([logprobs, drawn[:, None]], 1)
        ctx.save_for_backward(hidden, unembedding, bias, ids, sums.log_z)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(sums.entropy, draws)
        return logprobs, sums.entropy, draws

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None):
        hidden, unembedding, bias, ids, log_z = ctx.saved_tensors
        head = Head(hidden, unembedding, bias, ctx.temperature, ctx.chunk)
        out = Gradients.room(head, ctx.needs_input_grad[:3])
        gradients(head, ids, log_z, grad.to(log_z.dtype), ctx.kept, out)
        return *out.of(head), *[None] * 6


class _Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        unembedding: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        slope: Slope,
        temperature: float,
        chunk: int,
        entropy: bool,
        backward: bool,
    ):
        head = Head(hidden, unembedding, bias, temperature, chunk)
        parts = head.wholes()
        out = Gradients.room(head, ctx.needs_input_grad[:3] if backward else (False, False, False), len(parts))
        logprobs = hidden.new_empty(ids.shape, dtype=head.dtype)
        entropies, value = logprobs.new_empty(len(ids) if entropy else 0), logprobs.new_zeros(())
        for rows in parts:
            part = head.at(rows)
            kept = Kept.whole(part) if backward else Kept()
            sums = normalise(part, ids[rows], entropy, False, kept)
            logprobs[rows] = sums.selected - sums.log_z[:, None]
            if entropy:
                entropies[rows] = sums.entropy
            slopes = _slopes(slope, rows, logprobs[rows], sums.entropy)
            value += torch.where(slopes != 0, slopes * logprobs[rows], 0.0).sum()
            if backward:
                to_hidden = None if out.hidden is None else out.hidden[rows]
                share = Gradients(to_hidden, out.unembedding, out.bias, out.empty)
                gradients(part, ids[rows], sums.log_z, slopes, kept, share)
                out.empty = share.empty
        ctx.save_for_backward(*out.of(head))
        ctx.mark_non_differentiable(logprobs, entropies)
        return value, logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None):
        made = ctx.saved_tensors
        # They are used once, and a second copy of the unembedding's would be a large part of the peak.
        return *(None if x is None else x.mul_(grad.to(x.dtype)) for x in made), *[None] * 6


def _slopes(slope: Slope, rows: slice, logprobs: Tensor, entropy: Tensor) -> Tensor:
    found = slope(rows, logprobs.clone(), entropy).detach()
    if found.shape != logprobs.shape:
        raise ValueError(f"slope must give {list(logprobs.shape)} for these positions, gave {list(found.shape)}")
    return found.to(logprobs.dtype)


def _apply(hidden: Tensor, unembedding: Tensor, bias: Tensor | None, *rest: Any, kind: Any = _TokenLogprobs) -> Any:
    # Only out here is it known whether gradients are on: inside they are off, and `needs_input_grad` does not say.
    backward = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, unembedding, bias))
    return kind.apply(hidden, unembedding, bias, *rest, backward)


def _table(ids: Tensor) -> Tensor:
    return ids.long() if ids.dim() == 2 else ids.long()[:, None]


def _check(hidden: Tensor, unembedding: Tensor, ids: Tensor, temperature: float, chunk_tokens: int, bias: Tensor | None) -> None:
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating [N, D], got {hidden.dtype} {list(hidden.shape)}")
    if unembedding.dim() != 2 or unembedding.shape[1] != hidden.shape[1] or not len(unembedding):
        raise ValueError(f"unembedding must be [V, {hidden.shape[1]}] to fit hidden, got {list(unembedding.shape)}")
    if ids.dim() not in (1, 2) or len(ids) != len(hidden):
        raise ValueError(f"ids must be [{len(hidden)}] or [{len(hidden)}, K] to fit hidden, got {list(ids.shape)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"ids must be integers, got {ids.dtype}")
    if bias is not None and list(bias.shape) != [len(unembedding)]:
        raise ValueError(f"bias must be [{len(unembedding)}] to fit unembedding, got {list(bias.shape)}")
    for name, tensor in (("unembedding", unembedding), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, hidden is {hidden.dtype}; give both in one dtype")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    check_chunk(chunk_tokens)
    check_ids("ids", ids, len(unembedding))


def _check_uniform(uniform: Tensor, hidden: Tensor) -> None:
    if uniform.dtype != torch.float64 or list(uniform.shape) != [len(hidden)] or uniform.device != hidden.device:
        raise ValueError(
            f"uniform must be float64 [{len(hidden)}] on {hidden.device}, got {uniform.dtype} {list(uniform.shape)} on {uniform.device}"
        )
    if uniform.numel() and not bool(((uniform >= 0) & (uniform < 1)).all()):
        raise ValueError("uniform must lie in [0, 1)")
