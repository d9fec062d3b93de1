"""Rows made on the fly by reasoning-gym: verifiable tasks that need no download.

The only module that imports reasoning-gym. A domain is an endless sequence of tasks numbered from 0; a split keeps the
tasks whose text hashes into its share, so no task of one split ever appears in another. Evaluation splits give each
task once. The cursor of a domain is the number of its next task.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from raysys.config.parts import Procedural, Task
from raysys.errors import ConfigError, DataError

_SHARES = {"train": range(0, 80), "choose": range(80, 90), "report": range(90, 100)}
_PATIENCE = 20_000


@dataclass(frozen=True)
class Row:
    """One task as text. `target` is what a supervised run learns to write, `answer` what the verifier compares with."""

    id: str
    domain: str
    prompt: str
    target: str
    answer: str
    verifier: str
    metadata: str


class DomainStream:
    """One domain of a procedural source.

    Args:
        name: the domain's tag.
        task: what to make.
        source: split, size and seed.
        seed: the run's seed; the evaluation splits do not depend on it, so every run is measured on the same tasks.
    """

    def __init__(self, name: str, task: Task, source: Procedural, seed: int):
        self.name = name
        self._task, self._split, self._size = task, source.split, source.size
        base = f"{name}/{task.task}/{source.seed}" + (f"/{seed}" if source.split == "train" else "")
        self._seed = int.from_bytes(hashlib.blake2b(base.encode(), digest_size=6).digest(), "big")
        self._tasks = dataset(task.task, json.dumps(task.params, sort_keys=True), self._seed)
        self._seen: set[str] | None = None if source.split == "train" else set()
        self._next, self._given = 0, 0

    def state(self) -> dict[str, int]:
        return {"next": self._next, "given": self._given}

    def restore(self, state: dict[str, int]) -> None:
        self._next, self._given = 0, 0
        if self._seen is None:
            self._next, self._given = state["next"], state["given"]
            return
        self._seen.clear()  # which tasks were given already is part of an evaluation split's state: walk there again
        while self._next < state["next"]:
            self.row()

    def row(self) -> Row:
        """The next task. Raises DataError when the split has no further distinct task."""
        if self._size is not None and self._given and self._given % self._size == 0:
            self._next = 0
            if self._seen is not None:
                self._seen.clear()
        for _ in range(_PATIENCE):
            entry, number = self._tasks[self._next], self._next
            self._next += 1
            question = entry["question"]
            if _share(question) in _SHARES[self._split] and (self._seen is None or question not in self._seen):
                break
        else:
            raise DataError(
                f"domain {self.name}: no further task of split '{self._split}' among {_PATIENCE} tries, {self._given} were given",
                "ask for fewer rows, set data.source.size, or widen the task's params",
            )
        if self._seen is not None:
            self._seen.add(question)
        round_ = 0 if self._size is None else self._given // self._size
        self._given += 1
        return self._written(entry, f"{self.name}:{number}@{round_}")

    def _written(self, entry: dict[str, Any], row_id: str) -> Row:
        answer, metadata = str(entry["answer"]), json.dumps(entry["metadata"], default=str)
        task, prompt, target, verifier = self._task.task, entry["question"], str(entry["answer"]), f"reasoning_gym:{self._task.task}"
        if self._task.style == "scratchpad":
            if task == "chain_sum":  # least significant digit first, as sums are worked; what follows `>` is the answer
                prompt, target = entry["metadata"]["expression"].replace(" ", "") + "=", f"{answer[::-1]}>{answer}"
                verifier = f"scratchpad:{task}"
            else:
                prompt = entry["metadata"]["word"] + "<"
        return Row(row_id, self.name, prompt, target, answer, verifier, metadata)


@functools.lru_cache(maxsize=64)
def dataset(task: str, params: str, seed: int) -> Any:
    """A reasoning-gym data set; `params` as JSON. Raises ConfigError naming the task."""
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(task, seed=seed, size=2**31, **json.loads(params))
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"data.source: reasoning-gym cannot make task '{task}' with {params}: {error}") from None


def check_source(source: Procedural) -> None:
    """Raises ConfigError for an unknown task, bad params, or a style that the task has no form for."""
    if not source.domains:
        raise ConfigError("data.source.domains is empty", "name at least one domain")
    if not any(task.weight for task in source.domains.values()):
        raise ConfigError("data.source.domains: every weight is 0")
    for name, task in source.domains.items():
        if task.style == "scratchpad" and task.task not in ("chain_sum", "spell_backward"):
            raise ConfigError(f"data.source.domains.{name}: task '{task.task}' has no scratchpad style", "use style: plain")
        DomainStream(name, task, source, seed=0)


def shares(weights: dict[str, int], rows: int, already: dict[str, int]) -> list[str]:
    """Domain of each of the next `rows` rows: always the one that is furthest behind its share, so any prefix is balanced.

    Args:
        weights: share of each domain.
        already: rows given before, by domain; changed in place.
    """
    total = sum(weights.values())
    order = []
    for _ in range(rows):
        given = sum(already.values()) + 1
        name = max(weights, key=lambda one: weights[one] * given / total - already[one])
        already[name] += 1
        order.append(name)
    return order


def _share(question: str) -> int:
    return int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest(), "big") % 100
