"""The prompts of a run, in an order that a resume repeats exactly."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from raysys.batch import Batch, Ragged
from raysys.config.parts import Data
from raysys.data.procedural import Mixture
from raysys.data.rows import BadRow, BadRows, Row
from raysys.data.text import Encoded, Encoder
from raysys.errors import CheckpointError, DataError


class Rows(Protocol):
    """A source of encoded rows with a cursor."""

    def prefetch(self) -> None: ...
    def take(self, count: int) -> Batch: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class PromptStream:
    """Prompts (and for supervised runs, responses) without end: epochs roll over.

    The cursor is a place in an order that data, config and seed decide:
    procedural rows: the place in the domains' pattern, and for each domain the rows given and the entry to look at next;
    file rows: epoch, window of that epoch's order, and rows of the window consumed, good or bad (see `sources.FileRows`).
    It says what was handed out, so it is to be saved together with what was trained. Restoring it costs no pass over what came before.

    Args:
        data: where rows come from.
        tokenizer_folder: Hugging Face folder or id.
        seed: of the run; decides the order.
        max_prompt_tokens, max_response_tokens: rows beyond are bad rows.
        supervised: also give `response_ids`, the answer's tokens and the end token.
        deadline: seconds that reading the next rows of a file may take.

    Raises:
        ConfigError, DataError: see `preflight`, which finds the same before anything starts.
    """

    def __init__(
        self,
        data: Data,
        tokenizer_folder: str,
        seed: int,
        max_prompt_tokens: int,
        max_response_tokens: int,
        supervised: bool = False,
        deadline: float = 900.0,
        shared: int | None = None,
    ):
        encoder = encoder_for(data, tokenizer_folder, max_prompt_tokens, max_response_tokens, supervised, shared)
        self._report = BadRows(data.max_bad_share)
        if data.source is not None:
            self._kind = "procedural"
            self._rows: Rows = ProceduralRows(Mixture(data.source, seed, data.shuffle, data.context_field), encoder, self._report)
        else:
            from raysys.data.sources import FileRows

            self._kind = "file"
            self._rows = FileRows(data, encoder, seed, self._report, deadline)

    def prefetch(self) -> None:
        """Begins to read files, so that the first `take` need not wait for Ray Data's workers to start."""
        self._rows.prefetch()

    def take(self, n: int) -> Batch:
        """The next `n` usable rows: prompt_id (`<row id>@<epoch>`), sample (0), domain, prompt_ids, answer, verifier, metadata
        [, teacher_prompt_ids][, response_ids].

        Raises:
            DataError: too large a share of the rows is unusable, or none is usable.
            DeadlineError: a file's rows did not come in time.
        """
        if n < 1:
            raise ValueError(f"n={n}, expected at least 1")
        return self._rows.take(n)

    def state(self) -> dict[str, Any]:
        """The cursor, as plain values that JSON holds."""
        return {"kind": self._kind, "rows": self._rows.state(), "report": self._report.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on exactly where `state` was taken. Raises CheckpointError if it is of other data."""
        if state.get("kind") != self._kind:
            raise CheckpointError(
                f"the data cursor is of a {state.get('kind')} source, this run has a {self._kind} one", "resume with the run's own config"
            )
        state = json.loads(json.dumps(state))
        self._rows.restore(state["rows"])
        self._report.restore(state["report"])

    def report(self) -> BadRows:
        """What was unusable so far; `.lines()` is for people."""
        return self._report

    def close(self) -> None:
        """Stops reading ahead."""
        self._rows.close()


def encoder_for(
    data: Data, tokenizer_folder: str, max_prompt_tokens: int, max_response_tokens: int, supervised: bool, shared: int | None = None
) -> Encoder:
    """The encoder that a run's data asks for."""
    return Encoder(
        tokenizer_folder,
        max_prompt_tokens=max_prompt_tokens,
        max_response_tokens=max_response_tokens,
        supervised=supervised,
        shared=shared,
        enable_thinking=data.enable_thinking,
        context_template=data.context_template if data.context_field is not None else None,
    )


class ProceduralRows:
    """Rows made in this process. A row that does not fit is counted and the domain's next one takes its place."""

    def __init__(self, mixture: Mixture, encoder: Encoder, report: BadRows):
        self._mixture, self._encoder, self._report = mixture, encoder, report

    def prefetch(self) -> None:
        return None

    def take(self, count: int) -> Batch:
        wanted = self._mixture.places(count)
        rows: list[tuple[Row, int, Encoded] | None] = [None] * count
        missing = list(range(count))
        barren: Counter[str] = Counter()  # rows that did not fit, by domain, since one did
        while missing:
            drawn = [self._mixture.streams[wanted[place]].next() for place in missing]
            results = self._encoder.encode([row for row, _ in drawn])
            for place, (row, epoch), result in zip(missing, drawn, results, strict=True):
                domain = wanted[place]
                barren[domain] = barren[domain] + 1 if isinstance(result, BadRow) else 0
                if isinstance(result, BadRow):
                    if epoch == 0:
                        self._report.add(row.where, str(result))
                    if barren[domain] >= self._mixture.streams[domain].patience:
                        raise DataError(
                            f"no row of domain {domain} is usable, the last one: {row.where}: {result}",
                            f"set data.source.domains.{domain}.params so that rows fit",
                        )
                else:
                    rows[place] = (row, epoch, result)
                    self._report.good(epoch == 0)
            missing = [place for place in missing if rows[place] is None]
            # Drawing again must end: where nothing fits there is no first good row to wait for.
            self._report.check(complete=self._report.bad > 100 and bool(missing))
        return to_batch([row for row in rows if row is not None])

    def state(self) -> dict[str, Any]:
        return self._mixture.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._mixture.restore(state)

    def close(self) -> None:
        return None


def to_batch(rows: list[tuple[Row, int, Encoded]]) -> Batch:
    """Rows with their epochs and ids as the record that crosses actors."""
    columns: dict[str, Any] = {
        "prompt_id": [f"{row.id}@{epoch}" for row, epoch, _ in rows],
        "sample": np.zeros(len(rows), np.int32),
        "domain": [row.domain for row, _, _ in rows],
        "prompt_ids": Ragged.of([ids.prompt for _, _, ids in rows], np.int32),
        "answer": [row.answer for row, _, _ in rows],
        "verifier": [row.verifier for row, _, _ in rows],
        "metadata": [row.metadata for row, _, _ in rows],
    }
    first = rows[0][2]
    if first.teacher is not None:
        columns["teacher_prompt_ids"] = Ragged.of([ids.teacher or [] for _, _, ids in rows], np.int32)
    if first.response is not None:
        columns["response_ids"] = Ragged.of([ids.response or [] for _, _, ids in rows], np.int32)
    return Batch.from_columns(**columns)
