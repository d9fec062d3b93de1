"""Stand-ins with the rooms' interfaces, small enough to run hundreds of steps a second without Ray, vLLM or DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from raysys.batch import Batch, Ragged


class Killed(BaseException):
    """Stands for kill -9: nothing that handles errors may catch it."""


class FakeSource:
    """Numbered prompts; a response's tokens depend on the prompt's number and the weights' version only."""

    def __init__(self, weights: FakeTrainer):
        self.position, self._weights = 0, weights

    def take(self, batch: int, max_age: int) -> Batch:
        rows = range(self.position, self.position + batch)
        self.position += batch
        responses = [[(row + self._weights.steps) % 7 + 1] * (row % 3 + 1) for row in rows]
        return Batch.from_columns(
            prompt_id=[f"p{row}@0" for row in rows],
            sample=[0] * batch,
            domain=["a" if row % 2 else "b" for row in rows],
            prompt_ids=Ragged.of([[row % 5] for row in rows], np.int32),
            response_ids=Ragged.of(responses, np.int32),
            version_spans=Ragged.of([[0, self._weights.steps]] * batch, np.int32),
            stop_reason=["stop"] * batch,
        )

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class FakeTrainer:
    """One float64 weight that every batch moves; saving is a JSON file."""

    def __init__(self) -> None:
        self.weight, self.steps = 0.0, 0

    def step(self, batch: Batch) -> dict[str, float]:
        total = float(batch.ragged("response_ids").values.sum())
        self.weight = self.weight * 0.9 + total
        self.steps += 1
        return {"loss": self.weight}

    def save(self, folder: str) -> None:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "weight.json").write_text(json.dumps([self.weight, self.steps]))

    def load(self, folder: str) -> None:
        self.weight, self.steps = json.loads((Path(folder) / "weight.json").read_text())


class FakeScorers:
    def annotate(self, batch: Batch, queries: Any = None) -> Batch:
        return batch.with_columns(reward=batch.lengths("response_ids") / 3)


class FakeObjective:
    def queries(self, trainer: Any, batch: Batch) -> None:
        return None

    def advantages(self, batch: Batch) -> Batch:
        return batch


class FakeWeights:
    def push(self, version: int) -> dict[str, Any]:
        return {"fingerprint": f"f{version}", "parity_gap": 0.0}


class FileMetrics:
    def __init__(self, folder: Path):
        self._path = folder / "metrics.jsonl"

    def write(self, record: dict[str, Any]) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps(record) + "\n")
