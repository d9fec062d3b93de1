"""D2Quant: weights below four bits, with a scale more for the down-projection and a bias after attention. Paper: arXiv 2602.02546.

Legend: D model width, F MLP width, g group size along the input, X one group [rows, g] of a matrix, b bits; weights as `nn.Linear` stores
them [out, in].

    plain      W ~ (codes - zero) s                          s per (row, group), found by a search over clipped ranges
    DSQ        W ~ Q(W / c) c                                c per input column, shared by all rows of the down-projection
      uniform  Q = round to nearest of X / c, then c_j = <X_j, Q_j> / <Q_j, Q_j>, in turns; the best iterate of each group is kept
      binary   X ~ c_j sum_k r_ik B_ijk, B = +-1: rows r by least squares, then columns c, then the nearest levels; none raises the error
    absorption down(act(gate x) * up x) does not change when column j of down is divided and row j of up multiplied by c_j > 0
    DAC        bias = clamp(strength * mean over tokens of (teacher - student), -clip, clip)     of the norm after attention

The paper's figure fits both kinds of levels and the authors' program has the binary one; the uniform one can be served. In each group
the geometric mean of c is 1: where it lies is a free choice, and scales that absorb it stay in the range of half precision.

float64 stays float64, lower precisions compute in float32. Shapes are checked; nothing is drawn at random.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from raysys.methods.d2quant_kernels import column_sums, compiled, machine_code
from raysys.methods.tensors import compute_dtype

Levels = Literal["uniform", "binary"]
LEVELS: tuple[Levels, ...] = ("uniform", "binary")
BITS = range(2, 9)
BINARY_BITS = range(1, 5)
_LEAST_PERCENT = 20
"""Of the full range, where the search for a clipped one ends."""
_FARTHEST = 64.0
"""How far a column's scale may be from its group's median, as a factor."""
_AT_ONCE = {False: 2**20, True: 2**26}
"""Weights whose ranges are searched together, on a processor and on a GPU."""
_ROWS_A_CALL = 512
T = TypeVar("T")


@dataclass(frozen=True)
class Quantized:
    """A quantised matrix [out, in].

    Attributes:
        codes: [out, in], integers: signed without `zero`, from 0 on with it. Binary levels: bit k is 1 where plane k is +1.
        scale: [out, in / g]; of binary levels [out, in / g, bits], one a plane.
        zero: [out, in / g], or None on a symmetric grid.
        column_scale: [in], what `dequantize` multiplies columns with, or None.
        dtype: of the weight.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    column_scale: Tensor | None = None
    dtype: torch.dtype = torch.float32

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scale.shape[1]

    def dequantize(self) -> Tensor:
        """The matrix [out, in] that stands for the weight, in the weight's dtype."""
        groups = self.codes.unflatten(1, (self.scale.shape[1], -1))
        if self.scale.dim() == 3:
            out = plane_levels(groups, self.scale)
        else:
            steps = groups.to(self.scale.dtype)
            if self.zero is not None:
                steps = steps - self.zero.to(self.scale.dtype).unsqueeze(-1)
            out = steps * self.scale.unsqueeze(-1)
        out = out.flatten(1)
        return (out if self.column_scale is None else out * self.column_scale).to(self.dtype)


def quantize(weight: Tensor, bits: int, group_size: int = 128, symmetric: bool = True) -> Quantized:
    """Round to nearest, each group with the range that gives the least squared error of those tried.

    Args:
        weight: [out, in].
        bits: 2 to 8.
        group_size: inputs that share a scale; divides the input width.
        symmetric: codes from -2^(b-1) to 2^(b-1) - 1 and a scale of either sign; without, from 0 to 2^b - 1 around a zero point.

    Raises:
        ValueError: a shape, width or number of bits that does not fit, or a weight that is no finite number.
    """
    groups = _grouped(weight, group_size)
    _check_bits(bits, BITS)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    parts = []
    for some in groups.split(max(1, _AT_ONCE[groups.is_cuda] // weight.shape[1])):
        scale, zero = _searched(some, bits, symmetric)
        codes = (some / scale).add_(zero).round_().clamp_(low, high).to(torch.int8 if symmetric else torch.uint8)
        parts.append((codes.flatten(1), scale.squeeze(-1), zero.squeeze(-1).to(torch.int16)))
    codes, scale, zero = (torch.cat(part) for part in zip(*parts))
    return Quantized(codes, scale, None if symmetric else zero, None, weight.dtype)


def quantize_down(weight: Tensor, bits: int, group_size: int = 128, levels: Levels = "uniform", iterations: int = 15) -> Quantized:
    """DSQ: a down-projection with a scale for each input column, which `absorb` moves into the up-projection.

    Args:
        weight: [D, F].
        bits: 2 to 8; of binary levels 1 to 4.
        levels: uniform ones are symmetric, and no group is worse than by `quantize`; binary ones no serving kernel knows.
        iterations: alternations; 15 saturate. 0 keeps the start.

    Returns:
        With `column_scale` [F], positive, of geometric mean 1 in each group. Columns of zeros are left out of it: theirs is 1, with binary
        levels, none of which is 0, so small that nothing is left of them.

    Raises:
        ValueError: see `quantize`; no such levels; a negative number of iterations.
    """
    groups = _grouped(weight, group_size)
    if levels not in LEVELS:
        raise ValueError(f"levels must be one of {', '.join(LEVELS)}, got {levels!r}")
    _check_bits(bits, BITS if levels == "uniform" else BINARY_BITS)
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise ValueError(f"iterations must be a whole number from 0 on, got {iterations}")
    fit = _uniform if levels == "uniform" else _binary
    at_once = max(1, _AT_ONCE[groups.is_cuda] // groups[:, 0].numel())
    parts = [fit(some.contiguous(), bits, iterations) for some in groups.split(at_once, dim=1)]
    scale, codes, column = (torch.cat(part, dim=axis) for part, axis in zip(zip(*parts), (1, 1, 0)))
    return Quantized(codes.flatten(1), scale, None, column.flatten(), weight.dtype)


def absorb(up: Quantized, column_scale: Tensor) -> Quantized:
    """The up-projection whose row j is multiplied by c_j: its codes stay as they are. A bias has to be multiplied too.

    Right where the activation is linear in what up gives: SwiGLU, also ReLU (c > 0), but not GELU without a gate.

    Args:
        up: [F, D].
        column_scale: c of the down-projection, [F].

    Raises:
        ValueError: the shape is another one, or a scale is not positive, or not finite.
    """
    rows = up.codes.shape[0]
    if tuple(column_scale.shape) != (rows,):
        raise ValueError(f"column_scale must be [{rows}], one for each row of up, got {list(column_scale.shape)}")
    if not bool((column_scale > 0).all()):
        raise ValueError(f"column_scale must be positive, got {column_scale.min().item():g}")
    if not bool(column_scale.isfinite().all()):
        raise ValueError(f"column_scale must be finite, got {column_scale.max().item():g}")
    factor = column_scale.to(up.scale.dtype).reshape(-1, *([1] * (up.scale.dim() - 1)))
    return replace(up, scale=up.scale * factor)


def deviation_bias(teacher_sum: Tensor, student_sum: Tensor, tokens: int, strength: float = 1.0, clip: float = 10.0) -> Tensor:
    """DAC: the bias that takes the mean deviation of each channel away.

    Args:
        teacher_sum, student_sum: [D], sums over all tokens of the norm's output, with attention in full precision and quantised, on the
            same inputs.
        tokens: how many; padding is none.
        strength: share of the mean that is corrected.
        clip: largest bias.

    Raises:
        ValueError: shapes differ, there is no token, or `strength` or `clip` is negative.
    """
    if teacher_sum.dim() != 1 or teacher_sum.shape != student_sum.shape:
        raise ValueError(f"teacher_sum and student_sum must both be [D], got {list(teacher_sum.shape)} and {list(student_sum.shape)}")
    if not tokens > 0:
        raise ValueError(f"tokens must be positive, got {tokens}")
    for name, value in (("strength", strength), ("clip", clip)):
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    dtype = compute_dtype(teacher_sum, student_sum)
    mean = (teacher_sum.to(dtype) - student_sum.to(dtype)) / tokens
    return (strength * mean).clamp(-clip, clip)


def _searched(groups: Tensor, bits: int, symmetric: bool, column: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero point [R, G, 1] of the best range of each group; errors count times `column` [G, g]."""
    scale, zero = _whole(groups, bits, symmetric)
    percent = _best_percent(groups, scale, zero, bits, symmetric, column)
    return scale * (percent.to(torch.float64) / 100).to(scale.dtype), zero


def _whole(groups: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Step of the full range and zero point, [R, G, 1]."""
    bottom, top = groups.amin(dim=-1, keepdim=True).clamp_max(0), groups.amax(dim=-1, keepdim=True).clamp_min(0)
    if symmetric:
        whole = torch.maximum(-bottom, top) / 2 ** (bits - 1)
        return whole.where(whole > 0, 1.0), torch.zeros_like(whole)
    whole = (top - bottom) / (2**bits - 1)
    whole = whole.where(whole > 0, 1.0)
    return whole, (-bottom / whole).round_().clamp_(0, 2**bits - 1)


def _best_percent(groups: Tensor, whole: Tensor, zero: Tensor, bits: int, symmetric: bool, column: Tensor | None) -> Tensor:
    """[R, G, 1] in steps of one percent of `whole`, large ones first; negative: the symmetric grid the other way round.

    The grid is longer on the negative side: a sign says which side of the weights gets that level, and a step is at most as large as puts
    the shorter side's end on the largest weight.
    """
    first = math.ceil(100 * 2 ** (bits - 1) / (2 ** (bits - 1) - 1)) if symmetric else 100
    percents = range(first, _LEAST_PERCENT - 1, -1)
    below = zero + 2 ** (bits - 1) if symmetric else zero
    if groups.device.type != "cpu":
        return _tried(groups, whole, below, 2**bits, percents, symmetric, column)
    squares = (torch.ones_like(groups[:1, 0]) if column is None else column.square()).numpy()
    best, tried = torch.empty(whole.shape, dtype=torch.int32), np.array(percents)

    def search(rows: slice) -> None:
        groups_, whole_, below_, best_ = (one[rows].flatten(0, 1).numpy() for one in (groups.contiguous(), whole, below, best))
        compiled(bits)(groups_, squares, whole_.ravel(), below_.ravel(), 2**bits, tried, symmetric, best_.reshape(-1))

    _in_threads(search, len(groups))
    return best


def _tried(groups: Tensor, whole: Tensor, below: Tensor, codes: int, percents: range, mirrored: bool, column: Tensor | None) -> Tensor:
    """`best_by_sums` for any device."""
    best, least = torch.zeros_like(whole, dtype=torch.int32), torch.full_like(whole, math.inf)
    for percent in percents:
        scale = whole * (percent / 100)
        steps = (groups / scale).round_()
        for sign in (1, -1) if mirrored else (1,):
            low, high = (-below, codes - 1 - below) if sign > 0 else (below - codes + 1, below)
            off = torch.maximum(torch.minimum(steps, high), low).mul_(scale).sub_(groups)
            error = (off if column is None else off.mul_(column)).square_().sum(dim=-1, keepdim=True)
            better = error < least
            best.masked_fill_(better, sign * percent)
            least = torch.where(better, error, least)
    return best


def _uniform(groups: Tensor, bits: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, codes and column scale [G, g] of the best iterate of each group."""
    column, live = torch.ones_like(groups[0]), (groups != 0).any(dim=0)
    best: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    for step in range(iterations + 1):
        scale = _searched(groups / column, bits, True, column)[0].squeeze(-1)
        codes, along, size, error = _column_sums(groups, column, scale, 2 ** (bits - 1))
        if best is None:
            best = (error, scale, codes, column)
        else:
            better = error < best[0]
            best = (
                torch.where(better, error, best[0]),
                torch.where(better, scale, best[1]),
                torch.where(better.unsqueeze(-1), codes, best[2]),
                torch.where(better.unsqueeze(-1), column, best[3]),
            )
        # The plain quantiser comes first, so that nothing is worse. Then columns begin at their own size.
        column = _columns(along, size, column, live) if step else _normalised(groups.abs().mean(dim=0), live)[0]
    assert best is not None
    return best[1:]


def _column_sums(groups: Tensor, column: Tensor, scale: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [R, G, g], sums of X Q and of Q Q [G, g], and squared errors [G]: `column_sums`, for any device."""
    if groups.device.type == "cpu":
        codes = torch.empty_like(groups, dtype=torch.int8)

        def add(rows: slice) -> Tensor:
            sums = torch.zeros(3, *column.shape, dtype=torch.float64)
            flat = [one[rows].flatten(0, 1).numpy() for one in (groups, scale, codes)]
            machine_code(column_sums)(flat[0], column.numpy(), flat[1], longest, flat[2], *sums.numpy())
            return sums

        along, size, error = torch.stack(_in_threads(add, len(groups))).sum(dim=0)
        return codes, along.to(groups.dtype), size.to(groups.dtype), error.sum(dim=-1)
    steps = (groups / column / scale.unsqueeze(-1)).round_().clamp_(-longest, longest - 1)
    levels = steps * scale.unsqueeze(-1)
    error = (levels * column - groups).square_().sum(dim=(0, 2))
    return steps.to(torch.int8), (groups * levels).sum(dim=0), levels.square().sum(dim=0), error


def _in_threads(call: Callable[[slice], T], rows: int) -> list[T]:
    """What the call gives for slices of the rows, in order. How many threads torch has does not change the slices."""
    parts = [slice(start, start + _ROWS_A_CALL) for start in range(0, rows, _ROWS_A_CALL)]
    threads = min(torch.get_num_threads(), len(parts))
    if threads == 1:
        return [call(part) for part in parts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(call, parts))


def _columns(along: Tensor, size: Tensor, column: Tensor, live: Tensor) -> Tensor:
    """Least squares of each column on its levels, [G, g]; where that is not positive the old scale stays. Normalised."""
    found = torch.where((along > 0) & (size > 0), along / size.where(size > 0, 1.0), column)
    median = found.quantile(0.5, dim=-1, keepdim=True)
    return _normalised(found.clamp(median / _FARTHEST, median * _FARTHEST), live)[0]


def _normalised(column: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Columns over their geometric mean in each group, [G, g], and that mean [G, 1]. Columns of zeros do not count and get 1."""
    logs = torch.where(live, column, 1.0).log()
    mean = (logs.sum(dim=-1, keepdim=True) / live.sum(dim=-1, keepdim=True).clamp_min(1)).exp()
    return torch.where(live, column / mean, 1.0), mean


def _binary(groups: Tensor, bits: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row scales [R, G, b], codes and column scale [G, g]: coordinate descent from the greedy start."""
    least = 1e-8
    column = groups.abs().mean(dim=0)
    # Rows are fitted with the weight c^2: a column of zeros must have next to none, or it would pull a level to 0 for all of them.
    column = column.where(column > 0, least)
    scales, planes, rest = [], [], groups.clone()
    for _ in range(bits):
        plane = torch.where(rest >= 0, 1.0, -1.0).to(groups.dtype)
        scale = ((rest * plane * column).sum(dim=-1) / column.square().sum(dim=-1)).abs().clamp_min(least)
        rest = rest - column * scale.unsqueeze(-1) * plane
        scales.append(scale)
        planes.append(plane)
    scale, codes = torch.stack(scales, dim=-1), _coded(torch.stack(planes, dim=-1))
    for _ in range(iterations):
        scale, codes = _rows(groups, codes, column, scale)
        levels = plane_levels(codes, scale)
        along, size = (groups * levels).sum(dim=0), levels.square().sum(dim=0)
        column = torch.where((along > 0) & (size > 0), along / size.where(size > 0, 1.0), column)
        codes = _nearest(groups, scale, column)
    live = (groups != 0).any(dim=0)
    column, mean = _normalised(column, live)
    return scale * mean.unsqueeze(0), codes, column.where(live, least)


def _rows(groups: Tensor, codes: Tensor, column: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of each row on its planes; a plane with a negative scale is turned over."""
    bits = before.shape[-1]
    planes = _planes(codes, bits, groups.dtype)
    weighted = planes * column.unsqueeze(-1)
    gram = weighted.transpose(-1, -2) @ weighted
    # Planes that coincide make it singular; the ridge is rounding otherwise.
    ridge = 10 * torch.finfo(groups.dtype).eps * column.square().sum(dim=-1)
    gram = gram + ridge[:, None, None] * torch.eye(bits, dtype=groups.dtype, device=groups.device)
    found = torch.linalg.solve(gram, weighted.transpose(-1, -2) @ groups.unsqueeze(-1)).squeeze(-1)
    turned = torch.where(found.unsqueeze(-2) < 0, -planes, planes)
    return found.abs().clamp_min(1e-8), _coded(turned)


def _nearest(groups: Tensor, scale: Tensor, column: Tensor) -> Tensor:
    """The code of the level that is nearest to each weight."""
    best, least = torch.zeros_like(groups, dtype=torch.uint8), torch.full_like(groups, math.inf)
    for code in range(2 ** scale.shape[-1]):
        level = plane_levels(torch.full((1, 1, 1), code, dtype=torch.uint8, device=groups.device), scale)
        error = (level * column - groups).square_()
        better = error < least
        best.masked_fill_(better, code)
        least = torch.where(better, error, least)
    return best


def _planes(codes: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """[..., b] of -1 and 1."""
    return ((codes.unsqueeze(-1) >> torch.arange(bits, device=codes.device, dtype=torch.uint8)) & 1).to(dtype) * 2 - 1


def _coded(planes: Tensor) -> Tensor:
    places = 2 ** torch.arange(planes.shape[-1], device=planes.device)
    return ((planes > 0) * places).sum(dim=-1).to(torch.uint8)


def plane_levels(codes: Tensor, scale: Tensor) -> Tensor:
    """sum_k r_k B_k, what binary codes [..., g] stand for, of row scales [..., b]: [..., g]."""
    out = torch.zeros((), dtype=scale.dtype, device=scale.device)
    for plane in range(scale.shape[-1]):
        sign = ((codes >> plane) & 1).to(scale.dtype) * 2 - 1
        out = out + sign * scale[..., plane].unsqueeze(-1)
    return out


def _check_bits(bits: int, allowed: range) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in allowed:
        raise ValueError(f"bits must be {allowed.start} to {allowed.stop - 1}, got {bits}")


def _grouped(weight: Tensor, group_size: int) -> Tensor:
    """[out, in / g, g] in the dtype of the computation."""
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        raise ValueError(f"weight must be floating [out, in], got {weight.dtype} of shape {list(weight.shape)}")
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1 or weight.shape[1] % group_size:
        raise ValueError(f"group_size must divide the input width {weight.shape[1]}, got {group_size}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight must hold finite numbers only")
    return weight.detach().to(compute_dtype(weight)).unflatten(1, (-1, group_size))
