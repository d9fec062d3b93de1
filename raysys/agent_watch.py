"""What a step's episodes say of themselves, and the alarm when training collapses. Paper: arXiv 2604.18235, section on instability."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raysys.agent_transcripts import Transcripts
from raysys.batch import Batch
from raysys.errors import NumericsError
from raysys.files import read_json_lines
from raysys.search_agent import exact, played
from raysys.training.calibrated import CalibAdvObjective

WELL = 0.1
"""Share of high-perplexity rollouts that a model must have been below before more of them can be an alarm."""


class Watched:
    """The loop's objective and metrics at once: what goes through `advantages` is told in the step's record.

    Args:
        objective, metrics: the ones that work.
        history: the records of the steps before, for the alarm.
        alarm: whether a collapse ends the run; the newest checkpoint is of before it.
        transcripts: where some of the episodes are kept for people to read; None keeps none.
    """

    def __init__(
        self,
        objective: CalibAdvObjective,
        metrics: Any,
        history: Sequence[dict[str, Any]] = (),
        alarm: bool = True,
        transcripts: Transcripts | None = None,
    ):
        self._objective, self._metrics, self._alarm, self._transcripts = objective, metrics, alarm, transcripts
        self._history = list(history)
        self._batch: Batch | None = None
        self._facts: dict[str, float] = {}

    def queries(self, trainer: Any, batch: Batch) -> None:
        return self._objective.queries(trainer, batch)

    def advantages(self, batch: Batch) -> Batch:
        self._facts = facts(self._objective, batch)
        self._batch = self._objective.advantages(batch)
        return self._batch

    def write(self, record: dict[str, Any]) -> None:
        """Raises NumericsError when training has collapsed by this step; its record is written first."""
        from raysys.methods.calibadv_metrics import collapse

        record |= self._facts
        self._metrics.write(record)
        self._history = [*self._history[: record["step"]], record]
        reason = collapse(seen(self._history)) if self._alarm else None
        if self._transcripts is not None and self._batch is not None:
            self._transcripts.write(record["step"], self._batch, always=reason is not None)
        self._batch = None
        if reason is not None:
            raise NumericsError(
                f"training has collapsed: {reason}",
                "the newest folder under checkpoints/ is of before; stop_on_collapse=false goes on all the same",
            )


def facts(objective: CalibAdvObjective, batch: Batch) -> dict[str, float]:
    """Of judged episodes. Shares: `exact_match`, `valid`, `answered`, `invalid_action`, `high_ppl`, and `loss_tokens` of all tokens;
    means: `searches`, `turns`; and those of `raysys.methods.calibadv_metrics.calibration_metrics` that are numbers.
    """
    import torch

    from raysys.methods.calibadv_metrics import calibration_metrics, high_ppl, run_perplexity

    given, turns = objective.given(batch), played(batch)
    runs = given["runs"]
    logprobs = torch.zeros(runs.shape)
    real = torch.from_numpy(np.arange(runs.shape[1])[None, :] < batch.lengths("response_ids")[:, None])
    logprobs[real] = torch.from_numpy(batch.ragged("rollout_logprobs").values.copy())
    invalid = torch.tensor([any(turn["action"] == "invalid" for turn in one) for one in turns])
    tokens = max(1, int(batch.lengths("response_ids").sum()))
    told = {
        "exact_match": float(np.mean(exact(batch))),
        "valid": float(np.mean([bool(one) and bool(one[-1].get("valid")) for one in turns])),
        "answered": float(np.mean([bool(one) and "answer" in one[-1] for one in turns])),
        "invalid_action": float(invalid.float().mean()),
        "searches": float(np.mean([sum("doc_ids" in turn for turn in one) for one in turns])),
        "turns": float(np.mean([len(one) for one in turns])),
        "loss_tokens": float(batch.trained.sum()) / tokens,
        "high_ppl": high_ppl(run_perplexity(logprobs, runs, given["run_counts"]), invalid),
    }
    told |= calibration_metrics(
        **given, rebalance=objective.rebalance, soft_penalty=objective.soft_penalty, silver_sizes=objective.silver_sizes(batch)
    )
    return {name: value for name, value in told.items() if np.isfinite(value)}


def history(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's steps so far."""
    return [record for _, record in read_json_lines(folder / "metrics.jsonl")]


def seen(records: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """What the alarm looks at. A share of bad texts counts once it has been low: a model that never could write has not collapsed."""
    names = {"f1": "reward", "entropy": "entropy", "high_ppl": "high_ppl"}
    found, well = [], False
    for record in records:
        one = {name: float(record[key]) for name, key in names.items() if record.get(key) is not None}
        well = well or one.get("high_ppl", 1.0) <= WELL
        found.append(one if well else {name: value for name, value in one.items() if name != "high_ppl"})
    return found
