"""What crosses between the driver of a pretraining run and its ranks. Imports neither torch nor Ray."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raysys.config.pretraining import PretrainMoeConfig


@dataclass(frozen=True)
class PretrainSpec:
    """What one rank is built from."""

    config: PretrainMoeConfig
    vocabulary: int
    """Rows of the embedding."""
    start: str | None
    """Folder to go on from, as it is found here."""
    device: str
    """"cpu" or "gpu"."""
    dtype: str
    """"float32" or "bfloat16" (then with float32 masters)."""


@dataclass(frozen=True)
class Sequences:
    """Packed sequences of a rank's part of a pass. `ids`: [T]; `lengths`: of the pieces of documents, which do not see each other."""

    ids: np.ndarray
    lengths: np.ndarray

    @property
    def predicted(self) -> int:
        """Tokens that an earlier one of their piece predicts."""
        return len(self.ids) - len(self.lengths)

    @classmethod
    def none(cls) -> Sequences:
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64))
