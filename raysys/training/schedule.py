"""The learning rate of each step, from its number alone: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    peak: float, step: int, steps: int, schedule: Literal["constant", "cosine", "linear"], warmup_steps: int, lowest: float = 0.0
) -> float:
    """The rate of step `step` (0 is the first) of `steps`.

    Rises linearly over `warmup_steps` (the first step already trains, at peak / warmup_steps), then stays, or falls
    towards `lowest` times the peak, which it would reach at step number `steps`: the last step still trains.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    done = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return peak * (lowest + (1 - lowest) * left)
