"""The endless stream of prompts that a run takes from, with a cursor that resumes exactly.

The cursor of a procedural source is the number of each domain's next task; that of a file is (epoch, rows taken in it):
a resume reads the epoch again up to there, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from raysys.batch import Batch, Ragged
from raysys.config.parts import Data
from raysys.data.procedural import DomainStream, Row, shares
from raysys.data.sources import BadRows, Encoding, FileRows
from raysys.data.text import encode_answers, load_tokenizer, render
from raysys.errors import DataError


class PromptStream:
    """Prompts (and for supervised runs answers) as batches of tokens.

    Args:
        data: which source.
        tokenizer_folder: Hugging Face folder or id of the student.
        seed: the run's; decides tasks and order.
        max_prompt_tokens, max_response_tokens: longer rows of a file are bad rows; longer procedural ones are an error.
        supervised: also `response_ids`, the target and the end of sequence.
    """

    def __init__(self, data: Data, tokenizer_folder: str, seed: int, max_prompt_tokens: int, max_response_tokens: int, supervised: bool = False):
        encoding = Encoding(tokenizer_folder, data, max_prompt_tokens, max_response_tokens, supervised)
        self._rows: _Procedural | _Files = _Procedural(encoding, seed) if data.source is not None else _Files(encoding, seed)

    def take(self, n: int) -> Batch:
        """The next `n` rows, `sample` 0. Raises DataError."""
        return self._rows.take(n)

    def state(self) -> dict[str, Any]:
        """The cursor, as plain JSON."""
        return self._rows.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Back to where `state()` was taken: the rows that follow are the same, ids included."""
        self._rows.restore(state)

    def report(self) -> BadRows:
        """What could not be used so far."""
        return self._rows.bad


class _Procedural:
    def __init__(self, encoding: Encoding, seed: int):
        assert encoding.data.source is not None
        source = encoding.data.source
        self._encoding, self.bad = encoding, BadRows()
        self._weights = {name: task.weight for name, task in source.domains.items()}
        self._domains = {name: DomainStream(name, task, source, seed) for name, task in source.domains.items()}
        self._given = dict.fromkeys(source.domains, 0)

    def take(self, n: int) -> Batch:
        rows = [self._domains[name].row() for name in shares(self._weights, n, self._given)]
        self.bad.good += n
        tokenizer = load_tokenizer(self._encoding.tokenizer)
        if getattr(tokenizer, "chat_template", None):
            prompts = [render(tokenizer, row.prompt, self._encoding.data.enable_thinking) for row in rows]
        else:
            prompts = tokenizer([row.prompt for row in rows], add_special_tokens=False)["input_ids"]
        self._check(rows, prompts, self._encoding.max_prompt_tokens, "prompt", "max_prompt_tokens")
        columns: dict[str, Any] = {
            "prompt_id": [row.id for row in rows],
            "sample": np.zeros(n, np.int32),
            "domain": [row.domain for row in rows],
            "prompt_ids": Ragged.of(prompts, np.int32),
            "answer": [row.answer for row in rows],
            "verifier": [row.verifier for row in rows],
            "metadata": [row.metadata for row in rows],
        }
        if self._encoding.supervised:
            targets = encode_answers(tokenizer, [row.target for row in rows])
            self._check(rows, targets, self._encoding.max_response_tokens, "target", "max_response_tokens")
            columns["response_ids"] = Ragged.of(targets, np.int32)
        return Batch.from_columns(**columns)

    def state(self) -> dict[str, Any]:
        return {"domains": {name: stream.state() for name, stream in self._domains.items()}, "given": dict(self._given)}

    def restore(self, state: dict[str, Any]) -> None:
        for name, stream in self._domains.items():
            stream.restore(state["domains"][name])
        self._given = dict(state["given"])

    @staticmethod
    def _check(rows: list[Row], ids: list[list[int]], limit: int, what: str, key: str) -> None:
        for row, one in zip(rows, ids, strict=True):
            if len(one) > limit:
                raise DataError(f"row {row.id}: {what} has {len(one)} tokens, {key} is {limit}", f"raise {key}")


class _Files:
    def __init__(self, encoding: Encoding, seed: int):
        self._encoding, self._files = encoding, FileRows(encoding, seed)
        self._epoch, self._taken = 0, 0
        self._iterator: Iterator[dict[str, Any]] | None = None

    @property
    def bad(self) -> BadRows:
        return self._files.bad

    def take(self, n: int) -> Batch:
        rows = [self._next() for _ in range(n)]
        columns: dict[str, Any] = {"prompt_id": [row["prompt_id"] for row in rows], "sample": np.zeros(n, np.int32)}
        columns |= {name: [row[name] for row in rows] for name in ("domain", "answer", "verifier", "metadata")}
        lists = ["prompt_ids"]
        if self._encoding.data.context_field is not None:
            lists.append("teacher_prompt_ids")
        if self._encoding.supervised:
            lists.append("response_ids")
        return Batch.from_columns(**columns, **{name: Ragged.of([row[name] for row in rows], np.int32) for name in lists})

    def _next(self) -> dict[str, Any]:
        if self._iterator is None:
            self._iterator = self._files.epoch(self._epoch)
            for _ in range(self._taken):
                next(self._iterator)
        row = next(self._iterator, None)
        if row is None:
            self._epoch, self._taken, self._iterator = self._epoch + 1, 0, None
            return self._next()
        self._taken += 1
        return row | {"prompt_id": f"{row['row_id']}@{self._epoch}"}

    def state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "taken": self._taken}

    def restore(self, state: dict[str, Any]) -> None:
        self._epoch, self._taken, self._iterator = state["epoch"], state["taken"], None
