"""The inner loop of lexical search: sums a query's posting lists and keeps the best documents, ties by rank.

Work grows with the postings of the query's words and not with the corpus: only documents that hold a word are looked at.
Compiled by numba on first use (seconds) and kept on disk where a place can be written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

SPARSE = 4
"""A query with fewer postings than this share of the documents notes which it touches; the others go through all sums."""


def best_rows(
    weights: np.ndarray,
    rows: np.ndarray,
    starts: np.ndarray,
    rank: np.ndarray,
    words: np.ndarray,
    bounds: np.ndarray,
    sums: np.ndarray,
    touched: np.ndarray,
    best: np.ndarray,
    scores: np.ndarray,
    counts: np.ndarray,
) -> None:
    """Fills `best`, `scores` [Q, k] and `counts` [Q]: rows of the highest sums, highest first, equal sums by lower rank.

    Shapes: N documents, P postings, V words, W words of all queries. Assumes positive weights, and k of at least 1.

    Args:
        weights, rows: [P] postings, word after word. Rows are unsigned, here and below: a sign would be checked at each access.
        starts: [V + 1] where each word's postings begin.
        rank: [N] place of a row among those of equal sum.
        words: [W] word numbers of all queries, one query after another; a word twice counts twice.
        bounds: [Q + 1] where each query's words begin.
        sums, touched: [N] room to work in, zeros in `sums`, which are zeros again afterwards.
    """
    k = best.shape[1]
    for query in range(len(bounds) - 1):
        first, last = bounds[query], bounds[query + 1]
        postings = 0
        for place in range(first, last):
            postings += starts[words[place] + 1] - starts[words[place]]
        sparse = postings * SPARSE < len(rank)
        many = 0 if sparse else len(rank)
        for place in range(first, last):
            start, end = starts[words[place]], starts[words[place] + 1]
            held, added = rows[start:end], weights[start:end]
            if sparse:
                for posting in range(len(held)):
                    row = held[posting]
                    if sums[row] == 0:
                        touched[many] = row
                        many += 1
                    sums[row] += added[posting]
            else:
                for posting in range(len(held)):
                    sums[held[posting]] += added[posting]
        kept, lowest = 0, np.float32(0)
        for index in range(many):
            row = touched[index] if sparse else np.uint32(index)
            total = sums[row]
            if total <= lowest and (kept < k or total < lowest or rank[row] > rank[best[query, k - 1]]):
                continue
            slot = min(kept, k - 1)
            while slot > 0:
                above = scores[query, slot - 1]
                if total < above or (total == above and rank[row] > rank[best[query, slot - 1]]):
                    break
                scores[query, slot] = above
                best[query, slot] = best[query, slot - 1]
                slot -= 1
            scores[query, slot] = total
            best[query, slot] = row
            kept = min(kept + 1, k)
            if kept == k:
                lowest = scores[query, k - 1]
        if sparse:
            for index in range(many):
                sums[touched[index]] = 0
        else:
            sums[:] = 0
        counts[query] = kept


@cache
def compiled() -> Callable[..., None]:
    """`best_rows` as machine code that runs without the interpreter's lock."""
    from numba import njit

    options: dict[str, Any] = {"nogil": True, "boundscheck": False}
    try:
        return njit(cache=True, **options)(best_rows)
    except RuntimeError:  # no folder where numba could keep the code
        return njit(**options)(best_rows)
