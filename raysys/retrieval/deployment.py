"""The same search as a Ray Serve application with replicas that come and go, and as one actor."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any

from raysys.errors import DeadlineError
from raysys.retrieval.documents import Document
from raysys.retrieval.search import IndexSettings, LocalSearch
from raysys.retrieval.wire import Limits


def serve_app(
    settings: IndexSettings,
    *,
    min_replicas: int = 1,
    max_replicas: int = 4,
    ongoing: int = 8,
    cpus: float = 1.0,
    limits: Limits | None = None,
    strings: bool = False,
    threads: int = 2,
) -> Any:
    """An application for `ray.serve.run`, with the routes of `service.create_app`.

    Replicas map one index, which is built by the first if nobody has built it before: for a large corpus do that once, with
    `python -m raysys.retrieval --build-only`. Corpus and index must be where every node sees them.

    Args:
        min_replicas, max_replicas: how few and how many; Serve keeps about `ongoing` requests under way in each.
        cpus: of a replica.
    """
    from ray import serve

    def build() -> Any:
        from raysys.retrieval.service import create_app

        return create_app(LocalSearch(settings), limits=limits, strings=strings, threads=threads)

    deployment = serve.deployment(
        name="search",
        autoscaling_config={"min_replicas": min_replicas, "max_replicas": max_replicas, "target_ongoing_requests": ongoing},
        max_ongoing_requests=8 * ongoing,
        ray_actor_options={"num_cpus": cpus},
    )(serve.ingress(build)())
    return deployment.bind()


class ActorSearch:
    """A `Searcher` over an actor of `LocalSearch`, e.g. of `start_actor`; may be handed to other actors.

    Args:
        deadline: seconds of a search, in which Ray may have to start the actor again.
    """

    def __init__(self, actor: Any, deadline: float):
        self.actor, self._deadline = actor, deadline

    async def search(self, queries: Sequence[str], topk: int | None = None) -> list[list[Document]]:
        """As `SearchClient.search`. Raises InfrastructureError when the actor is gone or silent (DeadlineError), or what it raised."""
        return await _within(self.actor.search.remote(list(queries), topk), "search", self._deadline, "search.deadline")

    async def wait_healthy(self, deadline: float | None = None, knob: str = "search.deadline") -> None:
        """Returns when the index is open. Raises DeadlineError after `deadline` seconds, which `knob` sets, or what opening it raised."""
        await _within(self.actor.wait_healthy.remote(), "opening the index", deadline, knob)

    async def close(self) -> None:
        """The actor lives on: it is whoever started it that ends it."""


async def _within(answer: Awaitable[Any], operation: str, seconds: float | None, knob: str) -> Any:
    """What the actor gives, or one of our errors."""
    import ray.exceptions

    from raysys.runtime import first_cause

    try:
        async with asyncio.timeout(seconds):
            return await answer
    except ray.exceptions.RayError as error:  # first: an actor's own TimeoutError comes as both
        raise first_cause(error, "the search actor", operation) from error
    except TimeoutError:
        raise DeadlineError("the search actor", operation, seconds or 0.0, knob) from None


def start_actor(settings: IndexSettings, deadline: float, **options: Any) -> ActorSearch:
    """A search in an actor of its own. `deadline`: seconds of a search; `options`: Ray's, such as `num_cpus`."""
    import ray

    return ActorSearch(ray.remote(LocalSearch).options(**options).remote(settings), deadline)
