"""Parts that die for the storm: real Ray actors with the interfaces of engine, trainer and scorer, and numbers in place of models.

What an engine answers holds a mark of the weights it used, so a sample that was drawn with other weights than it claims is found.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray

from raysys.batch import Batch
from raysys.buckets import Layout, Packed, Plan
from raysys.errors import DataError
from raysys.rollout.serving import Response, Serving
from raysys.rollout.spec import RolloutSpec, Sampling
from raysys.runtime import get

SIZE = 32


def mark(weights: np.ndarray) -> int:
    """Names a weight vector in two bytes."""
    return int.from_bytes(hashlib.blake2b(weights.tobytes(), digest_size=2).digest(), "big")


def logprobs(weights: np.ndarray, ids: Any) -> np.ndarray:
    """Stands for a forward pass: depends on every weight."""
    return np.array([-1.0 - float(np.sin(weights * (1 + int(token))).sum()) for token in list(ids)[1:]], np.float32)


class StormEngine(Serving):
    """An engine whose sample takes a random time and says, token by token, which weights it was drawn with.

    While there is a file `hold` in the run's folder no token comes.
    """

    def __init__(self, spec: RolloutSpec, rank: int):
        super().__init__(spec.config.max_sequences)
        self._hold = Path(spec.log_dir or ".") / "hold"
        self._weights, self._coming = np.zeros(SIZE), np.zeros(SIZE)
        self._gate = asyncio.Event()
        self._gate.set()

    async def start(self) -> dict[str, Any]:
        return {"vllm": "storm", "revision": "0", "pid": os.getpid(), "vocabulary": 2**16, "kv_tokens": 400}

    async def limits(self) -> dict[str, int]:
        return {"vocabulary": 100, "length": 16}

    async def respond(self, ids: np.ndarray, sampling: Sampling, seed: int) -> Response:
        await self._gate.wait()
        rng = np.random.default_rng(seed)
        tokens: list[int] = []
        spans: list[int] = []
        for _ in range(int(rng.integers(1, 6))):
            await asyncio.sleep(float(rng.exponential(0.01)))
            while self._hold.exists():
                await asyncio.sleep(0.02)
            if not spans or spans[-1] != self._version:
                spans += [len(tokens), self._version]
            tokens.append(mark(self._weights))
        return Response(tokens, [0.0] * len(tokens), spans, "stop")

    async def begin_update(self, plan: Any) -> None:
        self._coming = np.full(SIZE, np.nan)
        self._gate.clear()  # as the real worker: samples in progress go on, new ones wait

    async def update(self, bucket: Packed) -> None:
        await asyncio.sleep(0.01)
        self._coming = bucket.data.view(np.float64).copy()

    async def finish_update(self, version: int) -> list[str]:
        self._weights, self._version = self._coming, version
        self._gate.set()
        return [str(mark(self._weights))]

    async def probe(self, ids: list[int]) -> np.ndarray:
        return logprobs(self._weights, ids)

    async def quarantine(self, reason: str) -> None:
        return None

    async def close(self) -> None:
        return None


class StormTrainerRank:
    """Weights that every batch moves, and the memory of what each version was. The file `pace` says how many seconds a step takes."""

    def __init__(self, moving: bool, pace: Path):
        self._weights, self._steps, self._moving, self._pace = np.linspace(0, 1, SIZE), 0, moving, pace
        self._marks = {0: mark(self._weights)}

    def step(self, batch: Batch) -> dict[str, float]:
        for row, (ids, spans) in enumerate(zip(batch.ragged("response_ids").rows(), batch.ragged("version_spans").rows(), strict=True)):
            starts, versions = spans[::2].tolist(), spans[1::2].tolist()
            for start, end, version in zip(starts, [*starts[1:], len(ids)], versions, strict=True):
                if version in self._marks and set(ids[start:end].tolist()) != {self._marks[version]}:
                    raise DataError(f"sample {batch.ids[row]} says weights {version}, and was drawn with others")
        began = time.monotonic()
        while time.monotonic() - began < self._seconds():
            time.sleep(0.01)
        text = "".join(
            f"{name}:{ids.tolist() if self._moving else ''};" for name, ids in zip(batch.ids, batch.ragged("response_ids").rows())
        )
        push = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=SIZE).digest(), np.uint8) / 256
        self._weights = 0.9 * self._weights + push
        self._steps += 1
        self._marks[self._steps] = mark(self._weights)
        return {"loss": float(self._weights.sum())}

    def _seconds(self) -> float:
        """Read again and again, so that a test can end a long step."""
        try:
            return float(self._pace.read_text())
        except (OSError, ValueError):
            return 0.05

    def bucket(self) -> Packed:
        return Packed("w", 0, str(mark(self._weights)), self._weights.view(np.uint8))

    def probe(self, ids: list[int]) -> np.ndarray:
        return logprobs(self._weights, ids)

    def save(self, folder: str) -> None:
        Path(folder).mkdir(parents=True)
        np.savez(Path(folder) / "weights.npz", weights=self._weights, steps=self._steps)

    def load(self, folder: str) -> None:
        with np.load(Path(folder) / "weights.npz") as saved:
            self._weights, self._steps = saved["weights"], int(saved["steps"])
        self._marks = {self._steps: mark(self._weights)}


class StormTrainer:
    """The rank as the loop and the pusher see it. It may take `patience` seconds for anything."""

    def __init__(self, moving: bool, patience: float, pace: Path):
        self._rank: Any = ray.remote(StormTrainerRank).remote(moving, pace)
        self._patience = patience

    def _call(self, method: str, *arguments: Any) -> Any:
        ref = getattr(self._rank, method).remote(*arguments)
        return get(ref, timeout=self._patience, actor="trainer rank 0", operation=method, knob="deadlines.train")

    def step(self, batch: Batch) -> dict[str, float]:
        return self._call("step", batch)

    def save(self, folder: str) -> None:
        self._call("save", folder)

    def load(self, folder: str) -> None:
        self._call("load", folder)

    def bucket_plan(self, max_bytes: int) -> Plan:
        return Plan.of([Layout.of({"w": ((SIZE,), "float64", 8 * SIZE)})])

    def memory(self) -> str:
        return ""

    def gather_bucket(self, index: int, in_place: bool = False) -> Any:
        return self._rank.bucket.remote()

    def tensor_digests(self, index: int) -> list[str]:
        raise AssertionError("nothing is wrong with the bytes")

    def probe_logprobs(self, ids: Any) -> np.ndarray:
        return self._call("probe", list(ids))


class StormScorer:
    """Rewards by length, slowly enough to be hit."""

    def score(self, batch: Batch) -> Batch:
        time.sleep(0.02)
        return batch.with_columns(reward=batch.lengths("response_ids") / 6)


class StormScorers:
    """A scorer that is replaced when it dies, as `raysys.scoring.group` does it."""

    def __init__(self, patience: float) -> None:
        self._actor: Any = ray.remote(StormScorer).remote()
        self._patience = patience

    def annotate(self, batch: Batch, queries: Any = None) -> Batch:
        from raysys.errors import InfrastructureError

        for _ in range(3):
            try:
                ref = self._actor.score.remote(batch)
                return get(ref, timeout=self._patience, actor="scorer 0", operation="score", knob="deadlines.score")
            except InfrastructureError:
                ray.kill(self._actor)
                self._actor = ray.remote(StormScorer).remote()
        raise InfrastructureError("three scorers died in one step")
