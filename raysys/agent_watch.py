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
from raysys.search_agent import exact, f1, played
from raysys.training.calibrated import CalibAdvObjective

WELL = 0.1
"""Share of high-perplexity rollouts that a model must have been below before more of them can be an alarm."""
LATELY = 5
"""Steps over which that share is averaged."""


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
    """Of judged episodes: `behaviour`, `loss_tokens` (share of all tokens that is trained on), and those of
    `raysys.methods.calibadv_metrics.calibration_metrics` that are numbers.
    """
    from raysys.methods.calibadv_metrics import calibration_metrics

    tokens = max(1, int(batch.lengths("response_ids").sum()))
    told = behaviour(batch) | {"loss_tokens": float(batch.trained.sum()) / tokens}
    told |= calibration_metrics(
        **objective.given(batch),
        rebalance=objective.rebalance,
        soft_penalty=objective.soft_penalty,
        silver_sizes=objective.silver_sizes(batch),
    )
    return {name: value for name, value in told.items() if np.isfinite(value)}


def behaviour(batch: Batch) -> dict[str, float]:
    """Of episodes. Shares: `exact_match`, `valid`, `answered`, `invalid_action`, `high_ppl`; means: `searches`, `turns`."""
    turns = played(batch)
    return {
        "exact_match": float(np.mean(exact(batch))),
        "valid": float(np.mean([bool(one) and bool(one[-1].get("valid")) for one in turns])),
        "answered": float(np.mean([bool(one) and "answer" in one[-1] for one in turns])),
        "invalid_action": float(np.mean([_invalid(one) for one in turns])),
        "searches": float(np.mean([sum("doc_ids" in turn for turn in one) for one in turns])),
        "turns": float(np.mean([len(one) for one in turns])),
        "high_ppl": _high_ppl(batch, turns),
    }


def measured(batch: Batch) -> dict[str, float]:
    """What an evaluation tells of episodes: `f1` of the answers, whatever the form of the episodes, and some of `behaviour`."""
    found = behaviour(batch)
    return {"f1": float(np.mean(f1(batch)))} | {name: found[name] for name in ("exact_match", "searches", "high_ppl", "valid", "answered")}


def _invalid(turns: Sequence[dict[str, Any]]) -> bool:
    return any(turn["action"] == "invalid" for turn in turns)


def _high_ppl(batch: Batch, turns: Sequence[Sequence[dict[str, Any]]]) -> float:
    import torch

    from raysys.methods.calibadv_metrics import high_ppl, run_perplexity

    runs, real = batch.ragged("runs").padded(fill=-1)
    logprobs = torch.zeros(runs.shape)
    logprobs[torch.from_numpy(real)] = torch.from_numpy(batch.ragged("rollout_logprobs").values.copy())
    counts = torch.tensor([len(one) for one in turns])
    perplexity = run_perplexity(logprobs, torch.from_numpy(runs), counts)
    return high_ppl(perplexity, torch.tensor([_invalid(one) for one in turns]))


def history(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's steps so far."""
    return [record for _, record in read_json_lines(folder / "metrics.jsonl")]


def seen(records: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """What the alarm looks at: means over `LATELY` steps, for a step's few episodes are mostly chance. Of entropy, of which the first is
    the measure, none before there are so many; of the share of bad texts once that has been low: a model that never could write has not
    collapsed."""
    found: list[dict[str, float]] = []
    shares: list[float] = []
    entropies: list[float] = []
    for record in records:
        one = {"f1": float(record["reward"])} if record.get("reward") is not None else {}
        entropy = record.get("entropy")
        if entropy is not None:
            entropies.append(float(entropy))
            if len(entropies) >= LATELY or not np.isfinite(entropies[-1]):
                one["entropy"] = float(np.mean(entropies[-LATELY:]))
        share = record.get("high_ppl")
        if share is not None and (shares or share <= WELL):
            shares.append(float(share))
            one["high_ppl"] = float(np.mean(shares[-LATELY:]))
        found.append(one)
    return found
