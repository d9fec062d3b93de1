"""MPI, manifold power iteration: each router row follows its expert's top singular direction. Paper: arXiv 2606.12397.

Legend: N experts, D model width, d expert width, R the router's parameter [N, D], W_i one matrix of expert i as `nn.Linear` stores
it [d, D] (so that the paper's M_i, the Gram of the input space, is W_i^T W_i and never built), C the norm of every row.

    r_i  = R_i W_i^T W_i                                                        power step, Eq. 4
    R'_i = C r_i / ||r_i||                                                      retraction, Eq. 5
    dL/dR_i = a_i M_i,   a = (C / ||r||) (g - (g.n) n),   n = r / ||r||,   g = dL/dR'
    dL/dW_i = (W_i a_i) R_i^T + (W_i R_i) a_i^T                                 dense, rank 2, for experts that saw no token too
    lambda_i = ||W_i R'_i|| / (||R'_i|| ||W_i||_2)                              alignment, Eq. 11

R' is a function of (R, W) that gradients pass through; nothing is written back. The paper's words can be read otherwise too, as R <- R'
once a training step, with tokens scored by R as it stands: `overwrite_`. Only the direction of r counts, so rows and products are brought
to size one by constants on the way: no number of iterations overflows or underflows, and the gradient is that of the plain form.

float64 stays float64, lower precisions compute and return float32.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raysys.methods.tensors import compute_dtype

Matrix = Literal["gate", "up", "down"]
MATRICES: tuple[Matrix, ...] = ("gate", "up", "down")
_LARGE = 1 << 16
"""Numbers of an expert's matrix from which it is worth a call of its own on CPU."""


def effective_router(router: Tensor, expert_gate: Tensor, scale: float, iterations: int = 1, detach_expert: bool = False) -> Tensor:
    """The router that tokens are scored with, Eqs. 4 and 5.

    Args:
        router: R, [N, D].
        expert_gate: [N, d, D], a matrix of each expert: see `input_matrix`.
        scale: C itself, the norm of every row of the result; the paper's C' is `scale * sqrt(N)`.
        iterations: power steps; 0 leaves the directions as they are (the paper's ablation "normalisation only").
        detach_expert: no gradient reaches the experts from here. The paper's listing lets it through.

    Returns:
        R', [N, D]. A row that the expert maps to nothing is 0 and gets no gradient.

    Raises:
        ValueError: shapes do not fit, a tensor is not floating, `scale` is not a positive number, `iterations` not a whole one from 0 on.
    """
    _check(router, expert_gate)
    if not (isinstance(scale, Real) and math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive number, got {scale}")
    rows = powered(router, expert_gate, iterations, detach_expert)
    norm = rows.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, float(scale) * rows / norm.where(norm > 0, 1.0), torch.zeros_like(rows))


@torch.no_grad()
def overwrite_(router: Tensor, expert_gate: Tensor, scale: float, iterations: int = 1) -> Tensor:
    """R <- R', in place: what the in-place mode does once a training step, after which tokens are scored with R itself.

    No gradient passes, so experts get none from routing and R gets that of a plain router. Repeated, it brings rows to their expert's top
    singular direction, however R is trained in between.

    Args:
        router: R, [N, D]; keeps its dtype. See `effective_router` for the others.

    Returns:
        The same tensor.

    Raises:
        ValueError: see `effective_router`.
    """
    return router.copy_(effective_router(router, expert_gate, scale, iterations))


def powered(router: Tensor, expert_gate: Tensor, iterations: int = 1, detach_expert: bool = False, sized: bool = True) -> Tensor:
    """Rows after the power steps of Eq. 4 without the retraction, [N, D].

    Args:
        sized: bring the rows to a size near one by constants, which leaves their directions and, after a retraction, all gradients as
            they are. Without, the product itself is returned (the paper's ablation "no retraction").

    Raises:
        ValueError: see `effective_router`.
    """
    _check(router, expert_gate)
    if isinstance(iterations, bool) or not isinstance(iterations, Integral) or iterations < 0:
        raise ValueError(f"iterations must be a whole number from 0 on, got {iterations}")
    dtype = compute_dtype(router, expert_gate)
    size = _unit_size if sized else (lambda rows: rows)
    with torch.autocast(router.device.type, enabled=False):
        matrix = (expert_gate.detach() if detach_expert else expert_gate).to(dtype)
        rows = size(router.to(dtype))
        for _ in range(int(iterations)):
            rows = size(_PowerStep.apply(rows, matrix, sized))
    return rows


class _PowerStep(torch.autograd.Function):
    """r_i W_i^T W_i, over a constant if `sized`. The experts' gradient, as large as all of them, is one product of rank 2 and not a sum."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: Tensor, sized: bool) -> Tensor:
        inner, size, out = _there_and_back(matrix, rows, None if sized else torch.ones_like(rows[:, :1]))
        ctx.save_for_backward(rows, matrix, inner, size)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows, matrix, inner, size = ctx.saved_tensors
        (grad,) = grads
        back, _, to_rows = _there_and_back(matrix, grad, size)
        to_matrix = None
        if ctx.needs_input_grad[1]:
            to_matrix = torch.bmm(torch.stack([inner, back], dim=2), torch.stack([grad, rows], dim=1))
        return to_rows, to_matrix, None


def _there_and_back(matrix: Tensor, rows: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """W_i r_i over `size` [N, 1] (None: its largest entry), [N, d]; that size; and W_i^T of the quotient, [N, D]."""
    if matrix.device.type != "cpu" or matrix.shape[1] * matrix.shape[2] < _LARGE:
        inner = torch.bmm(matrix, rows.unsqueeze(-1)).squeeze(-1)
        size = _largest(inner) if size is None else size
        inner = inner / size
        return inner, size, torch.bmm(inner.unsqueeze(1), matrix).squeeze(1)
    # One expert after another, so that its matrix, which the second product reads again, is still in the processor's cache.
    inner, sizes, out = rows.new_empty(matrix.shape[:2]), rows.new_empty(len(rows), 1), torch.empty_like(rows)
    for i, (one, row) in enumerate(zip(matrix, rows, strict=True)):
        there = one @ row
        sizes[i] = _largest(there) if size is None else size[i]
        inner[i] = there / sizes[i]
        out[i] = inner[i] @ one
    return inner, sizes, out


def input_matrix(which: Matrix, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The experts' matrix that rows follow, as a view [N, d, D] of input (gate, up) or output (down) directions.

    Args:
        which: the paper finds no significant difference; its default is the gate projection.
        gate, up: [N, d, D]; down: [N, D, d].

    Raises:
        ValueError: no such matrix.
    """
    if which not in MATRICES:
        raise ValueError(f"matrix must be one of {', '.join(MATRICES)}, got {which!r}")
    return {"gate": gate, "up": up, "down": down.transpose(1, 2)}[which]


@torch.no_grad()
def alignment(router: Tensor, expert_gate: Tensor) -> Tensor:
    """lambda of the rows given, [N] in [0, 1]: 1 where a row lies in its expert's top singular space. Eq. 11.

    A random row does not score 0 but about ||W||_F / (sqrt(D) ||W||_2). Rows and experts of nothing but zeros score 0.

    Args:
        router: [N, D]; expert_gate: [N, d, D].

    Raises:
        ValueError: shapes do not fit or a tensor is not floating.
    """
    _check(router, expert_gate)
    dtype = compute_dtype(router, expert_gate)
    found = []
    for row, matrix in zip(router, expert_gate, strict=True):
        row, matrix = _unit_size(row.double()), matrix.double()
        matrix = matrix / matrix.abs().amax().clamp_min(torch.finfo(torch.float64).tiny)
        # The largest eigenvalue of the smaller Gram is exact to rounding, and much cheaper than singular values.
        gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        bound = row.norm() * torch.linalg.eigvalsh(gram)[-1].clamp_min(0).sqrt()
        found.append(torch.where(bound > 0, (matrix @ row).norm() / bound.where(bound > 0, 1.0), 0.0))
    lambdas = torch.stack(found) if found else router.new_zeros(0)
    return lambdas.clamp(0, 1).to(dtype)


@torch.no_grad()
def row_cosine(router: Tensor) -> Tensor:
    """Mean of |cos| between two different rows of [N, D], a scalar: near 1 where experts share their direction. 0 for one row.

    Raises:
        ValueError: the router is no floating [N, D].
    """
    _check_router(router)
    rows = torch.nn.functional.normalize(_unit_size(router.to(compute_dtype(router))), dim=-1)
    n = len(rows)
    if n < 2:
        return rows.new_zeros(())
    cosines = (rows @ rows.T).abs()
    return (cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1))


def max_violation(load: Tensor) -> Tensor:
    """MaxVio: by how much the busiest expert's load exceeds the mean, as a share of it.

    Args:
        load: tokens of each expert, [..., N]: of one batch (batches are averaged afterwards), or of a whole set (MaxVio-global).

    Returns:
        [...]; 0 where there is no load.

    Raises:
        ValueError: there is no expert, or a negative load.
    """
    if load.dim() < 1 or load.shape[-1] < 1:
        raise ValueError(f"load must be [..., N], got shape {list(load.shape)}")
    load = load.double()
    if bool((load < 0).any()):
        raise ValueError(f"load must not be negative, got {load.min().item():g}")
    mean = load.mean(dim=-1)
    return torch.where(mean > 0, load.amax(dim=-1) / mean.where(mean > 0, 1.0) - 1, 0.0)


def _unit_size(rows: Tensor) -> Tensor:
    """Rows [..., D] divided by their largest entry, taken as a constant; rows of zeros stay."""
    return rows / _largest(rows.detach())


def _largest(rows: Tensor) -> Tensor:
    """[..., 1], the largest size of an entry, 1 for rows of zeros."""
    largest = rows.abs().amax(dim=-1, keepdim=True)
    return largest.where(largest > 0, 1.0)


def _check_router(router: Tensor) -> None:
    if router.dim() != 2 or not router.is_floating_point():
        raise ValueError(f"router must be floating [N, D], got {router.dtype} of shape {list(router.shape)}")


def _check(router: Tensor, expert_gate: Tensor) -> None:
    _check_router(router)
    n, width = router.shape
    if not expert_gate.is_floating_point():
        raise ValueError(f"expert_gate must be floating, got {expert_gate.dtype}")
    if expert_gate.dim() != 3 or expert_gate.shape[0] != n or expert_gate.shape[2] != width or expert_gate.shape[1] < 1:
        raise ValueError(f"expert_gate must be [{n}, d, {width}] for a router of shape {[n, width]}, got {list(expert_gate.shape)}")
