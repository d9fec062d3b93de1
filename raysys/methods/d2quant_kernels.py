"""The search for a group's range as machine code, for weights in the processor's memory: `best_ranges`. Compiled by numba on first use.

Legend: M groups, g group size, p percent of a group's full range `whole`; the step is s = p whole / 100, on a symmetric grid of either
sign.

Up to three bits all candidates together cost little more than one. In units of whole / 200 the border between codes k - 1 and k lies at
t = (2 k - 1) p, a whole number, and moving the weights beyond it from k - 1 to k changes their squared error by

    4 p sum over u >= t of c^2 (t - u)             u = 200 |w| / whole, c the weight that the column's error has

so a table over all t, filled once for each sign of the weights, gives the error of a candidate as a sum of as many entries as there are
borders. With more bits the table is longer than the candidates are many, and errors are summed weight by weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

TABLE_BITS = 3
LATTICE = 200
"""Units in a group's range whose step is `whole`: half of a percent."""


def best_by_table(
    groups: np.ndarray,
    squares: np.ndarray,
    whole: np.ndarray,
    zero: np.ndarray,
    codes: int,
    percents: np.ndarray,
    mirrored: bool,
    best: np.ndarray,
) -> None:
    """Fills `best` [M] with percents, negative where the mirrored grid is the better one. The first of equals, a grid before its mirror.

    Args:
        groups: [M, g].
        squares: [G, g], c^2 of the columns; group m has row m mod G.
        whole: [M], positive.
        zero: [M], how many codes lie below zero.
        codes: 2^b.
        percents: positive, falling.
        mirrored: also try the grid with its longer side on the positive weights.
    """
    size = LATTICE * (codes - 1) + 2  # no weight is farther from zero than all codes span
    amount, total = np.zeros((size, 2)), np.zeros((size, 2))
    for m in range(len(groups)):
        unit, end, weights = LATTICE / np.float64(whole[m]), 0, squares[m % len(squares)]
        for j in range(groups.shape[1]):
            value = groups[m, j] * unit
            side = int(value < 0)
            place = min(int(abs(value)), size - 1)
            amount[place, side] += weights[j]
            total[place, side] += weights[j] * abs(value)
            end = max(end, place + 1)
        high = low = high_sum = low_sum = 0.0
        for place in range(end - 1, percents[-1] - 1, -1):
            high += amount[place, 0]
            low += amount[place, 1]
            high_sum += total[place, 0]
            low_sum += total[place, 1]
            total[place, 0] = place * high - high_sum
            total[place, 1] = place * low - low_sum
        amount[:end] = 0.0
        below, least = int(zero[m]), np.inf
        above = codes - 1 - below
        for percent in percents:
            # `while`, because a range with a step divides.
            error, place = 0.0, percent
            while place < min(2 * above * percent, end):
                error += total[place, 0]
                place += 2 * percent
            place = percent
            while place < min(2 * below * percent, end):
                error += total[place, 1]
                place += 2 * percent
            if error * percent < least:
                least, best[m] = error * percent, percent
            if mirrored:
                # One code more above zero, one less below.
                place = (2 * below - 1) * percent
                if place < end:
                    error += total[place, 0] - total[place, 1]
                if error * percent < least:
                    least, best[m] = error * percent, -percent
        total[:end] = 0.0


def best_by_sums(
    groups: np.ndarray,
    squares: np.ndarray,
    whole: np.ndarray,
    zero: np.ndarray,
    codes: int,
    percents: np.ndarray,
    mirrored: bool,
    best: np.ndarray,
) -> None:
    """`best_by_table` in another way: squared errors, weight by weight."""
    number = groups.dtype.type
    for m in range(len(groups)):
        low, high = number(-zero[m]), number(codes - 1 - zero[m])
        row, weights, least = groups[m], squares[m % len(squares)], number(np.inf)
        for percent in percents:
            step = whole[m] * number(percent / 100)
            inverse, error, other = number(1) / step, number(0), number(0)
            for j in range(len(row)):
                steps = np.rint(row[j] * inverse)
                off = min(max(steps, low), high) * step - row[j]
                error += weights[j] * off * off
                off = min(max(steps, -high), -low) * step - row[j]
                other += weights[j] * off * off
            if error < least:
                least, best[m] = error, percent
            if mirrored and other < least:
                least, best[m] = other, -percent


def column_sums(
    groups: np.ndarray,
    column: np.ndarray,
    scale: np.ndarray,
    longest: int,
    codes: np.ndarray,
    along: np.ndarray,
    size: np.ndarray,
    error: np.ndarray,
) -> None:
    """Rounds weights X over c and adds up what the next c comes of, in one pass. Q are the levels, codes times scale.

    Args:
        groups: X [M, g]; group m has row m mod G of `column`.
        column: c [G, g].
        scale: [M].
        longest: 2^(b-1): codes from minus this to one below it.
        codes: [M, g], filled.
        along, size: [G, g], zeros, become sums of X Q and of Q Q.
        error: [G, g], zeros, becomes the sum of (c Q - X)^2.
    """
    number = groups.dtype.type
    low, high = number(-longest), number(longest - 1)
    levels = np.zeros_like(column[0])
    for m in range(len(groups)):
        g = m % len(column)
        row, step = groups[m], scale[m]
        for j in range(len(row)):
            levels[j] = min(max(np.rint(row[j] / column[g, j] / step), low), high)
        for j in range(len(row)):
            codes[m, j] = np.int32(levels[j])
        for j in range(len(row)):
            level = levels[j] * step
            along[g, j] += row[j] * level
            size[g, j] += level * level
            apart = level * column[g, j] - row[j]
            error[g, j] += apart * apart


def compiled(bits: int) -> Callable[..., None]:
    """The faster search for this many bits, as machine code."""
    return machine_code(best_by_table if bits <= TABLE_BITS else best_by_sums)


@cache
def machine_code(kernel: Callable[..., None]) -> Callable[..., None]:
    """One of this file's, compiled, without the interpreter's lock."""
    from numba import njit

    # Sums over a group may be taken in any order; nothing else is given up.
    options: dict[str, Any] = {"nogil": True, "boundscheck": False, "fastmath": {"reassoc", "nsz", "contract"}}
    try:
        return njit(cache=True, **options)(kernel)
    except RuntimeError:  # no folder where numba could keep the code
        return njit(**options)(kernel)
