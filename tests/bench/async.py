"""Steps per hour with `max_age=0` and with `max_age=K`, against the bound that generation alone sets.

Real loop, ledger, source and pool around fake engines with a long-tailed workload (`workload.txt`); the trainer sleeps. Both runs train
the same samples, which is checked. `real=true` adds `jobs/gopd.py` on a CPU engine, where generation and training share the cores.
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from raysys.batch import Batch, Ragged

DEFAULTS: dict[str, Any] = {
    "steps": 30,
    "batch": 64,
    "workers": 4,
    "seats": 4,
    "token_ms": 2.0,
    "train_s": 0.6,
    "max_age": 2,
    "real": False,
}


class Numbered:
    """Prompts whose only token is their number."""

    def __init__(self) -> None:
        self.at = 0

    def take(self, n: int) -> Batch:
        rows = np.arange(self.at, self.at + n)
        self.at += n
        return Batch.from_columns(
            prompt_id=[f"p{row}@0" for row in rows],
            sample=[0] * n,
            domain=[""] * n,
            prompt_ids=Ragged(rows.astype(np.int32), np.arange(n + 1)),
        )

    def state(self) -> dict[str, Any]:
        return {"at": self.at}

    def restore(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def run(steps: int, batch: int, workers: int, seats: int, token_ms: float, train_s: float, max_age: int, real: bool) -> dict[str, Any]:
    """Seconds of each run, steps per hour, their ratio, and the share of generation's own bound.

    `in_order` trains exactly the samples that the synchronous run trains; `first_ready` may end with a few later ones in place of
    stragglers, and `overlap` says how many they share.
    """
    from tests.bench.private_ray import private_ray

    with private_ray():
        alone = _generation(steps * batch, workers, seats, token_ms)
        runs = {
            f"max_age={age} {order}": _run(steps, batch, workers, seats, token_ms, train_s, age, order)
            for age, order in ((0, "in_order"), (max_age, "in_order"), (max_age, "first_ready"))
        }
    first, *others = [one.pop("ids") for one in runs.values()]
    synchronous, *asynchronous = runs.values()
    for one, ids in zip(asynchronous, others, strict=True):
        one |= {"overlap": len(first & ids) / len(first), "speedup": synchronous["seconds"] / one["seconds"]}
    for one in runs.values():
        one["share_of_bound"] = alone / one["seconds"]
    figures: dict[str, Any] = {"generation_alone_s": alone, "runs": runs}
    if real:
        figures["real"] = {str(age): _real(age) for age in (0, max_age)}
    return figures


def _generation(samples: int, workers: int, seats: int, token_ms: float) -> float:
    """Seconds to draw all samples with nobody to wait for."""
    from raysys.rollout.results import Result
    from raysys.rollout.spec import Sampling
    from tests.bench.fleet import FleetEngine, fleet

    with fleet(workers, seats, functools.partial(FleetEngine, seats, token_ms / 1000)) as (pool, _):
        inbox: deque[Result] = deque()
        pool.generate(Numbered().take(workers), Sampling(max_tokens=4096, seed=0))
        began = time.monotonic()
        pool.submit(Numbered().take(samples), Sampling(max_tokens=4096, seed=0), inbox)
        pool.wait(lambda: len(inbox) == samples, "generate")
        return time.monotonic() - began


def _run(steps: int, batch: int, workers: int, seats: int, token_ms: float, train_s: float, max_age: int, order: Any) -> dict[str, Any]:
    import ray

    from raysys.config.runs import GopdConfig
    from raysys.evaluation.during import NoEvaluation
    from raysys.ledger import Ledger
    from raysys.loop import Parts, train
    from raysys.rollout.source import OnPolicySource
    from raysys.rollout.spec import Sampling
    from tests.bench.fleet import FleetEngine, fleet
    from tests.fakes import FakeObjective, FakeScorers, FakeTrainer, FileMetrics

    class Sleeper(FakeTrainer):
        def step(self, batch: Batch) -> dict[str, float]:
            time.sleep(train_s)
            return super().step(batch)

    make = functools.partial(FleetEngine, seats, token_ms / 1000)
    with tempfile.TemporaryDirectory() as name, fleet(workers, seats, make) as (pool, host):

        class Push:
            def push(self, version: int) -> dict[str, Any]:
                ray.get(host.hold.remote(version))
                pool.pushed(version, pool.workers)
                return {}

        keys = ["student=s", "teachers.default=t", "data.path=p", f"batch={batch}", f"steps={steps}", f"max_age={max_age}"]
        ledger = Ledger(Path(name), GopdConfig.load(None, keys))
        source = OnPolicySource(Numbered(), pool, 1, Sampling(max_tokens=4096, seed=0), order=order)
        parts = Parts(source, FakeScorers(), FakeObjective(), Sleeper(), Push(), ledger, NoEvaluation(), FileMetrics(Path(name)))
        Push().push(0)
        pool.generate(Numbered().take(workers), Sampling(max_tokens=4096, seed=0))
        began = time.monotonic()
        train(parts, steps=steps, batch=batch, max_age=max_age, checkpoint_every=10**9)
        seconds = time.monotonic() - began
        records = [json.loads(line) for line in (Path(name) / "metrics.jsonl").read_text().splitlines()]
        taken = [one for line in (Path(name) / "ledger" / "steps.jsonl").read_text().splitlines() for one in json.loads(line)["ids"]]
        ledger.close()
    assert len(taken) == len(set(taken)) == steps * batch
    return {
        "seconds": seconds,
        "steps_per_hour": 3600 * steps / seconds,
        "trainer_waited_s": sum(record["seconds"]["generate"] for record in records),
        "age_max": float(np.mean([record["age_max"] for record in records])),
        "ids": set(taken),
    }


def _real(max_age: int) -> dict[str, Any]:
    from tests.bench import gopd_step

    return gopd_step.run(steps=20, skip=4, reward_scale=1.25, overrides=[f"max_age={max_age}"], model={})


def table(figures: dict[str, Any]) -> list[list[Any]]:
    rows: list[list[Any]] = [
        ["run", "seconds", "steps an hour", "speedup", "share of bound", "trainer waited s", "mean oldest age", "same samples"]
    ]
    for name, one in figures["runs"].items():
        row = [name, one["seconds"], one["steps_per_hour"], one.get("speedup", 1.0), one["share_of_bound"]]
        rows.append([*row, one["trainer_waited_s"], one["age_max"], one.get("overlap", 1.0)])
    rows.append(["generation alone", figures["generation_alone_s"], *[""] * 6])
    for age, one in figures.get("real", {}).items():
        rows.append(
            [f"real engine, max_age={age}: s a step", one["seconds"]["total"], *[""] * 3, one["seconds"].get("generate", 0.0), "", ""]
        )
    return rows
