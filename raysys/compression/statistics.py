"""What quantisation keeps of the calibration tokens: sums of products of a linear's inputs, and their factor for the backends.

Legend: n input columns, N tokens, X the inputs [n, N] on the quantised path, X_fp the same on the full-precision path.

    hessian    H = 2/N X X^T                   of the layer's squared output error
    deviation  D = 2/N (X_fp - X) X^T          what asymmetric calibration adds (GPTAQ; d2quant.md, section 5)
    factor     H + damp mean(diag H) I = (U^T U)^-1, U upper triangular, with columns and rows in the order of quantisation

Sums are of raw products, so it does not matter how tokens are batched, but for rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Order = Literal["group", "none"]
ORDERS: tuple[Order, ...] = ("group", "none")
_PANEL = 1024
_TOKENS = 4096
"""Converted and multiplied at a time."""


@dataclass(frozen=True)
class Factor:
    """What a column-by-column quantiser needs, in its order of columns.

    Attributes:
        order: [n], `order[k]` is the column that comes k-th; the columns of a group stay together.
        upper: U [n, n].
        asymmetric: triu(D U^T, 1) U, [n, n], or None without D. Row j is what least squares on the columns after j make of D's.
        dead: [n], bool: columns whose input was zero in each token.
        damp: what was added to the diagonal, as a share of its mean; more than asked for where H could not be factored otherwise.
    """

    order: Tensor
    upper: Tensor
    asymmetric: Tensor | None
    dead: Tensor
    damp: float


class Statistics:
    """Running sums over calibration tokens for the linears that share an input.

    Args:
        columns: n.
        dtype: of the sums, float32 or float64.
        device: of the sums; inputs are brought there.

    Raises:
        ValueError: another dtype, or no columns.
    """

    def __init__(self, columns: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be float32 or float64, got {dtype}")
        if columns < 1:
            raise ValueError(f"columns must be positive, got {columns}")
        self.columns = columns
        self.tokens = 0
        self._products = torch.zeros(columns, columns, dtype=dtype, device=device)
        self._deviations: Tensor | None = None
        self._factor: tuple[tuple[int, float, Order], Factor] | None = None

    @torch.no_grad()
    def add(self, inputs: Tensor, full: Tensor | None = None) -> None:
        """Tokens more.

        Args:
            inputs: [T, n] on the quantised path, without padding.
            full: [T, n] on the full-precision path. Either always or never.

        Raises:
            ValueError: other shapes, or `full` was given before and is not now, or the other way round.
        """
        if inputs.dim() != 2 or inputs.shape[1] != self.columns:
            raise ValueError(f"inputs must be [T, {self.columns}], got {list(inputs.shape)}")
        if full is not None and full.shape != inputs.shape:
            raise ValueError(f"full must be {list(inputs.shape)} as inputs are, got {list(full.shape)}")
        if self.tokens and (full is None) != (self._deviations is None):
            raise ValueError("full must be given with all tokens or with none")
        if not len(inputs):
            return
        if full is not None and self._deviations is None:
            self._deviations = torch.zeros_like(self._products)
        for start in range(0, len(inputs), _TOKENS):
            x = inputs[start : start + _TOKENS].to(self._products)
            self._add_products(x)
            if full is not None and self._deviations is not None:
                self._deviations.addmm_((full[start : start + _TOKENS].to(x) - x).T, x)
        self.tokens += len(inputs)
        self._factor = None

    def _add_products(self, x: Tensor) -> None:
        # Panels on and right of the diagonal only: half of the work. `hessian` mirrors them.
        for start in range(0, self.columns, _PANEL):
            panel = slice(start, start + _PANEL)
            self._products[panel, start:].addmm_(x[:, panel].T, x[:, start:])

    @property
    def hessian(self) -> Tensor:
        """2/N X X^T, [n, n]. Raises ValueError without tokens, or where inputs were no finite numbers."""
        if not self.tokens:
            raise ValueError("there are no statistics: no tokens were added")
        if not bool(self._products.diagonal().isfinite().all()):
            raise ValueError("calibration inputs must be finite numbers, and their squares within float32")
        for start in range(0, self.columns - _PANEL, _PANEL):
            end = start + _PANEL
            self._products[end:, start:end] = self._products[start:end, end:].T
        return self._products * (2 / self.tokens)

    @property
    def deviation(self) -> Tensor | None:
        """2/N (X_fp - X) X^T, [n, n], or None where `full` was not given."""
        return None if self._deviations is None else self._deviations * (2 / self.tokens)

    def factor(self, group_size: int, damp: float = 0.01, order: Order = "group") -> Factor:
        """Kept until tokens are added: linears that share an input share it.

        Args:
            group_size: divides n.
            damp: share of the diagonal's mean that is added to it.
            order: "group": inside groups by falling diag(H), groups by their largest; no index has to be stored. "none": as they are.

        Raises:
            ValueError: no tokens, arguments out of range, or a Hessian that cannot be factored.
        """
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
        if group_size < 1 or self.columns % group_size:
            raise ValueError(f"group_size must divide the input width {self.columns}, got {group_size}")
        if not 0 < damp < math.inf:
            raise ValueError(f"damp must be positive, got {damp}")
        key = (group_size, damp, order)
        if self._factor is None or self._factor[0] != key:
            self._factor = (key, self._factored(*key))
        return self._factor[1]

    @torch.no_grad()
    def _factored(self, group_size: int, damp: float, order: Order) -> Factor:
        hessian, deviation = self.hessian, self.deviation
        diagonal = hessian.diagonal().clone()
        dead = diagonal == 0
        along = torch.arange(self.columns, device=diagonal.device)
        if order == "group":
            along = group_order(diagonal, group_size)
            hessian = hessian[along][:, along]
            deviation = None if deviation is None else deviation[along][:, along]
        upper, used = _upper(hessian, dead[along], damp)
        return Factor(along, upper, None if deviation is None else _asymmetric(deviation, upper), dead, used)


def group_order(importance: Tensor, group_size: int) -> Tensor:
    """Columns [n] by falling importance inside their group, groups by their largest; ties as they stand."""
    inside = importance.unflatten(0, (-1, group_size)).sort(dim=1, descending=True, stable=True)
    groups = inside.values[:, 0].sort(descending=True, stable=True).indices
    first = torch.arange(0, len(importance), group_size, device=importance.device)
    return (inside.indices + first.unsqueeze(1))[groups].flatten()


def _upper(hessian: Tensor, dead: Tensor, damp: float) -> tuple[Tensor, float]:
    """U [n, n] of the damped Hessian, which is overwritten, and the damping that it took."""
    diagonal = hessian.diagonal()
    diagonal[dead] = 1
    mean, plain = diagonal.mean(), diagonal.clone()
    while True:
        diagonal.copy_(plain + damp * mean)
        # With rows and columns in reverse a lower factor is an upper one, M: H = M M^T, and U is the inverse of M.
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not int(failed):
            return _inverse(lower).flip(0, 1), damp
        if damp >= 1:
            raise ValueError(f"the Hessian of the calibration inputs cannot be factored, even with {damp:g} times its mean on the diagonal")
        damp *= 10


def _asymmetric(deviation: Tensor, upper: Tensor, panel: int = 256) -> Tensor:
    """triu(D U^T, 1) U in D's place. U is zero left of its diagonal, so a panel of rows needs what is right of its first column."""
    for start in range(0, len(upper), panel):
        rows, corner = slice(start, start + panel), upper[start:, start:]
        deviation[rows, start:] = (deviation[rows, start:] @ corner.T).triu_(1) @ corner
        deviation[rows, :start] = 0
    return deviation


def _inverse(lower: Tensor, small: int = 256) -> Tensor:
    """Of a lower triangular matrix, by halves: a third of the work that solving for the identity takes."""
    n = len(lower)
    if n <= small:
        return torch.linalg.solve_triangular(lower, torch.eye(n, dtype=lower.dtype, device=lower.device), upper=False)
    half = n // 2
    out = torch.zeros_like(lower)
    out[:half, :half] = _inverse(lower[:half, :half], small)
    out[half:, half:] = _inverse(lower[half:, half:], small)
    out[half:, :half] = -(out[half:, half:] @ (lower[half:, :half] @ out[:half, :half]))
    return out
