"""Engines and trainer on the same devices, in turns: who lives where, who sleeps when, and that it changes nothing that is learned."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raysys.colocate import TurningPusher, TurningTrainer, lodger
from raysys.config.parts import Rollout
from raysys.config.runs import NewModel
from raysys.rollout.spec import RolloutSpec


def test_an_engine_that_follows_a_lost_one_gets_its_place_when_that_is_gone():
    spec = RolloutSpec("m", "gpu", "bfloat16", 32, Rollout())
    trainer: Any = SimpleNamespace(placement="the trainer's", config=SimpleNamespace(ranks=2))
    kind = lodger(trainer)
    first, second, third = (kind(rank, spec, object, 0.0) for rank in range(3))
    assert first.placed(0) and second.placed(0) and not third.placed(0)
    assert (first._place(), second._place()) == ((0, 0.5), (1, 0.5))
    second.kill()
    assert third.placed(0) and third._place() == (1, 0.5) and not kind(3, spec, object, 0.0).placed(0)


def test_trainer_and_engines_take_turns():
    log: list[Any] = []
    pool: Any = SimpleNamespace(each=log.append)
    trainer: Any = SimpleNamespace(step=lambda batch: log.append(batch) or {"loss": 1.0}, release_cache=lambda: log.append("release"))
    pusher: Any = SimpleNamespace(push=log.append)
    assert TurningTrainer(trainer, pool).step("batch") == {"loss": 1.0}  # type: ignore[arg-type]
    TurningPusher(pusher, pool).push(3)
    assert log == ["sleep", "batch", "release", "wake", 3]


def job(folder: Path, **more: Any) -> dict[str, Any]:
    """A distillation between two new models."""
    from raysys.models.scratch import new_causal
    from tests.e2e.test_gopd import REV, gopd

    for seed, name in enumerate(("student", "teacher")):
        new_causal(NewModel(hidden_size=64, heads=2, kv_heads=2, ffn_size=96, context=64), folder / name / "export", seed=seed)
    return gopd(folder / "student", {"rev": folder / "teacher"}, {"rev": REV}, batch=32, **more)


@pytest.mark.gpu
@pytest.mark.e2e
@pytest.mark.timeout(1500)
def test_a_colocated_run_does_what_one_with_gpus_of_its_own_does(ray_head: Any, tmp_path: Path):
    import torch

    from tests.e2e.test_gopd import Workplace

    if (gpus := torch.cuda.device_count()) < 2:
        pytest.skip("a colocated run needs a GPU for engine and trainer and one for the scorer, and there is one")
    place = Workplace(tmp_path, ray_head)
    config = job(tmp_path, steps=6, rollout={"gpu_memory_utilization": 0.4, "enforce_eager": True})
    place.run("gopd", "together", config, "colocate=true", "weights.backend=ipc")
    together = place.metrics("together")
    assert len(together) == 6 and max(step["parity_gap"] for step in together) < 0.25
    assert len({step["fingerprint"] for step in together}) == 6
    if gpus < 3:
        return
    place.run("gopd", "apart", config)
    for ours, theirs in zip(together, place.metrics("apart"), strict=True):
        assert ours["reverse_kl"] == pytest.approx(theirs["reverse_kl"], rel=0.1, abs=0.01)
