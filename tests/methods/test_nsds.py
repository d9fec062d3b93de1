"""Properties T1 to T13 of the NSDS spec, by number, and the fast routes against dense singular value decompositions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from raysys.methods.nsds import (
    COMPONENTS,
    SERIES,
    allocate,
    combine,
    excess_kurtosis,
    layer_scores,
    layer_series,
    mad_sigmoid,
    soft_or,
    structural_expressiveness,
    unembedding_basis,
)

WIDTH, INNER, HEADS, SHARED, HEAD, VOCABULARY = 24, 40, 4, 2, 6, 50
SHAPES = {
    "q_proj": (HEADS * HEAD, WIDTH),
    "k_proj": (SHARED * HEAD, WIDTH),
    "v_proj": (SHARED * HEAD, WIDTH),
    "o_proj": (WIDTH, HEADS * HEAD),
    "gate_proj": (INNER, WIDTH),
    "up_proj": (INNER, WIDTH),
    "down_proj": (WIDTH, INNER),
}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(seed: int = 0) -> dict[str, Tensor]:
    return {name: normal(10 * seed + place, *shape) for place, (name, shape) in enumerate(SHAPES.items())}


def model(count: int = 7) -> list[dict[str, Tensor]]:
    return [layer(seed) for seed in range(count)]


def scores(layers: list[dict[str, Tensor]], **more: object) -> Tensor:
    keys: dict[str, object] = {"n_heads": HEADS, "n_kv_heads": SHARED, "head_dim": HEAD} | more
    return layer_scores(layers, normal(99, VOCABULARY, WIDTH), **keys)  # type: ignore[arg-type]


def kurtosis(x: Tensor) -> float:
    """By the book."""
    off = x.flatten() - x.mean()
    return float(off.pow(4).mean() / off.pow(2).mean().square()) - 3


def cut(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    share = values.square().cumsum(0) / values.square().sum()
    kept = max(2, int((share < 0.99).sum()) + 1)
    return left[:, :kept], values[:kept], right[:kept].T


def dense(weights: dict[str, Tensor], unembedding: Tensor, form: str = "product") -> dict[str, float]:
    """The definition of all ten series, with dense decompositions."""
    basis = cut(unembedding)[2]

    def columns(vectors: Tensor) -> Tensor:
        return torch.tensor([max(0.0, kurtosis(one)) for one in vectors.T], dtype=torch.float64)

    def se(values: Tensor, beta: Tensor) -> float:
        terms = values * beta
        share = terms / terms.sum()
        rank = math.exp(-sum(p * math.log(p) for p in share.tolist() if p > 0))
        return float(terms.sum()) * (rank if form == "product" else 1 / rank)

    found: dict[str, list[float]] = {name: [] for name in SERIES}
    for name in ("up", "gate"):
        matrix = weights[f"{name}_proj"]
        _, values, right = cut(matrix)
        found[f"{name}/nv"].append(kurtosis(matrix))
        found[f"{name}/se"].append(se(values, torch.log(1 + columns(right))))
    left, values, _ = cut(weights["down_proj"])
    found["down/nv"].append(kurtosis(weights["down_proj"]))
    found["down/se"].append(se(values, (basis.T @ left).norm(dim=0)))
    for head in range(HEADS):
        mine = slice(head * HEAD, (head + 1) * HEAD)
        theirs = slice(head // 2 * HEAD, (head // 2 + 1) * HEAD)
        qk = weights["q_proj"][mine].T @ weights["k_proj"][theirs]
        ov = weights["o_proj"][:, mine] @ weights["v_proj"][theirs]
        left, values, right = cut(qk)
        found["qk/nv"].append(kurtosis(qk))
        found["qk/se"].append(se(values, torch.log(1 + columns(left) * columns(right))))
        left, values, _ = cut(ov)
        found["ov/nv"].append(kurtosis(ov))
        found["ov/se"].append(se(values, (basis.T @ left).norm(dim=0)))
    return {name: sum(one) / len(one) for name, one in found.items()}


@pytest.mark.parametrize("count", [7, 8])
def test_t1_mad_sigmoid(count: int) -> None:
    r = normal(1, count)
    p = mad_sigmoid(r)
    median = r.quantile(0.5)
    if count % 2:
        assert p[r == median].tolist() == [0.5]
    assert torch.equal(p.argsort(), r.argsort()) and len(set(p.tolist())) == count
    torch.testing.assert_close(mad_sigmoid(37 * r - 4), p, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(mad_sigmoid(-r), 1 - p, rtol=1e-12, atol=1e-13)
    mad = (r - median).abs().quantile(0.5)
    torch.testing.assert_close(p, torch.sigmoid((r - median) / (1.4826 * mad)), rtol=1e-12, atol=0)


def test_t2_where_most_values_are_equal_the_standard_deviation_takes_over() -> None:
    r = torch.tensor([1.0, 1, 1, 1, 5], dtype=torch.float64)
    torch.testing.assert_close(mad_sigmoid(r), torch.sigmoid((r - 1) / r.std(correction=0)))
    assert mad_sigmoid(torch.full((4,), 0.1 + 0.2)).tolist() == [0.5] * 4
    assert mad_sigmoid(torch.tensor([0.3, 0.1 + 0.2, 0.3], dtype=torch.float64)).tolist() == [0.5] * 3, "rounding is no difference"


def test_t3_kurtosis_does_not_see_scale_shift_order_and_sign() -> None:
    x = normal(2, 30)
    want = kurtosis(x)
    for same in (x, 1e-150 * x, 1e150 * x, x + 7, x.flip(0).reshape(5, 6), -x):
        assert excess_kurtosis(same) == pytest.approx(want, rel=1e-10)
    assert excess_kurtosis(torch.tensor([1.0, -1, 1, -1])) == -2
    assert excess_kurtosis(torch.full((9,), 0.1)) == 0


def test_t4_gauge_of_the_circuits() -> None:
    weights, basis = layer(), unembedding_basis(normal(99, VOCABULARY, WIDTH))
    want = layer_series(weights, basis, HEADS, SHARED, HEAD)
    turned = dict(weights)
    for group in range(SHARED):
        rotation, other = torch.linalg.qr(normal(50 + group, HEAD, HEAD))[0], normal(60 + group, HEAD, HEAD)
        mine = slice(group * HEAD, (group + 1) * HEAD)
        for name, matrix in (("k_proj", rotation), ("v_proj", other)):
            turned[name] = turned[name].clone()
            turned[name][mine] = matrix @ weights[name][mine]
        turned["q_proj"], turned["o_proj"] = turned["q_proj"].clone(), turned["o_proj"].clone()
        for head in (2 * group, 2 * group + 1):
            own = slice(head * HEAD, (head + 1) * HEAD)
            turned["q_proj"][own] = rotation @ weights["q_proj"][own]
            turned["o_proj"][:, own] = weights["o_proj"][:, own] @ other.inverse()
    torch.testing.assert_close(layer_series(turned, basis, HEADS, SHARED, HEAD), want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", ["product", "ratio"])
def test_t5_the_fast_routes_are_the_dense_ones(form: str) -> None:
    unembedding = normal(99, VOCABULARY, WIDTH)
    weights = layer(3)
    got = layer_series(weights, unembedding_basis(unembedding), HEADS, SHARED, HEAD, form=form)  # type: ignore[arg-type]
    want = dense(weights, unembedding, form)
    for name, value in zip(SERIES, got.tolist(), strict=True):
        assert value == pytest.approx(want[name], rel=1e-9), name


def test_t6_role_weights_of_a_whole_unembedding_are_one_and_of_light_tails_zero() -> None:
    weights = layer()
    whole = torch.eye(WIDTH, dtype=torch.float64)
    _, values, _ = cut(weights["down_proj"])
    series = dict(zip(SERIES, layer_series(weights, whole, HEADS, SHARED, HEAD).tolist(), strict=True))
    assert series["down/se"] == pytest.approx(structural_expressiveness(values, torch.ones(len(values))))
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(WIDTH // 2)
    light = weights | {"gate_proj": normal(8, INNER, 1) * signs}  # its one direction has no tails: kurtosis -2
    assert dict(zip(SERIES, layer_series(light, whole, HEADS, SHARED, HEAD).tolist(), strict=True))["gate/se"] == pytest.approx(0, abs=1e-5)


def test_t7_expressiveness_of_flat_and_of_single_spectra() -> None:
    ones, spike = torch.ones(6), torch.tensor([6.0, 0, 0, 0, 0, 0])
    assert structural_expressiveness(ones, ones) == pytest.approx(36)
    assert structural_expressiveness(ones, ones, form="ratio") == pytest.approx(1)
    assert structural_expressiveness(spike, ones) == structural_expressiveness(spike, ones, form="ratio") == pytest.approx(6)
    values, beta = normal(3, 6).abs(), normal(4, 6).abs()
    for form in ("product", "ratio"):
        more = structural_expressiveness(2.5 * values, beta, form)  # type: ignore[arg-type]
        assert more == pytest.approx(2.5 * structural_expressiveness(values, beta, form))  # type: ignore[arg-type]
    assert structural_expressiveness(ones, torch.zeros(6)) == 0


def test_t8_soft_or() -> None:
    p = torch.rand(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = soft_or(p)
    torch.testing.assert_close(out, 1 - (1 - p).prod(dim=0))
    assert (out >= p.amax(dim=0)).all() and (out <= 1).all()
    torch.testing.assert_close(soft_or(p.flip(0)), out)
    torch.testing.assert_close(soft_or(torch.cat([p, torch.zeros(1, 4, dtype=torch.float64)])), out)
    assert soft_or(torch.tensor([[1.0], [0.5]])).item() == 1


def test_t9_scores_order_as_the_nested_soft_or_and_do_not_saturate() -> None:
    layers = model(6)
    basis = unembedding_basis(normal(99, VOCABULARY, WIDTH))
    p = torch.stack([mad_sigmoid(one) for one in torch.stack([layer_series(one, basis, HEADS, SHARED, HEAD) for one in layers]).T])
    half = len(COMPONENTS)
    nested = soft_or(torch.stack([soft_or(p[:half]), soft_or(p[half:])]))
    got = scores(layers)
    torch.testing.assert_close(got, -torch.log1p(-p).sum(dim=0), rtol=1e-9, atol=0)
    assert torch.equal(got.argsort(), nested.argsort())
    far = combine(torch.tensor([[0.0], [1], [2], [3], [4], [1e5], [1e6]]))
    assert far[6] > far[5] > far[4], "where sigmoid has long rounded to 1"


@pytest.mark.parametrize("size", [1, 7, 10**8 + 7])
def test_t10_the_budget_is_met_and_never_exceeded(size: int) -> None:
    ranks, before = normal(5, 10), [2] * 10
    for tenth in range(21):
        budget = 2 + tenth / 10
        bits = allocate(ranks, [size] * 10, budget)
        assert sum(bits) == 20 + 2 * (tenth // 2), budget
        assert all(now >= then for now, then in zip(bits, before, strict=True))
        before = bits
    assert allocate(ranks, [size] * 10, 4.000000000000002) == [4] * 10, "2 and twenty tenths, one after another"
    assert allocate([1.0, 1.0, 1.0, 1.0], [1] * 4, 3.0) == [4, 4, 2, 2], "ties go to the first"
    assert allocate([3.0, 2.0, 1.0], [5, 100, 5], 3.0) == [4, 2, 2], "the sets are nested: no small layer overtakes a large one"


def test_t11_two_runs_are_identical() -> None:
    assert torch.equal(scores(model()), scores(model()))


@pytest.mark.parametrize("name", list(SHAPES))
def test_t12_a_layer_with_heavy_tails_comes_first(name: str) -> None:
    layers = model()
    layers[4][name] = layers[4][name].pow(5)
    assert int(scores(layers).argmax()) == 4


def test_t13_shared_heads_written_out_give_the_same() -> None:
    layers = model(3)
    written = [
        {
            name: weight.reshape(SHARED, HEAD, WIDTH).repeat_interleave(HEADS // SHARED, 0).reshape(-1, WIDTH)
            if name in ("k_proj", "v_proj")
            else weight
            for name, weight in one.items()
        }
        for one in layers
    ]
    torch.testing.assert_close(scores(written, n_kv_heads=HEADS), scores(layers), rtol=1e-9, atol=1e-11)


def test_mlps_narrower_than_the_model_and_stacks_of_them() -> None:
    """Experts: the shorter side is decomposed, and a mixture's series are means over them."""
    unembedding = normal(99, VOCABULARY, WIDTH)
    basis, narrow = unembedding_basis(unembedding), 10
    shapes = {"gate_proj": (narrow, WIDTH), "up_proj": (narrow, WIDTH), "down_proj": (WIDTH, narrow)}
    experts = [layer() | {name: normal(100 * e + n, *shape) for n, (name, shape) in enumerate(shapes.items())} for e in range(3)]
    apart = [layer_series(one, basis, HEADS, SHARED, HEAD) for one in experts]
    for one, found in zip(experts, apart, strict=True):
        want = dense(one, unembedding)
        torch.testing.assert_close(found, torch.tensor([want[name] for name in SERIES], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    stacks = layer() | {name: torch.stack([one[name] for one in experts]) for name in shapes}
    found = layer_series(stacks, basis, HEADS, SHARED, HEAD)
    torch.testing.assert_close(found, torch.stack(apart).mean(dim=0), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"down_proj must be \[3, 24, 10\], got \[24, 10\]"):
        layer_series(stacks | {"down_proj": experts[0]["down_proj"]}, basis, HEADS, SHARED, HEAD)
    flat = layer() | {"up_proj": normal(7, narrow, 1) @ normal(8, 1, WIDTH), **{n: experts[0][n] for n in ("gate_proj", "down_proj")}}
    assert bool(layer_series(flat, basis, HEADS, SHARED, HEAD, energy=1.0).isfinite().all()), "a matrix of rank one"


def test_weights_of_low_precision_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [{name: weight.bfloat16() for name, weight in one.items()} for one in model(3)]
    want = scores([{name: weight.double() for name, weight in one.items()} for one in layers])
    torch.testing.assert_close(scores(layers), want, rtol=0, atol=0)
    monkeypatch.setattr("raysys.methods.nsds._BLOCK", 60)
    torch.testing.assert_close(scores(layers), want, rtol=1e-9, atol=1e-11)


def test_what_cannot_be_is_refused() -> None:
    layers = model(2)
    with pytest.raises(ValueError, match=r"layer 1: o_proj must be \[24, 24\], got \[24, 23\]"):
        scores([layers[0], layers[1] | {"o_proj": torch.zeros(24, 23)}])
    with pytest.raises(ValueError, match="layer 0: up_proj must hold finite numbers only"):
        scores([layers[0] | {"up_proj": torch.full((INNER, WIDTH), math.nan)}])
    with pytest.raises(ValueError, match="layer 0: gate_proj missing; fused projections must be split first"):
        scores([{name: weight for name, weight in layers[0].items() if name != "gate_proj"}])
    with pytest.raises(ValueError, match="n_heads=4 must be a multiple of n_kv_heads=3"):
        scores(layers, n_kv_heads=3)
    with pytest.raises(ValueError, match=r"budget must lie in \[2, 4\], got 4.5"):
        allocate([1.0], [1], 4.5)
    with pytest.raises(ValueError, match="sizes must be positive, got 0"):
        allocate([1.0, 2.0], [1, 0], 3)
    with pytest.raises(ValueError, match="form must be one of product, ratio, got 'sum'"):
        structural_expressiveness(torch.ones(2), torch.ones(2), form="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="role_weights must not be negative, got -1"):
        structural_expressiveness(torch.ones(2), -torch.ones(2))
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\], got 0 to 2"):
        soft_or(torch.tensor([[0.0], [2.0]]))
