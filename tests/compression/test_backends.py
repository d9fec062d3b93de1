"""RTN, GPTQ and GPTAQ: properties T2, T11 and T12 of the D2Quant spec, and columns one by one as the equations have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from raysys.compression.backends import gptq, rtn
from raysys.compression.statistics import Statistics
from raysys.methods.d2quant import Levels, Quantized, absorb, quantize, quantize_down

G = 16
FORMS: tuple[dict[str, Any], ...] = (
    {},
    {"alpha": 0.0},
    {"symmetric": False},
    {"order": "none"},
    {"down": True},
    {"down": True, "levels": "binary"},
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(seed: int = 0, tokens: int = 400, columns: int = 4 * G) -> tuple[Tensor, Tensor]:
    """Of the quantised and of the full-precision path: columns that hang together, and a deviation that does too."""
    mix = normal(seed, columns, columns) * normal(seed + 1, columns).mul(0.5).exp()
    x = normal(seed + 2, tokens, columns) @ mix
    return x, x + 0.3 * x @ normal(seed + 3, columns, columns) / columns**0.5


def summed(x: Tensor, full: Tensor | None = None) -> Statistics:
    made = Statistics(x.shape[1], torch.float64)
    made.add(x, full)
    return made


def off(x: Tensor, weight: Tensor, made: Quantized, full: Tensor | None = None) -> float:
    """Squared error of the output, relative."""
    want = (x if full is None else full) @ weight.T
    return float((x @ made.dequantize().T - want).square().sum() / want.square().sum())


def test_columns_one_by_one_as_the_equations_have_them() -> None:
    """The inverse of what is left of H anew for each column, no factor, no blocks; levels of a group as `quantize` fits them."""
    weight, (x, full) = normal(10, 6, 4 * G), inputs()
    n, alpha, bits = weight.shape[1], 0.25, 3
    hessian, deviation = 2 / len(x) * x.T @ x, 2 / len(x) * (full - x).T @ x
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    for strength in (0.0, alpha):
        left, codes = weight.clone(), torch.zeros(weight.shape)
        scale = torch.zeros(6, 4, dtype=torch.float64)
        for j in range(n):
            if j % G == 0:
                scale[:, j // G] = quantize(left[:, j : j + G], bits, G).scale[:, 0]
            codes[:, j] = (left[:, j] / scale[:, j // G]).round().clamp(-4, 3)
            rounded = codes[:, j] * scale[:, j // G]
            here, after = hessian[j:, j:].inverse(), slice(j + 1, n)
            step = -torch.outer((left[:, j] - rounded) / here[0, 0], here[0, 1:])
            if j + 1 < n:
                # Of what the weight makes of the deviation, as much as later columns can make: least squares on their inputs.
                step += strength * torch.outer(left[:, j], deviation[j, after] @ hessian[after, after].inverse())
            left[:, after] += step
        made = gptq(weight, summed(x, full), bits, G, order="none", alpha=strength)
        assert torch.equal(made.codes.double(), codes.double()), strength
        torch.testing.assert_close(made.scale, scale)


def test_the_library_s_gptq_gives_the_same_weights() -> None:
    """Of llmcompressor, where it is installed: it wants another compressed-tensors than vLLM, so in an environment of its own. It takes
    scales from before the first column, which one group has too."""
    library = pytest.importorskip("llmcompressor.modifiers.gptq.gptq_quantize")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy

    weight, (x, _) = normal(10, 6, 4 * G).float(), inputs()
    n = weight.shape[1]
    made = gptq(weight, summed(x), 3, n, order="none")
    hessian = (2 / len(x) * x.T @ x).float()
    kind = QuantizationArgs(num_bits=3, symmetric=True, strategy=QuantizationStrategy.GROUP, group_size=n)
    scale = made.scale.float().unsqueeze(0)
    theirs, _, failed = library.quantize_weight(weight[None].clone(), hessian[None], scale, torch.zeros_like(scale), None, kind, 16)
    assert not failed.any()
    torch.testing.assert_close(made.dequantize(), theirs[0], rtol=1e-4, atol=1e-5)


def test_errors_that_columns_make_up_for_each_other_are_smaller() -> None:
    weight, (x, full) = normal(11, 24, 4 * G), inputs(5)
    plain, asymmetric = (gptq(weight, summed(x, full), 3, G, alpha=alpha) for alpha in (0.0, 1.0))
    assert off(x, weight, plain) < 0.7 * off(x, weight, rtn(weight, 3, G))
    assert off(x, weight, asymmetric, full) < 0.95 * off(x, weight, plain, full)
    uneven = weight * normal(12, 4 * G).exp()
    assert off(x, uneven, gptq(uneven, summed(x), 3, G, down=True)) < 0.8 * off(x, uneven, gptq(uneven, summed(x), 3, G))


@pytest.mark.parametrize("form", [one for one in FORMS if not one.get("down")], ids=str)
def test_t2_rows_times_powers_of_two_keep_their_codes(form: dict[str, Any]) -> None:
    """What lets a column scale of down be absorbed into codes of up that are there already."""
    weight, (x, full) = normal(23, 8, 4 * G), inputs(29)
    factor = torch.tensor([0.125, 0.25, 0.5, 1, 2, 4, 8, 1024], dtype=torch.float64)
    plain, scaled = (gptq(one, summed(x, full), 2, G, **form) for one in (weight, weight * factor[:, None]))
    assert torch.equal(plain.codes, scaled.codes) and torch.equal(absorb(plain, factor).scale, scaled.scale)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_t12_the_block_size_does_not_matter(form: dict[str, Any]) -> None:
    weight, (x, full) = normal(13, 8, 6 * G), inputs(9, columns=6 * G)
    made = [gptq(weight, summed(x, full), 3, G, block=block, **form) for block in (G, 5, 2 * G, 4 * G + 1, 128)]
    for one in made[1:]:
        assert torch.equal(one.codes, made[0].codes)
        torch.testing.assert_close(one.dequantize(), made[0].dequantize(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_t11_without_a_deviation_it_is_gptq(form: dict[str, Any]) -> None:
    weight, (x, _) = normal(14, 8, 4 * G), inputs(13)
    same, none = (gptq(weight, summed(x, full), 2, G, **form) for full in (x, None))
    assert torch.equal(same.codes, none.codes) and torch.equal(same.scale, none.scale)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_t11_inputs_that_do_not_hang_together_make_it_rtn(form: dict[str, Any]) -> None:
    weight = normal(15, 8, 4 * G)
    made = gptq(weight, summed(torch.eye(4 * G, dtype=torch.float64) * 3), 2, G, **form)
    levels: Levels = form.get("levels", "uniform")
    want = rtn(weight, 2, G, levels, form.get("down", False), symmetric=form.get("symmetric", True))
    assert torch.equal(made.codes, want.codes) and torch.equal(made.scale, want.scale)
    for one, other in ((made.zero, want.zero), (made.column_scale, want.column_scale)):
        assert (one is None and other is None) or (one is not None and other is not None and torch.equal(one, other))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_results_stand_where_the_weight_has_them(form: dict[str, Any]) -> None:
    """Groups, and columns inside of them, put elsewhere: the same levels there, if columns are taken by importance."""
    weight, (x, full) = normal(16, 8, 4 * G), inputs(17)
    if form.get("order") == "none":
        made = gptq(weight, summed(x, full), 3, G, **form)
        assert not torch.equal(made.codes, gptq(weight, summed(x, full), 3, G).codes)
        return
    moved = torch.cat([G * group + torch.randperm(G, generator=torch.Generator().manual_seed(group)) for group in (2, 0, 3, 1)])
    here = gptq(weight, summed(x, full), 3, G, **form)
    there = gptq(weight[:, moved], summed(x[:, moved], full[:, moved]), 3, G, **form)
    assert torch.equal(here.codes[:, moved], there.codes)
    torch.testing.assert_close(here.dequantize()[:, moved], there.dequantize(), rtol=1e-9, atol=1e-9)
    if here.column_scale is not None and there.column_scale is not None:
        torch.testing.assert_close(here.column_scale[moved], there.column_scale)
        for group in here.column_scale.unflatten(0, (-1, G)):
            assert group.log().mean().abs() < 1e-9


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_columns_whose_input_is_always_zero_are_zero_and_no_burden(form: dict[str, Any]) -> None:
    weight, (x, full) = normal(18, 8, 4 * G), inputs(21)
    x[:, [3, 40]], full[:, 40] = 0, 0
    made = gptq(weight, summed(x, full), 3, G, **form)
    out = made.dequantize()
    assert out.isfinite().all()
    assert out[:, [3, 40]].abs().max() <= (1e-6 if form.get("levels") == "binary" else 0)
    other = weight.clone()
    other[:, [3, 40]] = 100
    assert torch.equal(gptq(other, summed(x, full), 3, G, **form).codes, made.codes)


def test_kinds_of_numbers_are_kept() -> None:
    weight, (x, full) = normal(19, 8, 4 * G).to(torch.bfloat16), inputs(25)
    single = Statistics(4 * G)
    single.add(x, full)
    made = gptq(weight, single, 3, G)
    assert made.dtype == torch.bfloat16 == made.dequantize().dtype and made.scale.dtype == torch.float32 and made.codes.dtype == torch.int8
    uneven = gptq(weight, single, 3, G, symmetric=False)
    assert uneven.codes.dtype == torch.uint8 and uneven.zero is not None and uneven.zero.dtype == torch.int16


def test_rtn_is_the_quantiser_of_the_method() -> None:
    weight = normal(20, 4, 2 * G)
    assert torch.equal(rtn(weight, 2, G).codes, quantize(weight, 2, G).codes)
    assert torch.equal(rtn(weight, 2, G, "binary").codes, quantize(weight, 2, G).codes)  # levels of another kind are those of columns
    assert torch.equal(rtn(weight, 2, G, symmetric=False).codes, quantize(weight, 2, G, False).codes)
    for levels in ("uniform", "binary"):
        assert torch.equal(rtn(weight, 2, G, levels, column=True).codes, quantize_down(weight, 2, G, levels).codes)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda w, s: rtn(w, 1, G), "bits must be 2 to 8, got 1"),
        (lambda w, s: gptq(w[:, :G], s, 2, G), r"weight must be floating \[out, 32\], got torch.float64 of shape \[4, 16\]"),
        (lambda w, s: gptq(w / 0, s, 2, G), "weight must hold finite numbers only"),
        (lambda w, s: gptq(w, s, 2, 5), "group_size must divide the input width 32, got 5"),
        (lambda w, s: gptq(w, s, 9, G), "bits must be 2 to 8, got 9"),
        (lambda w, s: gptq(w, s, 2, G, block=0), "block must be positive, got 0"),
        (lambda w, s: gptq(w, s, 2, G, alpha=-1), "alpha must not be negative, got -1"),
        (lambda w, s: gptq(w, Statistics(32), 2, G), "no tokens were added"),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[[Tensor, Statistics], Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call(normal(21, 4, 2 * G), summed(normal(22, 50, 2 * G)))
