"""How a sample ends, and how ended samples become columns of the record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raysys.batch import Batch, Ragged
from raysys.errors import DataError, InfrastructureError
from raysys.rollout.spec import RESPONSE_COLUMNS, response_columns

_ROUNDING = 1e-3
"""A log-prob may be so much above 0."""


@dataclass(frozen=True)
class Result:
    """A ticket's end: row `row` of `rows` (`RESPONSE_COLUMNS`), or None and why it is dead."""

    ticket: int
    rows: Batch | None
    row: int = 0
    causes: tuple[str, ...] = ()
    own_fault: bool = False
    """Of a dead one: the row cannot be sampled anywhere."""


def attach(prompts: Batch, results: Sequence[Result]) -> Batch:
    """Each row with its response columns. Raises DataError or InfrastructureError for the first row that has none."""
    for row, result in enumerate(results):
        if result.rows is None:
            name = f"{prompts.strings('prompt_id')[row]}/{prompts.numbers('sample')[row]}"
            kind = DataError if result.own_fault else InfrastructureError
            raise kind(f"sample {name} could not be drawn: {'; then '.join(result.causes)}", "rollout.retries sets how often it is tried")
    return attach_known(prompts, results)


def attach_known(prompts: Batch, results: Sequence[Result | None]) -> Batch:
    """Each row with its response columns, which are null where there is no result.

    For many rows at once: all that ended together is one table, which is copied here as a whole, however few of its rows are asked for.
    """
    first = next((result.rows for result in results if result is not None and result.rows is not None), None)
    names = RESPONSE_COLUMNS if first is None else response_columns(first)
    sources: list[Batch] = [Batch.from_columns(**{name: [] for name in names})]
    starts: dict[int, int] = {}
    rows, places = 0, []
    for result in results:
        if result is None or result.rows is None:
            places.append(None)
            continue
        if id(result.rows) not in starts:
            starts[id(result.rows)] = rows
            rows += len(result.rows)
            sources.append(result.rows)
        places.append(starts[id(result.rows)] + result.row)
    responses = Batch.concat(sources).table.take(pa.array(places, pa.int64()))
    return prompts.with_columns(**{name: responses.column(name) for name in names})


def absurd(rows: Batch, limits: Sequence[int | None], vocabulary: int, newest: int) -> str:
    """Why these responses cannot be answers to what was asked, "" if they can.

    Args:
        rows: `RESPONSE_COLUMNS` of as many prompts as there are `limits`.
        limits: tokens that each response may have; None: not known any more.
        vocabulary: of the model.
        newest: version of the newest weights that there can be.
    """
    ids, logprobs, spans = (rows.ragged(name) for name in ("response_ids", "rollout_logprobs", "version_spans"))
    if len(ids) != len(limits) or not np.array_equal(ids.offsets, logprobs.offsets):
        return f"it answered {len(limits)} prompts with {len(ids)} responses and log-probs of other lengths"
    if ids.values.size and (ids.values.min() < 0 or ids.values.max() >= vocabulary):
        return f"it answered with token ids from {ids.values.min()} to {ids.values.max()}, the vocabulary has {vocabulary}"
    if not np.isfinite(logprobs.values).all() or logprobs.values.max(initial=0) > _ROUNDING:
        return "it answered with log-probs that are not finite or above 0"
    for length, limit in zip(np.diff(ids.offsets).tolist(), limits, strict=True):
        if limit is not None and length > limit:
            return f"it answered with {length} tokens, asked for were {limit} at most"
        if not length and "runs" not in rows:  # an episode may end before anything is said
            return "it answered with no token"
    return _absurd_spans(spans, np.diff(ids.offsets), newest)


def _absurd_spans(spans: Ragged, lengths: np.ndarray, newest: int) -> str:
    for pairs, length in zip(spans.rows(), lengths.tolist(), strict=True):
        starts, versions = pairs[::2], pairs[1::2]
        whole = len(pairs) > 0 and len(starts) == len(versions)
        if not whole or starts[0] != 0 or (np.diff(starts) <= 0).any() or starts[-1] >= max(1, length):
            return f"it answered with version spans {pairs.tolist()} of {length} tokens"
        if versions.min() < 0 or versions.max() > newest:
            return f"it answered with weights {versions.max()}, of which there are none newer than {newest}"
    return ""
