"""A run's prompts, cut into shards: what is answered and published together. No engine, no clock: config and data decide every cut.

Shards are numbered teacher by teacher, since one teacher's engines run at a time. A shard says where its prompts are, not what they are:
rows of a file's unit, or a stretch of a domain's stream with the cursor at its beginning. So no pass over the data comes first, and
whoever answers a shard reads it for himself.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from raysys.config.parts import Data, Procedural
from raysys.data.files import Files, Unit, open_files
from raysys.data.procedural import Stream
from raysys.data.rows import BadRow, Row
from raysys.data.sources import UnitReader
from raysys.scoring.routing import route


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of the data: of a domain's stream from `cursor` on, or of a file's unit behind the first `skip`."""

    rows: int
    domain: str = ""
    cursor: tuple[int, int] = (0, 0)
    """Row and entry of the stream."""
    unit: Unit | None = None
    skip: int = 0


@dataclass(frozen=True)
class Shard:
    """A piece as one teacher answers it.

    Attributes:
        number: among all shards of the run, from 0.
        name: of its file, without the ending.
        teacher: Hugging Face folder or id. Of a piece of a file it answers only the rows that are routed to it.
        first: the teacher is the first one; on it rests the account of rows that nobody can read.
    """

    number: int
    name: str
    teacher: str
    piece: Piece
    first: bool


@dataclass(frozen=True)
class Prompts:
    """Where the prompts of a run come from. Pickles, so that engines on other nodes read for themselves."""

    data: Data
    seed: int
    teachers: Mapping[str, str]
    """Domain tag to Hugging Face folder or id; `default` serves rows without a tag."""
    files: Files | None

    @classmethod
    def of(cls, data: Data, seed: int, teachers: Mapping[str, str]) -> Prompts:
        """Raises ConfigError or DataError: `data.path` leads to nothing that can be read."""
        return cls(data, seed, dict(teachers), open_files(data.path) if data.path is not None else None)

    def cut(self, rows: int | None, shard_rows: int) -> list[Shard]:
        """The run's shards.

        Args:
            rows: of each procedural domain (times its weight), or of all files together; None: all that there are.
            shard_rows: prompts of a shard at most. A file's blank and unusable rows count.

        Raises:
            DataError: a procedural domain has too few questions.
        """
        pieces = self._of_files(rows, shard_rows) if self.files is not None else self._of_streams(rows, shard_rows)
        shards: list[Shard] = []
        for place, teacher in enumerate(dict.fromkeys(self.teachers.values())):
            tag = next(tag for tag, folder in self.teachers.items() if folder == teacher)
            own = [piece for piece in pieces if piece.unit is not None or self._teacher(piece.domain) == teacher]
            for number, piece in enumerate(own):
                name = f"{place}-{re.sub(r'[^A-Za-z0-9_-]', '_', tag)}-{number:05d}"
                shards.append(Shard(len(shards), name, teacher, piece, place == 0))
        return shards

    def read(self, shard: Shard) -> list[tuple[str, Row | BadRow]]:
        """Where each row of the shard is and what it is; blank lines and other teachers' rows left out.

        Raises:
            DataError: a row's tag has no teacher, or a file changed or is damaged.
        """
        piece = shard.piece
        if piece.unit is None:
            stream = self._stream(piece.domain)
            stream.restore({"row": piece.cursor[0], "entry": piece.cursor[1]})
            rows = [stream.next()[0] for _ in range(piece.rows)]
            return [(row.where, row) for row in rows]
        assert self.files is not None
        found = list(UnitReader(self.files, None, self.data).parsed(piece.unit, piece.skip, piece.rows))
        good = [row for _, row in found if isinstance(row, Row)]
        routed = iter(route([row.domain for row in good], [row.where for row in good], self.teachers))
        kept: list[tuple[str, Row | BadRow]] = []
        for where, row in found:
            if isinstance(row, Row):
                if next(routed) == shard.teacher:
                    kept.append((where, row))
            elif row is not None and shard.first:
                kept.append((where, row))
        return kept

    def _teacher(self, domain: str) -> str:
        return route([domain], [f"domain {domain}"], self.teachers)[0]

    def _source(self) -> Procedural:
        assert self.data.source is not None
        return self.data.source

    def _stream(self, domain: str) -> Stream:
        source = self._source()
        return Stream(domain, source.domains[domain], source, self.seed, self.data.shuffle, self.data.context_field)

    def _of_streams(self, rows: int | None, shard_rows: int) -> list[Piece]:
        """Drawing rows costs about 10 us each; their cursors spare every reader what lies before its own."""
        source = self._source()
        pieces = []
        for domain, task in source.domains.items():
            if not task.weight:
                continue
            stream, wanted = self._stream(domain), source.size or 0
            if rows is not None:  # a stream that repeats has no further rows
                wanted = min(rows * task.weight, source.size or rows * task.weight)
            for start in range(0, wanted, shard_rows):
                count = min(shard_rows, wanted - start)
                state = stream.state()
                pieces.append(Piece(count, domain=domain, cursor=(state["row"], state["entry"])))
                for _ in range(count):
                    stream.next()
        return pieces

    def _of_files(self, rows: int | None, shard_rows: int) -> list[Piece]:
        assert self.files is not None
        return list(_cut_units(self.files.units, rows, shard_rows))


def _cut_units(units: tuple[Unit, ...], rows: int | None, shard_rows: int) -> Iterator[Piece]:
    left = sum(unit.rows for unit in units) if rows is None else rows
    for unit in units:
        for skip in range(0, min(unit.rows, left), shard_rows):
            yield Piece(min(shard_rows, min(unit.rows, left) - skip), unit=unit, skip=skip)
        left -= min(unit.rows, left)


def digest(shards: list[Shard]) -> str:
    """Equal for two plans that answer the same prompts in the same shards. Which folder a teacher lies in does not matter."""
    facts = []
    for shard in shards:
        piece, unit = shard.piece, shard.piece.unit
        place = (unit.name, unit.first, unit.rows, unit.start, unit.stop) if unit is not None else (piece.domain, piece.cursor)
        facts.append((shard.number, shard.name, place, piece.skip, piece.rows))
    return hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()
