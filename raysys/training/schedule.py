"""The learning rate of each step, from its number alone: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "cosine", "linear", "wsd"]


def learning_rate(
    peak: float, step: int, steps: int, schedule: Schedule, warmup_steps: int, lowest: float = 0.0, decay_share: float = 0.2
) -> float:
    """The rate of step `step` (0 is the first) of `steps`.

    Rises linearly over `warmup_steps` (the first step already trains, at peak / warmup_steps), then stays, or falls
    towards `lowest` times the peak, which it would reach at step number `steps`: the last step still trains. With `wsd` it
    stays first, and falls linearly over the last `decay_share` of all steps.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    start = steps * (1 - decay_share) if schedule == "wsd" else warmup_steps
    done = min(1.0, max(0.0, (step - start) / max(1, steps - start)))
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return peak * (lowest + (1 - lowest) * left)
