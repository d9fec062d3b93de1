"""Properties of the D2Quant spec, by number: T1 to T10 and T13; T2, T11 and T12 of GPTQ are in `tests/compression/test_backends.py`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from raysys.methods import d2quant
from raysys.methods.d2quant import LEVELS, Levels, Quantized, absorb, deviation_bias, quantize, quantize_down

G = 16


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def uneven(seed: int, rows: int = 32, width: int = 3 * G) -> Tensor:
    """Columns of different size."""
    return normal(seed, rows, width) * normal(seed + 100, width).mul(0.5).exp()


def error(weight: Tensor, made: Quantized) -> float:
    return float((made.dequantize().double() - weight.double()).square().sum() / weight.double().square().sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_scales_and_zeros_are_what_they_say(bits: int, symmetric: bool) -> None:
    weight = normal(0, 6, 2 * G, dtype=torch.bfloat16)
    made = quantize(weight, bits, G, symmetric)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    assert made.codes.shape == weight.shape and low <= int(made.codes.min()) and int(made.codes.max()) <= high
    assert made.scale.shape == (6, 2) and made.group_size == G and (made.zero is None) == symmetric and made.column_scale is None
    steps = made.codes.double() - (0 if made.zero is None else made.zero.double().repeat_interleave(G, 1))
    want = steps * made.scale.double().repeat_interleave(G, 1)
    assert made.dequantize().dtype == torch.bfloat16
    torch.testing.assert_close(made.dequantize().double(), want, rtol=1e-2, atol=1e-4)
    # Each weight has the nearest level of its group's grid.
    grid = torch.arange(low, high + 1).double() - (0 if made.zero is None else made.zero.double().unsqueeze(-1))
    grid = (grid * made.scale.double().unsqueeze(-1)).repeat_interleave(G, 1)
    nearest = (grid - weight.double().unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close((want - weight.double()).abs(), nearest, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("bits", "symmetric", "value"), [(2, True, 0.133), (2, False, 0.136), (3, True, 0.035), (3, False, 0.035)])
def test_error_of_gaussian_weights_is_the_spec_s(bits: int, symmetric: bool, value: float) -> None:
    weight = normal(1, 512, 128, dtype=torch.float32)
    assert error(weight, quantize(weight, bits, 128, symmetric)) == pytest.approx(value, rel=0.05)


@pytest.mark.parametrize(
    ("levels", "bits", "plain", "spread", "outliers"),
    [("uniform", 2, 0.132, 0.128, 0.126), ("uniform", 3, 0.034, 0.032, 0.031), ("binary", 2, 0.113, 0.106, 0.077)],
)
def test_error_of_dsq_is_at_most_the_spec_s(levels: Levels, bits: int, plain: float, spread: float, outliers: float) -> None:
    weight = normal(1, 512, 128, dtype=torch.float32)
    large = torch.ones(128)
    large[[3, 50, 100]] = 8
    for factor, value in ((torch.ones(128), plain), (normal(2, 128).float().mul(0.5).exp(), spread), (large, outliers)):
        # Uniform levels do better where columns are uneven: the search for a range counts errors as they weigh in the end.
        assert 0.6 * value < error(weight * factor, quantize_down(weight * factor, bits, 128, levels)) < 1.04 * value


def test_t1_absorbing_leaves_the_block_as_it_is() -> None:
    up, down, gate, x = normal(0, 24, 8), normal(1, 8, 24), normal(2, 24, 8), normal(3, 5, 8)
    c = normal(4, 24).exp()

    def block(up: Tensor, down: Tensor, act: str) -> Tensor:
        if act == "swiglu":
            return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
        return getattr(torch.nn.functional, act)(x @ up.T) @ down.T

    for act, same in (("swiglu", True), ("relu", True), ("gelu", False)):
        before, after = block(up, down, act), block(up * c[:, None], down / c, act)
        assert torch.allclose(before, after, rtol=1e-12, atol=1e-12) == same, act


def test_t1_absorbed_codes_stay_and_the_product_is_the_one_with_columns() -> None:
    up, down, gate, x = normal(0, 2 * G, G), normal(1, 8, 2 * G), normal(2, 2 * G, G), normal(3, 5, G)
    q_up, q_down = quantize(up, 3, G), quantize_down(down, 3, G)
    assert q_down.column_scale is not None
    taken = absorb(q_up, q_down.column_scale)
    assert torch.equal(taken.codes, q_up.codes)
    act = torch.nn.functional.silu(x @ gate.T)
    want = (act * (x @ q_up.dequantize().T)) @ q_down.dequantize().T
    got = (act * (x @ taken.dequantize().T)) @ replace(q_down, column_scale=None).dequantize().T
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("symmetric", [True, False])
def test_t2_rows_times_powers_of_two_keep_their_codes(symmetric: bool) -> None:
    weight = normal(5, 8, 2 * G, dtype=torch.float32)
    factor = torch.tensor([0.125, 0.25, 0.5, 1, 2, 4, 8, 1024])
    plain, scaled = (quantize(one, 3, G, symmetric) for one in (weight, weight * factor[:, None]))
    assert torch.equal(plain.codes, scaled.codes) and torch.equal(absorb(plain, factor).scale, scaled.scale)


@pytest.mark.parametrize("bits", [2, 3])
def test_t3_no_step_of_the_binary_fit_raises_the_error(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = uneven(6)
    errors = [error(weight, quantize_down(weight, bits, G, "binary", steps)) for steps in range(12)]
    assert all(later <= sooner * (1 + 1e-12) for sooner, later in itertools.pairwise(errors)) and errors[-1] < errors[0]

    seen: list[float] = []
    groups = weight.unflatten(1, (-1, G))

    def told(scale: Tensor, codes: Tensor, column: Tensor) -> None:
        seen.append(float((d2quant.plane_levels(codes, scale) * column - groups).square().sum()))

    rows, nearest, state = d2quant._rows, d2quant._nearest, {}

    def watched_rows(groups: Tensor, codes: Tensor, column: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        told(before, codes, column)
        scale, codes = rows(groups, codes, column, before)
        told(scale, codes, column)
        state["codes"] = codes
        return scale, codes

    def watched_nearest(groups: Tensor, scale: Tensor, column: Tensor) -> Tensor:
        told(scale, state["codes"], column)
        return nearest(groups, scale, column)

    monkeypatch.setattr(d2quant, "_rows", watched_rows)
    monkeypatch.setattr(d2quant, "_nearest", watched_nearest)
    quantize_down(weight, bits, G, "binary", 8)
    assert len(seen) == 24 and all(later <= sooner * (1 + 1e-12) for sooner, later in itertools.pairwise(seen))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_t4_uniform_dsq_is_never_worse_than_the_plain_quantiser_in_any_group(bits: int) -> None:
    for seed, weight in enumerate(
        (normal(7, 12, 3 * G), uneven(8), normal(9, 12, 3 * G).pow(3), normal(10, 1, 3 * G), normal(11, 2, 3 * G).abs())
    ):
        groups = weight.unflatten(1, (-1, G))
        off = [
            (one.dequantize().unflatten(1, (-1, G)) - groups).square().sum(dim=(0, 2))
            for one in (quantize_down(weight, bits, G), quantize(weight, bits, G))
        ]
        assert (off[0] <= off[1] * (1 + 1e-12)).all(), seed


def test_t5_binary_levels_may_lose_to_the_plain_quantiser_where_uniform_ones_do_not() -> None:
    """No theorem: of heavy tails two symmetric pairs of levels hold less than a grid that is longer on one side."""
    heavy = normal(9, 256, 8 * G).pow(3)
    plain, uniform, binary = (
        error(heavy, made) for made in (quantize(heavy, 2, G * 8), *(quantize_down(heavy, 2, G * 8, levels) for levels in LEVELS))
    )
    assert uniform <= plain < binary


@pytest.mark.parametrize(("bits", "most"), [(2, 1e-12), (3, 5e-3)])
def test_t6_binary_matrices_are_found_again(bits: int, most: float) -> None:
    for seed in range(5):
        r, c = normal(seed, 64, 1, bits).abs() + 0.2, normal(seed + 50, 1, G).abs() + 0.2
        codes = torch.randint(2**bits, (64, 1, G), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        weight = (d2quant.plane_levels(codes, r) * c).flatten(1)
        assert error(weight, quantize_down(weight, bits, G, "binary", 40 if bits == 2 else 15)) < most


@pytest.mark.parametrize("levels", LEVELS)
def test_t7_the_column_scale_has_geometric_mean_one_in_each_group(levels: Levels) -> None:
    weight = uneven(12)
    weight[:, 5] = 0
    made = quantize_down(weight, 2, G, levels)
    assert made.column_scale is not None and (made.column_scale > 0).all()
    live = torch.arange(3 * G) != 5
    for group in range(3):
        mine = live & (torch.arange(3 * G) // G == group)
        assert made.column_scale[mine].log().mean().item() == pytest.approx(0, abs=1e-12)
    moved = replace(made, column_scale=made.column_scale / 4, scale=made.scale * 4)
    torch.testing.assert_close(moved.dequantize(), made.dequantize())
    assert made.dequantize()[:, 5].abs().max() <= (1e-7 if levels == "binary" else 0)


@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("bits", [2, 3])
def test_a_column_of_zeros_is_no_burden_for_the_binary_levels_of_others(bits: int, size: float) -> None:
    weight = size * normal(18, 64, 8 * G)
    weight[:, 3] = 0
    # The fit has its sums over columns, and is the one without that column.
    alone = torch.cat([weight[:, :3], weight[:, 4:]], dim=1)
    made, want = quantize_down(weight, bits, 8 * G, "binary"), quantize_down(alone, bits, 8 * G - 1, "binary")
    out = made.dequantize()
    assert out[:, 3].abs().max() < 1e-7 * weight.abs().max()
    torch.testing.assert_close(torch.cat([out[:, :3], out[:, 4:]], dim=1), want.dequantize(), rtol=1e-6, atol=1e-9)


def test_t8_the_bias_takes_the_mean_away_and_nothing_is_left_for_a_second() -> None:
    teacher, student = normal(13, 40, 6) + 0.5, normal(14, 40, 6)
    bias = deviation_bias(teacher.sum(0), student.sum(0), 40)
    mean = (teacher - student).mean(0)
    before, after = (teacher - student).square().mean(0), (teacher - student - bias).square().mean(0)
    torch.testing.assert_close(before - after, mean.square())
    assert deviation_bias(teacher.sum(0), (student + bias).sum(0), 40).abs().max() < 1e-12


def test_t9_a_constant_shift_is_the_bias_up_to_strength_and_clip() -> None:
    student = normal(15, 10, 4)
    sums = ((student + 0.2).sum(0), student.sum(0), 10)
    torch.testing.assert_close(deviation_bias(*sums), torch.full((4,), 0.2, dtype=torch.float64))
    torch.testing.assert_close(deviation_bias(*sums, strength=0.5), torch.full((4,), 0.1, dtype=torch.float64))
    assert deviation_bias(*sums, clip=0.05).tolist() == [0.05] * 4


def test_t10_a_bias_of_the_norm_is_a_bias_of_gate_and_up() -> None:
    up, gate = quantize(normal(0, 12, G), 3, G).dequantize(), quantize(normal(1, 12, G), 3, G).dequantize()
    down, x, mu = normal(2, G, 12), normal(3, 5, G), normal(4, G)
    before = (torch.nn.functional.silu((x + mu) @ gate.T) * ((x + mu) @ up.T)) @ down.T
    after = (torch.nn.functional.silu(x @ gate.T + gate @ mu) * (x @ up.T + up @ mu)) @ down.T
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("levels", LEVELS)
def test_t13_a_column_of_outliers_gets_a_scale_of_its_own(levels: Levels) -> None:
    weight = normal(16, 64, 2 * G)
    weight[:, 20] *= 9
    made, plain = quantize_down(weight, 2, G, levels), quantize_down(weight, 2, G, levels, iterations=0)
    assert made.column_scale is not None
    assert int(made.column_scale.argmax()) == 20 and made.column_scale[20] > 3 * made.column_scale[G:].median()
    assert error(weight, made) < 0.8 * error(weight, quantize(weight, 2, G))
    assert error(weight, made) < error(weight, plain)


def test_groups_and_rows_of_zeros_stay_zero() -> None:
    weight = normal(17, 4, 2 * G)
    weight[1], weight[:, G:] = 0, 0
    for made in (quantize(weight, 2, G), quantize(weight, 2, G, symmetric=False), quantize_down(weight, 2, G)):
        out = made.dequantize()
        assert out.isfinite().all() and not out[1].any() and not out[:, G:].any()
    out = quantize_down(weight, 2, G, "binary").dequantize()
    assert out.isfinite().all() and out[1].abs().max() < 1e-6 and out[:, G:].abs().max() < 1e-14


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda w: quantize(w, 1, G), "bits must be 2 to 8, got 1"),
        (lambda w: quantize(w, 2, 10), "group_size must divide the input width 48, got 10"),
        (lambda w: quantize(w[0], 2, G), r"weight must be floating \[out, in\], got torch.float64 of shape \[48\]"),
        (lambda w: quantize(w * math.nan, 2, G), "weight must hold finite numbers only"),
        (lambda w: quantize_down(w, 2, G, cast(Any, "ternary")), "levels must be one of uniform, binary, got 'ternary'"),
        (lambda w: quantize_down(w, 8, G, "binary"), "bits must be 1 to 4, got 8"),
        (lambda w: quantize_down(w, 2, G, iterations=-1), "iterations must be a whole number from 0 on, got -1"),
        (lambda w: absorb(quantize(w, 2, G), torch.ones(3)), r"column_scale must be \[32\], one for each row of up, got \[3\]"),
        (lambda w: absorb(quantize(w, 2, G), -torch.ones(32)), "column_scale must be positive, got -1"),
        (lambda w: absorb(quantize(w, 2, G), torch.full((32,), math.inf)), "column_scale must be finite, got inf"),
        (lambda w: deviation_bias(w[0], w[0][:3], 1), r"must both be \[D\], got \[48\] and \[3\]"),
        (lambda w: deviation_bias(w[0], w[0], 0), "tokens must be positive, got 0"),
        (lambda w: deviation_bias(w[0], w[0], 1, clip=-1), "clip must not be negative, got -1"),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[[Tensor], Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call(uneven(0))
