"""Metrics of a step on the device, read with one copy at its end."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from raysys.training.spec import Tally


class Meter:
    """Collects 0-d tensors during a step's micro-batches, so that none of them waits for the device."""

    def __init__(self) -> None:
        self._sums: list[tuple[str, Tensor, Tensor | float]] = []
        self._parts: list[tuple[str, Tensor]] = []
        self._extremes: list[tuple[str, Tensor]] = []

    def part(self, name: str, value: Tensor) -> None:
        self._parts.append((name, value))

    def add(self, metrics: Mapping[str, Tensor | tuple[Tensor, Tensor]], tokens: int) -> None:
        """Metrics of one micro-batch as `Objective.loss` gives them."""
        for name, value in metrics.items():
            if isinstance(value, tuple):
                self._sums.append((name, *value))
            elif name.endswith(("_max", "_min")):
                self._extremes.append((name, value))
            else:
                self._sums.append((name, value * tokens, tokens))

    def read(self, tally: Tally) -> None:
        """Adds everything up into `tally` and starts over."""
        values = [total for _, total, _ in self._sums] + [count for _, _, count in self._sums if isinstance(count, Tensor)]
        values += [value for _, value in self._parts + self._extremes]
        numbers = torch.stack([value.detach().double() for value in values]).tolist() if values else []
        totals, rest = numbers[: len(self._sums)], iter(numbers[len(self._sums) :])
        for (name, _, count), total in zip(self._sums, totals, strict=True):
            tally.add(name, total, next(rest) if isinstance(count, Tensor) else count)
        for name, _ in self._parts:
            tally.part(name, next(rest))
        for name, _ in self._extremes:
            tally.extreme(name, next(rest))
        self.__init__()
