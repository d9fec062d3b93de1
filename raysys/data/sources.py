"""Rows of files, streamed by Ray Data: read, parsed, templated and encoded in tasks, given out in an order that a resume repeats.

An epoch's order: the units (1,024 lines, or a Parquet row group) are permuted, consecutive ones form windows of about `WINDOW`
rows, and the rows of a window are permuted. So a data set of one window is shuffled completely, and a larger one as well as its
units are small. Without shuffling both orders are the files' own. A data set of one window is read once and kept.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa

from raysys.batch import SCHEMA, Batch, Ragged
from raysys.config.parts import Data
from raysys.data.files import Files, Raw, Unit, open_files
from raysys.data.rows import BadRow, BadRows, Row, parse
from raysys.data.text import Encoded, Encoder
from raysys.errors import CheckpointError, DataError, DeadlineError, InfrastructureError, RaysysError
from raysys.runtime import first_cause, ray_data, waiting

WINDOW = 16_384
"""Rows that are held to be shuffled."""
_TASK_ROWS = 4096
_TASKS = 1024
"""Rows that are worth a task of their own (each may start a process), and tasks at most."""
_STOP_SECONDS = 5.0
_CPUS = 0.5
"""Of a task: a job's actors may have booked all but little."""
_AHEAD = 1
"""Windows read before they are asked for."""

_OPTIONAL = ("teacher_prompt_ids", "response_ids", "runs")
_KEPT = ("domain", "prompt_ids", "answer", "verifier", "metadata", *_OPTIONAL)
_COLUMNS = pa.schema(
    [("unit", pa.int32()), ("where", pa.string()), ("id", pa.string()), *((name, SCHEMA[name]) for name in _KEPT), ("error", pa.string())]
)
_BLANK = "blank"


@dataclass(frozen=True)
class UnitReader:
    """Units to rows; travels to Ray's tasks. Without an encoder it only parses."""

    files: Files
    encoder: Encoder | None
    data: Data

    def parsed(self, unit: Unit, skip: int = 0, count: int | None = None) -> Iterator[tuple[str, Row | BadRow | None]]:
        """`file:number` and the row, why there is none, or None for a blank line. All of the unit, or `count` rows behind `skip`."""
        for raw in self.files.read(unit, skip, count):
            where = f"{unit.name}:{raw.number}"
            yield where, self._row(raw, where)

    def _row(self, raw: Raw, where: str) -> Row | BadRow | None:
        if raw.error:
            return BadRow(raw.error)
        if raw.record is None:
            return None
        try:
            return parse(
                raw.record, where=where, row_id=where, default_verifier=self.data.default_verifier, context_field=self.data.context_field
            )
        except BadRow as reason:
            return reason

    def table(self, number: int) -> pa.Table:
        """Unit `number` encoded, one line a row of the file. A row that cannot be used keeps its place and says why in `error`."""
        assert self.encoder is not None
        rows = list(self.parsed(self.files.units[number]))
        encoded = iter(self.encoder.encode([row for _, row in rows if isinstance(row, Row)]))
        lines = [_line(number, where, row, next(encoded) if isinstance(row, Row) else None) for where, row in rows]
        return pa.Table.from_pylist(lines, schema=_COLUMNS)


def _line(unit: int, where: str, row: Row | BadRow | None, encoded: Encoded | BadRow | None) -> dict[str, Any]:
    line: dict[str, Any] = {"unit": unit, "where": where}
    if not isinstance(row, Row) or not isinstance(encoded, Encoded):
        reason = row if isinstance(row, BadRow) else encoded
        return line | {"error": _BLANK if row is None else str(reason)}
    texts = {"id": row.id, "domain": row.domain, "answer": row.answer, "verifier": row.verifier, "metadata": row.metadata}
    return (
        line
        | texts
        | {"prompt_ids": encoded.prompt, "teacher_prompt_ids": encoded.teacher, "response_ids": encoded.response}
        | {"runs": encoded.runs}
    )


class FileRows:
    """Encoded rows of files, without end.

    The cursor: epoch, window of the epoch's order, and rows of the window consumed, bad and blank ones included. Restoring reads
    the window it stands in, nothing before it.

    Args:
        data, encoder: what to read and how.
        seed: with the epoch, decides the order.
        report: where bad rows are counted (in their first epoch).
        deadline: seconds that a window may take to come.
    """

    def __init__(self, data: Data, encoder: Encoder, seed: int, report: BadRows, deadline: float):
        self._files = open_files(data.path or "")
        self._reader = UnitReader(self._files, encoder, data)
        self._shuffle, self._seed, self._report, self._deadline = data.shuffle, seed, report, deadline
        self._columns = [
            name for name, used in (("teacher_prompt_ids", data.context_field is not None), ("response_ids", encoder.supervised)) if used
        ]
        self._epoch = self._window = self._row = 0
        self._usable = False
        self._table: pa.Table | None = None
        self._whole: pa.Table | None = None
        self._ahead: _Ahead | None = None

    def prefetch(self) -> None:
        """Begins to read what comes next."""
        if self._table is None and self._whole is None and self._ahead is None:
            self._ahead = _Ahead(self._reader, self._windows(self._epoch)[self._window :])

    def take(self, count: int) -> Batch:
        pieces: list[Batch] = []
        while count:
            piece = self._piece(self._current(), count)
            if len(piece):
                pieces.append(piece)
                self._usable = True
                count -= len(piece)
            elif self._finished_window():
                if not self._usable:
                    raise DataError("no row of the data set is usable: " + ("; ".join(self._report.examples[:5]) or "all lines are blank"))
                self._usable = False  # every epoch has to prove it
        return Batch.concat(_alike(pieces))

    def _piece(self, table: pa.Table, count: int) -> Batch:
        """Up to `count` good rows from here on, and the cursor behind them."""
        errors = table.column("error").combine_chunks().slice(self._row)
        good = np.flatnonzero(errors.is_null().to_numpy(zero_copy_only=False))[:count]
        passed = int(good[-1]) + 1 if len(good) == count else len(errors)
        if self._epoch == 0:
            self._account(table.slice(self._row, passed), len(good))
        rows = table.take(pa.array(good + self._row))
        self._row += passed
        ids = [f"{row_id}@{self._epoch}" for row_id in rows.column("id").to_pylist()]
        columns = {name: rows.column(name) for name in ("domain", "prompt_ids", "answer", "verifier", "metadata", *self._columns)}
        if rows.column("runs").null_count < len(rows):
            columns["runs"] = _known_runs(rows)
        return Batch.from_columns(prompt_id=ids, sample=np.zeros(len(ids), np.int32), **columns)

    def _account(self, table: pa.Table, good: int) -> None:
        self._report.good(good)
        bad = table.filter(table.column("error").is_valid())
        for where, reason in zip(bad.column("where").to_pylist(), bad.column("error").to_pylist(), strict=True):
            if reason != _BLANK:
                self._report.add(where, reason)
        self._report.check()

    def _finished_window(self) -> bool:
        """On to the next window; True when that ends the epoch."""
        self._table, self._row, self._window = None, 0, self._window + 1
        if self._window < len(self._windows(self._epoch)):
            return False
        if self._epoch == 0:
            self._report.check(complete=True)
        self._epoch, self._window = self._epoch + 1, 0
        return True

    def _current(self) -> pa.Table:
        if self._table is None:
            self._table = self._shuffled(self._read())
        return self._table

    def _read(self) -> pa.Table:
        """The window's rows in the order of its units."""
        if self._whole is not None:
            return self._whole
        self.prefetch()
        assert self._ahead is not None
        table = self._ahead.next(self._deadline)
        if self._ahead.done:
            self.close()
        if len(self._windows(0)) == 1:
            # In file order, so that it does not matter which epoch read it.
            self._whole = table = table.take(np.argsort(table.column("unit").to_numpy(), kind="stable"))
        return table

    def _shuffled(self, table: pa.Table) -> pa.Table:
        if not self._shuffle:
            return table
        return table.take(self._random(self._epoch, 1 + self._window).permutation(len(table))).combine_chunks()

    def _windows(self, epoch: int) -> list[list[int]]:
        """The epoch's units, in order, window by window."""
        units = self._files.units
        order = self._random(epoch, 0).permutation(len(units)) if self._shuffle else np.arange(len(units))
        before = np.cumsum([units[number].rows for number in order]) - 1
        return [order[before // WINDOW == window].tolist() for window in np.unique(before // WINDOW)]

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *key])

    def state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "window": self._window, "row": self._row, "files": self._digest()}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state["files"] != self._digest():
            raise CheckpointError(
                "the data files changed since the cursor was saved (names, sizes or row groups)", "bring back the files of the run"
            )
        self.close()
        self._epoch, self._window, self._row, self._table = state["epoch"], state["window"], state["row"], None
        self._usable = True  # what came before in this epoch was seen elsewhere: only a whole one can tell

    def _digest(self) -> str:
        facts = repr([(unit.name, unit.first, unit.rows, unit.start, unit.stop) for unit in self._files.units] + [WINDOW, self._shuffle])
        return blake2b(facts.encode(), digest_size=8).hexdigest()

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead = None


def _known_runs(rows: pa.Table) -> Ragged:
    """`runs` of rows of which some are episodes: of the others all is one run."""
    lengths = rows.column("response_ids").combine_chunks().value_lengths().to_pylist()
    return Ragged.of([[0] * length if own is None else own for own, length in zip(rows.column("runs").to_pylist(), lengths)], np.int32)


def _alike(pieces: list[Batch]) -> list[Batch]:
    """The pieces, all with `runs` if one has them."""
    if not any("runs" in piece for piece in pieces):
        return pieces
    offsets = [piece.ragged("response_ids").offsets for piece in pieces]
    return [
        piece if "runs" in piece else piece.with_columns(runs=Ragged(np.zeros(own[-1], np.int32), own))
        for piece, own in zip(pieces, offsets, strict=True)
    ]


class _Ahead:
    """Reads windows through Ray Data in a thread, at most `_AHEAD` of them early, so that a wait for one can have a deadline."""

    def __init__(self, reader: UnitReader, windows: list[list[int]]):
        self._reader, self._windows = reader, windows
        self._left = len(windows)
        self._ready: queue.Queue[pa.Table | BaseException] = queue.Queue(maxsize=_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="data reader", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return self._left == 0

    def next(self, deadline: float) -> pa.Table:
        """The next window. Raises DeadlineError, or what a task raised."""
        operation = "read the next rows of data.path"
        try:
            with waiting("data reader", operation, deadline, "deadlines.start"):
                found = self._ready.get(timeout=deadline)
        except queue.Empty:
            raise DeadlineError("data reader", operation, deadline, "deadlines.start, or free CPUs for Ray Data's tasks") from None
        if isinstance(found, RaysysError):
            raise found
        if isinstance(found, BaseException):
            raise first_cause(found, "data reader", "read data.path") from found
        self._left -= 1
        return found

    def stop(self) -> None:
        """Ends the thread, and with it Ray Data's execution; one that hangs is left behind."""
        self._stopped.set()
        self._thread.join(timeout=_STOP_SECONDS)

    def _run(self) -> None:
        try:
            with closing(self._blocks()) as blocks:
                for window in self._windows:
                    self._put(self._gathered(blocks, window))
                    if self._stopped.is_set():
                        return
        except BaseException as error:
            self._put(error)

    def _put(self, value: pa.Table | BaseException) -> None:
        while not self._stopped.is_set():
            try:
                return self._ready.put(value, timeout=0.2)
            except queue.Full:
                continue

    def _gathered(self, blocks: Iterator[pa.Table], window: list[int]) -> pa.Table:
        wanted = sum(self._reader.files.units[number].rows for number in window)
        parts: list[pa.Table] = []
        while wanted > 0:
            block = next(blocks)
            parts.append(block)
            wanted -= block.num_rows
        table = pa.concat_tables(parts)
        units = table.column("unit").to_numpy()
        came = units[np.flatnonzero(np.diff(units, prepend=-1))].tolist()
        if wanted < 0 or came != window:
            raise InfrastructureError("Ray Data gave rows in another order than asked for", "check that nothing turns off preserve_order")
        return table

    def _blocks(self) -> Generator[pa.Table, None, None]:
        """Encoded units one by one, in order."""
        order = [number for window in self._windows for number in window]
        rows = sum(self._reader.files.units[number].rows for number in order)
        places = ray_data().range(len(order), override_num_blocks=min(len(order), _TASKS, -(-rows // _TASK_ROWS)))
        read: Any = partial(_tables, reader=self._reader, order=order)
        encoded = places.map_batches(read, batch_size=None, num_cpus=_CPUS)
        encoded.context.execution_options.preserve_order = True
        encoded.context.enable_progress_bars = False
        for block in encoded.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from _by_unit(block)


def _tables(batch: Mapping[str, np.ndarray], reader: UnitReader, order: list[int]) -> Iterator[pa.Table]:
    for place in batch["id"]:
        yield reader.table(order[int(place)])


def _by_unit(block: pa.Table) -> Iterator[pa.Table]:
    """Ray may join small blocks; windows end where units do."""
    units = block.column("unit").to_numpy()
    starts = np.flatnonzero(np.diff(units, prepend=-1)).tolist()
    for start, stop in zip(starts, [*starts[1:], len(units)], strict=True):
        yield block.slice(start, stop - start)
