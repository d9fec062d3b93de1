"""A trainer that is not one: a transformers model whose weights move at will, with the protocol that a push needs; a pool beside it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from transformers import AutoModelForCausalLM

from raysys.buckets import Layout, Packed, Plan, digest
from raysys.config.parts import Deadlines, Weights
from raysys.rollout.pool import RolloutPool
from raysys.weights.push import Pusher

DEADLINES = Deadlines(placement=60, start=200, generate=60, push=60, heartbeat=20)


class MovingModel:
    """`lie` changes a bucket on its way; `asked` counts the buckets that were gathered."""

    def __init__(self, folder: str):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.layouts: list[Layout] = []
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

    def bucket_plan(self, max_bytes: int) -> Plan:
        entries = {name: (tuple(tensor.shape), "float32", tensor.nbytes) for name, tensor in self.state().items()}
        names = list(entries)
        self.layouts = [Layout.of({name: entries[name] for name in names[start : start + 5]}) for start in range(0, len(names), 5)]
        return Plan.of(self.layouts)

    def bucket(self, index: int) -> Packed:
        state, layout = self.state(), self.layouts[index]
        data = np.zeros(layout.nbytes, np.uint8)
        for name, start, size in zip(layout.names, layout.offsets, layout.sizes, strict=True):
            data[start : start + size] = raw(state[name])
        return Packed(Plan.of(self.layouts).mark, index, digest(data), data)

    def memory(self) -> str:
        return ""

    def gather_bucket(self, index: int, in_place: bool = False) -> Any:
        assert not in_place, "no worker sees this trainer's memory"
        self.asked += 1
        bucket = self.bucket(index)
        return ray.put(self.lie(bucket, self.layouts[index]) if self.lie is not None else bucket)

    def tensor_digests(self, index: int) -> list[str]:
        return self.layouts[index].digests(self.bucket(index).data)

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
    """A `lie`: one bit of `name` changes after the digest was taken."""

    def lie(bucket: Packed, layout: Layout) -> Packed:
        if name not in layout.names:
            return bucket
        data = bucket.data.copy()
        data[layout.offsets[layout.names.index(name)] + 1] ^= 1
        return dataclasses.replace(bucket, data=data)

    return lie


def stale(name: str, old: torch.Tensor) -> Any:
    """A `lie` with the right digest: the engine gets the old value of `name`."""

    def lie(bucket: Packed, layout: Layout) -> Packed:
        if name not in layout.names:
            return bucket
        data, start = bucket.data.copy(), layout.offsets[layout.names.index(name)]
        data[start : start + old.nbytes] = raw(old)
        return dataclasses.replace(bucket, data=data, digest=digest(data))

    return lie


def raw(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def replanned(plan: Plan, change: Mapping[str, Any]) -> Plan:
    """Names, shapes and dtypes otherwise than they are: each (shape, dtype) by name, None for a tensor that is left out."""
    manifest = {name: entry for name, entry in (plan.manifest() | change).items() if entry is not None}
    return Plan.of([Layout.of({name: (*entry, 4) for name, entry in manifest.items()})])


@dataclass
class Place:
    pool: RolloutPool
    trainer: MovingModel

    def pusher(self, **weights: Any) -> Pusher:
        return Pusher(self.trainer, self.pool, Weights(**weights), DEADLINES)
