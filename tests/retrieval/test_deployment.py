"""The Ray Serve application and the actor, as far as they can be looked at without a cluster."""

from __future__ import annotations

import asyncio
from typing import Any

from ray import cloudpickle

from raysys.retrieval.deployment import ActorSearch, serve_app
from raysys.retrieval.search import IndexSettings, LocalSearch
from tests.retrieval.conftest import ROWS, Writer


def test_an_application_scales_between_its_bounds_and_serves_the_same_routes(write: Writer) -> None:
    app = serve_app(IndexSettings(corpus=str(write(ROWS))), min_replicas=2, max_replicas=5, ongoing=3)
    deployment = app._bound_deployment
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 5, 3)
    assert deployment.name == "search"
    assert cloudpickle.loads(cloudpickle.dumps(deployment.func_or_class))  # pyright: ignore[reportPrivateImportUsage]


def test_an_actor_is_searched_as_an_index_is(local: LocalSearch) -> None:
    class Remote:
        """What a handle's method looks like."""

        def __init__(self, method: Any):
            self.remote = method

    class Handle:
        search = Remote(local.search)
        wait_healthy = Remote(local.wait_healthy)

    async def story() -> None:
        actor = ActorSearch(Handle())
        await actor.wait_healthy(1)
        assert await actor.search(["yen", ""], 1) == await local.search(["yen", ""], 1)
        await actor.close()

    asyncio.run(story())
