"""Queries a second, latency and memory of the search service, and its batch path against bare bm25s.

Documents and queries are words drawn by Zipf's law, with nothing left out as a stop word: the most frequent words are in almost
every document, which is the worst case for both. Three measurements, each in a fresh process that maps the index from disk:

* build: seconds and high-water mark of resident memory of making the index, JSONL included;
* batch: `queries` queries in batches of `batch`, in turn through `LexicalIndex.best` (rows, ties by id), `LocalSearch.find`
  (rows and texts) and bm25s itself with its numba backend (its tokenizer, rows); ratios are medians over rounds of processor time;
* service: the command on one core of its own, asked by clients that each wait for an answer before they ask again: `plain` sends
  one HTTP request a query, `client` are episodes that share a `SearchClient`. Where there are two cores or more the clients have another.

Memory is resident size, and the part of it that is mapped from files, which the system may take back.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from raysys.retrieval.client import SearchClient, SearchSettings
from raysys.retrieval.wire import read_answer, write_request
from tests.bench.peak import own_memory

DEFAULTS: dict[str, Any] = {
    "documents": 100_000,
    "vocabulary": 50_000,
    "words": 60,
    "query_words": 6,
    "topk": 3,
    "queries": 2048,
    "batch": 256,
    "rounds": 5,
    "clients": [1, 16, 256],
    "seconds": 10.0,
    "folder": None,
}
ROOT = Path(__file__).parents[2]
MIB = 2**20


def run(folder: str | None, clients: list[int], seconds: float, **size: Any) -> dict[str, Any]:
    """Figures by measurement. `folder`: keeps corpus and index there, and takes them from there the next time."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(folder or temporary) / f"zipf-{size['documents']}-{size['vocabulary']}-{size['words']}.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_corpus(path, size)
        built = _fresh("build", path, size)
        return {
            "corpus_mib": path.stat().st_size / MIB,
            "index_mib": sum(file.stat().st_size for file in path.with_name(path.name + ".index").rglob("*") if file.is_file()) / MIB,
            "build": built,
            "batch": _fresh("batch", path, size),
            "service": _service(path, size, clients, seconds),
            "targets": {"batch_ratio": 0.8, "p99_ms_at_16_clients_and_100k": 50},
        }


def table(figures: dict[str, Any]) -> list[list[Any]]:
    batch = figures["batch"]
    rows: list[list[Any]] = [["what", "clients", "queries_per_second", "p50_ms", "p99_ms", "ratio_to_bare", "resident_mib", "mapped_mib"]]
    for name in ("bare", "rows", "texts"):
        memory = (batch["resident_mib"], batch["mapped_mib"]) if name == "texts" else ("", "")
        rows.append([f"batch {name}", "", batch[name], "", "", batch["ratios"][name], *memory])
    for each in figures["service"]:
        rows.append([f"service {each['form']}", each["clients"], each["queries_per_second"], each["p50_ms"], each["p99_ms"], ""])
        rows[-1] += [each["resident_mib"], each["mapped_mib"]]
    rows.append(["build (s)", "", figures["build"]["seconds"], "", "", "", figures["build"]["peak_mib"], ""])
    return rows


def write_corpus(path: Path, size: dict[str, Any]) -> None:
    draw = Words(size, seed=0)
    draft = path.with_suffix(".draft")
    with open(draft, "w") as file:
        for number in range(size["documents"]):
            words = draw(int(draw.rng.integers(size["words"] // 2, size["words"] * 3 // 2)))
            contents = f'"{" ".join(words[:2])}"\n{" ".join(words[2:])}'
            file.write(json.dumps({"id": str(number), "contents": contents}) + "\n")
    os.replace(draft, path)


def queries_of(size: dict[str, Any], count: int, seed: int) -> list[str]:
    draw = Words(size, seed)
    return [" ".join(draw(size["query_words"])) for _ in range(count)]


class Words:
    """Words drawn by Zipf's law, many at a time."""

    def __init__(self, size: dict[str, Any], seed: int):
        self.rng = np.random.default_rng(seed)
        self._names = [f"w{number:x}q" for number in range(size["vocabulary"])]
        self._edges = np.cumsum(1 / np.arange(1, size["vocabulary"] + 1))
        self._stock: list[int] = []
        self._taken = 0

    def __call__(self, count: int) -> list[str]:
        if self._taken + count > len(self._stock):
            self._taken = 0
            self._stock = np.searchsorted(self._edges, self.rng.random(1 << 20) * self._edges[-1]).tolist()
        self._taken += count
        return [self._names[number] for number in self._stock[self._taken - count : self._taken]]


def _fresh(what: str, path: Path, size: dict[str, Any]) -> Any:
    call = [sys.executable, "-m", "tests.bench.retrieval", json.dumps([what, str(path), size])]
    return json.loads(subprocess.run(call, check=True, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()[-1])


def _build(path: str, size: dict[str, Any]) -> dict[str, float]:
    from raysys.retrieval.search import IndexSettings, LocalSearch

    began = time.perf_counter()
    LocalSearch(IndexSettings(corpus=path, rebuild=True))
    return {"seconds": time.perf_counter() - began, "peak_mib": own_memory("VmHWM") / MIB}


def _batch(path: str, size: dict[str, Any]) -> dict[str, Any]:
    from raysys.retrieval.search import IndexSettings, LocalSearch

    search = LocalSearch(IndexSettings(corpus=path))
    queries, topk = queries_of(size, size["queries"], seed=1), size["topk"]
    batches = [queries[first : first + size["batch"]] for first in range(0, len(queries), size["batch"])]
    for each in batches:
        search.find(each, topk)
    memory = {"resident_mib": own_memory("VmRSS") / MIB, "mapped_mib": own_memory("RssFile") / MIB}
    forms: dict[str, Callable[[list[str]], Any]] = {
        "bare": _bare(search.corpus.folder, topk),
        "rows": lambda batch: search.index.best(batch, topk),
        "texts": lambda batch: search.find(batch, topk),
    }
    spent: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(size["rounds"] + 1):
        for name in [*forms][number % 3 :] + [*forms][: number % 3]:
            began = time.process_time()
            for each in batches:
                forms[name](each)
            if number:  # the first round compiles and warms
                spent[name].append(time.process_time() - began)
    return {
        **{name: len(queries) / statistics.median(taken) for name, taken in spent.items()},
        "ratios": {name: statistics.median(b / t for b, t in zip(spent["bare"], taken, strict=True)) for name, taken in spent.items()},
        **memory,
    }


def _bare(folder: Path, topk: int) -> Callable[[list[str]], Any]:
    import bm25s

    model = bm25s.BM25.load(folder / "bm25", mmap=True, override_params={"backend": "numba"})

    def search(batch: list[str]) -> Any:
        words = bm25s.tokenize(batch, token_pattern=r"\w+", return_ids=False, show_progress=False)
        return model.retrieve(words, k=topk, show_progress=False)

    return search


def _service(path: Path, size: dict[str, Any], clients: list[int], seconds: float) -> list[dict[str, Any]]:
    cores = sorted(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "raysys.retrieval", "--corpus", str(path), "--port", "0", "--topk", str(size["topk"])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    found = []
    try:
        os.sched_setaffinity(process.pid, cores[:1])
        os.sched_setaffinity(0, cores[1:2] or cores)
        assert process.stdout is not None
        url = [process.stdout.readline() for _ in range(2)][1].split()[1]
        for count in clients:
            for form, ask in (("plain", _plain), ("client", _shared)):
                asyncio.run(ask(url, size, count, seconds / 5, seed=2))  # warms connections, pages and code
                waits, took = asyncio.run(ask(url, size, count, seconds, seed=3))
                found.append(
                    {
                        "form": form,
                        "clients": count,
                        "queries_per_second": len(waits) / took,
                        "p50_ms": 1e3 * float(np.percentile(waits, 50)),
                        "p99_ms": 1e3 * float(np.percentile(waits, 99)),
                        "resident_mib": own_memory("VmRSS", process.pid) / MIB,
                        "mapped_mib": own_memory("RssFile", process.pid) / MIB,
                    }
                )
    finally:
        os.sched_setaffinity(0, cores)
        process.terminate()
        process.wait(20)
    return found


async def _plain(url: str, size: dict[str, Any], count: int, seconds: float, seed: int) -> tuple[list[float], float]:
    connector = aiohttp.TCPConnector(limit=count)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=60)) as session:

        async def ask(query: str) -> None:
            async with session.post(url, data=write_request([query], size["topk"], 20)) as answer:
                read_answer(await answer.read(), 1)

        return await _asked(ask, size, count, seconds, seed)


async def _shared(url: str, size: dict[str, Any], count: int, seconds: float, seed: int) -> tuple[list[float], float]:
    async with SearchClient(SearchSettings(url=url, topk=size["topk"])) as client:

        async def ask(query: str) -> None:
            await client.search([query])

        return await _asked(ask, size, count, seconds, seed)


async def _asked(
    ask: Callable[[str], Awaitable[None]], size: dict[str, Any], count: int, seconds: float, seed: int
) -> tuple[list[float], float]:
    """Seconds that each query waited, and seconds of all: `count` clients one query after the other."""
    queries = queries_of(size, 4096, seed)
    waits: list[float] = []
    began = time.perf_counter()

    async def client(number: int) -> None:
        while time.perf_counter() < began + seconds:
            sent = time.perf_counter()
            await ask(queries[number % len(queries)])
            waits.append(time.perf_counter() - sent)
            number += count

    await asyncio.gather(*(client(number) for number in range(count)))
    return waits, time.perf_counter() - began


if __name__ == "__main__":
    wanted, where, sizes = json.loads(sys.argv[1])
    print(json.dumps({"build": _build, "batch": _batch}[wanted](where, sizes)))
