"""Loop, ledger, source and the pool's books together, while workers die, answer late and the driver itself is killed, in any order.

No process is harmed here (`tests/chaos` does that): an event is a draw, so hypothesis finds the shortest story that breaks a promise.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.config.runs import GopdConfig
from raysys.errors import ConfigError
from raysys.evaluation.during import NoEvaluation
from raysys.ledger import Ledger
from raysys.loop import Parts, train
from raysys.rollout.source import OnPolicySource
from raysys.rollout.spec import Sampling
from tests.fakes import FakeObjective, FakePool, FakePrompts, FakeScorers, FakeTrainer, FileMetrics, Killed

BATCH, STEPS, EVERY = 3, 9, 2


class Weights:
    def __init__(self, pool: FakePool):
        self._pool = pool

    def push(self, version: int) -> dict[str, float]:
        assert version == self._pool.version + 1, "versions go up one by one"
        self._pool.version = version
        return {}


class Dying:
    """Stands before a part and ends the driver at one of its calls."""

    def __init__(self, part: object, method: str, at: int):
        self._part, self._method, self._left = part, method, at

    def __getattr__(self, name: str):
        if name == self._method:
            self._left -= 1
            if self._left < 0:
                raise Killed
        return getattr(self._part, name)


def attempt(folder: Path, max_age: int, chance, order: str, samples: int, die: tuple[str, int] | None, moving: bool) -> FakeTrainer:
    """One driver's life, from the newest resume point to the end or its death."""
    keys = ["student=s", "teachers.default=t", "data.path=p", f"batch={BATCH}", f"steps={STEPS}", f"max_age={max_age}"]
    ledger = Ledger(folder, GopdConfig.load(None, keys), keep=2)
    try:
        pool, trainer = FakePool(chance, moving=moving), FakeTrainer()
        source = OnPolicySource(FakePrompts(), pool, samples, Sampling(max_tokens=4, seed=0), order=order)  # type: ignore[arg-type]
        if ledger.resume_point is not None:
            trainer.load(str(ledger.resume_point / "trainer"))
            source.restore(ledger.cursor() or {}, ledger.backlog(), ledger.step)
        pool.version = ledger.step
        parts = {"source": source, "trainer": trainer, "weights": Weights(pool), "metrics": FileMetrics(folder)}
        if die is not None:
            name, method = {"take": "source", "step": "trainer", "push": "weights", "write": "metrics"}[die[0]], die[0]
            parts[name] = Dying(parts[name], method, die[1])
        whole = Parts(scorers=FakeScorers(), objective=FakeObjective(), ledger=ledger, evaluator=NoEvaluation(), **parts)  # type: ignore[arg-type]
        ledger.finish(train(whole, steps=STEPS, batch=BATCH, max_age=max_age, checkpoint_every=EVERY))
        return trainer
    finally:
        ledger.close()


def run(
    folder: Path, max_age: int, seed: int, deaths: list[tuple[str, int]], order: str, samples: int = 2, moving: bool = False
) -> FakeTrainer:
    """Attempts until the run is done; `deaths` end the first ones."""
    dice = random.Random(seed)
    for die in deaths:
        try:
            return attempt(folder, max_age, dice.randrange, order, samples, die, moving)
        except Killed:
            continue
    return attempt(folder, max_age, dice.randrange, order, samples, None, moving)


def trained(folder: Path) -> list[list[str]]:
    return [json.loads(line)["ids"] for line in (folder / "ledger/steps.jsonl").read_text().splitlines()]


DEATHS = st.lists(st.tuples(st.sampled_from(["take", "step", "push", "write"]), st.integers(0, 6)), max_size=3)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), max_age=st.integers(0, 3), deaths=DEATHS, order=st.sampled_from(["first_ready", "in_order"]))
def test_every_prompt_is_trained_exactly_once_and_never_too_old(seed: int, max_age: int, deaths: list[tuple[str, int]], order: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(folder, max_age, seed, deaths, order)
        steps = trained(folder)
        ids = [one for step in steps for one in step]
        assert len(steps) == STEPS and all(len(step) == 2 * BATCH for step in steps)
        assert max(Counter(ids).values()) == 1
        groups = {one.rpartition("/")[0] for one in ids}
        assert len(groups) == STEPS * BATCH and all(f"{group}/{sample}" in ids for group in groups for sample in (0, 1))
        if max_age == 0 or order == "in_order":
            assert ids == [f"p{prompt}@0/{sample}" for prompt in range(STEPS * BATCH) for sample in (0, 1)]
        else:  # nobody is left behind: what was drawn first is trained before it would be too old
            numbers = [int(group[1:].partition("@")[0]) for group in groups]
            assert max(numbers) < (STEPS + max_age) * BATCH
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [record["version"] for record in records] == list(range(1, STEPS + 1))
        assert all(0 <= record["age_max"] <= max_age for record in records)
        assert all(record.get("recovered", {}).get("stale", 0) == 0 for record in records), "the trainer waits rather than throw away"


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), deaths=DEATHS, case=st.sampled_from([(0, True), (2, False)]))
def test_where_the_order_is_fixed_the_weights_are_those_of_an_undisturbed_run(seed: int, deaths: list[tuple[str, int]], case) -> None:
    """Synchronous, or in order with responses that the weights do not change."""
    max_age, moving = case
    with tempfile.TemporaryDirectory() as name:
        calm = run(Path(name) / "calm", max_age, 0, [], "in_order", moving=moving)
        hit = run(Path(name) / "hit", max_age, seed, deaths, "in_order", moving=moving)
        assert hit.weight == calm.weight
        metrics = [(Path(name) / which / "metrics.jsonl").read_text().splitlines() for which in ("calm", "hit")]
        for before, after in zip(*(map(json.loads, lines) for lines in metrics), strict=True):
            times = {"seconds", "recovered", "age_max"} | {key for key in (*before, *after) if key.startswith("age/")}
            assert {key: value for key, value in before.items() if key not in times} == {
                key: value for key, value in after.items() if key not in times
            }


@pytest.mark.parametrize("max_age", [1, 2])
def test_a_straggler_is_waited_for_before_it_is_too_old_and_no_longer(max_age: int) -> None:
    """One prompt is never finished until nothing else can happen: training goes on without it for exactly `max_age` steps."""
    stuck: list[bool] = [True]

    class Slow(FakePool):
        def happen(self) -> None:
            for name, tickets in self._books.assign(self.now).items():
                self._ghosts += [(name, ticket) for ticket in tickets]
                self._began |= dict.fromkeys(tickets, self.version)
            for name, ticket in list(self._ghosts):
                if ticket == 0 and stuck[0]:
                    continue
                if self._books.finish(name, ticket):
                    self._deliver(ticket)
            if self.waits > 50:
                stuck[0] = False
            self.waits += 1

    pool = Slow(lambda n: 0)
    pool.waits = 0
    source = OnPolicySource(FakePrompts(), pool, 1, Sampling(max_tokens=4, seed=0))  # type: ignore[arg-type]
    for step in range(max_age):
        assert "p0@0" not in source.take(BATCH, max_age).strings("prompt_id") and stuck[0]
        pool.version = step + 1
        pool.waits = 0
    assert "p0@0" in source.take(BATCH, max_age).strings("prompt_id") and not stuck[0]
    assert source.stale == 0


def test_samples_that_are_too_old_are_drawn_again_and_counted() -> None:
    """Nothing makes them so in a run; a backlog of another `max_age` does."""
    dice = random.Random(0)
    pool = FakePool(dice.randrange, moving=True)
    source = OnPolicySource(FakePrompts(), pool, 2, Sampling(max_tokens=4, seed=0))  # type: ignore[arg-type]
    first = source.take(BATCH, 2)
    for _ in range(3000):
        pool.happen()
    state, backlog = source.state(), source.backlog()
    assert backlog is not None and all(backlog.strings("stop_reason"))
    pool = FakePool(dice.randrange, moving=True)
    pool.version = 5
    source = OnPolicySource(FakePrompts(), pool, 2, Sampling(max_tokens=4, seed=0))  # type: ignore[arg-type]
    source.restore(state, backlog, 5)
    later = source.take(2 * BATCH, 0)
    assert source.stale == 4 * BATCH and sorted(set(first.strings("prompt_id")) | set(later.strings("prompt_id"))) == sorted(
        f"p{row}@0" for row in range(3 * BATCH)
    )
    assert later.ragged("version_spans").values.tolist() == [0, 5] * 4 * BATCH


def test_a_prompt_that_dies_while_a_resume_point_is_written_is_in_its_backlog() -> None:
    from raysys.rollout.results import Result

    dice = random.Random(0)
    pool = FakePool(dice.randrange)
    letters: list[dict[str, object]] = []
    source = OnPolicySource(FakePrompts(), pool, 2, Sampling(max_tokens=4, seed=0), dead_letter=letters.append, max_dead_letters=9)  # type: ignore[arg-type]
    source.take(BATCH, 2)
    state = source.state()
    (ticket, group), *_ = source._of_ticket.items()
    source._inbox.append(Result(ticket, None, 0, ("died",), True))
    backlog, prompt = source.backlog(), group.prompts.strings("prompt_id")[0]
    assert backlog is not None and prompt in backlog.strings("prompt_id") and not letters and state["dead"] == 0
    source.take(BATCH, 2)
    assert [letter["prompt_id"] for letter in letters] == [prompt], "and it is buried when the loop goes on"


def test_a_run_on_recorded_samples_does_not_go_on_without_them() -> None:
    pool = FakePool(lambda n: 0)
    source = OnPolicySource(FakePrompts(), pool, 2, Sampling(max_tokens=4, seed=0))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^the resume point is of a run on recorded samples.*set rollout\.replay again"):
        source.restore({"step": 3}, None, 3)
