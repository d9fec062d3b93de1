"""A pool of one real engine around a small model, and a trainer for it; one for each module that asks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def place(request: pytest.FixtureRequest, ray_head: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A `tests.weights.trainer.Place`. The module says by `TIED` which kind of model it wants, or makes one with its trainer by `made`."""
    import ray  # not earlier: Ray reads whether it needs a token when it is imported

    from raysys.config.parts import Rollout
    from raysys.config.runs import NewModel
    from raysys.models.scratch import new_causal
    from raysys.rollout.pool import RolloutPool
    from raysys.rollout.spec import RolloutSpec
    from raysys.weights.receive import SharedMemoryReceiver
    from tests.weights.trainer import DEADLINES, MovingModel, Place

    where = tmp_path_factory.mktemp("model")
    if hasattr(request.module, "made"):
        trainer = request.module.made(where)
    else:
        new_causal(NewModel(hidden_size=64, heads=2, kv_heads=2, ffn_size=96, context=64, tied=request.module.TIED), where, seed=0)
        trainer = MovingModel(str(where))
    folder = str(where)
    config = Rollout(kv_cache_mib=16)
    spec = RolloutSpec(folder, "cpu", "float32", max_model_len=40, config=config, receiver=SharedMemoryReceiver, log_dir=folder)
    ray.init(address=ray_head.gcs, log_to_driver=False)
    try:
        with RolloutPool(config, spec, DEADLINES) as pool:
            pool.start()
            yield Place(pool, trainer)
    finally:
        ray.shutdown()
