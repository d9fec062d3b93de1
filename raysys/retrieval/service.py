"""The search service: a FastAPI app with `/retrieve` and `/health`, and a server that starts and stops with a handle."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import fastapi
import uvicorn
from fastapi.responses import JSONResponse, Response

from raysys.errors import ConfigError, InfrastructureError, RaysysError
from raysys.retrieval.coalesce import Coalescer
from raysys.retrieval.documents import Found
from raysys.retrieval.search import LocalSearch
from raysys.retrieval.wire import BadRequest, Limits, Request, read_request, write_answer

log = logging.getLogger(__name__)
_CHUNK = 64
"""Queries that are searched in one go; between the pieces of a large request, small ones of others get their turn."""
_LARGE = 64


def create_app(search: LocalSearch, *, limits: Limits | None = None, strings: bool = False, threads: int = 2) -> fastapi.FastAPI:
    """The service as an ASGI app.

    Args:
        search: answers queries; called from `threads` threads, never from the event loop.
        limits: what one request may ask for; more is answered with 4xx and a sentence.
        strings: documents of the first style are bare texts too.

    Raises:
        ConfigError: no thread to search in.
    """
    if threads < 1:
        raise ConfigError(f"a service with {threads} threads cannot search", "raise --threads")
    limits = limits or Limits()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="search")

    async def run(key: Hashable, queries: list[str]) -> list[list[Found]]:
        topk, candidates, rerank = key  # type: ignore[misc]
        return await asyncio.get_running_loop().run_in_executor(pool, search.find, queries, topk, candidates, rerank)

    waiting: Coalescer[str, list[Found]] = Coalescer(run, most=_CHUNK, wait=0, parallel=threads)

    @asynccontextmanager
    async def lifespan(_: fastapi.FastAPI) -> AsyncIterator[None]:
        yield
        await waiting.close()
        pool.shutdown(wait=True, cancel_futures=True)

    app = fastapi.FastAPI(title="raysys retrieval", lifespan=lifespan, docs_url=None, redoc_url=None)

    @app.post("/retrieve")
    async def retrieve(http: fastapi.Request) -> Response:
        try:
            request = read_request(await _body(http, limits), limits, strings)
            found = await _found(waiting, request, threads)
        except BadRequest as error:
            return JSONResponse({"detail": error.message}, error.status)
        except RaysysError as error:
            log.error("a search failed: %s", error)
            return JSONResponse({"detail": str(error)}, 500)
        if len(found) <= _LARGE:
            return Response(write_answer(found, request), media_type="application/json")
        body = await asyncio.get_running_loop().run_in_executor(pool, write_answer, found, request)
        return Response(body, media_type="application/json")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", **search.describe()}

    return app


async def _found(waiting: Coalescer[str, list[Found]], request: Request, threads: int) -> list[list[Found]]:
    """Documents of all queries. At most `threads` pieces of a request queue at a time, so that a large one does not keep others out."""
    pieces = [request.queries[first : first + _CHUNK] for first in range(0, len(request.queries), _CHUNK)]
    key = (request.topk, request.candidates, request.rerank)
    found: list[list[Found]] = []
    for first in range(0, len(pieces), threads):
        for piece in await asyncio.gather(*(waiting(key, each) for each in pieces[first : first + threads])):
            found += piece
    return found


async def _body(http: fastapi.Request, limits: Limits) -> bytes:
    """The body, of which no more than the limit is ever held. Raises BadRequest."""
    body = bytearray()
    async for piece in http.stream():
        body += piece
        if len(body) > limits.body_bytes:
            raise BadRequest(413, f"the body has more than {limits.body_bytes} bytes")
    return bytes(body)


def listen(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises ConfigError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(f"{host}:{port} cannot be listened on: {error}", "take another --port or --host") from None
    return listener


def address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def server(app: Any) -> uvicorn.Server:
    """A server of the app; requests under way when it is told to end get ten seconds."""
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=10))


class Running:
    """The service in a thread of this process, from construction to `stop` or the end of a `with` block.

    Attributes:
        url: what a client is given.
    """

    def __init__(self, app: Any, host: str = "127.0.0.1", port: int = 0, timeout: float = 30.0):
        """Raises ConfigError for an address that is taken, InfrastructureError if the server does not start in `timeout` seconds."""
        listener = listen(host, port)
        self.url = address(listener)
        self._server = server(app)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True, name="retrieval")
        self._thread.start()
        until = time.monotonic() + timeout
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > until:
                raise InfrastructureError(f"the search service at {self.url} did not start", "see its log")
            time.sleep(0.005)

    def stop(self, timeout: float = 15.0) -> None:
        """Answers what is under way, then ends."""
        self._server.should_exit = True
        self._thread.join(timeout)

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
