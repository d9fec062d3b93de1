"""Episodes on an engine that says what it is told to: ids, masks, limits, seats."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import asynccontextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from raysys.batch import Batch, Ragged
from raysys.errors import InfrastructureError
from raysys.rollout.calculator import Calculators, calculate
from raysys.rollout.environment import EpisodeSpec, Reply
from raysys.rollout.episodes import Episode, seed_of
from raysys.rollout.results import Result, attach
from raysys.rollout.serving import Asked, Response, Seat, Serving
from raysys.rollout.spec import Sampling

EOS = 1


class Letters:
    """A token a character."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(one) for one in ids if one != EOS)


class Script:
    """An engine whose generations are written down. It cuts them as vLLM does."""

    def __init__(self, *turns: str, versions: Sequence[int] = (4, 4, 4, 4, 4)):
        self.turns, self.versions, self.asked = list(turns), versions, []

    async def __call__(self, ids: list[int], tokens: int, seed: int) -> Response:
        turn = len(self.asked)
        self.asked.append((list(ids), tokens, seed))
        made = [*Letters().encode(self.turns[turn]), EOS]
        whole = made[:-1] if self.turns[turn].endswith(">") else made
        cut = whole[:tokens]
        return Response(cut, [-0.5] * len(cut), [0, self.versions[turn]], "stop" if len(cut) == len(whole) else "length")


@asynccontextmanager
async def nowhere():
    yield


def play(script: Script, tokens: int = 500, environments: Any = None, generations: int = 5, turn_tokens: int = 100) -> Response:
    spec = EpisodeSpec(environments or Calculators(), generations, turn_tokens)
    return asyncio.run(Episode(spec, script, Letters(), nowhere).run([7, 8], "p0", "", tokens, seed=11))


def pieces(made: Response) -> list[tuple[int, str]]:
    """(run, text) of each stretch of tokens."""
    assert made.runs is not None
    found: list[tuple[int, list[int]]] = []
    for token, run in zip(made.ids, made.runs, strict=True):
        if not found or found[-1][0] != run:
            found.append((run, []))
        found[-1][1].append(token)
    return [(run, "".join(map(chr, ids))) for run, ids in found]


def test_13_runs_and_observations_reproduce_the_text_exactly() -> None:
    script = Script("so <calc>2*3</calc>", "then <calc>1/0</calc>", "<answer>6</answer>")
    made = play(script)
    assert pieces(made) == [
        (0, "so <calc>2*3</calc>"),
        (-1, "<result> 6 </result>"),
        (1, "then <calc>1/0</calc>"),
        (-1, "<result> error: division by zero </result>"),
        (2, "<answer>6</answer>"),
    ]
    assert made.reason == "stop" and len(script.asked) == 3
    assert [value == 0.0 for value in made.logprobs] == [run == -1 for run in made.runs or ()]
    told = json.loads(made.record)["turns"]
    assert [turn["action"] for turn in told] == ["calculate", "calculate", "answer"]
    for turn, (start, end) in enumerate(turn["tokens"] for turn in told):
        assert set((made.runs or [])[start:end]) == {turn}


def test_a_generation_goes_on_with_the_sampled_ids() -> None:
    script = Script("<calc>1</calc>", "<answer>1</answer>")
    made = play(script)
    assert script.asked[0][0] == [7, 8]
    assert script.asked[1][0] == [7, 8, *made.ids[: len("<calc>1</calc><result> 1 </result>")]]


def test_14_no_more_generations_than_allowed_and_the_last_ones_tool_is_not_asked() -> None:
    asked = []

    class Counting:
        stops = ("</calc>",)

        async def open(self) -> None: ...
        async def close(self) -> None: ...
        def new(self) -> Counting:
            return self

        async def reset(self, prompt_id: str, metadata: str) -> str:
            return ""

        async def step(self, text: str, last: bool) -> Reply:
            asked.append(last)
            return Reply("" if last else "ok", record={})

    made = play(Script(*["<calc>1</calc>"] * 9), environments=Counting())
    assert asked == [False] * 4 + [True] and made.reason == "length"
    assert sum(run == -1 for run in made.runs or ()) == 4 * len("ok")


def test_limits_of_a_generation_and_of_the_response() -> None:
    script = Script("x" * 50, "never")
    made = play(script, turn_tokens=10)
    assert made.ids == [ord("x")] * 10 and json.loads(made.record)["turns"] == [{"tokens": [0, 10], "stop": "length", "action": "none"}]
    first, told = "<calc>1</calc>", "<result> 1 </result>"
    for tokens in range(1, 60):
        made = play(Script(first, "<answer>1</answer>"), tokens=tokens)
        assert len(made.ids) <= tokens and (made.reason == "stop") == (tokens < len(first) or tokens >= len(first + told) + 1)
        assert len(made.ids) == len(made.logprobs) == len(made.runs or ())
        assert (-1 in (made.runs or ())) == (tokens >= len(first + told) + 1), "an observation comes whole and leaves room, or not at all"


def test_versions_are_where_they_changed() -> None:
    made = play(Script("<calc>1</calc>", "<calc>2</calc>", "<answer>1</answer>", versions=(4, 4, 6)))
    start = len("<calc>1</calc><result> 1 </result>") * 2
    assert made.spans == [0, 4, start, 6]


def test_each_generation_has_a_seed_of_its_own() -> None:
    script = Script("<calc>1</calc>", "<calc>2</calc>", "<answer>1</answer>")
    play(script)
    seeds = [seed for _, _, seed in script.asked]
    assert seeds[0] == 11 and seeds == [seed_of(11, turn) for turn in range(3)] and len(set(seeds)) == 3


class Opening(Calculators):
    """Tells the model the row's metadata first."""

    def new(self) -> Any:
        made = super().new()

        async def reset(prompt_id: str, metadata: str) -> str:
            return f"[{prompt_id}:{metadata}]"

        made.reset = reset  # type: ignore[method-assign]
        return made


def test_an_opening_observation_is_read_and_not_trained_on() -> None:
    made = play(Script("<answer>1</answer>"), environments=Opening())
    assert pieces(made) == [(-1, "[p0:]"), (0, "<answer>1</answer>")] and made.spans == [0, 4]
    assert play(Script("never"), tokens=5, environments=Opening()).ids == []


class Slow(Serving):
    """One seat; each generation takes 20 ms and each tool 100 ms."""

    def __init__(self, fails: bool = False):
        super().__init__(seats=1)
        self.inside = self.most = self.tools = self.most_tools = 0
        self.fails = fails

    async def play(self, asked: Asked, sampling: Sampling, seed: int, seat: Seat) -> Response:
        script = Script("<calc>1</calc>", "<answer>1</answer>")

        async def generate(ids: list[int], tokens: int, own: int) -> Response:
            self.inside += 1
            self.most = max(self.most, self.inside)
            await asyncio.sleep(0.02)
            self.inside -= 1
            return await script(ids, tokens, own)

        outer = self

        class Waiting(Calculators):
            def new(self) -> Any:
                made = super().new()
                step = made.step

                async def slowly(text: str, last: bool) -> Reply:
                    outer.tools += 1
                    outer.most_tools = max(outer.most_tools, outer.tools)
                    await asyncio.sleep(0.1)
                    outer.tools -= 1
                    if outer.fails:
                        raise InfrastructureError("the tool is away")
                    return await step(text, last)

                made.step = slowly  # type: ignore[method-assign]
                return made

        return await Episode(EpisodeSpec(Waiting(), 5, 100), generate, Letters(), seat.away).run(
            asked.ids.tolist(), asked.prompt_id, asked.metadata, sampling.max_tokens, seed
        )


def prompts(count: int) -> Batch:
    return Batch.from_columns(
        prompt_id=[f"p{row}" for row in range(count)],
        sample=[0] * count,
        metadata=[""] * count,
        prompt_ids=Ragged.of([[7]] * count, np.int32),
    )


async def harvested(worker: Serving, count: int) -> tuple[list[int], list[Batch], list[Any]]:
    tickets: list[int] = []
    rows: list[Batch] = []
    failures: list[Any] = []
    while len(tickets) + len(failures) < count:
        found = await worker.collect(wait=5.0)
        tickets += found.tickets
        failures += found.failures
        if found.rows is not None:
            rows.append(found.rows)
    return tickets, rows, failures


def test_nobody_holds_a_seat_while_its_tool_is_at_work() -> None:
    async def story() -> None:
        worker = Slow()
        await worker.submit(prompts(8), list(range(8)), Sampling(max_tokens=200, seed=0), 0)
        tickets, rows, _ = await harvested(worker, 8)
        assert (await worker.collect(wait=0.01)).away >= 8 * 2 * 0.1, "two tools each"
        assert sorted(tickets) == list(range(8)) and worker.most == 1, "generations do not"
        assert worker._running == 0
        results = [Result(ticket, batch, row) for batch in rows for row, ticket in enumerate(range(len(batch)))]
        attached = attach(prompts(8), results)
        assert {"runs", "episode"} <= set(attached.columns)
        assert worker._seats._value == 1 and worker.most_tools > 1, "tools overlap"

    asyncio.run(story())


def test_a_tool_that_is_away_is_no_answer_but_a_failure_that_another_worker_may_not_have() -> None:
    async def story() -> None:
        worker = Slow(fails=True)
        await worker.submit(prompts(2), [0, 1], Sampling(max_tokens=200, seed=0), 0)
        _, rows, failures = await harvested(worker, 2)
        assert not rows and all(failure.retry and "the tool is away" in failure.cause for failure in failures)
        assert worker._seats._value == 1 and worker._running == 0

    asyncio.run(story())


def test_aborting_an_episode_anywhere_gives_its_seat_back() -> None:
    async def story() -> None:
        for moment in (0.0, 0.01, 0.05, 0.13):
            worker = Slow()
            await worker.submit(prompts(3), [0, 1, 2], Sampling(max_tokens=200, seed=0), 0)
            await asyncio.sleep(moment)
            await worker.abort([0, 1, 2])
            await asyncio.sleep(0.05)
            assert worker._seats._value == 1 and worker._running == 0 and not worker._tasks

    asyncio.run(story())


@pytest.mark.parametrize(
    ("text", "value"), [("3 * (4 + 5)", 27), ("1/3", Fraction(1, 3)), ("-2 - -2", 0), ("0.1 + 0.2", Fraction(3, 10)), (" 7 ", 7)]
)
def test_calculator_knows(text: str, value: Any) -> None:
    assert calculate(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2 **3",
        "__import__('os')",
        "x",
        "'a' * 9",
        "1 if 1 else 2",
        "(1, 2)",
        "1; 2",
        "9" * 61,
        "1" * 201,
        "1/0",
        "True",
        "1e400",
        "2 // 1",
        "10j",
    ],
)
def test_calculator_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        calculate(text)
