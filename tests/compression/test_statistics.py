"""Sums over calibration tokens, and the factor of their Hessian, against what they are by definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from raysys.compression import statistics
from raysys.compression.statistics import Statistics, group_order


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def summed(inputs: Tensor, full: Tensor | None = None) -> Statistics:
    made = Statistics(inputs.shape[1], torch.float64)
    made.add(inputs, full)
    return made


def test_sums_are_the_products_and_how_tokens_are_batched_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, full = normal(0, 50, 12), normal(1, 50, 12)
    whole = summed(x, full)
    torch.testing.assert_close(whole.hessian, 2 / 50 * x.T @ x)
    assert whole.deviation is not None and whole.tokens == 50
    torch.testing.assert_close(whole.deviation, 2 / 50 * (full - x).T @ x)
    monkeypatch.setattr(statistics, "_PANEL", 5)
    monkeypatch.setattr(statistics, "_TOKENS", 4)
    parts = Statistics(12, torch.float64)
    for piece in (slice(0, 1), slice(1, 1), slice(1, 30), slice(30, 50)):
        parts.add(x[piece], full[piece])
        if parts.tokens == 30:
            torch.testing.assert_close(parts.hessian, 2 / 30 * x[:30].T @ x[:30])  # reading in between changes nothing
    assert parts.tokens == 50 and parts.deviation is not None
    torch.testing.assert_close(parts.hessian, whole.hessian, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.deviation, whole.deviation, rtol=1e-12, atol=1e-12)


def test_halves_are_summed_in_single_precision() -> None:
    x = normal(2, 400, 6).to(torch.bfloat16)
    made = Statistics(6)
    made.add(x)
    assert made.hessian.dtype == torch.float32 and made.deviation is None
    torch.testing.assert_close(made.hessian.double(), 2 / 400 * x.double().T @ x.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("columns", [40, 600])
def test_the_factor_is_the_inverse_s(columns: int) -> None:
    x = normal(3, 2 * columns, columns)
    x[:, 7] = 0
    made = summed(x, x)
    hessian = 2 / len(x) * x.T @ x
    hessian[7, 7] = 1
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    factor = made.factor(8, 0.05, "none")
    assert torch.equal(factor.upper, factor.upper.triu()) and factor.dead.nonzero().flatten().tolist() == [7] and factor.damp == 0.05
    torch.testing.assert_close(factor.upper.T @ factor.upper, damped.inverse(), rtol=1e-9, atol=1e-9)
    ordered = made.factor(8, 0.05, "group")
    torch.testing.assert_close(ordered.upper.T @ ordered.upper, damped[ordered.order][:, ordered.order].inverse(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("columns", [12, 300])
def test_the_asymmetric_part_is_least_squares_on_later_columns_in_the_same_order(columns: int) -> None:
    x, full = normal(4, 2 * columns, columns), normal(5, 2 * columns, columns)
    factor = summed(x, full).factor(4, 0.1)
    assert not torch.equal(factor.order, torch.arange(columns)) and factor.asymmetric is not None
    x, full = x[:, factor.order], full[:, factor.order]
    hessian, deviation = 2 / len(x) * x.T @ x, 2 / len(x) * (full - x).T @ x
    hessian += 0.1 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    for j in (0, 1, columns // 2, columns - 2):
        want = torch.linalg.solve(hessian[j + 1 :, j + 1 :], deviation[j, j + 1 :])
        torch.testing.assert_close(factor.asymmetric[j, j + 1 :], want)
        assert not factor.asymmetric[j, : j + 1].abs().max() > 1e-12


def test_groups_stay_together_and_fall_by_their_largest() -> None:
    importance = torch.tensor([1.0, 4, 2, 9, 0, 9, 3, 3, 3])
    assert group_order(importance, 3).tolist() == [3, 5, 4, 1, 2, 0, 6, 7, 8]


def test_a_factor_is_kept_until_tokens_come() -> None:
    made = summed(normal(6, 30, 8))
    first = made.factor(4)
    assert made.factor(4) is first and made.factor(4, 0.02) is not first
    first = made.factor(4)
    made.add(normal(7, 3, 8))
    assert made.factor(4) is not first


def test_fewer_tokens_than_columns_are_damped_until_they_can_be_factored() -> None:
    x = normal(8, 3, 24).float()
    made = Statistics(24)
    made.add(x * 1e3)
    factor = made.factor(8, 1e-12, "none")
    assert factor.damp > 1e-12 and factor.upper.isfinite().all()


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda s, x: Statistics(4, torch.bfloat16), "dtype must be float32 or float64, got torch.bfloat16"),
        (lambda s, x: Statistics(0), "columns must be positive, got 0"),
        (lambda s, x: s.add(x[:, :3]), r"inputs must be \[T, 8\], got \[5, 3\]"),
        (lambda s, x: s.add(x, x[:2]), r"full must be \[5, 8\] as inputs are, got \[2, 8\]"),
        (lambda s, x: s.add(x, x), "full must be given with all tokens or with none"),
        (lambda s, x: Statistics(8).hessian, "no tokens were added"),
        (lambda s, x: summed(x * math.inf).hessian, "calibration inputs must be finite numbers"),
        (lambda s, x: s.factor(3), "group_size must divide the input width 8, got 3"),
        (lambda s, x: s.factor(4, 0), "damp must be positive, got 0"),
        (lambda s, x: s.factor(4, 0.01, cast(Any, "falling")), "order must be one of group, none, got 'falling'"),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[[Statistics, Tensor], Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call(summed(normal(9, 20, 8)), normal(10, 5, 8))
