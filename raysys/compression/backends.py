"""Quantisers of one linear: round to nearest, GPTQ, and GPTQ with asymmetric calibration (GPTAQ). Spec: d2quant.md, section 5.

Legend: R rows (outputs), n input columns, g group size, W the weight [R, n] as `nn.Linear` stores it; H, D, U as in `statistics`.

    P = alpha triu(D U^T, 1) U                       alpha = 0 is GPTQ
    e_j = (w_j - q_j) / U_jj                         columns one by one, w_j as it stands, q_j its nearest level
    W[:, j+1:] -= e_j U[j, j+1:] - w_j P[j, j+1:]

The levels of a group are fitted at its first column, on the weights as they stand then and by their plain squared error: by
`methods.d2quant.quantize`, or for a down-projection with scales for columns (DSQ) by `quantize_down`. Columns that come late pay for the
errors of all before, so important ones come first ("group" order); results are back in the weight's own order, `column_scale` too.

The steps within a group read each column once; what a block of columns does to all later ones is one matrix product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raysys.compression.statistics import Factor, Order, Statistics
from raysys.methods.d2quant import Levels, Quantized, plane_levels, quantize, quantize_down
from raysys.methods.tensors import compute_dtype


def rtn(
    weight: Tensor,
    bits: int,
    group_size: int = 128,
    levels: Levels = "uniform",
    column: bool = False,
    *,
    symmetric: bool = True,
    iterations: int = 15,
) -> Quantized:
    """Round to nearest on the best grid of each group; nothing of the data is used.

    Args:
        weight: [R, n].
        column: with a scale for each column (DSQ), which has to be absorbed: for down-projections.
        levels, iterations: with `column`; without, levels are uniform.
        symmetric: without `column`; with it the grid is.

    Raises:
        ValueError: see `methods.d2quant.quantize` and `quantize_down`.
    """
    if column:
        return quantize_down(weight, bits, group_size, levels, iterations)
    return quantize(weight, bits, group_size, symmetric)


@torch.no_grad()
def gptq(
    weight: Tensor,
    statistics: Statistics,
    bits: int,
    group_size: int = 128,
    *,
    block: int = 128,
    damp: float = 0.01,
    order: Order = "group",
    alpha: float = 0.25,
    down: bool = False,
    levels: Levels = "uniform",
    iterations: int = 15,
    symmetric: bool = True,
) -> Quantized:
    """Columns one by one, what rounding one costs the output made up by those after it.

    Args:
        weight: [R, n].
        statistics: of the inputs. With `deviation` and `alpha` above 0 this is GPTAQ, else GPTQ.
        block: columns whose effect on later ones is applied together; changes the time, not the result.
        damp: share of the Hessian's mean diagonal that is added to it.
        order: of columns, "group" or "none"; no index has to be stored for either.
        alpha: strength of the asymmetric term.
        down: with a scale for each column, as `rtn` with `column`; it is fitted anew in each group, on the weights as they stand there.
        levels, iterations: with `down`; without, levels are uniform.
        symmetric: without `down`; with it the grid is.

    Returns:
        Columns whose input was always zero are zero, or with binary levels, none of which is 0, next to it.

    Raises:
        ValueError: shapes or numbers that do not fit, weights that are no finite numbers, a Hessian that cannot be factored.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or weight.shape[1] != statistics.columns:
        raise ValueError(f"weight must be floating [out, {statistics.columns}], got {weight.dtype} of shape {list(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight must hold finite numbers only")
    if block < 1:
        raise ValueError(f"block must be positive, got {block}")
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha must not be negative, got {alpha}")
    factor = statistics.factor(group_size, damp, order)
    dtype = compute_dtype(weight, factor.upper)
    # Columns are rows here: each is read and written as a whole.
    work = weight.detach().to(dtype).masked_fill(factor.dead, 0).T[factor.order].contiguous()

    def fit(group: Tensor) -> Quantized:
        return quantize_down(group, bits, group_size, levels, iterations) if down else quantize(group, bits, group_size, symmetric)

    made, codes = [], []
    width = max(1, block // group_size) * group_size
    for start in range(0, len(work), width):
        end = min(start + width, len(work))
        pull = _pull(factor, start, end, alpha, dtype)
        push = torch.empty(pull.shape[1], work.shape[1], dtype=dtype, device=work.device)
        each = len(push) // (end - start)
        for first in range(start, end, group_size):
            inside, done = slice(first - start, first - start + group_size), (first - start) * each
            group = work[first : first + group_size]
            if done:
                group.addmm_(pull[inside, :done], push[:done], alpha=-1)
            grid = fit(group.T.contiguous())
            made.append(grid)
            codes.append(_columns(group, grid, bits, pull[inside, done : done + group_size * each], push[done : done + group_size * each]))
        work[end:].addmm_(pull[end - start :], push, alpha=-1)
    return _in_order(made, torch.cat(codes), factor.order, group_size, weight.dtype)


def _pull(factor: Factor, start: int, end: int, alpha: float, dtype: torch.dtype) -> Tensor:
    """What columns from `start` on [n - start] take from each of the block's: a column for e_j, with D a second one for w_j."""
    upper = factor.upper[start:end, start:].to(dtype)
    if factor.asymmetric is None or alpha == 0:
        return upper.T
    return torch.stack([upper, factor.asymmetric[start:end, start:].to(dtype) * -alpha], dim=1).flatten(0, 1).T


def _columns(group: Tensor, grid: Quantized, bits: int, pull: Tensor, push: Tensor) -> Tensor:
    """Codes [g, R] of a group's columns [g, R] one after another; fills `push` with what each does to later ones."""
    codes = torch.empty(group.shape, dtype=grid.codes.dtype, device=group.device)
    pull = pull.contiguous()
    each = len(push) // len(group)
    for j, column in enumerate(group):
        if j:
            column = torch.addmv(column, push[: j * each].T, pull[j, : j * each], alpha=-1)
        codes[j], value = _nearest(column, grid, bits, j)
        torch.div(column - value, pull[j, j * each], out=push[j * each])
        if each == 2:
            push[j * each + 1] = column
    return codes


def _nearest(column: Tensor, grid: Quantized, bits: int, j: int) -> tuple[Tensor, Tensor]:
    """Codes and levels [R] of column j of a group, rounded as `methods.d2quant` rounds."""
    size = None if grid.column_scale is None else grid.column_scale[j]
    if grid.scale.dim() == 3:
        assert size is not None
        levels = plane_levels(torch.arange(2**bits, dtype=torch.uint8, device=column.device), grid.scale[:, 0]) * size
        codes = (levels - column.unsqueeze(1)).square_().argmin(dim=1)
        return codes.to(grid.codes.dtype), levels.gather(1, codes.unsqueeze(1)).squeeze(1)
    scale = grid.scale[:, 0]
    steps = (column if size is None else column / size) / scale
    if grid.zero is None:
        steps = steps.round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        value = steps * scale
    else:
        zero = grid.zero[:, 0].to(column.dtype)
        steps = (steps + zero).round_().clamp_(0, 2**bits - 1)
        value = (steps - zero) * scale
    return steps.to(grid.codes.dtype), value if size is None else value * size


def _in_order(made: list[Quantized], codes: Tensor, order: Tensor, group_size: int, dtype: torch.dtype) -> Quantized:
    """One matrix of the groups [R, g], columns and groups where the weight has them."""
    back = order.argsort()
    groups = order[::group_size].div(group_size, rounding_mode="floor").argsort()
    scale = torch.cat([one.scale for one in made], dim=1)[:, groups]
    zero = None if made[0].zero is None else torch.cat([one.zero for one in made if one.zero is not None], dim=1)[:, groups]
    sizes = [one.column_scale for one in made if one.column_scale is not None]
    return Quantized(codes[back].T.contiguous(), scale, zero, torch.cat(sizes)[back] if sizes else None, dtype)
