"""How a sample ends, and how ended samples become columns of the record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raysys.batch import Batch
from raysys.errors import DataError, InfrastructureError
from raysys.rollout.spec import RESPONSE_COLUMNS, response_columns


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
    first = next((result.rows for result in results if result.rows is not None), None)
    names = RESPONSE_COLUMNS if first is None else response_columns(first)
    sources: list[Batch] = [Batch.from_columns(**{name: [] for name in names})]
    starts: dict[int, int] = {}
    rows = 0
    for row, result in enumerate(results):
        if result.rows is None:
            name = f"{prompts.strings('prompt_id')[row]}/{prompts.numbers('sample')[row]}"
            kind = DataError if result.own_fault else InfrastructureError
            raise kind(f"sample {name} could not be drawn: {'; then '.join(result.causes)}", "rollout.retries sets how often it is tried")
        if id(result.rows) not in starts:
            starts[id(result.rows)] = rows
            rows += len(result.rows)
            sources.append(result.rows)
    responses = Batch.concat(sources).take([starts[id(result.rows)] + result.row for result in results])
    return prompts.with_columns(**{name: responses.table.column(name) for name in names})
