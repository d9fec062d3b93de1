"""The real service over HTTP: both styles, its limits, many clients at once, and how it starts and ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from raysys.errors import ConfigError
from raysys.retrieval.__main__ import main
from raysys.retrieval.coalesce import Coalescer
from raysys.retrieval.documents import Found
from raysys.retrieval.search import LocalSearch
from raysys.retrieval.service import Running, create_app
from tests.retrieval.conftest import ROWS, Writer


def post(url: str, payload: Any, path: str = "/retrieve") -> tuple[int, Any]:
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, body), timeout=20) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_both_styles_of_request_are_answered(url: str) -> None:
    status, answer = post(url, {"queries": ["capital of France", ""], "topk": 2, "return_scores": True})
    assert status == 200 and [len(each) for each in answer["result"]] == [2, 0]
    first = answer["result"][0][0]
    assert first["document"] == {"id": "9", "contents": ROWS[0]["contents"]} and first["score"] > 0
    style = {"queries": ["yen"], "topk_retrieval": 5, "topk_rerank": 1, "return_scores": True, "not_sort": False}
    status, answer = post(url, style)
    assert status == 200 and answer["result"][0][0]["document"] == ROWS[2]["contents"]


def test_health_tells_what_is_served(url: str, local: LocalSearch) -> None:
    with urllib.request.urlopen(url + "/health", timeout=10) as answer:
        told = json.loads(answer.read())
    assert told == {"status": "ok", "documents": 5, "corpus": local.corpus.hash, "index": "bm25", "rerank": False}


@pytest.mark.parametrize(
    ("payload", "status", "sentence"),
    [
        ({"queries": ["x"] * 201}, 413, "201 texts, more than the 200"),
        ({"queries": ["x" * 101]}, 413, "has 101 characters, more than the 100"),
        ({"queries": ["x"], "topk": 11}, 422, "from 1 to 10, found 11"),
        (b"{" + b" " * 60_000, 413, "more than 50000 bytes"),
        (b"nonsense", 400, "not JSON"),
        ({"queries": ["__import__('os').system('true')"], "topk": "1+1"}, 422, "`topk`"),
    ],
)
def test_what_is_too_much_or_wrong_is_refused_with_a_sentence(url: str, payload: Any, status: int, sentence: str) -> None:
    code, answer = post(url, payload)
    assert code == status and sentence in answer["detail"]


def test_a_large_batch_is_answered_in_order(url: str, local: LocalSearch) -> None:
    queries = [["capital", "yen", "volcanoes", "", "france"][number % 5] for number in range(200)]
    _, answer = post(url, {"queries": queries, "topk": 2, "return_scores": True})
    expected = [[each.id for each in list_] for list_ in local.find(queries, 2)]
    assert [[each["document"]["id"] for each in list_] for list_ in answer["result"]] == expected


def test_sixteen_clients_at_once_all_get_their_own_answer(url: str) -> None:
    wanted = {"yen": "30", "lyon": "2", "seine": "9", "volcanoes": "5"}
    wrong: list[Any] = []

    def client(word: str) -> None:
        for _ in range(10):
            _, answer = post(url, {"queries": [word], "topk": 1})
            if answer["result"][0][0]["id"] != wanted[word]:
                wrong.append(answer)

    threads = [threading.Thread(target=client, args=([*wanted][number % 4],)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_single_queries_share_a_call_while_one_is_under_way(local: LocalSearch) -> None:
    calls: list[int] = []

    class Slow(LocalSearch):
        def __init__(self) -> None:
            self.settings = local.settings

        def find(self, queries: Any, *_: Any, **__: Any) -> list[list[Found]]:
            calls.append(len(queries))
            time.sleep(0.5)
            return [[Found("1", query, 1.0)] for query in queries]

    with Running(create_app(Slow(), threads=1)) as running:
        threads = [threading.Thread(target=post, args=(running.url, {"queries": ["x"]})) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(calls) == 20 and len(calls) <= 8


def test_a_failing_index_is_an_error_of_the_server(write: Writer, local: LocalSearch) -> None:
    from raysys.retrieval.search import IndexSettings

    search = LocalSearch(IndexSettings(corpus=str(write(ROWS))))
    with Running(create_app(search)) as running:
        assert post(running.url, {"queries": ["yen"]})[0] == 200
        search.corpus.path.write_text("gone")
        code, answer = post(running.url, {"queries": ["yen"]})
        assert code == 500 and "was changed while it is served" in answer["detail"]


def test_a_port_that_is_taken_is_one_clear_error(url: str, write: Writer, capsys: pytest.CaptureFixture[str]) -> None:
    port = url.rpartition(":")[2]
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be listened on"):
        Running(None, port=int(port))
    assert main(["--corpus", str(write(ROWS)), "--port", port]) == 2
    assert main(["--corpus", "nowhere.jsonl", "--port", "0"]) == 2
    assert main(["--corpus", str(write(ROWS)), "--port", "70000"]) == 2
    assert main(["--corpus", str(write(ROWS)), "--port", "0", "--threads", "0"]) == 2
    assert "corpus nowhere.jsonl is no file" in capsys.readouterr().err


def test_the_command_builds_serves_and_ends_in_good_order(write: Writer) -> None:
    path = write(ROWS)
    assert main(["--corpus", str(path), "--build-only"]) == 0
    command = [sys.executable, "-m", "raysys.retrieval", "--corpus", str(path), "--port", "0", "--strings"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2], env={**os.environ})
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        assert lines[0].startswith("5 documents, bm25 index in ")
        url = lines[1].removeprefix("serving ").removesuffix("/retrieve\n")
        assert url.startswith("http://127.0.0.1:")
        assert post(url, {"queries": ["yen"], "topk": 1}) == (200, {"result": [[ROWS[2]["contents"]]]})
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_a_coalescer_keeps_keys_apart_and_gives_each_caller_its_own_error() -> None:
    calls: list[tuple[Any, list[int]]] = []

    async def run(key: Any, items: list[int]) -> list[int | BaseException]:
        calls.append((key, items))
        if key == "bad":
            raise RuntimeError("all of it")
        return [ValueError(str(item)) if item < 0 else 2 * item for item in items]

    async def story() -> None:
        both: Coalescer[int, int] = Coalescer(run, most=4, wait=0.01, parallel=1)
        asked = [both("a", [1, 2]), both("b", [3]), both("a", [-1]), both("bad", [5]), both("a", [4]), both("a", [7] * 9), both("a", [])]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert found[:2] == [[2, 4], [6]] and found[4:] == [[8], [14] * 9, []]
        assert isinstance(found[2], ValueError) and isinstance(found[3], RuntimeError)
        assert calls == [("a", [1, 2, -1, 4]), ("b", [3]), ("bad", [5]), ("a", [7] * 9)]
        left = asyncio.ensure_future(both("a", [1]))
        await asyncio.sleep(0)
        await both.close()
        with pytest.raises(asyncio.CancelledError):
            await left

    asyncio.run(story())
