"""How fast a push travels through a node's memory, part by part, beside a plain copy of the same bytes in memory.

Two ways: `in place`, where the engine reads what the trainer packed, and through Ray's object store, as between nodes.

Transport and hashing: real buckets (`BucketPlan`), the real `Pusher` and `SharedMemoryReceiver` in Ray actors, and in place of the
engine a process that maps each file and reads a number of every page of every tensor. In the transport figures both ends give one
constant for every digest, so that only bytes move. The engine's own load: a vLLM engine on CPU, clocked inside its process.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from raysys.buckets import Bucket, Plan
from raysys.memory import whose
from raysys.rollout.worker import RolloutWorker
from raysys.weights.receive import SharedMemoryReceiver

DEFAULTS: dict[str, Any] = {
    "parameters": [1_000_000, 30_000_000, 300_000_000],
    "tensors": [100, 10_000],
    "ways": ["in place", "object store"],
    "engines": [1_000_000, 30_000_000],
    "bucket_mib": 256,
    "repeats": 5,
}
TARGET = 0.5
PARTS = ("gather", "store", "write", "map", "answer")
MODELS: dict[int, dict[str, Any]] = {
    1_000_000: {"hidden_size": 128, "layers": 5, "heads": 4, "kv_heads": 4, "ffn_size": 384},
    30_000_000: {"hidden_size": 512, "layers": 9, "heads": 16, "kv_heads": 16, "ffn_size": 1536},
}
PAGE = 4096


def run(parameters: list[int], tensors: list[int], ways: list[str], engines: list[int], bucket_mib: int, repeats: int) -> dict[str, Any]:
    """Medians of `repeats` warm pushes for each size and number of tensors, and for each engine (those of `MODELS`)."""
    from tests.bench.private_ray import private_ray

    with private_ray(cpus=4):
        moved = [_moved(way, size, count, bucket_mib, repeats) for size in parameters for count in tensors for way in ways]
        loaded = [_loaded(size, bucket_mib, repeats) for size in engines]
    return {"moved": moved, "loaded": loaded, "targets": {"ratio_at_300M": TARGET}}


def table(figures: dict[str, Any]) -> list[list[Any]]:
    keys = ["memcpy_s", "transport_s", "transport_gbs", "ratio", "hash_trainer_s", "hash_engine_s", "load_s", "whole_s"]
    keys = ["way", "parameters", "tensors", *keys, *(f"{part}_s" for part in PARTS)]
    return [keys, *([row.get(key, "-") for key in keys] for row in [*figures["moved"], *figures["loaded"]])]


def _moved(way: str, parameters: int, tensors: int, bucket_mib: int, repeats: int) -> dict[str, Any]:
    import ray

    from raysys.runtime import compute_environment

    in_place = way == "in place"
    source = _actor(Source, compute_environment(2), None, parameters, tensors)
    sink = _actor(Sink, {"VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"})
    laps: list[dict[str, float]] = []
    try:
        ray.get(sink.start.remote())
        pusher, count = _pusher(source, sink, bucket_mib, in_place)
        for version in range(repeats + 1):
            lap = {"memcpy_s": memcpy_seconds(parameters * 4)}
            for name, on in (("transport_s", False), ("whole_s", True)):
                ray.get([end.hashing.remote(on) for end in (source, sink)])
                lap[name] = pusher.push(version).seconds["transfer"]
            lap["hash_trainer_s"], lap["hash_engine_s"] = ray.get([end.hashing.remote(False) for end in (source, sink)])
            laps.append(lap | _parts(source, sink, in_place))
    finally:
        ray.get([sink.close.remote(), source.close.remote()])
        for end in (source, sink):
            ray.kill(end)
    found = {name: statistics.median(lap[name] for lap in laps[1:]) for name in laps[0]}
    found |= {"ratio": found["memcpy_s"] / found["transport_s"], "transport_gbs": parameters * 4 / found["transport_s"] / 1e9}
    # The first push makes the pages of the object store and of the trainer's buffers.
    return {"way": way, "parameters": parameters, "tensors": tensors, "buckets": count, **found, "first": laps[0], "laps": laps[1:]}


def _loaded(parameters: int, bucket_mib: int, repeats: int) -> dict[str, Any]:
    import ray

    from raysys.config.parts import Rollout
    from raysys.config.runs import NewModel
    from raysys.models.scratch import new_causal
    from raysys.rollout.engine import environment
    from raysys.rollout.spec import RolloutSpec
    from raysys.runtime import compute_environment

    laps: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(new_causal(NewModel(context=64, initializer_range=0.02, **MODELS[parameters]), temporary, seed=0))
        config = Rollout(kv_cache_mib=64, max_sequences=4)
        spec = RolloutSpec(folder, "cpu", "float32", max_model_len=40, config=config, receiver=SharedMemoryReceiver, log_dir=folder)
        source = _actor(Source, compute_environment(2), folder)
        # The clocks go to the engine's process as a function.
        worker = _actor(ClockedWorker, environment(spec) | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}, spec)
        try:
            ray.get(worker.start.remote(), timeout=300)
            pusher, _ = _pusher(source, worker, bucket_mib, True)
            sizes = [int(np.prod(shape)) for shape, _ in ray.get(source.planned.remote()).manifest().values()]
            for version in range(repeats + 1):
                ray.get([source.hashing.remote(True), worker.clocks.remote()])
                whole = pusher.push(version + 1).seconds["transfer"]
                left, inside = ray.get([source.hashing.remote(True), worker.clocks.remote()])
                load = sum(inside.values()) - 2 * inside["digest"]  # `update_weights` hashes what it reads
                laps.append({"whole_s": whole, "hash_trainer_s": left, "hash_engine_s": inside["digest"], "load_s": load})
        finally:
            ray.get([worker.close.remote(), source.close.remote()])
            for end in (source, worker):
                ray.kill(end)
    found = {name: statistics.median(lap[name] for lap in laps[1:]) for name in laps[0]}
    found |= {"load_gbs": sum(sizes) * 4 / found["load_s"] / 1e9}
    return {"way": "in place", "parameters": sum(sizes), "tensors": len(sizes), **found, "laps": laps[1:]}


def memcpy_seconds(nbytes: int, times: int = 3) -> float:
    """Median time of a copy between two buffers whose pages exist."""
    source, target, found = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8), []
    for _ in range(times):
        began = time.perf_counter()
        np.copyto(target, source)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def _actor(kind: type, environment: dict[str, str], *arguments: Any) -> Any:
    import ray

    return ray.remote(kind).options(runtime_env={"env_vars": environment}).remote(*arguments)


def _pusher(source: Any, worker: Any, bucket_mib: int, in_place: bool) -> tuple[Any, int]:
    """A `Pusher` from one source to one worker, and the number of buckets."""
    import ray

    from raysys.config.parts import Deadlines, Weights
    from raysys.weights.push import Pusher

    def planned(max_bytes: int) -> Plan:
        return ray.get(source.bucket_plan.remote(max_bytes))

    def probed(ids: list[int]) -> np.ndarray:
        return ray.get(source.probe_logprobs.remote(ids))

    def lose(member: Any, cause: str) -> None:
        raise RuntimeError(cause)

    facts = {"memory": whose()} if in_place else {}
    member = type("Member", (), {"name": "worker", "state": "up", "handle": worker, "facts": facts})()
    trainer: Any = SimpleNamespace(bucket_plan=planned, memory=whose, gather_bucket=source.gather_bucket.remote, probe_logprobs=probed)
    engines: Any = SimpleNamespace(workers=[member], pushed=lambda version, members: None, lose=lose)
    pusher = Pusher(trainer, engines, Weights(bucket_mib=bucket_mib), Deadlines(push=120), probe_ids=[5, 90, 17, 33])
    return pusher, len(ray.get(source.planned.remote()).layouts())


def _parts(source: Any, sink: Any, in_place: bool) -> dict[str, float]:
    """Seconds of each part with one bucket under way at a time; `store` is Ray's: put, message, get."""
    import ray

    plan: Plan = ray.get(source.planned.remote())
    ray.get(sink.begin_update.remote(plan))
    sums = dict.fromkeys([f"{part}_s" for part in PARTS], 0.0)
    for index in range(len(plan.layouts())):
        later = ray.get(sink.marked.remote(source.gather_bucket.remote(index, in_place)))
        marks = [*ray.get(source.marks.remote()), *later]
        for name, began, ended in zip(sums, marks, marks[1:], strict=False):
            sums[name] += ended - began
    ray.get(sink.finish_update.remote(0))
    return sums


class Clock:
    """A function whose seconds are counted, and which gives `instead` while it is off."""

    def __init__(self, function: Callable[..., Any], instead: Any = None):
        self.function, self.instead, self.on, self.seconds = function, instead, True, 0.0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if not self.on:
            return self.instead
        began = time.perf_counter()
        try:
            return self.function(*arguments, **options)
        finally:
            self.seconds += time.perf_counter() - began

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)

    def switch(self, on: bool) -> float:
        """Turns it on or off; gives the seconds so far and counts anew."""
        spent, self.on, self.seconds = self.seconds, on, 0.0
        return spent


class Source:
    """Rank 0 of a trainer that only has weights: a model folder's, or so many in so many tensors."""

    def __init__(self, folder: str | None, parameters: int = 0, tensors: int = 1):
        import torch
        from torch.distributed import HashStore  # type: ignore[attr-defined]
        from transformers import AutoModelForCausalLM

        from raysys.training import weights

        torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        if folder:
            self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        else:
            state = {f"layers.{index // 10}.weight{index}": torch.randn(parameters // tensors) for index in range(tensors)}
            self._model = SimpleNamespace(state_dict=lambda keep_vars: state)
        rooms: Any = weights
        self._packer: Any = None
        self._marks = [0.0, 0.0]
        self._hash = rooms.digest = Clock(weights.digest, "")

    def bucket_plan(self, max_bytes: int) -> Plan:
        from raysys.training.weights import Packer, Whole

        self.close()
        self._packer = Packer(Whole(self._model), max_bytes)
        return self.planned()

    def planned(self) -> Plan:
        return self._packer.plan

    def close(self) -> None:
        if self._packer is not None:
            self._packer.close()

    def gather_bucket(self, index: int, in_place: bool) -> Bucket | None:
        began = time.monotonic()
        bucket = self._packer.gather(index, in_place)
        self._marks = [began, time.monotonic()]
        return bucket

    def marks(self) -> list[float]:
        return self._marks

    def hashing(self, on: bool) -> float:
        return self._hash.switch(on)

    def probe_logprobs(self, ids: list[int]) -> np.ndarray:
        import torch

        if not hasattr(self._model, "parameters"):
            return np.zeros(len(ids) - 1, np.float32)
        with torch.no_grad():
            logprobs = self._model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        return logprobs.gather(-1, torch.tensor(ids)[1:, None])[:, 0].numpy()


class Sink:
    """A rollout actor without an engine: the receiver is real, at its other end is a process that runs `serve`."""

    model_config = SimpleNamespace(dtype="torch.float32")

    async def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs,), daemon=True)
        self._process.start()
        self._turn, self._marks, self._receiver = asyncio.Lock(), [0.0, 0.0], SharedMemoryReceiver()
        with tempfile.TemporaryDirectory() as nothing:
            await self._receiver.ready(self, nothing)

    async def close(self) -> None:
        self._receiver.close()
        self._process.terminate()

    # -- what a push asks of a rollout actor

    async def begin_update(self, plan: Plan) -> None:
        await self._receiver.check(self, plan)
        await self._receiver.begin(self, plan)

    async def update(self, bucket: Bucket) -> None:
        await self._receiver.update(self, bucket)

    async def finish_update(self, version: int) -> list[str]:
        return await self._receiver.finish(self, version)

    async def probe(self, ids: list[int]) -> np.ndarray:
        return np.zeros(len(ids) - 1, np.float32)

    async def marked(self, bucket: Bucket) -> list[float]:
        """`update` with its times: bucket here, file written, file read, all answered."""
        began = time.monotonic()
        await self.update(bucket)
        return [began, *self._marks, time.monotonic()]

    async def hashing(self, on: bool) -> float:
        return await self._ask("hashing", on)

    # -- what the receiver asks of an engine

    async def init_weight_transfer_engine(self, request: Any) -> None:
        return None

    async def start_weight_update(self) -> None:
        return None

    async def update_weights(self, request: Any) -> None:
        written = time.monotonic()
        await self._ask("update", request.update_info)
        self._marks = [written, time.monotonic()]

    async def finish_weight_update(self, weight_version: str = "") -> None:
        return None

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        return [await self._ask(method, *args)]

    async def _ask(self, what: str, payload: Any = None) -> Any:
        async with self._turn:
            self._pipe.send((what, payload))
            return await asyncio.to_thread(self._pipe.recv)


def serve(pipe: Any) -> None:
    """The engine's stand-in: maps, touches and hashes what it is told of, with the engine's own functions."""

    from raysys.buckets import digest
    from raysys.weights.engine_backend import mapped

    clock, layouts, kept, cut = Clock(digest, ""), (), {}, {}
    while True:
        what, payload = pipe.recv()
        answer: Any = {"raysys_dtypes": {}, "raysys_wrong": []}.get(what)
        if what == "hashing":
            answer = clock.switch(payload)
        elif what == "raysys_expect":
            layouts = Plan("", payload).layouts()
        elif what == "update":
            path, index = payload["path"], payload["index"]
            if path not in kept:
                kept[path] = mapped(path)
            data = kept[path][: layouts[index].nbytes]
            if clock(data.numpy()) != payload["digest"]:
                raise AssertionError("what arrived is not what left")
            if (path, index) not in cut:
                cut[path, index] = layouts[index].tensors(data)
            data[::PAGE].sum()
        pipe.send(answer)


class ClockedWorker(RolloutWorker):
    """A rollout worker that can say how long its engine's process took for what."""

    async def clocks(self) -> dict[str, float]:
        """Seconds since the last call by function, in the engine's process."""
        return (await self._engine.collective_rpc(read_clocks))[0]


def read_clocks(worker: Any) -> dict[str, float]:
    from raysys.weights import engine_backend

    holders = dict.fromkeys(("start_weight_update", "update_weights", "finish_weight_update"), worker.weight_transfer_engine)
    found = {}
    for name, holder in {"digest": engine_backend, **holders}.items():
        clock = getattr(holder, name)
        if not isinstance(clock, Clock):
            clock = Clock(clock)
            setattr(holder, name, clock)
        found[name] = clock.switch(True)
    return found
