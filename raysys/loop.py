"""The on-policy loop, on one screen.

    prompts -> rollout pool -> scoring -> trainer -> weights back into the pool

Supervised runs are this loop too: their source is data, nothing is scored and nothing is pushed. Synchronous training
is `max_age=0` of the general form. What differs from a textbook policy-gradient loop: the importance weight corrects
engine against trainer numerics, not an old policy, and the step's own forward pass supplies the student term of the
advantage, so no separate pass for old log-probs is made (unless `trainer.mini_batches` asks for several updates).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from raysys.batch import Batch
from raysys.ledger import Ledger
from raysys.runtime import Stopwatch


class Source(Protocol):
    def take(self, batch: int, max_age: int) -> Batch: ...
    def state(self) -> dict[str, Any]: ...
    def backlog(self) -> Batch | None: ...
    def counts(self) -> dict[str, int]: ...


class Scorers(Protocol):
    def annotate(self, batch: Batch, queries: Any = None) -> Batch: ...


class Objective(Protocol):
    def queries(self, trainer: Any, batch: Batch) -> Any: ...
    def advantages(self, batch: Batch) -> Batch: ...


class Trainer(Protocol):
    def step(self, batch: Batch) -> dict[str, float]: ...
    def save(self, folder: str) -> None: ...


class Pushes(Protocol):
    def push(self, version: int) -> dict[str, Any]: ...


class Writes(Protocol):
    def write(self, record: dict[str, Any]) -> None: ...


class Evaluates(Protocol):
    def due(self, step: int) -> bool: ...
    def run(self, step: int) -> bool:
        """Evaluates the weights after `step` steps; True asks the loop to stop."""
        ...


@dataclass(frozen=True)
class Parts:
    """The rooms that one run wires together."""

    source: Source
    scorers: Scorers
    objective: Objective
    trainer: Trainer
    weights: Pushes
    ledger: Ledger
    evaluator: Evaluates
    metrics: Writes
    watch: Stopwatch = field(default_factory=Stopwatch)
    """Where the loop's time goes; `.phase` says what it does now."""


def train(parts: Parts, *, steps: int, batch: int, max_age: int = 0, checkpoint_every: int = 10) -> int:
    """Runs from the ledger's step to `steps`; returns the step it ended at (earlier if the evaluator said stop).

    Every step is recorded in `metrics.jsonl`, seconds by phase included; what comes between two records (evaluation,
    checkpoint) is timed into the later one, an evaluation before the first step into its.
    """
    source, ledger, trainer = parts.source, parts.ledger, parts.trainer
    watch = parts.watch
    watch.lap()
    # Before the first step, and after a resume: a step on record is not evaluated again, but may say that the run was to stop there.
    if parts.evaluator.due(ledger.step):
        with watch("evaluate"):
            if parts.evaluator.run(ledger.step):
                return ledger.step
    for step in range(ledger.step, steps):
        with watch("generate"):
            samples = source.take(batch, max_age)
        with watch("score"):
            scored = parts.scorers.annotate(samples, parts.objective.queries(trainer, samples))
        with watch("train"):
            metrics = trainer.step(parts.objective.advantages(scored))
        with watch("push"):
            pushed = parts.weights.push(step + 1)
        record = {"step": step, "version": step + 1} | describe(scored, step) | metrics | pushed | recovered(source.counts())
        record["seconds"] = watch.lap()
        with watch("record"):
            parts.metrics.write(record)
            ledger.commit(step, samples.ids, step + 1)
        stop = False
        if parts.evaluator.due(step + 1):
            with watch("evaluate"):
                stop = parts.evaluator.run(step + 1)
        if stop or step + 1 == steps or (step + 1) % checkpoint_every == 0:
            with watch("checkpoint"):
                ledger.checkpoint(step + 1, trainer, source)
        if stop:
            return step + 1
    return max(steps, ledger.step)


def describe(batch: Batch, version: int) -> dict[str, float | None]:
    """What the batch says of itself: mean reward, response tokens, share cut off, oldest weight version in it."""
    facts: dict[str, float | None] = {"response_tokens": float(np.mean(batch.lengths("response_ids")))}
    if "reward" in batch:
        reward, domains = batch.numbers("reward"), np.array(batch.strings("domain"))
        facts["reward"] = float(np.mean(reward))
        facts |= {f"reward/{name}": float(np.mean(reward[domains == name])) for name in sorted(set(domains.tolist())) if name}
    elif "version_spans" in batch:
        facts["reward"] = None  # sampled rows that nothing judges: a reader of `metrics.jsonl` finds the key all the same
    if "stop_reason" in batch:
        facts["truncated"] = float(np.mean([reason == "length" for reason in batch.strings("stop_reason")]))
    if "version_spans" in batch:
        spans = batch.ragged("version_spans")
        facts["age_max"] = float(version - int(spans.values[1::2].min(initial=version)))
        if facts["age_max"]:
            ages = version - np.array([row[1] for row in spans.rows()])
            facts |= {f"age/{age}": float(np.mean(ages == age)) for age in np.unique(ages).tolist()}
    return facts


def recovered(counts: dict[str, int]) -> dict[str, dict[str, int]]:
    """What went wrong so far in this process and was made good, if anything did."""
    return {"recovered": counts} if any(counts.values()) else {}
