"""The searches for a group's range against trying each candidate by the book."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from raysys.methods.d2quant import _tried
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
