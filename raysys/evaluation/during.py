"""Evaluation inside a run: held-out prompts through the run's own engines, before, every so often, and after."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raysys.batch import Batch
from raysys.evaluation.accuracy import EvaluationResult, run_evaluation
from raysys.files import append_json, read_json_lines, write_json

log = logging.getLogger(__name__)


class Evaluator:
    """Decides when to evaluate, records the result, keeps the best weights, and may ask the loop to stop.

    Args:
        generate: prompts to samples, with the weights of the step (the caller makes sure they are pushed).
        prompts: the held-out prompts, repeated per sample already.
        decode, score: see `run_evaluation`.
        folder: the run folder; results go to `evaluation.jsonl` and `samples.jsonl`.
        label: what the record is called; None: "before", "after" or the step.
        steps, every: evaluate at 0, at `steps`, and at multiples of `every` (None: only at the ends).
        samples: responses a prompt; 1 is greedy.
        stop_at: accuracy by domain at which the run may end.
        export: writes a Hugging Face folder; called when the mean accuracy is the best so far.
        measure: see `run_evaluation`; `headline` is the one of its numbers by which weights are the best, None: mean accuracy.
        before: called with the step before anything is generated (supervised runs push their weights here).
    """

    def __init__(
        self,
        *,
        generate: Callable[[Batch], Batch],
        prompts: Batch,
        decode: Callable[[Sequence[Any]], list[str]],
        score: Callable[[str, str, str, str], float],
        folder: Path,
        steps: int,
        every: int | None,
        samples: int = 1,
        stop_at: Mapping[str, float] | None = None,
        export: Callable[[str], None] | None = None,
        before: Callable[[int], Any] | None = None,
        told: Callable[[str], None] = log.info,
        examples: int = 5,
        label: str | None = None,
        facts: Mapping[str, Any] | None = None,
        measure: Callable[[Batch], dict[str, float]] | None = None,
        headline: str | None = None,
    ):
        self._generate, self._prompts, self._decode, self._score = generate, prompts, decode, score
        self._folder, self._steps, self._every, self._samples = folder, steps, every, samples
        self._stop_at, self._export, self._before, self._told = dict(stop_at or {}), export, before, told
        self._examples, self._label, self._facts = examples, label, dict(facts or {})
        self._measure, self._headline = measure, headline
        known = [record for _, record in read_json_lines(folder / "evaluation.jsonl")]
        self._done = {record["step"]: record for record in known if label is None or record["label"] == label}
        self._best = max((record["mean"] for record in self._done.values() if record["step"] > 0), default=-1.0)

    def due(self, step: int) -> bool:
        return step in (0, self._steps) or (self._every is not None and step % self._every == 0)

    def run(self, step: int) -> bool:
        """Evaluates once; a step already on record is not repeated. True: every domain of `stop_at` is reached."""
        if step not in self._done:
            if self._before is not None:
                self._before(step)
            result = run_evaluation(
                self._generate,
                self._prompts,
                self._decode,
                self._score,
                samples=self._samples,
                examples=self._examples,
                measure=self._measure,
            )
            self._record(step, result)
        reached = {domain: facts["mean"] for domain, facts in self._done[step]["domains"].items()}
        return step > 0 and bool(self._stop_at) and all(reached.get(name, 0.0) >= bar for name, bar in self._stop_at.items())

    def _record(self, step: int, result: EvaluationResult) -> None:
        label = self._label or ("before" if step == 0 else "after" if step == self._steps else f"step {step}")
        facts = result.to_dict()
        mean = mean_accuracy(facts) if self._headline is None else facts["measures"][self._headline]
        record = {"step": step, "label": label, "mean": mean} | self._facts | {k: v for k, v in facts.items() if k != "examples"}
        append_json(self._folder / "evaluation.jsonl", record)
        for example in facts["examples"]:
            append_json(self._folder / "samples.jsonl", {"step": step, "label": label} | example)
        self._done[step] = record
        told = facts["measures"] or {name: domain["mean"] for name, domain in facts["domains"].items()}
        self._told(f"evaluation {label}: " + "  ".join(f"{name} {value:.3f}" for name, value in told.items()))
        if self._export is not None and step > 0 and record["mean"] > self._best:
            self._best = record["mean"]
            best = self._folder / "checkpoints" / "best"
            self._export(str(best))
            write_json(best / "best.json", {"step": step, "mean": record["mean"]})


class NoEvaluation:
    """The evaluator of a run that has none."""

    def due(self, step: int) -> bool:
        return False

    def run(self, step: int) -> bool:
        return False


def mean_accuracy(facts: Mapping[str, Any]) -> float:
    """Mean over domains, each counted once."""
    means = [domain["mean"] for domain in facts["domains"].values()]
    return sum(means) / len(means) if means else 0.0
