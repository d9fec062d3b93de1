"""Which shards are finished: the bookkeeping that makes a killed run go on where it was.

A shard is published in two renames: first `data/<name>.parquet`, then its record `ledger/shards/<name>.json`, which says that it is
finished. A kill between the two leaves a file without a record; the shard is answered again and the same bytes replace it, since what is
sampled depends on run, prompt and sample alone. So no row is written twice and none is lost, whenever the kill came.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from raysys.errors import CheckpointError
from raysys.files import sync, write_json, writing
from raysys.generation.answers import Record, as_json
from raysys.generation.shards import Shard, digest

GROUP_ROWS = 1024
"""Rows of a Parquet row group, which is what training shuffles and reads as one."""


class Books:
    """A run's shards on disk.

    Args:
        folder: the run's.
        shards: all of the run.

    Raises:
        CheckpointError: the folder holds shards of other prompts or another cut.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]):
        self._data, self._records = folder / "data", folder / "ledger" / "shards"
        self._shards = list(shards)
        for place in (self._data, self._records):
            place.mkdir(parents=True, exist_ok=True)
        self._check(folder / "ledger" / "plan.json")
        for draft in self._data.glob(".*.draft"):
            draft.unlink(missing_ok=True)

    def _check(self, path: Path) -> None:
        now = digest(self._shards)
        if not path.is_file():
            write_json(path, {"shards": len(self._shards), "digest": now})
        elif json.loads(path.read_text())["digest"] != now:
            raise CheckpointError("the data changed since the run began (files, rows, or tasks)", "bring it back, or choose another name=")

    def finished(self) -> dict[int, Record]:
        """Records of the shards that are whole, by number."""
        found: dict[int, Record] = {}
        for shard in self._shards:
            record = self._record(shard)
            if record is not None:
                found[shard.number] = record
        return found

    def _record(self, shard: Shard) -> Record | None:
        try:
            record = Record(**json.loads((self._records / f"{shard.name}.json").read_text(encoding="utf-8")))
            whole = not record.size or (self._data / f"{shard.name}.parquet").stat().st_size == record.size
        except (OSError, ValueError, TypeError):
            return None
        return record if whole else None


def publish(folder: Path, rows: pa.Table, record: Record) -> None:
    """Puts a shard into the run's folder; sets `record.size`. Raises CheckpointError for what the system says of it."""
    path = folder / "data" / f"{record.shard}.parquet"
    # A retried shard may meet the one who was given up on: each writes a draft of its own, and the same bytes.
    draft = path.with_name(f".{record.shard}.{os.getpid()}.draft")
    with writing(path):
        if len(rows):
            parquet.write_table(rows, draft, row_group_size=GROUP_ROWS, compression="zstd")
            sync(draft)
            record.size = draft.stat().st_size
            os.replace(draft, path)
            sync(path.parent)
        write_json(folder / "ledger" / "shards" / f"{record.shard}.json", as_json(record))
