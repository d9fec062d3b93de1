"""The searches for a group's range against trying each candidate by the book."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from raysys.methods import d2quant
from raysys.methods.d2quant import _tried, quantize, quantize_down
from raysys.methods.d2quant_kernels import TABLE_BITS, best_by_sums, best_by_table, compiled

ROWS, GROUPS, SIZE = 4, 3, 16


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_all_ways_find_the_range_with_the_least_error(bits: int, mirrored: bool, weighted: bool) -> None:
    draw = np.random.default_rng(bits)
    groups = draw.normal(size=(ROWS, GROUPS, SIZE)) * np.exp(draw.normal(size=SIZE))
    groups[1, 1] = np.abs(groups[1, 1])  # one side only
    groups[2, 2] = 0
    column = np.exp(draw.normal(size=(GROUPS, SIZE))) if weighted else np.ones((GROUPS, SIZE))
    codes, percents = 2**bits, range(200 if mirrored else 100, 19, -1)
    if mirrored:
        below = np.full((ROWS, GROUPS, 1), codes // 2)
        whole = np.abs(groups).max(axis=-1, keepdims=True) / (codes // 2)
    else:
        top, bottom = groups.max(axis=-1, keepdims=True).clip(0), groups.min(axis=-1, keepdims=True).clip(None, 0)
        whole = (top - bottom) / (codes - 1)
        below = np.rint(-bottom / np.where(whole > 0, whole, 1)).clip(0, codes - 1)
    whole[whole == 0] = 1

    want = np.zeros((ROWS, GROUPS), dtype=int)
    for row in range(ROWS):
        for group in range(GROUPS):
            errors = {}
            for percent in percents:
                grid = (np.arange(codes) - below[row, group]) * whole[row, group] * percent / 100
                for sign in (1, -1) if mirrored else (1,):
                    off = np.abs(sign * grid[:, None] - groups[row, group]).min(axis=0)
                    errors[sign * percent] = (off * column[group]) ** 2 @ np.ones(SIZE)
            want[row, group] = min(errors, key=lambda percent: errors[percent])

    flat: tuple[Any, ...] = (
        groups.reshape(-1, SIZE),
        column**2,
        whole.ravel(),
        below.astype(float).ravel(),
        codes,
        np.array(percents),
        mirrored,
    )
    assert want[2, 2] == percents[0]
    # As plain Python where that is quick; as machine code always.
    for kernel in (compiled(bits), *([best_by_table, best_by_sums] if bits == 2 else [])):
        got = np.zeros(ROWS * GROUPS, dtype=np.int32)
        kernel(*flat, got)
        assert got.tolist() == want.ravel().tolist(), kernel
    tensors = [torch.from_numpy(one) for one in (groups, whole, below.astype(float))]
    tried = _tried(*tensors, codes, percents, mirrored, torch.from_numpy(column) if weighted else None)
    assert tried.flatten().tolist() == want.ravel().tolist()


def test_few_bits_go_by_the_table() -> None:
    assert TABLE_BITS == 3 and compiled(2).py_func is best_by_table and compiled(4).py_func is best_by_sums  # type: ignore[attr-defined]


def test_threads_change_nothing() -> None:
    weight = torch.randn(1100, 2 * SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made.append((quantize(weight, 4, SIZE), quantize_down(weight, 2, SIZE)))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*made):
        assert torch.equal(one.codes, other.codes) and torch.equal(one.scale, other.scale)
    assert [rows.start for rows in d2quant._in_threads(lambda rows: rows, 1100)] == [0, 512, 1024]


@pytest.mark.parametrize("bits", [2, 4])
def test_sums_over_columns_are_those_of_the_levels(bits: int) -> None:
    draw = torch.Generator().manual_seed(1)
    groups = torch.randn(600, GROUPS, SIZE, generator=draw, dtype=torch.float64)
    column, scale = (
        torch.rand(GROUPS, SIZE, generator=draw, dtype=torch.float64) + 0.5,
        torch.rand(600, GROUPS, generator=draw).double() - 0.5,
    )
    longest = 2 ** (bits - 1)
    codes, along, size, error = d2quant._column_sums(groups, column, scale, longest)
    want = (groups / column / scale.unsqueeze(-1)).round().clamp(-longest, longest - 1)
    levels = want * scale.unsqueeze(-1)
    assert torch.equal(codes.double(), want)
    torch.testing.assert_close(along, (groups * levels).sum(0))
    torch.testing.assert_close(size, levels.square().sum(0))
    torch.testing.assert_close(error, (levels * column - groups).square().sum((0, 2)))
