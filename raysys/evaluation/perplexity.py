"""Perplexity on fixed windows: the token mean of the negative log-likelihood, and e to its power.

Legend: N windows, T positions of a window, V vocabulary. A window is seen alone: its first token is not predicted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1024
"""Positions whose logits exist in float32 at once."""


def cut(ids: Sequence[int], length: int, windows: int | None = None) -> list[list[int]]:
    """Consecutive windows of `length` tokens that do not overlap, from the beginning; what is left at the end is no window.

    Raises:
        ValueError: `length` is below 2, or there are fewer tokens than that.
    """
    if length < 2:
        raise ValueError(f"length must be at least 2, so that something is predicted, got {length}")
    count = len(ids) // length
    if not count:
        raise ValueError(f"{len(ids)} tokens make no window of {length}")
    return [list(ids[start * length : (start + 1) * length]) for start in range(count if windows is None else min(windows, count))]


def window_nll(logits: Tensor, ids: Tensor, start: int = 1) -> tuple[float, int]:
    """Sum of -log p of a window's tokens from position `start` on, in nats, and how many they are.

    Args:
        logits: [T, V]; those at position t are for the token at t + 1, so the last ones are not used.
        ids: [T].
        start: from 1 on; a prompt's tokens may be left out.

    Raises:
        ValueError: shapes differ, or `start` is not positive.
    """
    import torch

    if logits.dim() != 2 or ids.shape != logits.shape[:1]:
        raise ValueError(f"logits must be [T, V] and ids [T], got {list(logits.shape)} and {list(ids.shape)}")
    if start < 1:
        raise ValueError(f"start must be at least 1: the first token is not predicted, got {start}")
    total = 0.0
    for first in range(start, len(ids), CHUNK):
        last = min(first + CHUNK, len(ids))
        part = logits[first - 1 : last - 1]
        part = part if part.dtype == torch.float64 else part.float()
        total += float(torch.nn.functional.cross_entropy(part, ids[first:last], reduction="sum").double())
    return total, max(0, len(ids) - start)


@dataclass
class Perplexity:
    """A running token mean, and the share of windows whose every token was the most likely one."""

    nll: float = 0.0
    tokens: int = 0
    windows: int = 0
    greedy: int = 0

    def add(self, nll: float, tokens: int) -> None:
        """A sum over some tokens, and how many they are."""
        self.nll, self.tokens = self.nll + nll, self.tokens + tokens

    def end(self, greedy: bool) -> None:
        """A window's end. `greedy`: greedy decoding from its start would have written it."""
        self.windows, self.greedy = self.windows + 1, self.greedy + greedy

    @property
    def accuracy(self) -> float:
        """Share of windows that greedy decoding writes. Raises ValueError: none has ended."""
        if not self.windows:
            raise ValueError("no window has ended")
        return self.greedy / self.windows

    @property
    def mean(self) -> float:
        """Nats a token. Raises ValueError: there is none."""
        if not self.tokens:
            raise ValueError("there is no token to predict")
        return self.nll / self.tokens

    @property
    def value(self) -> float:
        """The perplexity; infinite where it exceeds what a float holds."""
        try:
            return math.exp(self.mean)
        except OverflowError:
            return math.inf
