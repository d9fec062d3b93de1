"""Micro-batches by a budget of tokens, and where their response tokens are.

Legend: T tokens of all rows, one row after another, n response tokens of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack_rows(lengths: Sequence[int] | np.ndarray, budget: int, padded: bool = False) -> list[np.ndarray]:
    """Splits rows into micro-batches: longest first, each into the first micro-batch that has room for it.

    Args:
        lengths: tokens of each row.
        budget: tokens of a micro-batch; a single longer row gets a micro-batch of its own.
        padded: for models that cannot pack (`raysys.models.packing.teach`): rows of similar length come together, and a
            micro-batch counts rows * longest.

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
    packs = _sorted(order, sizes, budget) if padded else _first_fit(order, sizes, budget)
    return [np.sort(np.asarray(pack, dtype=np.int64)) for pack in packs]


def response_positions(prompts: np.ndarray, responses: np.ndarray) -> np.ndarray:
    """[n]: where the response tokens are among the T, of rows with so many tokens each."""
    starts = np.cumsum(prompts + responses) - responses
    within = np.arange(responses.sum()) - np.repeat(np.cumsum(responses) - responses, responses)
    return np.repeat(starts, responses) + within


def _first_fit(order: np.ndarray, sizes: np.ndarray, budget: int) -> list[list[int]]:
    packs: list[list[int]] = []
    room = np.zeros(len(order), dtype=np.int64)  # of packs that are not begun: none
    for row in order:
        fits = np.flatnonzero(room[: len(packs)] >= sizes[row])
        if len(fits):
            pack = int(fits[0])
        else:
            pack = len(packs)
            packs.append([])
            room[pack] = budget
        packs[pack].append(int(row))
        room[pack] -= sizes[row]
    return packs


def _sorted(order: np.ndarray, sizes: np.ndarray, budget: int) -> list[np.ndarray]:
    packs: list[np.ndarray] = []
    start = 0
    while start < len(order):
        longest = max(1, int(sizes[order[start]]))
        stop = start + max(1, budget // longest)
        packs.append(order[start:stop])
        start = stop
    return packs
