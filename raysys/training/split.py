"""Who trains on which rows. Plain numpy: the driver deals rows out by their tokens, the same way for the same batch."""

from __future__ import annotations

import numpy as np

from raysys.models.microbatch import pack_rows
from raysys.training.spec import Share


def split(
    prompts: np.ndarray,
    responses: np.ndarray,
    *,
    ranks: int,
    mini_batches: int,
    budget: int,
    padded: bool = False,
    trained: np.ndarray | None = None,
) -> list[list[Share]]:
    """Shares of each optimiser step and rank, `[mini_batches][ranks]`; rows count in the whole batch.

    Mini-batch i takes every `mini_batches`-th row from row i on, so rows that the batch orders by domain stay mixed. Rows
    without a token to train on have nothing to train on and are in no share.

    Args:
        prompts, responses: tokens of each row.
        budget: tokens of a micro-batch.
        padded: whether padding counts (`raysys.models.microbatch.pack_rows`).
        trained: response tokens of each row that are trained on; None: all.
    """
    lengths, trained = prompts + responses, responses if trained is None else trained
    steps = []
    for first in range(mini_batches):
        rows = np.arange(first, len(lengths), mini_batches)
        rows = rows[trained[rows] > 0]
        parts = [rows[part] for part in balance(lengths[rows], ranks)]
        passes = max(len(pack_rows(lengths[part], budget, padded)) for part in parts)
        steps.append([Share(part, int(trained[rows].sum()), len(rows), passes) for part in parts])
    return steps


def balance(tokens: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Row indices of each rank, ascending; the next longest row goes to the rank with the least so far."""
    if ranks == 1:
        return [np.arange(len(tokens))]
    loads = [0] * ranks
    rows: list[list[int]] = [[] for _ in range(ranks)]
    for row in np.argsort(-tokens, kind="stable").tolist():
        rank = loads.index(min(loads))
        loads[rank] += int(tokens[row])
        rows[rank].append(row)
    return [np.sort(np.asarray(own, dtype=np.int64)) for own in rows]
