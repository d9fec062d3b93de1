"""A training worker's side of pretraining data: its share of each step's sequences, read from the token cache. No Ray here."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from raysys.data.shards import Folder, Shard, Split, read_shard
from raysys.data.token_plan import Mixture, Place, Plan, SourceOrder, counts_file, plan_file, rows_of
from raysys.errors import ConfigError, DataError, DeadlineError, InfrastructureError

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Packed:
    """A sequence.

    Attributes:
        ids: int32 [tokens], at most `Plan.sequence` of them.
        lengths: int32 [documents]; tokens of each document or part of one, which see each other only. Sum to `len(ids)`.
        source: label of its source.
        epoch: how often that source had been given out as a whole before.
    """

    ids: np.ndarray
    lengths: np.ndarray
    source: str
    epoch: int


class TokenStream:
    """Sequences by step. The cursor is the step number: any step can be asked for at any time, and is the same for every number of
    ranks but for how it is shared out. The next window of each source is read while training goes on; every rank reads whole windows,
    `data.shuffle_units` units of text, whatever its share of them is.

    Args:
        folder, name: of the token cache and of its plan: `TokenCache.path` and `TokenCache.plan.name`.
        batch: sequences of a step, of all ranks together.
        rank, world: this worker, and how many there are.
        split: `validation` gives held-out documents, in one order, each once.
        samples: how many there are in all, so that the last step is cut short; None: steps have no end.
        deadline: seconds that sequences may take to come, when they are not made yet.

    Raises:
        ConfigError: this node does not see the cache.
    """

    def __init__(
        self,
        folder: str,
        name: str,
        *,
        batch: int,
        rank: int = 0,
        world: int = 1,
        split: Split = "train",
        samples: int | None = None,
        deadline: float = 900.0,
    ):
        if batch < 1 or not 0 <= rank < world:
            raise ValueError(f"batch={batch}, rank={rank}, world={world}: expected batch >= 1 and 0 <= rank < world")
        self._folder, self._name, self._deadline = Folder.at(folder), name, deadline
        self._split: Split = split
        text = self._folder.read(plan_file(name))
        if text is None:
            raise ConfigError(f"{folder} holds no plan {name} on this node", "set data.cache to a folder or URI that all workers see")
        self.plan = Plan.from_json(text)
        self._mixture = Mixture(self.plan.weights)
        self._orders = {label: SourceOrder(self.plan, label, split) for label in self.plan.units}
        self._rows: dict[str, np.ndarray] = {}
        self._batch, self._rank, self._world, self._samples = batch, rank, world, samples
        self._stamp: tuple[int, int] | None = None
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="token stream")
        self._windows: dict[tuple[str, int, int], Future[_Window]] = {}
        self.stall_seconds = 0.0
        """Seconds spent in `take`: training stood still for as long."""
        self.tokens = 0
        """Tokens given out by this stream."""
        self.epochs = dict.fromkeys(self.plan.units, 0)
        """Of each source, that of the newest sequence given out."""
        self._refresh()

    def take(self, step: int) -> list[Packed]:
        """This rank's sequences of a step (from 0): of the `batch` samples from `step * batch` on, a run of neighbours, or none.

        Raises:
            DeadlineError: they were not made in time.
            DataError: a source has no usable text or, held out, too little; a shard is damaged; what ended the making of units.
            InfrastructureError: what ended it, where data are not to blame.
        """
        began = time.monotonic()
        try:
            size = self._batch if self._samples is None else max(0, min(self._batch, self._samples - step * self._batch))
            first, last = (step * self._batch + size * rank // self._world for rank in (self._rank, self._rank + 1))
            samples = [self._mixture.sample(number) for number in range(first, last)]
            places = [(label, self._place(label, number)) for label, number in samples]
            given: dict[int, Packed] = {}
            # Window by window, so that a step of many windows holds no more of them than another one.
            for at in sorted(range(len(places)), key=lambda at: (places[at][0], places[at][1].epoch, places[at][1].window)):
                label, place = places[at]
                given[at] = self._window(label, place.epoch, place.window).row(place, label)
                self.epochs[label] = place.epoch
            self.tokens += sum(len(one.ids) for one in given.values())
            self._look_ahead(dict(places))
            return [given[at] for at in range(len(places))]
        finally:
            self.stall_seconds += time.monotonic() - began

    @property
    def available(self) -> int | None:
        """Samples that there are before some source repeats, None while not all units are made. For validation there are no others."""
        self._refresh()
        totals = {label: order.total for label, order in self._orders.items()}
        known = {label: total for label, total in totals.items() if total is not None}
        return self._mixture.until(known) if len(known) == len(totals) else None

    def close(self) -> None:
        """Stops reading ahead."""
        self._reader.shutdown(wait=False, cancel_futures=True)
        self._windows.clear()

    def _place(self, label: str, number: int) -> Place:
        ends = time.monotonic() + self._deadline
        while (place := self._orders[label].place(number)) is None:
            if not self._refresh():
                if time.monotonic() > ends:
                    knob = "data.wait, or give data.tasks more CPUs"
                    raise DeadlineError("token stream", f"wait for more tokens of source {label}", self._deadline, knob)
                time.sleep(_POLL_SECONDS)
        return place

    def _refresh(self) -> bool:
        """Looks which units are made by now. Returns whether that is news."""
        stamp = self._folder.stamp(counts_file(self._name))
        if stamp is None or stamp == self._stamp:
            return False
        known: dict[str, Any] = json.loads(self._folder.read(counts_file(self._name)) or b"{}")
        self._stamp = stamp
        for label, order in self._orders.items():
            self._rows[label] = rows_of(self.plan, label, known.get("counts", {}), self._split)
            order.know(self._rows[label])
        if error := known.get("error"):
            raise (DataError if error["data"] else InfrastructureError)(error["message"], error["remedy"])
        return True

    def _window(self, label: str, epoch: int, window: int) -> _Window:
        """Read in the reader's thread; only this window of the source stays, and the one behind it."""
        self._begin(label, epoch, window)
        keep = {(label, epoch, window), (label, *self._orders[label].after(epoch, window))}
        for key in [key for key in self._windows if key[0] == label and key not in keep]:
            self._windows.pop(key).cancel()
        try:
            return self._windows[label, epoch, window].result(timeout=self._deadline)
        except TimeoutError:
            raise DeadlineError("token stream", f"read a shard of source {label}", self._deadline, "data.wait") from None

    def _begin(self, label: str, epoch: int, window: int) -> None:
        if (label, epoch, window) not in self._windows:
            order = self._orders[label]
            keys = [(self.plan.units[label][unit], int(self._rows[label][unit])) for unit in order.windows(epoch)[window]]
            self._windows[label, epoch, window] = self._reader.submit(_read, self._folder, keys, self._split, order, epoch, window)

    def _look_ahead(self, newest: Mapping[str, Place]) -> None:
        for label, place in newest.items():
            order = self._orders[label]
            following = order.after(place.epoch, place.window)
            if (self._split == "train" or following[0] == 0) and order.ready(*following):
                self._begin(label, *following)


def _read(folder: Folder, keys: list[tuple[str, int]], split: Split, order: SourceOrder, epoch: int, window: int) -> _Window:
    shards = [read_shard(folder, key, split, rows) for key, rows in keys if rows]
    ends = np.cumsum([shard.rows for shard in shards])
    return _Window(shards, ends, order.permutation(epoch, window, int(ends[-1]) if len(ends) else 0))


@dataclass(frozen=True)
class _Window:
    """Shards whose rows are mixed: row r is row `order[r]` of the shards one behind another."""

    shards: list[Shard]
    ends: np.ndarray
    order: np.ndarray

    def row(self, place: Place, label: str) -> Packed:
        row = int(self.order[place.row])
        number = int(np.searchsorted(self.ends, row, side="right"))
        shard, row = self.shards[number], row - int(self.ends[number - 1] if number else 0)
        ids = shard.ids[shard.starts[row] : shard.starts[row + 1]]
        lengths = shard.lengths[shard.pieces[row] : shard.pieces[row + 1]]
        return Packed(ids.copy(), lengths.copy(), label, place.epoch)  # a view would keep the whole window in memory
