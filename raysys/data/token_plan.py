"""The order of a run's sequences: decided by sources, weights and seed alone, so that a step number is the whole cursor.

Sample n of the run belongs to the source that a fixed pattern names, as sequence k of that source. A source's sequences come epoch by
epoch: its units are permuted, `window` neighbours at a time are mixed, and the rows of such a window are permuted. Where k lies follows
from the numbers of rows of the units before it; no token is read to find out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from raysys.data.corpus import digest
from raysys.data.procedural import pattern
from raysys.data.shards import Split
from raysys.errors import CheckpointError, DataError

_PERIOD = 1 << 14
"""Places of the pattern at most: weights are exact to one in so many."""
UNKNOWN = -1


@dataclass(frozen=True)
class Plan:
    """What workers need to know of a corpus.

    Attributes:
        sequence, vocabulary, eos: tokens of a sequence, number of ids, the end token's id.
        seed, shuffle, window: see above.
        weights: of each source.
        units: keys of each source's units, in the files' order.
        facts: what the data are, in words and digests, by name; equal for runs that see the same sequences in the same order.
    """

    sequence: int
    vocabulary: int
    eos: int
    seed: int
    shuffle: bool
    window: int
    weights: dict[str, float]
    units: dict[str, tuple[str, ...]]
    facts: dict[str, str]

    @cached_property
    def name(self) -> str:
        """Of its files in the cache."""
        return digest([self.facts, [digest(keys) for keys in self.units.values()]])

    def to_json(self) -> bytes:
        fields = ("sequence", "vocabulary", "eos", "seed", "shuffle", "window", "weights", "units", "facts")
        return json.dumps({name: getattr(self, name) for name in fields}).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Plan:
        values = json.loads(text)
        return cls(**values | {"units": {label: tuple(keys) for label, keys in values["units"].items()}})


def plan_file(name: str) -> str:
    return f"{name}.plan.json"


def counts_file(name: str) -> str:
    """`counts`: of each unit that is there, rows, held-out rows and tokens by key; `error`: what ended the making of others."""
    return f"{name}.counts.json"


def check_same(saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises CheckpointError, naming what differs, unless both are the facts of the same data."""
    different = [
        f"{name} was {saved.get(name, 'not there')}, is {now.get(name, 'not there')}"
        for name in sorted({*saved, *now})
        if saved.get(name) != now.get(name)
    ]
    if different:
        raise CheckpointError(
            "the run's data are not those that it was started with: " + "; ".join(different),
            "bring back the data and settings of the run, or start another run under another name",
        )


class Mixture:
    """Which source each sample is of, and the how manieth of it. Weights are proportions of sequences."""

    def __init__(self, weights: Mapping[str, float]):
        whole = dict(zip(weights, proportions(list(weights.values())), strict=True))
        self.labels = tuple(weights)
        order = pattern(whole)
        self._codes = np.array([self.labels.index(label) for label in order])
        # before[s, r]: samples of source s among the first r of the pattern.
        chosen = self._codes[None, :] == np.arange(len(self.labels))[:, None]
        self._before = np.concatenate([np.zeros((len(self.labels), 1), np.int64), np.cumsum(chosen, axis=1)], axis=1)

    def sample(self, number: int) -> tuple[str, int]:
        """Source of sample `number`, and its number among that source's."""
        round_, place = divmod(number, len(self._codes))
        source = self._codes[place]
        return self.labels[source], int(round_ * self._before[source, -1] + self._before[source, place])

    def until(self, rows: Mapping[str, int]) -> int:
        """Samples before the first one that needs more of some source than so many rows."""
        ends = []
        for label, own in rows.items():
            source = self.labels.index(label)
            round_, rest = divmod(own, int(self._before[source, -1]))
            ends.append(round_ * len(self._codes) + int(np.flatnonzero(self._codes == source)[rest]))
        return min(ends)


def proportions(weights: list[float]) -> list[int]:
    """Whole numbers of a sum of at most 2^14 or so: exact where the weights are simple fractions, else the nearest, none below 1."""
    simple = [Fraction(weight).limit_denominator(1000) for weight in weights]
    if all(math.isclose(float(part), weight, rel_tol=1e-9) for part, weight in zip(simple, weights, strict=True)):
        scale = math.lcm(*(part.denominator for part in simple))
        whole = [int(part * scale) for part in simple]
        whole = [number // math.gcd(*whole) for number in whole]
        if sum(whole) <= _PERIOD:
            return whole
    return [max(1, round(weight / sum(weights) * _PERIOD)) for weight in weights]


@dataclass(frozen=True)
class Place:
    """Where a sequence lies: `row` is its number in the window before the window's rows are permuted back."""

    epoch: int
    window: int
    row: int


class SourceOrder:
    """The sequences of one source, without end.

    Args:
        label: decides the order together with the plan's seed, so a source keeps its order when others come or go.
        split: the held-out one is never shuffled, has one epoch, and stands in the order in which its units are made.
    """

    def __init__(self, plan: Plan, label: str, split: Split = "train"):
        self.label, self._split = label, split
        self._units, self._window = len(plan.units[label]), plan.window
        self._shuffle, self._seed = plan.shuffle, [plan.seed % 2**63, int(hashlib.blake2b(label.encode(), digest_size=6).hexdigest(), 16)]
        self._windows: dict[int, list[np.ndarray]] = {}
        self._starts: dict[int, np.ndarray] = {}
        self.total: int | None = None
        """Sequences of an epoch, None while some unit is unknown."""
        self.know(np.full(self._units, UNKNOWN, np.int64))

    def know(self, rows: np.ndarray) -> None:
        """How many rows each unit has, int64 [units]; `UNKNOWN` where it is not made yet."""
        self._rows, self._starts = rows, {}
        self.total = None if (rows == UNKNOWN).any() else int(rows.sum())

    @property
    def known(self) -> int:
        """Sequences of the first epoch that can be found already."""
        return int(self._window_starts(0)[-1])

    def windows(self, epoch: int) -> list[np.ndarray]:
        """Numbers of the units of each window, in order."""
        if epoch not in self._windows:
            order = self._random(epoch, 0).permutation(self._units) if self._shuffle else np.arange(self._units)
            self._windows[epoch] = [order[at : at + self._window] for at in range(0, self._units, self._window)]
            _keep_newest(self._windows)
        return self._windows[epoch]

    def place(self, number: int) -> Place | None:
        """Where the source's sequence `number` is; None while that is unknown. Raises DataError: there is none such."""
        epoch, total = 0, self.total
        if total is not None:
            if total == 0:
                raise DataError(f"source {self.label} has no text for {self._split}", _REMEDIES[self._split])
            epoch, number = divmod(number, total)
            if epoch and self._split == "validation":
                raise DataError(f"source {self.label} has only {total} held-out sequences", _REMEDIES[self._split])
        starts = self._window_starts(epoch)
        if number >= starts[-1]:
            return None
        window = int(np.searchsorted(starts, number, side="right")) - 1
        return Place(epoch, window, number - int(starts[window]))

    def ready(self, epoch: int, window: int) -> bool:
        """Whether all units of the window are made."""
        return bool((self._rows[self.windows(epoch)[window]] != UNKNOWN).all())

    def after(self, epoch: int, window: int) -> tuple[int, int]:
        """Epoch and window that come next."""
        return (epoch, window + 1) if (window + 1) * self._window < self._units else (epoch + 1, 0)

    def permutation(self, epoch: int, window: int, rows: int) -> np.ndarray:
        """Which row of the window, of those of its units one behind another, stands at each place."""
        if not self._shuffle or self._split == "validation":
            return np.arange(rows)
        return self._random(epoch, 1 + window).permutation(rows)

    def _window_starts(self, epoch: int) -> np.ndarray:
        """Rows before each window that is known to the end, and before the next one."""
        if epoch not in self._starts:
            rows = [self._rows[units] for units in self.windows(epoch)]
            known = next((number for number, one in enumerate(rows) if (one == UNKNOWN).any()), len(rows))
            self._starts[epoch] = np.cumsum([0, *(int(one.sum()) for one in rows[:known])])
            _keep_newest(self._starts)
        return self._starts[epoch]

    def _random(self, epoch: int, *key: int) -> np.random.Generator:
        return np.random.default_rng([*self._seed, epoch, *key])


def _keep_newest(by_epoch: dict[int, Any]) -> None:
    """A batch may stand in two epochs, or three of a very small source."""
    while len(by_epoch) > 3:
        del by_epoch[next(iter(by_epoch))]


_REMEDIES = {
    "train": "check its files, data.min_characters and data.held_out_share",
    "validation": "raise data.held_out_share, or ask for fewer sequences",
}


def needed_order(plan: Plan, sizes: Mapping[str, list[int]]) -> list[tuple[str, int]]:
    """(source, unit) in the order in which epoch 0 will ask for them, judged by how much text the units hold.

    Args:
        sizes: bytes of each source's units.
    """
    found: list[tuple[float, str, int]] = []
    for label, weight in plan.weights.items():
        before = 0.0
        for window in SourceOrder(plan, label).windows(0):
            found += [(before / weight, label, int(unit)) for unit in window]
            before += sum(sizes[label][unit] for unit in window)
    return [(label, unit) for _, label, unit in sorted(found, key=lambda one: one[0])]


def rows_of(plan: Plan, label: str, counts: Mapping[str, Sequence[int]], split: Split) -> np.ndarray:
    """Rows of each unit of a source, for `SourceOrder.know`. `counts`: rows and held-out rows of the units that are made, by key."""
    column = 0 if split == "train" else 1
    return np.array([counts[key][column] if key in counts else UNKNOWN for key in plan.units[label]], np.int64)
