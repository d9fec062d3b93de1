"""A small corpus, an index of it, and a real server of that index on a free port."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from raysys.retrieval.search import IndexSettings, LocalSearch
from raysys.retrieval.service import Running, create_app
from raysys.retrieval.wire import Limits

ROWS = [
    {"id": "9", "contents": '"Paris"\nParis is the capital of France, on the Seine.'},
    {"id": "2", "contents": '"Lyon"\nLyon is a city in France.'},
    {"id": "30", "contents": '"Yen"\nThe yen is the currency of Japan.'},
    {"id": "4", "title": "São Tomé", "text": "São Tomé is the capital of São Tomé and Príncipe."},
    {"id": 5, "contents": "a line without a title about volcanoes"},
]

Writer = Callable[[Sequence[Any]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """Writes rows (objects, or raw lines as text or bytes) as a corpus and returns its path."""

    def written(rows: Sequence[Any], name: str = "corpus.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows]
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return written


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> LocalSearch:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return LocalSearch(IndexSettings(corpus=str(path)))


@pytest.fixture(scope="session")
def url(local: LocalSearch) -> Iterator[str]:
    """Address of a service of `ROWS`."""
    with Running(create_app(local, limits=Limits(queries=200, query_chars=100, topk=10, body_bytes=50_000))) as running:
        yield running.url
