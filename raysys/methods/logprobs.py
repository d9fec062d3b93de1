"""Log-probabilities of asked-for ids without ever holding `[N, V]` logits: log-softmax and gather over blocks, recomputed in backward.

Legend: N positions, D width, V vocabulary, K ids asked for at each position.

    z_i = (h_i U^T + b) / T;  logp_ik = z_i[y_ik] - log sum_v exp z_iv
    dz_iv = sum_k g_ik 1[v = y_ik] - (sum_k g_ik) p_iv

The vocabulary is the outer loop and positions the inner one, so a block of the unembedding's gradient is finished
before the next begins. Extra memory is one block of logits, one float32 block of that gradient, and float32 `[N, D]`.
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raysys.methods.tensors import check_chunk, check_ids, chunks, compute_dtype

# Logits that exist at once. On CPU a block should stay in cache between its passes, on a GPU it should fill the device.
CPU_BLOCK = 2**19
GPU_BLOCK = 2**24


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
        hidden: [N, D]; float64 stays float64, lower precisions multiply in their own dtype and normalise in float32.
        unembedding: [V, D], same dtype. May be a DeepSpeed ZeRO-3 parameter when called inside its module's forward:
            the parameter object itself is saved, so that backward finds what the module's hook gathered again.
        ids: [N] or [N, K] integers in [0, V).
        temperature: divides the logits; positive.
        chunk_tokens: positions whose logits may exist at once (of a block of the vocabulary only).
        bias: [V], same dtype, or None.
        entropy: also return each position's entropy in nats, [N], without gradient.

    Returns:
        [N] or [N, K] as `ids`, float32 (float64 for float64 input), or that and the entropy. Gradients reach hidden, unembedding and bias.

    Raises:
        ValueError: shapes, dtypes or devices disagree, an id is outside the vocabulary, or temperature or chunk_tokens is not positive.
    """
    _check(hidden, unembedding, ids, temperature, chunk_tokens, bias)
    table = ids.long() if ids.dim() == 2 else ids.long()[:, None]
    logprobs, entropies = _TokenLogprobs.apply(hidden, unembedding, bias, table, float(temperature), chunk_tokens, entropy)
    logprobs = logprobs.reshape(ids.shape)
    return (logprobs, entropies) if entropy else logprobs


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, unembedding: Tensor, bias: Tensor | None, ids: Tensor, temperature: float, chunk: int, entropy: bool
    ):
        selected, log_z, entropies = _normalise(hidden, unembedding, bias, ids, temperature, chunk, entropy)
        ctx.save_for_backward(hidden, unembedding, bias, ids, log_z)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropies)
        return selected - log_z[:, None], entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None):
        hidden, unembedding, bias, ids, log_z = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        grads = _gradients(hidden, unembedding, bias, ids, log_z, grad.to(log_z.dtype), ctx.temperature, ctx.chunk, wanted)
        return *grads, None, None, None, None


def _normalise(hidden: Tensor, unembedding: Tensor, bias: Tensor | None, ids: Tensor, temperature: float, chunk: int, entropy: bool):
    """Logits of `ids` [N, K], log of the normaliser [N], entropy [N] (empty unless asked for)."""
    n, dtype, tiny = len(hidden), compute_dtype(hidden), torch.finfo(compute_dtype(hidden)).min
    selected = hidden.new_zeros(ids.shape, dtype=dtype)
    peak = hidden.new_full((n,), tiny, dtype=dtype)
    mass, moment = hidden.new_zeros(n, dtype=dtype), hidden.new_zeros(n, dtype=dtype)  # sum e^(z-peak), sum (z-peak) e^(z-peak)
    for start, stop in _vocabulary_blocks(hidden, unembedding, chunk):
        for rows in chunks(n, chunk):
            block = _logits(hidden[rows], unembedding[start:stop], None if bias is None else bias[start:stop], temperature)
            local, inside = _inside(ids[rows], start, stop)
            selected[rows] = torch.where(inside, block.gather(1, local), selected[rows])
            # The floor keeps a row whose logits are all -inf so far from becoming inf - inf.
            top = torch.maximum(block.amax(1), peak[rows])
            shrink = (peak[rows] - top).exp_()
            if entropy:
                shifted = block.sub_(top[:, None])
                weights = shifted.exp()
                moment[rows] = shrink * (moment[rows] + (peak[rows] - top) * mass[rows]) + (weights * shifted.clamp_(min=tiny)).sum(1)
                mass[rows] = mass[rows] * shrink + weights.sum(1)
            else:
                mass[rows] = mass[rows] * shrink + block.sub_(top[:, None]).exp_().sum(1)
            peak[rows] = top
    log_mass = mass.log()
    return selected, peak + log_mass, log_mass - moment / mass if entropy else hidden.new_zeros(0, dtype=dtype)


def _gradients(
    hidden: Tensor,
    unembedding: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    log_z: Tensor,
    grad: Tensor,
    temperature: float,
    chunk: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, unembedding and bias where wanted, given that of the log-probs `grad` [N, K]."""
    dtype = log_z.dtype
    to_hidden = torch.zeros_like(hidden, dtype=dtype) if wanted[0] else None
    to_unembedding = torch.empty_like(unembedding) if wanted[1] else None
    to_bias = torch.empty_like(bias) if bias is not None and wanted[2] else None
    grad = grad / temperature
    total = grad.sum(1, keepdim=True).neg_()
    parts = chunks(len(hidden), chunk)
    for start, stop in _vocabulary_blocks(hidden, unembedding, chunk):
        weight = unembedding[start:stop]
        weight_sum = hidden.new_zeros(weight.shape, dtype=dtype) if to_unembedding is not None and len(parts) != 1 else None
        bias_sum = hidden.new_zeros(stop - start, dtype=dtype) if to_bias is not None else None
        for rows in parts:
            block = _logits(hidden[rows], weight, None if bias is None else bias[start:stop], temperature)
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


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """A new float32 (or float64) block of logits, the caller's to overwrite."""
    block = _product(hidden, weight.t())
    if bias is not None:
        block += bias
    return block if temperature == 1.0 else block.div_(temperature)


def _product(left: Tensor, right: Tensor) -> Tensor:
    dtype = compute_dtype(left)
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda:  # the product's own float32 accumulator, not rounded on its way out
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += _product(left, right)


def _vocabulary_blocks(hidden: Tensor, unembedding: Tensor, chunk: int) -> list[tuple[int, int]]:
    budget = GPU_BLOCK if hidden.is_cuda else CPU_BLOCK
    size, rows = len(unembedding), max(1, min(chunk, len(hidden)))
    width = max(256, budget // rows)
    width = math.ceil(size / math.ceil(size / width))  # blocks of equal width, no sliver at the end
    return [(start, min(start + width, size)) for start in range(0, size, width)]


def _inside(ids: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Ids counted from `start` (any valid number where they are not in this block), and which are in it."""
    inside = (ids >= start) & (ids < stop)
    return (ids - start).clamp_(0, stop - start - 1), inside


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
