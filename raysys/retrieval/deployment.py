"""The same search as a Ray Serve application with replicas that come and go, and as one actor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    """A `Searcher` over an actor of `LocalSearch`, e.g. of `start_actor`; may be handed to other actors."""

    def __init__(self, actor: Any):
        self.actor = actor

    async def search(self, queries: Sequence[str], topk: int | None = None) -> list[list[Document]]:
        """As `SearchClient.search`. Raises InfrastructureError when the actor is gone, or what it raised."""
        import ray.exceptions

        from raysys.runtime import first_cause

        try:
            return await self.actor.search.remote(list(queries), topk)
        except ray.exceptions.RayError as error:
            raise first_cause(error, "search", "search") from error

    async def wait_healthy(self, deadline: float | None = None) -> None:
        """Returns when the index is open. Raises DeadlineError after `deadline` seconds, or what opening it raised."""
        import asyncio

        import ray.exceptions

        from raysys.errors import DeadlineError
        from raysys.runtime import first_cause

        try:
            async with asyncio.timeout(deadline):
                await self.actor.wait_healthy.remote()
        except TimeoutError:
            raise DeadlineError("search", "opening the index", deadline or 0.0, "search.deadline") from None
        except ray.exceptions.RayError as error:
            raise first_cause(error, "search", "opening the index") from error

    async def close(self) -> None:
        """The actor lives on: it is whoever started it that ends it."""


def start_actor(settings: IndexSettings, **options: Any) -> ActorSearch:
    """A search in an actor of its own. `options`: Ray's, such as `num_cpus`."""
    import ray

    return ActorSearch(ray.remote(LocalSearch).options(**options).remote(settings))
