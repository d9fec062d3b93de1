"""Trajectories a second of several turns: each goes on when its own tool answers, against a loop that waits for everybody after each turn.

`episodes` is the product's path: driver, pool, the worker's `play`, seats that are given up while a tool is at work. `barrier` is the
usual lock-step loop at its best: it lives beside the engines, costs no driver and hands the next trajectory to whichever seat of whichever
engine is free; then all tools are called at once, and the next turn begins when the slowest has answered. Engines are fake, one model of
their time for both (`tests/bench/decoder.py`), with room for the longest trajectory in each seat's part of the KV cache; both must end
with the same tokens, which is checked.

`waves` is trajectories to seats: 1 is what training loops are set to, where an engine has a seat for each of its share of the batch.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import statistics
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from raysys.batch import Batch, Ragged
from raysys.config.parts import Rollout
from raysys.rollout.environment import EpisodeSpec, Reply
from raysys.rollout.episodes import seed_of
from raysys.rollout.serving import Response
from raysys.rollout.spec import RolloutSpec, Sampling
from raysys.rollout.worker import RolloutWorker
from tests.bench.decoder import Decoder, Pace
from tests.bench.workload import lengths

DEFAULTS: dict[str, Any] = {
    "workers": 2,
    "seats": 32,
    "waves": [1, 4],
    "repeats": 5,
    "turns": 5,
    "turn_tokens": 1024,
    "prompt_tokens": 100,
    "observation_tokens": 200,
    "tool_ms": [5.0, 500.0],
    "step_ms": 2.0,
    "sequence_us": 20.0,
    "prefill_us": 10.0,
}
VOCABULARY = 50_000


class Numbers:
    """Text is ids in decimal."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


@dataclass(frozen=True)
class Tools:
    """Environments of 1 to `turns` turns, alike often. A tool takes log-normal seconds, `fastest` and `slowest` its 1 % and 99 % quantiles
    and its limits; the last turn calls none. What it says depends on what it was told."""

    turns: int
    tokens: int
    fastest: float
    slowest: float
    stops: Sequence[str] = ()

    async def open(self) -> None: ...
    async def close(self) -> None: ...

    def new(self) -> Tool:
        return Tool(self)

    def plan(self, prompt_id: str) -> list[float]:
        """Seconds of each tool call of a trajectory."""
        dice = np.random.default_rng(zlib.crc32(prompt_id.encode()))
        middle, spread = math.sqrt(self.fastest * self.slowest), math.log(self.slowest / self.fastest) / 2 / NormalDist().inv_cdf(0.99)
        drawn = middle * np.exp(spread * dice.standard_normal(dice.integers(1, self.turns + 1) - 1))
        return np.clip(drawn, self.fastest, self.slowest).tolist()


class Tool:
    def __init__(self, tools: Tools):
        self._tools, self._calls = tools, iter(())

    async def reset(self, prompt_id: str, metadata: str) -> str:
        self._calls = iter(self._tools.plan(prompt_id))
        return ""

    async def step(self, text: str, last: bool) -> Reply:
        seconds = next(self._calls, None)
        if seconds is None:
            return Reply(done=True)
        await asyncio.sleep(seconds)
        start = zlib.crc32(text.encode())
        return Reply(" ".join(str((start + place) % VOCABULARY) for place in range(self._tools.tokens)))


class Engine(RolloutWorker):
    """The product's worker with a model of time in place of vLLM. A generation's length is of `workload.txt`, by its seed; its tokens
    depend on all that came before."""

    def __init__(self, spec: RolloutSpec, pace: Pace, kv_tokens: int):
        super().__init__(spec)
        self.decoder, self._drawn, self._kv_tokens = Decoder(pace), lengths(), kv_tokens

    async def start(self) -> dict[str, Any]:
        self._codec = Numbers()
        return {"vllm": "model", "revision": "0", "pid": 0, "vocabulary": VOCABULARY, "kv_tokens": self._kv_tokens}

    async def respond(self, ids: np.ndarray, sampling: Sampling, seed: int, stops: Sequence[str] = ()) -> Response:
        tokens = min(sampling.max_tokens, int(self._drawn[seed % len(self._drawn)]))
        await self.decoder.decode(len(ids), tokens)
        made = ((np.arange(tokens) + seed + ids.sum()) % VOCABULARY).tolist()
        return Response(made, [0.0] * tokens, [0, self._version], "stop")

    async def alive(self) -> None:
        return None


async def spent(engines: list[Engine]) -> dict[str, float]:
    """So far: seat-seconds in which a sequence decoded, and their process's seconds of processor."""
    return {"seats": sum(engine.decoder.seat_seconds for engine in engines), "processor": time.process_time()}


async def barrier(
    engines: list[Engine], prompts: Batch, sampling: Sampling, episodes: EpisodeSpec, seats: int
) -> tuple[float, list[list[int]]]:
    """Seconds, and each trajectory's response."""
    began = time.monotonic()
    names = prompts.strings("prompt_id")
    seeds = [sampling.seed_of(name, 0) for name in names]
    texts = [ids.tolist() for ids in prompts.ragged("prompt_ids").rows()]
    starts = [len(text) for text in texts]
    worlds = [episodes.environments.new() for _ in names]
    await asyncio.gather(*[world.reset(name, "") for world, name in zip(worlds, names, strict=True)])
    drawing, codec, said = Sampling(episodes.turn_tokens, sampling.seed), Numbers(), dict[int, list[int]]()

    async def seat(engine: Engine, queue: Iterator[int], turn: int) -> None:
        for row in queue:
            said[row] = (await engine.respond(np.array(texts[row]), drawing, seed_of(seeds[row], turn))).ids
            texts[row] += said[row]

    going = list(range(len(names)))
    for turn in range(episodes.generations):
        queue, last = iter(going), turn + 1 == episodes.generations
        await asyncio.gather(*[seat(engine, queue, turn) for _ in range(seats) for engine in engines])
        replies = await asyncio.gather(*[worlds[row].step(codec.decode(said[row]), last) for row in going])
        for row, reply in zip(going, replies, strict=True):
            texts[row] += codec.encode(reply.observation)
        going = [row for row, reply in zip(going, replies, strict=True) if not reply.done]
    return time.monotonic() - began, [text[start:] for text, start in zip(texts, starts, strict=True)]


def run(workers: int, seats: int, waves: list[int], repeats: int, **model: Any) -> dict[str, Any]:
    """By `waves`, medians over `repeats` of other trajectories each: seconds of both forms, their ratio, the share of seats in use, and
    two bounds: all generation with full seats and no tool, and the longest trajectory alone."""
    from tests.bench.private_ray import private_ray

    pace = Pace(model["step_ms"] / 1e3, model["sequence_us"] / 1e6, model["prefill_us"] / 1e6)
    fastest, slowest = (ms / 1e3 for ms in model["tool_ms"])
    episodes = EpisodeSpec(Tools(model["turns"], model["observation_tokens"], fastest, slowest), model["turns"], model["turn_tokens"])
    longest = model["prompt_tokens"] + model["turns"] * (model["turn_tokens"] + model["observation_tokens"])
    with tempfile.TemporaryDirectory() as folder, private_ray():
        from tests.bench.fleet import fleet  # imports Ray, which must not be before its token is there

        (Path(folder) / "config.json").write_text(json.dumps({"eos_token_id": 1}))
        spec = RolloutSpec(folder, "cpu", "float32", 10**6, Rollout(max_sequences=seats), episodes=episodes)
        with fleet(workers, seats, functools.partial(Engine, spec, pace, seats * longest), episodes) as (pool, host):
            _both(pool, host, _prompts("warm", workers, model["prompt_tokens"]), episodes, workers * seats)
            found: dict[str, Any] = {}
            for wave in waves:
                rounds = []
                for repeat in range(repeats):
                    prompts = _prompts(f"{wave}/{repeat}", wave * workers * seats, model["prompt_tokens"])
                    one = _both(pool, host, prompts, episodes, workers * seats)
                    rounds.append(one | _bounds(prompts, episodes, pace, workers, seats))
                found[str(wave)] = {"trajectories": wave * workers * seats, "rounds": rounds} | _medians(rounds)
    return {"waves": found, "target": 1.7}


def _prompts(name: str, count: int, tokens: int) -> Batch:
    numbers = np.arange(count * tokens, dtype=np.int32) % VOCABULARY
    return Batch.from_columns(
        prompt_id=[f"{name}/{row}@0" for row in range(count)],
        sample=[0] * count,
        domain=[""] * count,
        metadata=[""] * count,
        prompt_ids=Ragged(numbers, np.arange(count + 1) * tokens),
    )


def _both(pool: Any, host: Any, prompts: Batch, episodes: EpisodeSpec, seats: int) -> dict[str, float]:
    """`seats`: of all engines together."""
    import ray

    sampling = Sampling(max_tokens=10**5, seed=0)
    before = ray.get(host.apply.remote(spent))
    stopped, told = ray.get(host.apply.remote(barrier, prompts, sampling, episodes, seats // len(pool.workers)))
    between, driver, began = ray.get(host.apply.remote(spent)), time.process_time(), time.monotonic()
    out = pool.generate(prompts, sampling)
    seconds, driver = time.monotonic() - began, time.process_time() - driver
    after = ray.get(host.apply.remote(spent))
    made = [ids.tolist() for ids in out.ragged("response_ids").rows()]
    assert made == told, "the two forms did not make the same trajectories"
    return {
        "barrier_s": stopped,
        "episodes_s": seconds,
        "ratio": stopped / seconds,
        "barrier_per_s": len(prompts) / stopped,
        "episodes_per_s": len(prompts) / seconds,
        "barrier_busy": (between["seats"] - before["seats"]) / (stopped * seats),
        "episodes_busy": (after["seats"] - between["seats"]) / (seconds * seats),
        "barrier_host_processor_s": between["processor"] - before["processor"],
        "episodes_host_processor_s": after["processor"] - between["processor"],
        "driver_processor_s": driver,
    }


def _bounds(prompts: Batch, episodes: EpisodeSpec, pace: Pace, workers: int, seats: int) -> dict[str, float]:
    """`packed_s`: nobody can be faster, nor than `longest_s`."""
    sampling, drawn, tools = Sampling(max_tokens=10**5, seed=0), lengths(), episodes.environments
    assert isinstance(tools, Tools)
    alone, decoded, read, waited, turns = [], 0, 0, 0.0, 0
    for name, size in zip(prompts.strings("prompt_id"), prompts.lengths("prompt_ids").tolist(), strict=True):
        calls, context, own = tools.plan(name), size, sum(tools.plan(name))
        for turn in range(len(calls) + 1):
            tokens = min(episodes.turn_tokens, int(drawn[seed_of(sampling.seed_of(name, 0), turn) % len(drawn)]))
            own += pace.seconds(1) * tokens + pace.prefill * context
            decoded, read, turns = decoded + tokens, read + context, turns + 1
            context += tokens + tools.tokens
        alone.append(own)
        waited += sum(calls)
    packed = (decoded / seats * pace.seconds(seats) + read * pace.prefill) / workers
    return {"packed_s": packed, "longest_s": max(alone), "tokens": decoded, "turns": turns, "tool_s": waited}


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    found = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    return found | {"share_of_bound": statistics.median(max(one["packed_s"], one["longest_s"]) / one["episodes_s"] for one in rounds)}


def table(figures: dict[str, Any]) -> list[list[Any]]:
    header = ["waves", "form", "s", "trajectories/s", "ratio", "seats busy", "packed s", "longest s", "share of bound", "driver CPU s"]
    rows: list[list[Any]] = [header]
    for wave, one in figures["waves"].items():
        rows.append([wave, "barrier", one["barrier_s"], one["barrier_per_s"], 1.0, one["barrier_busy"], *[""] * 4])
        own = [one[key] for key in ("ratio", "episodes_busy", "packed_s", "longest_s", "share_of_bound", "driver_processor_s")]
        rows.append([wave, "episodes", one["episodes_s"], one["episodes_per_s"], *own])
    return rows
