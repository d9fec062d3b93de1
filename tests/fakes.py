"""Stand-ins with the rooms' interfaces, small enough to run hundreds of steps a second without Ray, vLLM or DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from raysys.batch import Batch, Ragged
from raysys.files import append_json


class Killed(BaseException):
    """Stands for kill -9: nothing that handles errors may catch it."""


class FakeSource:
    """Numbered prompts; a response's tokens depend on the prompt's number and the weights' version only."""

    def __init__(self, weights: FakeTrainer):
        self.position, self._weights = 0, weights

    def take(self, batch: int, max_age: int) -> Batch:
        rows = range(self.position, self.position + batch)
        self.position += batch
        responses = [[(row + self._weights.steps) % 7 + 1] * (row % 3 + 1) for row in rows]
        return Batch.from_columns(
            prompt_id=[f"p{row}@0" for row in rows],
            sample=[0] * batch,
            domain=["a" if row % 2 else "b" for row in rows],
            prompt_ids=Ragged.of([[row % 5] for row in rows], np.int32),
            response_ids=Ragged.of(responses, np.int32),
            version_spans=Ragged.of([[0, self._weights.steps]] * batch, np.int32),
            stop_reason=["stop"] * batch,
        )

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def backlog(self) -> None:
        return None

    def counts(self) -> dict[str, int]:
        return {}

    def restore(self, state: dict[str, Any], backlog: Batch | None = None, version: int = 0) -> None:
        self.position = state["position"]

    def status(self) -> dict[str, Any]:
        return {"groups": self.position}


class FakeTrainer:
    """One float64 weight that every batch moves; saving is a JSON file."""

    def __init__(self) -> None:
        self.weight, self.steps = 0.0, 0

    def step(self, batch: Batch) -> dict[str, float]:
        total = float(batch.ragged("response_ids").values.sum())
        self.weight = self.weight * 0.9 + total
        self.steps += 1
        return {"loss": self.weight}

    def save(self, folder: str) -> None:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "weight.json").write_text(json.dumps([self.weight, self.steps]))

    def load(self, folder: str) -> None:
        self.weight, self.steps = json.loads((Path(folder) / "weight.json").read_text())


class FakeScorers:
    def annotate(self, batch: Batch, queries: Any = None) -> Batch:
        return batch.with_columns(reward=batch.lengths("response_ids") / 3)


class FakeObjective:
    def queries(self, trainer: Any, batch: Batch) -> None:
        return None

    def advantages(self, batch: Batch) -> Batch:
        return batch


class FakeWeights:
    def push(self, version: int) -> dict[str, Any]:
        return {"fingerprint": f"f{version}", "parity_gap": 0.0}


class FileMetrics:
    def __init__(self, folder: Path):
        self._path = folder / "metrics.jsonl"

    def write(self, record: dict[str, Any]) -> None:
        append_json(self._path, record)


class FakePool:
    """The pool's books with workers that are lines of a script: what happens next is drawn from `chance`, and nothing takes time.

    Responses depend on the sample's id alone, or on the weights' version too (`moving`).
    """

    def __init__(self, chance: Callable[[int], int], workers: int = 3, retries: int = 10**6, moving: bool = False):
        from raysys.rollout.dispatch import Dispatcher

        self.version, self.lost, self.now = 0, 0, 0.0
        self._chance, self._moving = chance, moving
        self._books = Dispatcher(retries)
        self._asked: dict[int, tuple[Batch, int, Any]] = {}
        self._began: dict[int, int] = {}
        self._ghosts: list[tuple[str, int]] = []
        self._names = 0
        for _ in range(workers):
            self._join()

    def submit(self, prompts: Batch, sampling: Any, inbox: Any, wave: int = 0) -> list[int]:
        tickets = [self._books.add(1 + row % 7, wave) for row in range(len(prompts))]
        self._asked |= {ticket: (prompts, row, inbox) for row, ticket in enumerate(tickets)}
        return tickets

    def cancel(self, tickets: Any) -> None:
        for ticket in tickets:
            self._asked.pop(ticket, None)
            self._books.drop(ticket)

    def wait(self, done: Callable[[], bool], operation: str) -> None:
        for _ in range(100_000):
            if done():
                return
            self.happen()
        raise AssertionError("a hundred thousand events later there is still no batch")

    def counts(self) -> dict[str, int]:
        return {"redispatched": self._books.redispatched, "duplicates": self._books.duplicates, "lost_workers": self.lost}

    def happen(self) -> None:
        """One event: work is handed out, finishes, fails, is answered by a ghost; a worker dies or comes."""
        event = self._chance(12)
        if event <= 3:
            for name, tickets in self._books.assign(self.now).items():
                self._ghosts += [(name, ticket) for ticket in tickets]
                self._began |= dict.fromkeys(tickets, self.version)
            self._ghosts = self._ghosts[-40:]
        elif event <= 8 and self._ghosts:  # anyone who ever had something answers, perhaps too late or again
            name, ticket = self._ghosts[self._chance(len(self._ghosts))]
            if self._books.finish(name, ticket):
                self._deliver(ticket)
        elif event == 9 and self._ghosts:
            name, ticket = self._ghosts[self._chance(len(self._ghosts))]
            self._books.fail(name, ticket, "lost")
        elif event == 10 and self._books.workers:
            self._books.leave(list(self._books.workers)[self._chance(len(self._books.workers))], "died")
            self.lost += 1
        elif event == 11 and len(self._books.workers) < 5:
            self._join()
        if not self._books.workers:
            self._join()

    def _join(self) -> None:
        self._books.join(f"w{self._names}", 4, 40)
        self._names += 1

    def _deliver(self, ticket: int) -> None:
        from raysys.rollout.results import Result

        prompts, row, inbox = self._asked.pop(ticket)
        number = int(prompts.strings("prompt_id")[row][1:].partition("@")[0])
        began = self._began.pop(ticket)
        tokens = [(number + (began if self._moving else 0)) % 7 + 1] * (number % 3 + 1)
        rows = Batch.from_columns(
            response_ids=[tokens], rollout_logprobs=[[0.0] * len(tokens)], version_spans=[[0, began]], stop_reason=["stop"]
        )
        inbox.append(Result(ticket, rows, 0))


class FakePrompts:
    """Numbered prompts without end."""

    def __init__(self) -> None:
        self.position = 0

    def take(self, n: int) -> Batch:
        rows = range(self.position, self.position + n)
        self.position += n
        return Batch.from_columns(
            prompt_id=[f"p{row}@0" for row in rows],
            sample=[0] * n,
            domain=["a" if row % 2 else "b" for row in rows],
            prompt_ids=Ragged.of([[row % 5] for row in rows], np.int32),
        )

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
