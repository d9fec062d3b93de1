"""Procedural rows: reasoning-gym tasks as prompts, without files and without Ray.

A domain's stream is the task's entries 0, 1, 2, ... under one seed, less those whose question belongs to another split. The split
is a hash of the question alone (case and spacing aside), not of seed, parameters, style or domain, so no question of `choose` or
`report` is ever met in `train`, whatever the configs of the runs. `train` streams also depend on the run's seed; the held-out
splits do not, so runs with different seeds are compared on the same tasks. A `train` stream draws with replacement; a held-out one
gives each question once.

Styles. `plain` asks the task's own question; its answer is the target. `scratchpad` is short enough for a small character model:

| task | prompt | target | judged by |
|---|---|---|---|
| chain_sum | `42-25=` | `71>17`: the answer reversed, then the answer; `15-43=`: `82->-28` | the text after the last `>` |
| spell_backward | `neon<` | `noen` | the whole text |

Row ids: `<domain>:<number in the stream>`, held-out ones `<split>/<domain>:<number>`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

from raysys import tasks
from raysys.config.parts import Procedural, Task
from raysys.data.rows import Row
from raysys.errors import CheckpointError, ConfigError, DataError

SPLITS = {"train": range(8), "choose": range(8, 9), "report": range(9, 10)}
"""Tenths of all questions that each split owns."""
PATIENCE = 20_000
"""Entries in a row that are of other splits, or do not fit, before a task is said to have none."""


def split_of(question: str) -> str:
    """The split that owns this question."""
    text = " ".join(question.casefold().split())
    tenth = _hash("split", text) % 10
    return next(name for name, tenths in SPLITS.items() if tenth in tenths)


def render(task: Task, entry: Mapping[str, Any]) -> tuple[str, str, str]:
    """Prompt, target and verifier of an entry in the task's style."""
    if task.style == "scratchpad":
        return _SCRATCHPADS[task.task](entry)
    return entry["question"], entry["answer"] or "", f"reasoning_gym:{task.task}"


def _sum(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    answer = entry["answer"]
    return entry["metadata"]["expression"].replace(" ", "") + "=", f"{answer[::-1]}>{answer}", "scratchpad:chain_sum"


def _backward(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    return entry["metadata"]["word"] + "<", entry["answer"], "reasoning_gym:spell_backward"


_SCRATCHPADS: dict[str, Callable[[Mapping[str, Any]], tuple[str, str, str]]] = {"chain_sum": _sum, "spell_backward": _backward}


def check(config: Procedural) -> None:
    """Raises ConfigError: no domain with a weight, an unknown task, wrong params, or a style that the task does not have."""
    if not any(task.weight for task in config.domains.values()):
        raise ConfigError("data.source.domains gives no domain a weight above 0")
    for domain, task in config.domains.items():
        try:
            tasks.check(task.task, task.params)
        except ConfigError as error:
            raise ConfigError(f"data.source.domains.{domain}: {error.message}", error.remedy) from None
        if task.style == "scratchpad" and task.task not in _SCRATCHPADS:
            raise ConfigError(
                f"data.source.domains.{domain}: task '{task.task}' has no scratchpad style (only {', '.join(_SCRATCHPADS)} have)",
                "use style: plain",
            )


class Stream:
    """One domain's rows in order. The cursor is (row, entry): rows given so far, and the entry to look at next.

    With `size` rows the stream repeats: each later epoch has the same rows, in an order of its own if `shuffle`.
    Restoring costs nothing for an endless `train` stream; a held-out or repeating one draws its rows again (10 us each).
    """

    def __init__(self, domain: str, task: Task, source: Procedural, seed: int, shuffle: bool, context_field: str | None = None):
        self._domain, self._task, self._split, self._size = domain, task, source.split, source.size
        self._shuffle, self._context = shuffle, context_field
        self._seed = _hash("seed", source.seed, seed if source.split == "train" else 0, source.split, domain, task.task) % tasks.SEEDS
        self._params = tasks.canonical(task.params)
        self._row = self._entry = 0
        self._seen: set[str] | None = None if source.split == "train" else set()
        self._pool: list[Row] = []
        self._order: tuple[int, list[int]] = (0, [])

    @property
    def patience(self) -> int:
        """Rows one after another among which all are; of an endless stream, as many as are worth a try."""
        return PATIENCE if self._size is None else 2 * self._size

    def next(self) -> tuple[Row, int]:
        """The next row and its epoch. Raises DataError: the task has no question for this split."""
        row, self._row = self._row, self._row + 1
        if self._size is None:
            return self._draw(row), 0
        epoch, place = divmod(row, self._size)
        place = self._place(epoch, place)
        while len(self._pool) <= place:
            self._pool.append(self._draw(len(self._pool)))
        return self._pool[place], epoch

    def state(self) -> dict[str, int]:
        return {"row": self._row, "entry": self._entry}

    def restore(self, state: Mapping[str, int]) -> None:
        """Back to where `state` was taken."""
        self._row = state["row"]
        if self._size is None and self._seen is None:
            self._entry = state["entry"]
        elif self._size is None:
            self._entry, self._seen = 0, set()
            while self._entry < state["entry"]:
                self._draw(0)

    def _place(self, epoch: int, place: int) -> int:
        if epoch == 0 or not self._shuffle:
            return place
        if self._order[0] != epoch:
            keys = [_hash("order", self._seed, epoch, number) for number in range(self._size or 0)]
            self._order = (epoch, sorted(range(len(keys)), key=keys.__getitem__))
        return self._order[1][place]

    def _draw(self, number: int) -> Row:
        for _ in range(PATIENCE):
            index, self._entry = self._entry, self._entry + 1
            entry = tasks.entry(self._task.task, self._params, self._seed, index)
            question = entry["question"]
            if split_of(question) != self._split or (self._seen is not None and question in self._seen):
                continue
            if self._seen is not None:
                self._seen.add(question)
            return self._row_of(entry, number, index)
        raise DataError(
            f"domain {self._domain}: no further question of '{self._task.task}' for split '{self._split}' among {PATIENCE} entries, "
            f"{number} were given",
            "ask for fewer rows, set data.source.size, or give the task more distinct questions (params)",
        )

    def _row_of(self, entry: Mapping[str, Any], number: int, index: int) -> Row:
        prompt, target, verifier = render(self._task, entry)
        row_id = f"{self._domain}:{number}" if self._split == "train" else f"{self._split}/{self._domain}:{number}"
        return Row(
            id=row_id,
            where=f"domain {self._domain}, row {number}",
            prompt=prompt,
            domain=self._domain,
            answer=entry["answer"] or "",
            target=target,
            verifier=verifier,
            metadata=tasks.recipe(self._task.params, self._seed, index),
            context=None if self._context is None else self._context_of(entry, target),
        )

    def _context_of(self, entry: Mapping[str, Any], target: str) -> str:
        fields = {"question": entry["question"], "answer": entry["answer"], "target": target, **entry["metadata"]}
        if self._context not in fields:
            raise ConfigError(f"data.context_field={self._context}: domain {self._domain} has {', '.join(fields)}")
        return str(fields[self._context])


class Mixture:
    """The domains' streams woven together by weight.

    Which domain a place belongs to is a fixed pattern, as long as the weights' sum over their common divisor and spread as evenly as
    whole numbers allow. So any run of rows that is a multiple of it, wherever it starts, has the exact proportions: 512 rows of
    weights 1:1 are 256 and 256, 128 rows of weights 7:1 are 112 and 16. The cursor is the place, and each stream's own.
    """

    def __init__(self, source: Procedural, seed: int, shuffle: bool, context_field: str | None = None):
        check(source)
        self.streams = {
            domain: Stream(domain, task, source, seed, shuffle, context_field) for domain, task in source.domains.items() if task.weight
        }
        self._pattern = pattern({domain: source.domains[domain].weight for domain in self.streams})
        self._place = 0

    def places(self, count: int) -> list[str]:
        """The domains of the next `count` rows."""
        start, self._place = self._place, self._place + count
        return [self._pattern[place % len(self._pattern)] for place in range(start, start + count)]

    def state(self) -> dict[str, Any]:
        return {"place": self._place, "streams": {domain: stream.state() for domain, stream in self.streams.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        if set(state.get("streams", ())) != set(self.streams):
            raise CheckpointError(
                f"the data cursor is of domains {sorted(state.get('streams', ()))}, this run has {sorted(self.streams)}",
                "resume with the run's own config",
            )
        self._place = state["place"]
        for domain, stream in self.streams.items():
            stream.restore(state["streams"][domain])


def pattern(weights: Mapping[str, int]) -> list[str]:
    """The shortest sequence with these proportions, each domain spread evenly."""
    divisor = math.gcd(*weights.values())
    spots = [
        ((number + 0.5) / weight, order, domain)
        for order, (domain, weight) in enumerate(weights.items())
        for number in range(weight // divisor)
    ]
    return [domain for _, _, domain in sorted(spots)]


def _hash(*parts: Any) -> int:
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
