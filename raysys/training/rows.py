"""One rank's rows as tensors, micro-batch by micro-batch: what the model reads packed, what objectives read padded.

Legend: B rows of a micro-batch, T tokens of all of them, R response tokens that are trained on (right padded), n of all rows: all response
tokens, but of an episode those that were generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raysys.batch import Batch, Ragged
from raysys.errors import DataError
from raysys.models.microbatch import pack_rows, response_positions
from raysys.training.objectives import Micro


@dataclass(frozen=True)
class Inputs:
    """A micro-batch as the model reads it. Dummies (no rows of the batch) have one row of two tokens, so that every collective happens."""

    rows: np.ndarray
    input_ids: Tensor
    """[T]"""
    prompt_lengths: Tensor
    """[B], on the CPU, as are the responses': the layout is worked out there."""
    response_lengths: Tensor
    targets: Tensor
    """[n] where the response tokens that are trained on are among the T."""
    mask: Tensor
    """[B, R] bool; R counts these."""

    @property
    def responses(self) -> Tensor:
        """[n] ids of these tokens, row after row."""
        return self.input_ids[self.targets]

    @property
    def dummy(self) -> bool:
        return len(self.rows) == 0

    def padded(self, flat: Tensor) -> Tensor:
        """Values of the response tokens, row after row, as [B, R]; 0 where masked. Differentiable."""
        return torch.zeros(self.mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(self.mask, flat)


class Rows:
    """The rows that a rank was sent.

    Raises:
        DataError: a column is missing or lacks a value for each response token (`runs` too), a prompt is empty, or an id is not one of the
            model's.
    """

    def __init__(self, batch: Batch, columns: Sequence[str], vocabulary: int, device: torch.device):
        self.device = device
        self._generated: Ragged | None = None
        self._names = batch.ids if "sample" in batch else [f"row {row}" for row in range(len(batch))]
        self._domains = batch.strings("domain") if "domain" in batch else [""] * len(batch)
        prompts, responses = batch.ragged("prompt_ids"), batch.ragged("response_ids")
        self.prompts, self.responses = np.diff(prompts.offsets), np.diff(responses.offsets)
        self._ids = _interleave(prompts, responses)
        self.trained = batch.trained
        if "runs" in batch:
            self._generated = Ragged(self._column(batch, "runs").values >= 0, responses.offsets)
        self._columns = {name: self._column(batch, name) for name in columns}
        if (self.prompts < 1).any():
            raise DataError(
                f"{self._names[int(np.argmin(self.prompts))]} has an empty prompt, so nothing predicts its first response token"
            )
        if self._ids.values.max(initial=0) >= vocabulary or self._ids.values.min(initial=0) < 0:
            raise DataError(
                f"token id {int(self._ids.values.max())} is outside the model's {vocabulary} ids", "check the tokenizer of the data"
            )

    def _column(self, batch: Batch, name: str) -> Ragged:
        if name not in batch:
            raise DataError(f"the batch has no column {name}, which the objective reads; it has {', '.join(batch.columns)}")
        column = batch.ragged(name)
        wrong = np.flatnonzero(np.diff(column.offsets) != self.responses)
        if len(wrong):
            row = int(wrong[0])
            raise DataError(f"{self._names[row]} has {len(column[row])} values of {name} for {self.responses[row]} response tokens")
        if self._generated is None:
            return column
        return Ragged(column.values[self._generated.values], np.concatenate([[0], np.cumsum(self.trained)]))

    def name(self, rows: np.ndarray, most: int = 4) -> str:
        """Sample ids for an error message."""
        shown = ", ".join(self._names[row] for row in rows[:most])
        return shown + (f" and {len(rows) - most} more" if len(rows) > most else "")

    def packs(self, rows: np.ndarray, budget: int, count: int, padded: bool = False) -> list[np.ndarray]:
        """Micro-batches of these rows (`raysys.models.microbatch.pack_rows`), filled up to `count` with empty ones."""
        lengths = (self.prompts + self.responses)[rows]
        packs = [rows[pack] for pack in pack_rows(lengths, budget, padded)]
        return packs + [np.zeros(0, np.int64)] * (count - len(packs))

    @staticmethod
    def nothing(device: torch.device) -> Inputs:
        """A dummy."""
        one = torch.ones(1, dtype=torch.long)
        ids, mask = torch.zeros(2, dtype=torch.long, device=device), torch.ones(1, 1, dtype=torch.bool, device=device)
        return Inputs(np.zeros(0, np.int64), ids, one, one, torch.ones(1, dtype=torch.long, device=device), mask)

    def inputs(self, rows: np.ndarray) -> Inputs:
        if not len(rows):
            return self.nothing(self.device)
        ids, prompts, responses, trained = _select(self._ids, rows).values, self.prompts[rows], self.responses[rows], self.trained[rows]
        mask = np.arange(trained.max(initial=0))[None, :] < trained[:, None]
        targets = response_positions(prompts, responses)
        if self._generated is not None:
            targets = targets[_select(self._generated, rows).values]
        lengths = torch.from_numpy(prompts), torch.from_numpy(responses)
        return Inputs(rows, self._tensor(ids), *lengths, self._tensor(targets), self._tensor(mask))

    def micro(self, rows: np.ndarray) -> Micro:
        columns = {name: self._tensor(_select(column, rows).padded()[0]) for name, column in self._columns.items()}
        return Micro(columns, tuple(self._domains[row] for row in rows))

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)


def _interleave(prompts: Ragged, responses: Ragged) -> Ragged:
    """Prompt and response of each row in one, int64."""
    offsets = prompts.offsets + responses.offsets
    values = np.empty(int(offsets[-1]), np.int64)
    is_prompt = np.arange(len(values)) - np.repeat(offsets[:-1], np.diff(offsets)) < np.repeat(np.diff(prompts.offsets), np.diff(offsets))
    values[is_prompt], values[~is_prompt] = prompts.values, responses.values
    return Ragged(values, offsets)


def _select(column: Ragged, rows: np.ndarray) -> Ragged:
    starts, lengths = column.offsets[rows], np.diff(column.offsets)[rows]
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    where = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - starts, lengths)
    return Ragged(column.values[where], offsets)
