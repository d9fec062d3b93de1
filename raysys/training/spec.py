"""What crosses between the trainer group and its ranks. Imports neither torch nor Ray."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from raysys.config.parts import Trainer
from raysys.training.objectives import Objective


@dataclass(frozen=True)
class TrainerSpec:
    """What one rank is built from."""

    config: Trainer
    model: str
    """Hugging Face folder or id."""
    objective: Objective
    learning_rate: float
    steps: int
    """Where a falling learning rate ends."""
    seed: int
    temperature: float
    """Of the rollouts; divides the logits."""
    device: str
    """"cpu" or "gpu"."""
    dtype: str
    """"float32" or "bfloat16" (then with float32 masters)."""
    vocabulary: int | None = None
    """First ids that the objective's probabilities are over; None: all."""
    log_dir: str | None = None
    """Where DeepSpeed's own chatter goes, one file a rank; None drops it."""


@dataclass(frozen=True)
class Share:
    """One rank's part of one optimiser step."""

    rows: np.ndarray
    """Rows of the batch that this rank was sent, those with at least one response token."""
    tokens: int
    """Response tokens of the optimiser step, all ranks together."""
    sequences: int
    """Such rows, all ranks together."""
    micro_batches: int
    """Forward and backward passes that every rank makes, empty ones included: their collectives must match."""


@dataclass
class Tally:
    """Metrics on their way to a global mean."""

    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Total and count; the metric is total / count over all micro-batches and ranks."""
    parts: dict[str, float] = field(default_factory=dict)
    """Already a part of the whole: added up."""
    extremes: dict[str, float] = field(default_factory=dict)
    """The largest, or of names that end in `_min` the smallest."""
    common: dict[str, float] = field(default_factory=dict)
    """The same on every rank."""

    def add(self, name: str, total: float, count: float) -> None:
        before = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (before[0] + total, before[1] + count)

    def part(self, name: str, value: float) -> None:
        self.parts[name] = self.parts.get(name, 0.0) + value

    def extreme(self, name: str, value: float) -> None:
        further = min if name.endswith("_min") else max
        self.extremes[name] = further(value, self.extremes.get(name, value))

    def merge(self, other: Tally) -> Tally:
        """Takes in another rank's tally."""
        for name, (total, count) in other.sums.items():
            self.add(name, total, count)
        for name, value in other.parts.items():
            self.part(name, value)
        for name, value in other.extremes.items():
            self.extreme(name, value)
        return self

    def metrics(self) -> dict[str, float]:
        return self.parts | {name: total / count for name, (total, count) in self.sums.items() if count} | self.extremes | self.common
