"""How busy the pool keeps 1 to 64 engines with one workload, and what that costs the driver in memory and processor time.

Fake engines in one process (`fleet.py`); three waves of work for all seats. Busy is the share of seat-seconds in which a sample ran,
from the first sample to the moment when the last one was handed out; what follows is the workload's tail.
"""

from __future__ import annotations

import functools
import gc
import time
from collections import deque
from typing import Any

DEFAULTS: dict[str, Any] = {"workers": [1, 2, 4, 8, 64], "seats": 8, "token_ms": 20.0, "waves": 4}


def run(workers: list[int], seats: int, token_ms: float, waves: int) -> dict[str, Any]:
    """Busy share, samples a second, driver's seconds of processor a thousand samples, and its memory, by number of workers."""
    from tests.bench.private_ray import private_ray

    with private_ray():
        return {str(count): _measure(count, seats, token_ms / 1000, waves * seats * count) for count in workers}


def _measure(workers: int, seats: int, seconds_per_token: float, samples: int) -> dict[str, float]:
    import importlib

    import psutil
    import ray

    from raysys.rollout.results import Result
    from raysys.rollout.spec import Sampling
    from tests.bench.fleet import FleetEngine, fleet

    prompts = importlib.import_module("tests.bench.async").Numbered()
    sampling = Sampling(max_tokens=4096, seed=0)
    me = psutil.Process()
    with fleet(workers, seats, functools.partial(FleetEngine, seats, seconds_per_token)) as (pool, host):
        inbox: deque[Result] = deque()
        gc.collect()
        memory, spent = me.memory_info().rss, sum(me.cpu_times()[:2])
        began = time.monotonic()
        pool.submit(prompts.take(samples), sampling, inbox)
        pool.wait(lambda: pool.status()["waiting"] == 0, "generate")
        dealt = time.monotonic() - began
        running = sum(worker["held"] for worker in pool.status()["workers"])
        busy = ray.get(host.occupied.remote())
        pool.wait(lambda: len(inbox) == samples, "generate")
        whole = time.monotonic() - began
        return {
            "busy": busy / (dealt * workers * seats),
            "samples_per_s": samples / whole,
            "driver_s_per_1000": (sum(me.cpu_times()[:2]) - spent) / samples * 1000,
            "driver_mib": (me.memory_info().rss - memory) / 2**20,
            "rss_mib": me.memory_info().rss / 2**20,
            "held_at_the_end": running,
        }


def table(figures: dict[str, Any]) -> list[list[Any]]:
    header = ["workers", "busy", "samples/s", "driver s per 1000", "driver grew MiB", "driver RSS MiB"]
    keys = ("busy", "samples_per_s", "driver_s_per_1000", "driver_mib", "rss_mib")
    return [header, *([count, *(one[key] for key in keys)] for count, one in figures.items())]
