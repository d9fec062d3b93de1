"""Properties 1 to 13 of the MPI spec, by number, in float64 where nothing else is said."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from raysys.methods import mpi
from raysys.methods.mpi import Matrix, alignment, effective_router, input_matrix, max_violation, overwrite_, powered, row_cosine

N, INNER, WIDTH, SCALE = 5, 6, 8, 0.7


def drawn(seed: int = 0, dtype: torch.dtype = torch.float64, n: int = N, inner: int = INNER, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(n, inner, width, generator=generator, dtype=torch.float64).to(dtype),
    )


def orthogonal(size: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def with_spectrum(values: Tensor, seed: int = 2) -> tuple[Tensor, Tensor]:
    """A matrix [d, D] with these singular values, and its right singular vectors as rows."""
    left, right = orthogonal(len(values), seed), orthogonal(len(values), seed + 1)
    return left @ torch.diag(values) @ right, right


def plain(router: Tensor, gate: Tensor, iterations: int = 1) -> Tensor:
    """The paper's listing, with the Gram matrix that the code never builds."""
    gram = gate.transpose(1, 2) @ gate
    for _ in range(iterations):
        router = torch.einsum("nd,nde->ne", router, gram)
    return SCALE * router / router.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_1_every_row_has_norm_c(dtype: torch.dtype, error: float) -> None:
    norms = effective_router(*drawn(dtype=dtype), SCALE).norm(dim=-1)
    assert (norms - SCALE).abs().max() < error


def test_2_invariances() -> None:
    router, gate = drawn()
    want = effective_router(router, gate, SCALE)
    for same in (
        effective_router(3.7 * router, gate, SCALE),
        effective_router(1e-200 * router, gate, SCALE),
        effective_router(router, -0.2 * gate, SCALE),
        effective_router(router, 1e180 * gate, SCALE),
        -effective_router(-router, gate, SCALE),
        effective_router(router, orthogonal(INNER) @ gate, SCALE),
    ):
        torch.testing.assert_close(same, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("large", [1, 1 << 30], ids=["expert by expert", "all together"])
@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_value_and_gradients_are_those_of_the_gram_form(iterations: int, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi, "_LARGE", large)
    results = []
    for form in (lambda r, w: effective_router(r, w, SCALE, iterations), lambda r, w: plain(r, w, iterations)):
        router, gate = (one.requires_grad_() for one in drawn())
        out = form(router, gate)
        (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        results.append((out.detach(), router.grad, gate.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_large_experts_one_by_one_are_those_together(monkeypatch: pytest.MonkeyPatch) -> None:
    router, down = drawn(n=3, width=1024, inner=1)[0], drawn(n=3, inner=1024, width=512)[1]
    results = []
    for large in (mpi._LARGE, 1 << 30):
        monkeypatch.setattr(mpi, "_LARGE", large)
        leaves = router.clone().requires_grad_(), down.clone().requires_grad_()
        out = effective_router(leaves[0], input_matrix("down", down, down, leaves[1]), SCALE, 2)
        (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        results.append((out.detach(), leaves[0].grad, leaves[1].grad))
    for one_by_one, together in zip(*results, strict=True):
        torch.testing.assert_close(one_by_one, together, rtol=1e-10, atol=1e-12)


def test_3_gradients_are_orthogonal_and_the_closed_forms() -> None:
    router, gate = (one.requires_grad_() for one in drawn())
    out = effective_router(router, gate, SCALE)
    asked = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    (out * asked).sum().backward()
    assert router.grad is not None and gate.grad is not None
    assert (router * router.grad).sum(dim=-1).abs().max() < 1e-12
    assert (gate * gate.grad).sum(dim=(1, 2)).abs().max() < 1e-12

    r, w = router.detach(), gate.detach()
    rows = torch.einsum("nd,nfd,nfe->ne", r, w, w)
    size = rows.norm(dim=-1, keepdim=True)
    n = rows / size
    a = SCALE / size * (asked - (asked * n).sum(dim=-1, keepdim=True) * n)
    torch.testing.assert_close(router.grad, torch.einsum("nd,nfd,nfe->ne", a, w, w), rtol=1e-10, atol=1e-12)
    wa, wr = torch.einsum("nfd,nd->nf", w, a), torch.einsum("nfd,nd->nf", w, r)
    torch.testing.assert_close(gate.grad, torch.einsum("nf,nd->nfd", wa, r) + torch.einsum("nf,nd->nfd", wr, a), rtol=1e-10, atol=1e-12)
    assert all(torch.linalg.matrix_rank(one, rtol=1e-9) == 2 for one in gate.grad)


def test_3_finite_differences() -> None:
    router, gate = (one.requires_grad_() for one in drawn(n=2, inner=3, width=4))
    assert torch.autograd.gradcheck(lambda r, w: effective_router(r, w, SCALE, 2), (router, gate))


def test_4_a_detached_expert_gets_nothing_and_the_router_the_same() -> None:
    gradients = []
    for detach in (False, True):
        router, gate = (one.requires_grad_() for one in drawn())
        effective_router(router, gate, SCALE, detach_expert=detach).cumsum(0).square().sum().backward()
        gradients.append(router.grad)
        assert (gate.grad is None) == detach
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_5_iterated_rows_align_at_the_rate_of_the_power_method() -> None:
    values = torch.tensor([1.0, 0.7, 0.5, 0.4, 0.3, 0.2], dtype=torch.float64)
    matrix, right = with_spectrum(values)
    row, gate = torch.ones(1, len(values), dtype=torch.float64), matrix.unsqueeze(0)

    def tangent(rows: Tensor) -> float:
        along = (rows @ right.T)[0]
        return (along[1:].norm() / along[0].abs()).item()

    first, lambdas = tangent(row), [alignment(row, gate).item()]
    last = first
    for step in range(1, 41):
        row = effective_router(row, gate, SCALE)
        assert tangent(row) <= 0.49 * last + 1e-12 and tangent(row) <= 0.49**step * first + 1e-12
        last = tangent(row)
        lambdas.append(alignment(row, gate).item())
    assert all(later >= sooner - 1e-12 for sooner, later in itertools.pairwise(lambdas))
    assert lambdas[0] < 0.9 and lambdas[-1] > 1 - 1e-9


def test_6_the_sign_along_the_top_direction_is_kept() -> None:
    for seed in range(20):
        router, gate = drawn(seed)
        top = torch.linalg.svd(gate).Vh[:, 0]
        before, after = (router * top).sum(-1), (effective_router(router, gate, SCALE, 3) * top).sum(-1)
        assert torch.equal(before.sign(), after.sign())


def test_7_the_move_is_the_ascent_of_the_paper_near_the_top() -> None:
    values = torch.tensor([1.0, 0.8, 0.3, 0.2], dtype=torch.float64)
    matrix, right = with_spectrum(values)
    gram, errors = matrix.T @ matrix, []
    for angle in (0.3, 0.1, 0.01):
        row = math.cos(angle) * right[0] + math.sin(angle) * right[1]
        exact = effective_router(row[None], matrix[None], 1.0)[0] - row
        energy = row @ gram @ row
        near = (row @ gram - row * energy) / energy
        assert abs((near @ row).item()) < 1e-12
        errors.append(((near - exact).norm() / exact.norm()).item())
    assert errors == pytest.approx([0.053, 0.018, 0.0018], rel=0.02), "the spec's figures, which are those of this ratio of singular values"


def test_8_lambda_is_one_in_the_top_space_and_has_a_floor() -> None:
    router, gate = drawn(n=3)
    top = torch.linalg.svd(gate).Vh[:, 0]
    torch.testing.assert_close(alignment(-2.5 * top, gate), torch.ones(3, dtype=torch.float64))
    assert (alignment(router, gate) < 1).all()
    want = torch.einsum("nfd,nd->nf", gate, router).norm(dim=-1) / router.norm(dim=-1) / torch.linalg.matrix_norm(gate, ord=2)
    torch.testing.assert_close(alignment(router, gate), want)
    twofold = torch.diag(torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64))[None]
    assert alignment(torch.tensor([[0.6, 0.8, 0.0]], dtype=torch.float64), twofold).item() == pytest.approx(1)

    router, gate = drawn(n=400, inner=1, width=64)
    gate = gate.new_tensor(range(1, 33)).diag() @ orthogonal(64)[:32]  # one expert's matrix, many random rows
    floor = gate.norm() / (8 * torch.linalg.matrix_norm(gate, ord=2))
    assert alignment(router, gate.expand(400, 32, 64)).mean().item() == pytest.approx(floor.item(), rel=0.03)


@pytest.mark.parametrize(("width", "inner"), [(1024, 512), (1536, 768)])
def test_9_reference_values_of_gaussian_experts(width: int, inner: int) -> None:
    router, gate = drawn(dtype=torch.float32, n=2, inner=inner, width=width)
    assert alignment(router, gate).mean().item() == pytest.approx(0.42, abs=0.03)
    for iterations, value in ((1, 0.80), (2, 0.87), (5, 0.94), (10, 0.97)):
        assert alignment(effective_router(router, gate, SCALE, iterations), gate).mean().item() == pytest.approx(value, abs=0.02)


def test_10_the_router_of_a_bf16_model_is_computed_in_float32() -> None:
    router, gate = drawn(dtype=torch.bfloat16)
    got = effective_router(router, gate, SCALE)
    want = effective_router(router.double(), gate.double(), SCALE)
    assert got.dtype == torch.float32 and (got - want).norm() < 1e-6 * want.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(effective_router(router, gate, SCALE), got)


def test_11_shards_along_the_inner_width_add_up() -> None:
    router, gate = drawn()
    whole = powered(router, gate, sized=False)
    parts = sum(powered(router, part, sized=False) for part in gate.split(2, dim=1))
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_12_switches() -> None:
    router, gate = drawn()
    torch.testing.assert_close(effective_router(router, gate, SCALE, iterations=0), SCALE * router / router.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(powered(router, gate, sized=False), torch.einsum("nd,nfd,nfe->ne", router, gate, gate))
    up, down = drawn(7)[1], drawn(8)[1].transpose(1, 2).contiguous()
    grams: dict[Matrix, Tensor] = {"gate": gate.mT @ gate, "up": up.mT @ up, "down": down @ down.mT}
    for which, gram in grams.items():
        rows = effective_router(router, input_matrix(which, gate, up, down), SCALE)
        want = torch.einsum("nd,nde->ne", router, gram)
        torch.testing.assert_close(rows, SCALE * want / want.norm(dim=-1, keepdim=True))
    with pytest.raises(ValueError, match="matrix must be one of gate, up, down, got 'wo'"):
        input_matrix("wo", gate, up, down)  # type: ignore[arg-type]


def test_overwriting_is_the_effective_router_without_gradient_and_drives_lambda_to_one() -> None:
    router, gate = (one.requires_grad_() for one in drawn())
    want = effective_router(router, gate, SCALE, 2).detach()
    assert overwrite_(router, gate, SCALE, 2) is router and router.requires_grad and router.is_leaf
    assert torch.equal(router, want)
    for _ in range(60):
        overwrite_(router, gate, SCALE)
    assert alignment(router, gate).min() > 1 - 1e-3
    half = want.bfloat16()
    assert overwrite_(half, gate.detach(), SCALE).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="scale must be a positive number, got -1"):
        overwrite_(router, gate, -1.0)


@pytest.mark.parametrize("scale", [0.75, np.float32(0.75), np.float64(0.75)])
def test_numbers_of_numpy_are_numbers(scale: float) -> None:
    router, gate = drawn(dtype=torch.float32)
    got = effective_router(router, gate, scale, np.int64(2))  # type: ignore[arg-type]
    assert got.dtype == torch.float32 and torch.equal(got, effective_router(router, gate, 0.75, 2))


def test_13_a_cached_leaf_and_recomputing_give_the_same_gradients() -> None:
    batches = [torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (1, 2)]

    def loss(x: Tensor, rows: Tensor) -> Tensor:
        return (x @ rows.T).softmax(-1).square().sum()

    router, gate = (one.requires_grad_() for one in drawn())
    for x in batches:
        loss(x, effective_router(router, gate, SCALE)).backward()
    want = (router.grad, gate.grad)
    router, gate = (one.requires_grad_() for one in drawn())
    out = effective_router(router, gate, SCALE)
    leaf = out.detach().requires_grad_()
    for x in batches:
        loss(x, leaf).backward()
    out.backward(leaf.grad)
    for mine, theirs in zip((router.grad, gate.grad), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_many_iterations_neither_overflow_nor_underflow(size: float) -> None:
    router, gate = (one.requires_grad_() for one in drawn(dtype=torch.float32))
    out = effective_router(router, gate * size, SCALE, iterations=200)
    top = torch.linalg.svd(gate.detach()).Vh[:, 0]
    assert ((out * top).sum(-1).abs() - SCALE).abs().max() < 1e-5
    out.cumsum(0).square().sum().backward()
    assert router.grad is not None and router.grad.isfinite().all()


def test_a_row_that_leads_nowhere_is_zero_and_harms_nobody() -> None:
    router, gate = drawn()
    router[1], gate[2] = 0, 0
    router.requires_grad_()
    gate.requires_grad_()
    out = effective_router(router, gate, SCALE)
    out.sum().backward()
    assert router.grad is not None and gate.grad is not None
    assert out.norm(dim=-1).tolist() == pytest.approx([SCALE, 0, 0, SCALE, SCALE])
    assert router.grad.isfinite().all() and gate.grad.isfinite().all() and not router.grad[1:3].any()
    assert alignment(router, gate)[1:3].tolist() == [0, 0]


def test_max_violation_and_row_cosine() -> None:
    assert max_violation(torch.tensor([[2, 2, 2], [6, 0, 0], [0, 0, 0]])).tolist() == [0, 2, 0]
    same = torch.tensor([[1.0, 0], [-2, 0], [0, 3]])
    assert row_cosine(same).item() == pytest.approx(1 / 3)
    assert row_cosine(same[:1]).item() == 0
    with pytest.raises(ValueError, match="load must not be negative, got -1"):
        max_violation(torch.tensor([1, -1]))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"router": torch.zeros(8)}, r"router must be floating \[N, D\], got torch.float32 of shape \[8\]"),
        ({"router": torch.zeros(5, 8, dtype=torch.long)}, "router must be floating"),
        ({"expert_gate": torch.zeros(5, 8, 6)}, r"expert_gate must be \[5, d, 8\].*got \[5, 8, 6\]"),
        ({"expert_gate": torch.zeros(1, 6, 8)}, r"got \[1, 6, 8\]"),
        ({"expert_gate": torch.zeros(5, 6, 8, dtype=torch.int)}, "expert_gate must be floating"),
        ({"scale": -1.0}, "scale must be a positive number, got -1.0"),
        ({"scale": math.nan}, "scale must be a positive number, got nan"),
        ({"iterations": -1}, "iterations must be a whole number from 0 on, got -1"),
        ({"iterations": 1.5}, "iterations must be"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, object], told: str) -> None:
    router, gate = drawn()
    with pytest.raises(ValueError, match=told):
        effective_router(**({"router": router, "expert_gate": gate, "scale": SCALE} | change))  # type: ignore[arg-type]
