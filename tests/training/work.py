"""What the ranks of `ranks.py` run, and the batches that they run it on."""

from __future__ import annotations

from typing import Any

import numpy as np

from raysys.batch import Batch, Ragged
from raysys.buckets import Layout
from raysys.config.parts import Trainer
from raysys.training.objectives import GopdObjective, Objective
from raysys.training.spec import Share, Tally, TrainerSpec
from raysys.training.split import split
from raysys.training.worker import TrainerWorker

RATE = 1e-3


def gopd_batch(rows: int = 13, seed: int = 0, **columns: Any) -> Batch:
    """Random prompts and responses of different lengths, one response empty, with log-probs of all parties."""
    rng = np.random.default_rng(seed)
    prompts, responses = rng.integers(1, 6, rows), rng.integers(1, 12, rows)
    responses[rows // 2] = 0

    def ids(lengths: np.ndarray) -> Ragged:
        return Ragged.of([rng.integers(3, 98, length) for length in lengths], np.int32)

    def logprobs() -> Ragged:
        return Ragged.of([rng.uniform(-6, -2, length) for length in responses], np.float32)

    made = {
        "prompt_id": [f"p{row}@0" for row in range(rows)],
        "sample": [0] * rows,
        "domain": ["add" if row % 3 else "rev" for row in range(rows)],
        "prompt_ids": ids(prompts),
        "response_ids": ids(responses),
        "rollout_logprobs": logprobs(),
        "teacher_logprobs": logprobs(),
        "reference_logprobs": logprobs(),
    }
    return Batch.from_columns(**made | columns)


def episodes(batch: Batch, seed: int = 5) -> Batch:
    """The same rows as episodes: about a third of their response tokens are the environment's, all of row 3."""
    responses, rng = batch.ragged("response_ids"), np.random.default_rng(seed)
    runs = np.where(rng.random(len(responses.values)) < 0.35, -1, 0)
    runs[responses.offsets[3] : responses.offsets[4]] = -1
    return batch.with_columns(runs=Ragged(runs.astype(np.int32), responses.offsets))


def spec(model: str, objective: Objective | None = None, dtype: str = "float32", rate: float = RATE, **trainer: Any) -> TrainerSpec:
    # Clipping bites in most steps, and a small epsilon keeps Adam's first steps from hiding the gradient's size.
    config = Trainer(**{"threads": 1, "micro_batch_tokens": 64, "clip": 0.05, "epsilon": 1e-4, **trainer})
    return TrainerSpec(config, model, objective or GopdObjective(reward_scale=1.25), rate, 10, 0, 1.0, "cpu", dtype)


def worker(of: TrainerSpec, rank: int, ranks: int, port: int) -> TrainerWorker:
    made = TrainerWorker(of, rank, ranks)
    made.start("127.0.0.1", port)
    return made


def shares(of: TrainerSpec, batch: Batch, rank: int, ranks: int, padded: bool = False) -> list[Share]:
    lengths = batch.lengths("prompt_ids"), batch.lengths("response_ids")
    sizes = {"mini_batches": of.config.mini_batches, "budget": of.config.micro_batch_tokens}
    steps = split(*lengths, ranks=ranks, **sizes, padded=padded, trained=batch.trained)
    return [step[rank] for step in steps]


def train(
    rank: int, ranks: int, port: int, *, of: TrainerSpec, batches: list[Batch], load: str = "", save: str = "", export: str = ""
) -> Any:
    """Each batch a step. Returns the steps' tallies and the weights afterwards (on rank 0)."""
    made = worker(of, rank, ranks, port)
    if load:
        made.load(load)
    tallies = [made.step(batch, shares(of, batch, rank, ranks, made.engine.padded)) for batch in batches]
    if save:
        made.save(save)
    if export:
        made.export(export)
    return tallies, weights(made)


def weights(made: TrainerWorker, max_bytes: int = 5000) -> dict[str, np.ndarray]:
    """All tensors by name, as float32; empty except on rank 0."""
    tensors = {}
    for index, layout in enumerate(made.bucket_plan(max_bytes).layouts()):
        bucket = made.gather_bucket(index)
        tensors |= unpack(bucket, layout) if bucket is not None else {}
    return tensors


def unpack(bucket: Any, layout: Layout) -> dict[str, np.ndarray]:
    tensors = {}
    for name, shape, dtype, start, size in zip(*vars(layout).values(), strict=True):
        raw = bucket.data[start : start + size]
        if dtype == "float32":
            flat = raw.view(np.float32)
        else:  # bfloat16 is the upper half of a float32
            flat = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        tensors[name] = flat.reshape(shape).copy()
    return tensors


def merged(results: list[Any], step: int = -1) -> dict[str, float]:
    """Metrics of one step from all ranks' tallies, as the group merges them."""
    first, *others = [tallies[step] for tallies, _ in results]
    whole = Tally(dict(first.sums), dict(first.parts), dict(first.extremes), dict(first.common))
    for other in others:
        whole.merge(other)
    return whole.metrics()
