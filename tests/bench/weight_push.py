"""How fast a push travels over shared memory, part by part, beside a plain copy of the same bytes in memory.

Transport and hashing: real buckets (`BucketPlan`), the real `Pusher` and `SharedMemoryReceiver` in Ray actors, and in place of the
engine a process that maps each file and reads a number of every page of every tensor. In the transport figures both ends return one
constant for a digest, so that only bytes move. The engine's own load: a vLLM engine on CPU, clocked inside its process.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from raysys.batch import Bucket
from raysys.rollout.worker import RolloutWorker
from raysys.weights.receive import Manifest, SharedMemoryReceiver

DEFAULTS: dict[str, Any] = {
    "parameters": [1_000_000, 30_000_000, 300_000_000],
    "tensors": [100, 10_000],
    "engines": [1_000_000, 30_000_000],
    "bucket_mib": 256,
    "repeats": 5,
}
TARGET = 0.5
PARTS = ("gather", "store", "write", "map", "answer")
SIZES = {1_000_000: {"hidden_size": 128, "layers": 5, "heads": 4, "kv_heads": 4, "ffn_size": 384}}
SIZES[30_000_000] = {"hidden_size": 512, "layers": 9, "heads": 16, "kv_heads": 16, "ffn_size": 1536}
PAGE = 1024
"""float32 numbers of a page of memory."""


def run(parameters: list[int], tensors: list[int], engines: list[int], bucket_mib: int, repeats: int) -> dict[str, Any]:
    """Medians of `repeats` warm pushes for each size and number of tensors, and for each engine (1 M and 30 M exist)."""
    from tests.bench.private_ray import private_ray

    with private_ray(cpus=4):
        moved = [_moved(size, count, bucket_mib, repeats) for size in parameters for count in tensors]
        loaded = [_loaded(size, bucket_mib, repeats) for size in engines]
    return {"moved": moved, "loaded": loaded, "targets": {"ratio_at_300M": TARGET}}


def table(figures: dict[str, Any]) -> list[list[Any]]:
    keys = ["memcpy_s", "transport_s", "memcpy_gbs", "transport_gbs", "ratio", "hash_trainer_s", "hash_engine_s", "whole_s"]
    head = ["parameters", "tensors", *keys, *(f"{part}_s" for part in PARTS), "load_s"]
    rows = [[row["parameters"], row["tensors"], *(row[key] for key in keys), *row["parts"].values(), "-"] for row in figures["moved"]]
    for row in figures["loaded"]:
        found = [row.get(key, "-") for key in keys]
        rows.append([row["parameters"], row["tensors"], *found, *("-" for _ in PARTS), row["load_s"]])
    return [head, *rows]


def _moved(parameters: int, tensors: int, bucket_mib: int, repeats: int) -> dict[str, Any]:
    import ray

    from raysys.rollout.spec import RolloutSpec  # noqa: F401  the sink's process must find the package as this one does
    from raysys.runtime import compute_environment

    source: Any = ray.remote(Source).options(runtime_env={"env_vars": compute_environment(2)}).remote(None, parameters, tensors)
    sink: Any = ray.remote(Sink).options(runtime_env={"env_vars": {"VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}}).remote()
    try:
        ray.get(sink.start.remote())
        pusher, count = _pusher(source, sink, bucket_mib)
        nbytes, seconds = parameters * 4, {"memcpy": [], "transport": [], "whole": []}
        hashes: list[tuple[float, float]] = []
        parts: list[dict[str, float]] = []
        for repeat in range(repeats + 1):
            lap = {"memcpy": memcpy_seconds(nbytes)}
            for name in ("transport", "whole"):
                ray.get([end.hashing.remote(name == "whole") for end in (source, sink)])
                lap[name] = pusher.push(repeat).seconds["transfer"]
            spent = ray.get([end.hashed.remote() for end in (source, sink)])
            ray.get([end.hashing.remote(False) for end in (source, sink)])
            steps = _parts(source, sink, count)
            if repeat == 0:
                first = lap["transport"]  # pages of the store and of the trainer's buffers are made by the first push
                continue
            for name, one in lap.items():
                seconds[name].append(one)
            hashes.append((spent[0], spent[1]))
            parts.append(steps)
    finally:
        ray.kill(source)
        ray.get(sink.close.remote())
        ray.kill(sink)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "parameters": parameters,
        "tensors": tensors,
        "buckets": count,
        **{f"{name}_s": value for name, value in middle.items()},
        **{f"{name}_all_s": values for name, values in seconds.items()},
        "first_transport_s": first,
        **{f"{name}_gbs": nbytes / middle[name] / 1e9 for name in ("memcpy", "transport")},
        "ratio": middle["memcpy"] / middle["transport"],
        "hash_trainer_s": statistics.median(one for one, _ in hashes),
        "hash_engine_s": statistics.median(one for _, one in hashes),
        "parts": {part: statistics.median(one[part] for one in parts) for part in PARTS},
    }


def _loaded(parameters: int, bucket_mib: int, repeats: int) -> dict[str, Any]:
    import ray

    from raysys.config.parts import Rollout
    from raysys.config.runs import NewModel
    from raysys.models.scratch import new_causal
    from raysys.rollout.engine import environment
    from raysys.rollout.spec import RolloutSpec
    from raysys.runtime import compute_environment

    with tempfile.TemporaryDirectory() as temporary:
        folder = str(new_causal(NewModel(context=64, initializer_range=0.02, **SIZES[parameters]), temporary, seed=0))
        config = Rollout(kv_cache_mib=64, max_sequences=4)
        spec = RolloutSpec(folder, "cpu", "float32", max_model_len=40, config=config, receiver=SharedMemoryReceiver, log_dir=folder)
        source: Any = ray.remote(Source).options(runtime_env={"env_vars": compute_environment(2)}).remote(folder)
        extra = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # clocks go to the engine's process as a function
        worker: Any = ray.remote(ClockedWorker).options(runtime_env={"env_vars": environment(spec) | extra}).remote(spec)
        try:
            ray.get(worker.start.remote(), timeout=300)
            pusher, _ = _pusher(source, worker, bucket_mib)
            manifest, _ = ray.get(source.bucket_plan.remote(bucket_mib << 20))
            laps: list[dict[str, float]] = []
            for repeat in range(repeats + 1):
                ray.get(source.hashing.remote(True))
                ray.get(worker.clocks.remote())
                result = pusher.push(repeat + 1)
                clocks = ray.get(worker.clocks.remote())
                lap = {"whole_s": result.seconds["transfer"], "hash_trainer_s": ray.get(source.hashed.remote())}
                lap |= {"hash_engine_s": clocks.pop("digest"), **{f"{name}_s": value for name, value in clocks.items()}}
                laps.append(lap | {"load_s": sum(clocks.values()) - lap["hash_engine_s"]})
        finally:
            ray.kill(source)
            ray.get(worker.close.remote())
            ray.kill(worker)
    held = sum(int(np.prod(shape)) for shape, _ in manifest.values())
    medians = {name: statistics.median(lap[name] for lap in laps[1:]) for name in laps[0]}
    return {"parameters": held, "tensors": len(manifest), **medians, "load_gbs": held * 4 / medians["load_s"] / 1e9}


def memcpy_seconds(nbytes: int, times: int = 3) -> float:
    """Median time of a copy between two buffers whose pages exist."""
    source, target = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)
    found = []
    for _ in range(times):
        began = time.perf_counter()
        np.copyto(target, source)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def _pusher(source: Any, worker: Any, bucket_mib: int) -> tuple[Any, int]:
    """A `Pusher` from one source to one worker, and the number of buckets."""
    import ray

    from raysys.config.parts import Deadlines, Weights
    from raysys.weights.push import Pusher

    def nothing(*_: Any) -> None:
        return None

    def planned(max_bytes: int) -> tuple[Manifest, int]:
        return ray.get(source.bucket_plan.remote(max_bytes))

    def probed(ids: Sequence[int]) -> np.ndarray:
        return ray.get(source.probe_logprobs.remote(list(ids)))

    trainer: Any = SimpleNamespace(
        bucket_plan=planned, gather_bucket=lambda index: source.gather_bucket.remote(index), probe_logprobs=probed
    )
    pool: Any = SimpleNamespace(workers=[_Member(worker)], await_worker=nothing, pushed=nothing, lose=_lost)
    return Pusher(trainer, pool, Weights(bucket_mib=bucket_mib), Deadlines(push=120)), planned(bucket_mib << 20)[1]


class _Member:
    """A worker as a push sees it."""

    name, state = "worker", "up"

    def __init__(self, handle: Any):
        self.handle = handle


def _lost(member: _Member, cause: str) -> None:
    raise RuntimeError(f"{member.name}: {cause}")


def _parts(source: Any, sink: Any, count: int) -> dict[str, float]:
    """Seconds of each part with one bucket under way at a time; `store` is Ray's: put, message, get."""
    import ray

    ray.get(sink.begin_update.remote(ray.get(source.manifest.remote())))
    sums = dict.fromkeys(PARTS, 0.0)
    for index in range(count):
        marks: list[float] = ray.get(sink.marked.remote(source.gather_bucket.remote(index)))
        marks = [*ray.get(source.marks.remote()), *marks]
        for part, began, ended in zip(PARTS, marks, marks[1:], strict=False):
            sums[part] += ended - began
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


class Source:
    """Rank 0 of a trainer that only has weights: a model folder's, or so many in so many tensors."""

    def __init__(self, folder: str | None, parameters: int = 0, tensors: int = 1):
        import torch
        from transformers import AutoModelForCausalLM

        from raysys.training import weights

        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        if folder:
            self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        else:
            state = {f"layers.{index // 10}.weight{index}": torch.randn(parameters // tensors) for index in range(tensors)}
            self._model = SimpleNamespace(state_dict=lambda keep_vars: state)
        self._marks = [0.0, 0.0]
        self._blake3 = Clock(weights.blake3, weights.blake3())
        weights.blake3 = self._blake3  # type: ignore[misc]

    def bucket_plan(self, max_bytes: int) -> tuple[Manifest, int]:
        from raysys.training.weights import BucketPlan

        self._plan = BucketPlan(SimpleNamespace(module=self._model, zero_optimization_stage=lambda: 0), max_bytes)
        return self._plan.manifest, len(self._plan.buckets)

    def manifest(self) -> Manifest:
        return self._plan.manifest

    def gather_bucket(self, index: int) -> Bucket | None:
        began = time.monotonic()
        bucket = self._plan.gather(index)
        self._marks = [began, time.monotonic()]
        return bucket

    def marks(self) -> list[float]:
        return self._marks

    def hashing(self, on: bool) -> None:
        self._blake3.on, self._blake3.seconds = on, 0.0

    def hashed(self) -> float:
        return self._blake3.seconds

    def probe_logprobs(self, ids: list[int]) -> np.ndarray:
        import torch

        if not hasattr(self._model, "parameters"):
            return np.zeros(len(ids) - 1, np.float32)
        with torch.no_grad():
            logprobs = self._model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        return logprobs.gather(-1, torch.tensor(ids)[1:, None])[:, 0].numpy()


class Sink:
    """A rollout actor without an engine: the receiver is real, `Stub` is at its other end."""

    async def start(self) -> None:
        self._receiver, self._stub = SharedMemoryReceiver(), Stub()
        with tempfile.TemporaryDirectory() as nothing:
            await self._receiver.ready(self._stub, nothing)

    async def limits(self) -> dict[str, int]:
        return {"vocabulary": 100, "length": 8}

    async def begin_update(self, manifest: Manifest) -> None:
        await self._receiver.check(self._stub, manifest)
        await self._receiver.begin(self._stub, manifest)

    async def update(self, bucket: Bucket) -> None:
        await self._receiver.update(self._stub, bucket)

    async def marked(self, bucket: Bucket) -> list[float]:
        """`update` with its times: bucket here, file written, file read, all answered."""
        began = time.monotonic()
        await self.update(bucket)
        return [began, *self._stub.marks, time.monotonic()]

    async def finish_update(self, version: int) -> dict[str, str]:
        return await self._receiver.finish(self._stub, version)

    async def probe(self, ids: list[int]) -> np.ndarray:
        return np.zeros(len(ids) - 1, np.float32)

    async def hashing(self, on: bool) -> None:
        await self._stub.ask("hashing", on)

    async def hashed(self) -> float:
        return await self._stub.ask("hashed")

    async def close(self) -> None:
        self._receiver.close()
        self._stub.process.terminate()


class Stub:
    """What the receiver needs of an engine, in a process of its own."""

    model_config = SimpleNamespace(dtype="torch.float32")

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._turn, self.marks = asyncio.Lock(), [0.0, 0.0]
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()

    async def ask(self, what: str, payload: Any = None) -> Any:
        async with self._turn:
            self._pipe.send((what, payload))
            return await asyncio.to_thread(self._pipe.recv)

    async def init_weight_transfer_engine(self, request: Any) -> None:
        return None

    async def start_weight_update(self) -> None:
        await self.ask("begin")

    async def finish_weight_update(self, weight_version: str = "") -> None:
        return None

    async def update_weights(self, request: Any) -> None:
        written = time.monotonic()
        await self.ask("update", request.update_info)
        self.marks = [written, time.monotonic()]

    async def collective_rpc(self, method: str) -> list[Any]:
        return [await self.ask(method)]


def serve(pipe: Any) -> None:
    """The stub's process: maps, touches and hashes what it is told of, with the engine's own functions."""
    import torch

    from raysys.weights.digest import digest
    from raysys.weights.engine_backend import mapped, views

    clock, digests = Clock(digest, digest(b"")), {}
    while True:
        what, payload = pipe.recv()
        answer: Any = {"raysys_dtypes": {}, "raysys_digests": digests, "hashed": clock.seconds}.get(what)
        if what == "hashing":
            clock.on, clock.seconds = payload, 0.0
        elif what == "begin":
            digests = {}
        elif what == "update":
            with mapped(payload["path"]) as data:
                for name, tensor in views(data, SimpleNamespace(**payload)):
                    tensor.view(-1)[::PAGE].sum()
                    digests[name] = clock(tensor.view(-1).view(torch.uint8).numpy())
                del data, tensor
        pipe.send(answer)


class ClockedWorker(RolloutWorker):
    """A rollout worker that can say how long its engine's process took for what."""

    async def clocks(self) -> dict[str, float]:
        """Seconds since the last call by function, in the engine's process."""
        return (await self._engine.collective_rpc(read_clocks))[0]


def read_clocks(worker: Any) -> dict[str, float]:
    from raysys.weights import engine_backend

    holders = {"digest": engine_backend} | dict.fromkeys(
        ("start_weight_update", "update_weights", "finish_weight_update"), worker.weight_transfer_engine
    )
    found = {}
    for name, holder in holders.items():
        clock = getattr(holder, name)
        found[name] = clock.seconds if isinstance(clock, Clock) else 0.0
        setattr(holder, name, Clock(clock.function if isinstance(clock, Clock) else clock))
    return found
