"""Steps that see a weight matrix as a whole: Muon, and Hyperball around the direction of Muon or Adam (arXiv 2606.16899).

Legend: n matrices of a stack, r = d_out rows, c = d_in columns, as `nn.Linear` stores one. The matrices of a stack know nothing of each
other. eta is the learning rate, lambda the weight decay, |W| the Frobenius norm.

    Muon        W' = (1 - eta lambda) W - eta s O(u)              s = 0.2 sqrt(max(r, c))
    Hyperball   W' = R unit(W - eta s R unit(u)),  unit(x) = x / |x|,  s = 0.2 sqrt(c)

u is Nesterov's momentum for Muon and m / (sqrt(v) + eps) for AdamH; MuonH has O(u) in its place. O is the quintic Newton-Schulz
iteration, which brings singular values near 1 rather than to it. R is sqrt(r) in the MPI paper (arXiv 2606.12397) and the initial norm
in Hyperball's.

Known and inferred. Both norms and "LR scale 0.2 sqrt(d_in), with d_in of the 1B model kept for all scales" are the MPI paper's; it prints
Muon's scale without its square root, which is the published rule. Inferred: s multiplies the relative step, |dW| = eta s R. Then with
R = sqrt(r) a step has |dW| = 0.2 eta sqrt(r c), the size that AdamW's usually have, as Muon's s gives it: one learning rate for all. And
"of the 1B model" is taken to be c times base_width / width, which gives every matrix the input width of its twin in the 1B model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raysys.methods.tensors import compute_dtype

QUINTIC = (3.4445, -4.7750, 2.0315)
ADAM_SIZE = 0.2
"""Root mean square of AdamW's usual steps, in learning rates."""
_TINY = 1e-15
"""A smaller norm counts as none: no direction comes of it."""


def norms(matrices: Tensor) -> Tensor:
    """Frobenius norms of [..., r, c] as [..., 1, 1]."""
    _check("matrices", matrices)
    return torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=compute_dtype(matrices))


def unit(matrices: Tensor) -> Tensor:
    """Each matrix at norm 1; zeros stay zeros, so an expert without gradient is left where it is."""
    return matrices / norms(matrices).clamp(min=_TINY)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Each matrix with its singular vectors and singular values near 1, whatever its scale: [..., r, c], zeros stay zeros.

    Computes in bfloat16 on CUDA, which its published use shows to suffice, else in float32 (float64 stays).

    Raises:
        ValueError: no matrices, or `steps` below 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    a, b, c = QUINTIC
    x = unit(matrices)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x.to(torch.bfloat16) if x.is_cuda and x.dtype == torch.float32 else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).to(compute_dtype(matrices))


def hyperball_step(weights: Tensor, directions: Tensor, rate: float, size: float | None) -> Tensor:
    """The weights after a step against `directions` of `rate` times their norm, brought back to their norm: [..., r, c].

    Args:
        rate: |dW| / |W| before it is brought back: learning rate times `hyperball_scale`.
        size: the norm R; None keeps each matrix's own.

    Raises:
        ValueError: shapes differ, or a negative rate.
    """
    if weights.shape != directions.shape:
        raise ValueError(f"directions have shape {list(directions.shape)}, weights {list(weights.shape)}")
    if rate < 0:
        raise ValueError(f"rate must not be negative, got {rate}")
    radius = norms(weights) if size is None else size
    return radius * unit(weights - rate * radius * unit(directions))


def hyperball_size(rows: int) -> float:
    """The MPI paper's norm of a matrix with so many rows."""
    return math.sqrt(rows)


def muon_scale(rows: int, columns: int) -> float:
    """What multiplies the learning rate of an orthogonal step to give it AdamW's size."""
    return ADAM_SIZE * math.sqrt(max(rows, columns))


def hyperball_scale(columns: int, width_ratio: float = 1.0) -> float:
    """What multiplies the learning rate to give the relative size of a step; `width_ratio`: base_width / width."""
    return ADAM_SIZE * math.sqrt(columns * width_ratio)


def _check(name: str, matrices: Tensor) -> None:
    if matrices.dim() < 2 or not matrices.is_floating_point():
        raise ValueError(f"{name} must be floating [..., r, c], got {list(matrices.shape)} of {matrices.dtype}")
