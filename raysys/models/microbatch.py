"""Micro-batches by a budget of padded tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack_rows(lengths: Sequence[int] | np.ndarray, budget: int) -> list[np.ndarray]:
    """Splits rows into micro-batches of similar length, longest first, so that rows * longest <= budget.

    Args:
        lengths: tokens of each row.
        budget: padded tokens of a micro-batch; a single longer row gets a micro-batch of its own.

    Returns:
        Row indices of each micro-batch, ascending inside it; every row once; the same for the same input.

    Raises:
        ValueError: budget is not positive, or a length is negative.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if budget < 1:
        raise ValueError(f"budget must be positive, got {budget}")
    if sizes.ndim != 1 or (sizes < 0).any():
        raise ValueError(f"lengths must be one row of non-negative numbers, got shape {sizes.shape}, smallest {sizes.min(initial=0)}")
    order = np.argsort(-sizes, kind="stable")
    packs: list[np.ndarray] = []
    start = 0
    while start < len(order):
        longest = max(1, int(sizes[order[start]]))
        stop = start + max(1, budget // longest)
        packs.append(np.sort(order[start:stop]))
        start = stop
    return packs
