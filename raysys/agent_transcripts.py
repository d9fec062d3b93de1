"""Some episodes of a run as a person reads them: what was said, what each step was reinforced or punished by. Paper: arXiv 2604.18235."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from raysys.batch import Batch
from raysys.files import append_json, read_json_lines
from raysys.search_agent import accepted, exact, played
from raysys.training.calibrated import CalibAdvObjective

FILE = "episodes.jsonl"
MOMENTS, GROUPS, SAMPLES = 8, 2, 16
"""What keeps the file small: steps between the first and the last, groups of a step, samples of a group."""


class Decodes(Protocol):
    """`raysys.data.text.Decoder`."""

    def texts(self, rows: Sequence[Any]) -> list[str]: ...
    def pieces(self, ids: Sequence[int], ends: Sequence[int]) -> list[str]: ...


class Transcripts:
    """Appends groups to the run's `episodes.jsonl`, a line a step; a step that is there is not written again.

    Args:
        folder: the run's.
        decoder: of the student's tokenizer.
        objective: the one that the run's advantages are from.
        steps: of the whole run.
    """

    def __init__(self, folder: Path, decoder: Decodes, objective: CalibAdvObjective, steps: int):
        self._path, self._decoder, self._objective, self._steps = folder / FILE, decoder, objective, steps
        self._every = max(1, math.ceil(steps / MOMENTS))
        self._written = {record["step"] for _, record in read_json_lines(self._path)}

    def due(self, step: int) -> bool:
        return step not in self._written and (step % self._every == 0 or step == self._steps - 1)

    def write(self, step: int, batch: Batch, always: bool = False) -> None:
        """Judged episodes with advantages. `always`: also where the step is not due. Raises CheckpointError."""
        if step in self._written or not (always or self.due(step)):
            return
        groups = [self._group(batch.take(rows)) for rows in chosen(batch, self._objective.threshold)]
        append_json(self._path, {"step": step, "groups": groups})
        self._written.add(step)

    def _group(self, rows: Batch) -> dict[str, Any]:
        from raysys.methods.calibadv import known_scores, run_advantages, run_lengths
        from raysys.methods.calibadv_metrics import run_perplexity

        given = self._objective.given(rows)
        runs, counts = given["runs"], given["run_counts"]
        plain = run_advantages(
            given["rewards"], given["groups"], run_lengths(runs, counts), counts, given["step_scores"], rebalance=None, soft_penalty=False
        )
        logprobs = rows.ragged("rollout_logprobs").padded(width=runs.shape[1])[0]
        perplexity = run_perplexity(plain.new_tensor(logprobs), runs, counts)
        scores = known_scores(given["step_scores"], counts)
        prompt = rows.ragged("prompt_ids")[0].tolist()
        asked = self._decoder.texts([prompt])[0]
        shown = min(len(rows), SAMPLES)
        return {
            "prompt_id": rows.strings("prompt_id")[0],
            "question": question(asked),
            "prompt": self._decoder.pieces(prompt, [])[0],
            "golds": accepted(rows.strings("answer")[0], rows.ids[0]),
            "of": len(rows),
            "samples": [
                self._told(rows, row) | {"segments": self._segments(rows, row, plain[row], scores[row], perplexity[row])}
                for row in range(shown)
            ],
        }

    def _told(self, rows: Batch, row: int) -> dict[str, Any]:
        one = rows.slice(row, 1)
        turns = played(one)[0]
        return {
            "sample": int(one.numbers("sample")[0]),
            "reward": float(one.numbers("reward")[0]),
            "exact_match": exact(one)[0],
            "valid": bool(turns) and bool(turns[-1].get("valid")),
            "searches": sum("doc_ids" in turn for turn in turns),
            "stop": one.strings("stop_reason")[0] if "stop_reason" in one else "",
        }

    def _segments(self, rows: Batch, row: int, plain: Any, scores: Any, perplexity: Any) -> list[dict[str, Any]]:
        """What follows one another in a response, `text` by `text`: of a run of generated tokens also what it is trained by."""
        runs, ids, advantages = (rows.ragged(name)[row] for name in ("runs", "response_ids", "advantages"))
        if not len(runs):
            return []
        ends = (np.flatnonzero(np.diff(runs)) + 1).tolist()
        turns = played(rows.slice(row, 1))[0]
        segments = []
        for start, end, text in zip([0, *ends], [*ends, len(runs)], self._decoder.pieces(ids.tolist(), ends), strict=True):
            run = int(runs[start])
            said: dict[str, Any] = {"run": run, "tokens": end - start, "text": text}
            if run >= 0:
                said |= {
                    "action": turns[run]["action"],
                    "shown": "doc_ids" in turns[run],
                    "advantage": float(advantages[start]),
                    "grpo": float(plain[run]),
                    "score": _number(scores[run]) if run < len(scores) else None,
                    "perplexity": _number(perplexity[run]),
                }
            segments.append(said)
        return segments


def chosen(batch: Batch, threshold: float) -> list[np.ndarray]:
    """The rows of some groups: first of those with a good episode and a worse one, then of those with advantages, then of others."""
    _, first, groups = np.unique(np.array(batch.strings("prompt_id")), return_index=True, return_inverse=True)
    rewards, advantages = batch.numbers("reward"), batch.ragged("advantages")
    blamed = np.array([bool(advantages[row].any()) for row in range(len(batch))])

    def rank(group: int) -> tuple[int, int]:
        rows = groups == group
        mixed = bool(blamed[rows].any())
        return (0 if mixed and rewards[rows].max() >= threshold else 1 if mixed else 2), int(first[group])

    return [np.flatnonzero(groups == group) for group in sorted(range(len(first)), key=rank)[:GROUPS]]


def question(prompt: str) -> str:
    """What is asked: behind the last `Question:` of a prompt, up to the end of its line; the whole where there is none."""
    _, found, rest = prompt.rpartition("Question:")
    return rest.strip().partition("\n")[0].strip() if found else prompt.strip()


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
