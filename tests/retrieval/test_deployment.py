"""The Ray Serve application, also on a live cluster, and the actor."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import ray
from ray import cloudpickle, serve

from raysys.errors import DeadlineError
from raysys.head import Head, free_port
from raysys.retrieval.client import SearchClient, SearchSettings
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


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_replicas_on_a_live_cluster_answer_as_the_index_does(write: Writer, local: LocalSearch, ray_head: Head) -> None:
    app = serve_app(IndexSettings(corpus=str(write(ROWS))), min_replicas=2, max_replicas=2, cpus=0.1)
    port = free_port()

    async def story() -> None:
        client = SearchClient(SearchSettings(url=f"http://127.0.0.1:{port}"))
        await client.wait_healthy(60)
        queries = ["yen", "capital of France", "volcanoes"]
        for _ in range(4):  # both replicas have their turn
            assert await client.search(queries, 2) == await local.search(queries, 2)
        await client.close()

    ray.init(address=ray_head.gcs, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app)
        asyncio.run(story())
    finally:
        serve.shutdown()
        ray.shutdown()


def test_an_actor_is_searched_as_an_index_is(local: LocalSearch) -> None:
    class Remote:
        """What a handle's method looks like."""

        def __init__(self, method: Any):
            self.remote = method

    class Handle:
        search = Remote(local.search)
        wait_healthy = Remote(local.wait_healthy)

    async def story() -> None:
        actor = ActorSearch(Handle(), 5)
        await actor.wait_healthy(1)
        assert await actor.search(["yen", ""], 1) == await local.search(["yen", ""], 1)
        await actor.close()

    asyncio.run(story())


def test_an_actor_that_is_silent_is_named_with_the_operation_and_its_knob() -> None:
    class Remote:
        def remote(self, *args: Any) -> Any:
            return asyncio.sleep(60)

    class Handle:
        search = wait_healthy = Remote()

    async def story() -> None:
        actor = ActorSearch(Handle(), 0.02)
        with pytest.raises(DeadlineError, match=r"the search actor did not finish 'search' within 0\.02 s \(raise search\.deadline"):
            await actor.search(["yen"])
        with pytest.raises(DeadlineError, match=r"'opening the index' within 0\.01 s \(raise deadlines\.start"):
            await actor.wait_healthy(0.01, "deadlines.start")

    asyncio.run(story())
