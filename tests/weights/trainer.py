"""A trainer that is not one: a transformers model whose weights move at will, with the protocol that a push needs; a pool beside it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from transformers import AutoModelForCausalLM

from raysys.batch import Bucket
from raysys.config.parts import Deadlines, Weights
from raysys.rollout.pool import RolloutPool
from raysys.weights.digest import digest
from raysys.weights.push import Pusher

DEADLINES = Deadlines(placement=60, start=200, generate=60, push=60, heartbeat=20)


class MovingModel:
    """`lie` changes a bucket on its way; `asked` counts the buckets that were gathered."""

    def __init__(self, folder: str):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.names: list[list[str]] = []
        self.asked = 0
        self.lie: Any = None

    def move(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors by their Hugging Face names."""
        return self.model.state_dict()

    def bucket_plan(self, max_bytes: int) -> tuple[dict[str, tuple[tuple[int, ...], str]], int]:
        state = self.state()
        names = list(state)
        self.names = [names[start : start + 5] for start in range(0, len(names), 5)]
        return {name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in state.items()}, len(self.names)

    def bucket(self, index: int) -> Bucket:
        state = self.state()
        names = self.names[index]
        pieces = [state[name].contiguous().flatten().view(torch.uint8).numpy() for name in names]
        offsets = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])
        return Bucket(
            names=tuple(names),
            shapes=tuple(tuple(state[name].shape) for name in names),
            dtypes=tuple("float32" for _ in names),
            offsets=tuple(int(offset) for offset in offsets[:-1]),
            digests=tuple(digest(piece) for piece in pieces),
            data=np.concatenate(pieces),
        )

    def memory(self) -> str:
        return ""

    def gather_bucket(self, index: int, in_place: bool = False) -> Any:
        assert not in_place, "no worker sees this trainer's memory"
        self.asked += 1
        bucket = self.bucket(index)
        return ray.put(self.lie(bucket) if self.lie is not None else bucket)

    def probe_logprobs(self, ids: Sequence[int]) -> np.ndarray:
        tokens = torch.tensor([list(ids)])
        with torch.no_grad():
            logprobs = self.model(tokens).logits[0, :-1].double().log_softmax(-1)
        return logprobs.gather(-1, tokens[0, 1:, None])[:, 0].numpy()

    def copy(self) -> MovingModel:
        return copy.deepcopy(self)

    def logprobs(self, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
        return self.probe_logprobs([*prompt.tolist(), *response.tolist()])[len(prompt) - 1 :]


def flipped(name: str) -> Any:
    """A `lie`: one bit of `name` changes after its digest was taken."""

    def lie(bucket: Bucket) -> Bucket:
        if name not in bucket.names:
            return bucket
        data = bucket.data.copy()
        data[bucket.offsets[bucket.names.index(name)] + 1] ^= 1
        return dataclasses.replace(bucket, data=data)

    return lie


def stale(name: str, old: torch.Tensor) -> Any:
    """A `lie` with right digests: the engine gets the old value of `name`."""

    def lie(bucket: Bucket) -> Bucket:
        if name not in bucket.names:
            return bucket
        at, piece = bucket.names.index(name), old.contiguous().flatten().view(torch.uint8).numpy()
        data, digests = bucket.data.copy(), list(bucket.digests)
        data[bucket.offsets[at] : bucket.offsets[at] + len(piece)] = piece
        digests[at] = digest(piece)
        return dataclasses.replace(bucket, data=data, digests=tuple(digests))

    return lie


@dataclass
class Place:
    pool: RolloutPool
    trainer: MovingModel

    def pusher(self, **weights: Any) -> Pusher:
        return Pusher(self.trainer, self.pool, Weights(**weights), DEADLINES)
