"""The one record that crosses actors: Arrow columns, one schema; a sample keeps its id and gains columns on its way.

Legend: B rows, R longest response of the batch, n tokens of one row.

| column | type | written by |
|---|---|---|
| prompt_id | string, unique within the run (the epoch is part of it) | data |
| sample | int32, index among the prompt's samples | data |
| domain | string, "" when the row has no tag | data |
| prompt_ids | list<int32> | data |
| teacher_prompt_ids | list<int32>, optional: what the teacher reads instead (context distillation) | data |
| answer, verifier, metadata | string; metadata is JSON for the verifier | data |
| response_ids | list<int32>, incl. EOS when sampled | rollout, or data for supervised rows |
| rollout_logprobs | list<float32> of the sampled ids | rollout |
| version_spans | list<int32>, flat pairs (first token, version) | rollout |
| stop_reason | string: "stop" or "length" | rollout |
| runs | list<int32>, of episodes: the generation that a response token is of, -1 for what the environment said | rollout |
| episode | string, of episodes: JSON of what happened at each turn | rollout |
| teacher_logprobs, reference_logprobs | list<float32> | scoring |
| query_ids | list<int32>, K a response token: what was scored in place of the response's ids | scoring |
| draw_ids, teacher_draw_logprobs | list<int32>, list<float32>: draws from the student, the teacher's log-probs of them | trainer |
| reward | float32 | scoring |
| advantages | list<float32>, objectives that need whole groups | trainer |
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

SCHEMA: dict[str, pa.DataType] = {
    "prompt_id": pa.string(),
    "sample": pa.int32(),
    "domain": pa.string(),
    "prompt_ids": pa.list_(pa.int32()),
    "teacher_prompt_ids": pa.list_(pa.int32()),
    "answer": pa.string(),
    "verifier": pa.string(),
    "metadata": pa.string(),
    "response_ids": pa.list_(pa.int32()),
    "rollout_logprobs": pa.list_(pa.float32()),
    "version_spans": pa.list_(pa.int32()),
    "stop_reason": pa.string(),
    "runs": pa.list_(pa.int32()),
    "episode": pa.string(),
    "teacher_logprobs": pa.list_(pa.float32()),
    "reference_logprobs": pa.list_(pa.float32()),
    "query_ids": pa.list_(pa.int32()),
    "draw_ids": pa.list_(pa.int32()),
    "teacher_draw_logprobs": pa.list_(pa.float32()),
    "reward": pa.float32(),
    "advantages": pa.list_(pa.float32()),
}


class Batch:
    """An immutable set of samples. Columns are those of `SCHEMA`; a row is one sample.

    Pickles as Arrow, so it travels through Ray's object store without a copy per row.
    """

    __slots__ = ("table",)

    def __init__(self, table: pa.Table):
        unknown = [name for name in table.column_names if name not in SCHEMA]
        if unknown:
            raise ValueError(f"columns {unknown} are not in the record's schema")
        fields = [pa.field(name, SCHEMA[name]) for name in table.column_names]
        self.table = table.cast(pa.schema(fields)).combine_chunks()

    @classmethod
    def from_columns(cls, **columns: Any) -> Batch:
        """Builds a batch from Python lists, numpy arrays or `Ragged` values, one per column name."""
        return cls(pa.table({name: _array(name, values) for name, values in columns.items()}))

    @classmethod
    def concat(cls, batches: Sequence[Batch]) -> Batch:
        return cls(pa.concat_tables([batch.table for batch in batches]))

    def __len__(self) -> int:
        return self.table.num_rows

    def __contains__(self, name: str) -> bool:
        return name in self.table.column_names

    @property
    def columns(self) -> list[str]:
        return self.table.column_names

    @property
    def ids(self) -> list[str]:
        """Sample ids, `<prompt_id>/<sample>`; unique within a run."""
        pairs = zip(self.strings("prompt_id"), self.numbers("sample"), strict=True)
        return [f"{prompt}/{sample}" for prompt, sample in pairs]

    @property
    def trained(self) -> np.ndarray:
        """Response tokens that a row is trained on: of an episode those that were generated."""
        if "runs" not in self:
            return self.lengths("response_ids")
        runs = self.ragged("runs")
        return np.diff(np.concatenate([[0], np.cumsum(runs.values >= 0)])[runs.offsets])

    def with_columns(self, **columns: Any) -> Batch:
        """The same rows with columns added or replaced."""
        table = self.table
        for name, values in columns.items():
            array = _array(name, values)
            if len(array) != len(self):
                raise ValueError(f"column {name} has {len(array)} rows, the batch has {len(self)}")
            position = table.column_names.index(name) if name in table.column_names else None
            table = table.append_column(name, array) if position is None else table.set_column(position, name, array)
        return Batch(table)

    def take(self, rows: Sequence[int] | np.ndarray) -> Batch:
        return Batch(self.table.take(pa.array(np.asarray(rows, dtype=np.int64))))

    def repeat(self, times: int) -> Batch:
        """Each row `times` times, side by side, with `sample` 0 .. times - 1."""
        if times < 1:
            raise ValueError(f"times must be at least 1, got {times}")
        rows = np.repeat(np.arange(len(self)), times)
        return self.take(rows).with_columns(sample=np.tile(np.arange(times, dtype=np.int32), len(self)))

    def slice(self, start: int, length: int) -> Batch:
        return Batch(self.table.slice(start, length))

    def strings(self, name: str) -> list[str]:
        return [value or "" for value in self.table.column(name).to_pylist()]

    def numbers(self, name: str) -> np.ndarray:
        return self.table.column(name).to_numpy()

    def ragged(self, name: str) -> Ragged:
        """A list column as flat values and row offsets (no copy where Arrow allows)."""
        column = self.table.column(name)
        array = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.array([], SCHEMA[name])])
        offsets = array.offsets.to_numpy()
        values = array.values.to_numpy(zero_copy_only=False)
        return Ragged(values[offsets[0] : offsets[-1]], offsets.astype(np.int64) - offsets[0])

    def lengths(self, name: str) -> np.ndarray:
        return np.diff(self.ragged(name).offsets)

    def save(self, path: Path) -> None:
        """Writes an Arrow file; a reader sees the whole of it or nothing."""
        draft = path.with_name(f".{path.name}.draft")
        with pa.OSFile(str(draft), "wb") as stream, pa.ipc.new_file(stream, self.table.schema) as writer:
            writer.write_table(self.table)
        os.replace(draft, path)

    @classmethod
    def load(cls, path: Path) -> Batch:
        """Reads what `save` wrote."""
        with pa.OSFile(str(path)) as stream, pa.ipc.open_file(stream) as reader:
            return cls(reader.read_all())

    def __reduce__(self):
        return (Batch, (self.table,))


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths: `values` flat, row i is `values[offsets[i]:offsets[i + 1]]`."""

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, rows: Iterable[Sequence[Any] | np.ndarray], dtype: Any) -> Ragged:
        arrays = [np.asarray(row, dtype=dtype) for row in rows]
        offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
        np.cumsum([len(array) for array in arrays], out=offsets[1:])
        return cls(np.concatenate(arrays) if arrays else np.zeros(0, dtype), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def rows(self) -> list[np.ndarray]:
        return [self[row] for row in range(len(self))]

    def padded(self, fill: float = 0, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Right-padded `[B, R]` values and the boolean mask of real entries."""
        lengths = np.diff(self.offsets)
        longest = int(lengths.max(initial=0)) if width is None else width
        mask = np.arange(longest)[None, :] < lengths[:, None]
        out = np.full(mask.shape, fill, dtype=self.values.dtype)
        out[mask] = self.values
        return out, mask


def _array(name: str, values: Any) -> pa.Array:
    kind = SCHEMA.get(name)
    if kind is None:
        raise ValueError(f"column {name} is not in the record's schema")
    if isinstance(values, Ragged):
        flat = pa.array(values.values, type=kind.value_type)
        return pa.ListArray.from_arrays(pa.array(values.offsets, type=pa.int32()), flat)
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        array = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        return array.cast(kind)
    return pa.array(values, type=kind)
