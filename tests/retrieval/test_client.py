"""The client against services that misbehave: nothing is lost, and nothing wrong is taken for an answer."""

from __future__ import annotations

import asyncio
import json
import math
import pickle
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import fastapi
import pytest
from fastapi.responses import HTMLResponse, JSONResponse, Response

from raysys.errors import ConfigError, SearchError, SearchRefused
from raysys.retrieval.breaker import Failed
from raysys.retrieval.client import SearchClient, SearchSettings
from raysys.retrieval.documents import Document, text_id
from raysys.retrieval.search import LocalSearch
from raysys.retrieval.service import Running, create_app

Story = Callable[[SearchClient], Awaitable[None]]


class Scripted:
    """A service that answers as told, request by request, and well afterwards; a query is answered with itself. "hang": only at its end."""

    def __init__(self, *script: str):
        self.script = list(script)
        self.seen: list[dict[str, Any]] = []
        self.over = False
        app = fastapi.FastAPI()

        @app.post("/retrieve")
        async def retrieve(http: fastapi.Request) -> Response:
            payload = json.loads(await http.body())
            self.seen.append(payload)
            return await self.answer(payload["queries"], self.script.pop(0) if self.script else "ok")

        self.running = Running(app)
        self.url = self.running.url

    async def answer(self, queries: list[str], how: str) -> Response:
        good = {"result": [[{"document": {"id": query, "contents": query}, "score": 1.0}] for query in queries]}
        while how == "hang" and not self.over:
            await asyncio.sleep(0.02)
        if how == "late":
            await asyncio.sleep(0.3)
        if how == "html":
            return HTMLResponse("<html><h1>Bad gateway</h1></html>")
        if how == "count":
            return JSONResponse({"result": [*good["result"], []]})
        if how == "json":
            return JSONResponse({"oops": 1})
        if how.isdigit():
            return JSONResponse({"detail": "told to"}, int(how))
        if how == "no evil" and any("evil" in query for query in queries):
            return JSONResponse({"detail": "evil"}, 422)
        return JSONResponse(good)

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *exc: object) -> None:
        self.over = True
        self.running.stop()


def tell(url: str, story: Story, **changes: Any) -> SearchClient:
    """Runs a story with a client that soon tries again, of a patience that a busy machine does not end."""
    quick: dict[str, Any] = {"backoff": 0.01, "longest_backoff": 0.1, "timeout": 20.0, "deadline": 60.0, "gather": 0.001}

    async def told() -> SearchClient:
        async with SearchClient(SearchSettings(url=url, **{**quick, **changes})) as client:
            await story(client)
        return client

    return asyncio.run(told())


def test_the_real_service_is_searched_as_the_index_itself(url: str, local: LocalSearch) -> None:
    queries = ["capital of France", "", "yen", "xyzzy"]

    async def story(client: SearchClient) -> None:
        await client.wait_healthy(5)
        found = await client.search(queries)
        assert found == await local.search(queries)
        assert found[0][0].title == "Paris" and found[0][0].body.startswith("Paris is") and found[0][0].score > 0
        assert [len(each) for each in found] == [3, 0, 1, 0]
        assert len((await client.search(["capital france"], topk=1))[0]) == 1
        assert await client.search([]) == []

    tell(url, story)


def test_texts_without_ids_are_told_apart_by_their_text(local: LocalSearch) -> None:
    async def story(client: SearchClient) -> None:
        document = (await client.search(["yen"]))[0][0]
        assert document.title == "Yen" and document.id == text_id('"Yen"\nThe yen is the currency of Japan.')
        assert not math.isnan(document.score)

    with Running(create_app(local, strings=True)) as running:
        tell(running.url + "/retrieve", story)


def test_both_key_styles_are_sent_and_long_queries_are_cut() -> None:
    async def story(client: SearchClient) -> None:
        await client.search(["x" * 50, "half \ud800", " "], topk=2)

    with Scripted() as service:
        tell(service.url, story, query_chars=10, candidates=7)
    sent = {"topk": 2, "topk_retrieval": 7, "topk_rerank": 2, "return_scores": True, "not_sort": False}
    assert service.seen == [{"queries": ["x" * 10, "half ?"], **sent}]


@pytest.mark.parametrize("how", ["500", "503", "429", "html", "json", "count", "hang"])
def test_a_fault_that_passes_is_not_noticed(how: str) -> None:
    async def story(client: SearchClient) -> None:
        assert [each[0].id for each in await client.search(["a", "b"])] == ["a", "b"]

    with Scripted(how, how) as service:
        client = tell(service.url, story, **({"timeout": 1.5} if how == "hang" else {}))
        assert client.state()["failures"] == 2 and len(service.seen) == 3


@pytest.mark.parametrize(
    ("how", "said"),
    [("500", "HTTP 500"), ("html", "an HTML page: <html>"), ("count", "2 lists for 1 queries"), ("json", "without lists in `result`")],
)
def test_a_fault_that_stays_is_an_error_with_address_attempts_and_cause(how: str, said: str) -> None:
    async def story(client: SearchClient) -> None:
        with pytest.raises(SearchError, match=rf"{client.url} gave no usable answer in 3 attempts .*{said}.*search\.url") as caught:
            await client.search(["a"])
        same = pickle.loads(pickle.dumps(caught.value))
        assert str(same) == str(caught.value) and same.attempts == 3

    with Scripted(*[how] * 9) as service:
        tell(service.url, story, retries=2, breaker_after=99)


def test_a_service_that_hangs_names_the_timeout() -> None:
    async def story(client: SearchClient) -> None:
        with pytest.raises(SearchError, match=r"1 attempt .*no answer within search\.timeout=0\.2 s"):
            await client.search(["a"])

    with Scripted("hang") as service:
        tell(service.url, story, retries=0, timeout=0.2)


def test_a_refusal_is_no_outage_and_hits_only_the_query_that_is_to_blame() -> None:
    async def story(client: SearchClient) -> None:
        words = ["a", "b", "evil c", "d", "e"]
        found = await asyncio.gather(*(client.search([word]) for word in words), return_exceptions=True)
        refused = found.pop(2)
        assert isinstance(refused, SearchRefused) and "HTTP 422" in str(refused) and "evil" in str(refused)
        assert str(pickle.loads(pickle.dumps(refused))) == str(refused)
        assert [each[0][0].id for each in found if not isinstance(each, BaseException)] == ["a", "b", "d", "e"]
        assert not client.state()["outages"]

    with Scripted(*["no evil"] * 99) as service:
        tell(service.url, story, gather=0.02)


def test_a_wrong_path_is_said_at_once() -> None:
    async def story(client: SearchClient) -> None:
        for call in (client.search(["a"]), client.wait_healthy(5)):
            with pytest.raises(SearchRefused, match="HTTP 404"):
                await call

    with Scripted() as service:
        tell(service.url + "/elsewhere", story)


def test_a_service_that_is_away_for_a_second_costs_time_and_nothing_else(local: LocalSearch) -> None:
    running = Running(create_app(local))
    port = int(running.url.rpartition(":")[2])
    back: list[Running] = []

    away: list[float] = []

    def outage() -> None:
        began = time.monotonic()
        running.stop()
        time.sleep(1.0)
        back.append(Running(create_app(local), port=port))
        away.append(time.monotonic() - began)

    async def story(client: SearchClient) -> None:
        async def episode(number: int) -> list[str]:
            ids = []
            for step in range(30):
                ids.append((await client.search([["yen", "lyon", "seine"][(number + step) % 3]]))[0][0].id)
                await asyncio.sleep(0.03)
            return ids

        thread = threading.Timer(0.3, outage)
        thread.start()
        found = await asyncio.gather(*(episode(number) for number in range(16)))
        thread.join()
        assert found == [[["30", "2", "9"][(number + step) % 3] for step in range(30)] for number in range(16)]
        state = client.state()
        assert state["outages"] >= 1 and state["paused_s"] > 0.5 and not state["paused_now"]
        assert state["failures"] < 30 + 20 * away[0], "while it was away only probes went out, twenty a second at most"

    try:
        tell(running.url, story)
    finally:
        for each in (running, *back):
            each.stop()


def test_an_outage_uses_up_nobodys_attempts() -> None:
    async def story(client: SearchClient) -> None:
        assert (await client.search(["a"]))[0][0].id == "a"

    with Scripted(*["500"] * 12) as service:
        client = tell(service.url, story, retries=2, breaker_after=2)
        assert client.state()["outages"] == 1
        assert [each["queries"] for each in service.seen] == [["a"]] * 2 + [["test"]] * 11 + [["a"]]


def test_an_outage_longer_than_the_deadline_is_an_error_for_all_who_wait() -> None:
    async def story(client: SearchClient) -> None:
        began = time.monotonic()
        found = await asyncio.gather(*(client.search([str(number)]) for number in range(20)), return_exceptions=True)
        assert all(isinstance(each, SearchError) and "ClientConnectorError" in str(each) for each in found)
        with pytest.raises(SearchError, match="0 attempts"):
            await client.wait_healthy(0.1)
        assert time.monotonic() - began < 6, "all at the same time: one pair after another would take 10 s"

    with Running(create_app(None)) as gone:  # type: ignore[arg-type]
        pass
    tell(gone.url, story, deadline=2.0, batch=2, parallel=2)


def test_who_shares_a_request_with_one_that_asked_long_before_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service comes back after the others' deadline and before the last one's, which goes with the second."""
    back = asyncio.Event()

    async def post(client: SearchClient, queries: list[str], topk: int) -> list[list[Document]]:
        if not back.is_set():
            raise Failed("away")
        return [[Document(query, "", query)] for query in queries]

    monkeypatch.setattr(SearchClient, "_post", post)

    async def story(client: SearchClient) -> None:
        async def asked(after: float) -> list[list[Document]]:
            await asyncio.sleep(after)
            return await client.search([str(after)])

        *early, last = (asyncio.ensure_future(asked(after)) for after in (0.0, 0.02, 1.0))
        lost = await asyncio.gather(*early, return_exceptions=True)
        assert all(isinstance(each, SearchError) for each in lost) and not last.done()
        back.set()
        assert (await last)[0][0].id == "1.0"

    tell("http://127.0.0.1:9", story, deadline=2.0, parallel=1, longest_backoff=0.02)


def test_queries_of_many_episodes_share_requests(url: str) -> None:
    async def story(client: SearchClient) -> None:
        await asyncio.gather(*(client.search(["yen", "lyon"]) for _ in range(100)))

    client = tell(url, story, batch=64, gather=0.02)
    assert client.state()["queries"] == 200 and client.state()["requests"] == 4


def test_a_caller_that_gives_up_takes_nobody_with_it() -> None:
    async def story(client: SearchClient) -> None:
        gone, stays = asyncio.ensure_future(client.search(["a"])), asyncio.ensure_future(client.search(["b"]))
        await asyncio.sleep(0.05)
        gone.cancel()
        assert (await stays)[0][0].id == "b"

    with Scripted("late") as service:
        tell(service.url, story)


@pytest.mark.parametrize("url", ["127.0.0.1:8001", "ftp://host/x", "http://", "http://host:port", ""])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"search\.url"):
        SearchSettings(url=url)


def test_settings_are_checked() -> None:
    wrongs: list[dict[str, Any]] = [{"topk": 0}, {"timeout": 0}, {"retries": -1}, {"batch": 0}, {"deadline": float("nan")}]
    for wrong in wrongs:
        with pytest.raises(ConfigError, match=r"search\.\w+="):
            SearchSettings(url="http://host:1", **wrong)
