"""The search agent's world: episodes that search and answer, and what they are worth. Paper: arXiv 2604.18235, on Search-R1's protocol.

A generation ends at `</search>` or `</answer>`. A search is answered by documents between information tags; an answer, or anything
else, ends the episode. With `opener` the `<think>` that each generation begins with is put there and not trained on (the paper's
decoupled opener).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from raysys.batch import Batch
from raysys.config.agents import SearchAgentConfig
from raysys.data.questions import Passage
from raysys.errors import DataError
from raysys.methods.calibadv_text import END_MARKERS, NOTICE, Action, action, answer_f1, escape_tags, exact_match, format_valid, reward
from raysys.retrieval.client import SearchClient, SearchSettings
from raysys.retrieval.documents import Document, Searcher
from raysys.rollout.environment import EpisodeSpec, Reply

OPENER = "<think>"
DOCUMENT_CHARS = 1200
"""Of a document that the model is shown: cut one by one, so that no long one costs the others their place."""
TOLD = f"\n\n{NOTICE} I should put a query between search tags, or the answer between answer tags.\n\n"


class SearchEnvironments:
    """Makes the environments of one worker, which share a client.

    Args:
        connect: makes the searcher of a worker, such as the client of a service.
        opener: whether `<think>` is put before each generation.
        document_chars: see `DOCUMENT_CHARS`.
    """

    stops: Sequence[str] = ("</search>", "</answer>")

    def __init__(
        self,
        connect: Callable[[], Searcher],
        opener: bool = True,
        document_chars: int = DOCUMENT_CHARS,
    ):
        self.opener, self.document_chars, self._connect = opener, document_chars, connect
        self._searcher: Searcher | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_searcher": None}

    async def open(self) -> None:
        self._searcher = self._connect()

    def new(self) -> SearchEnvironment:
        assert self._searcher is not None, "open() comes first"
        return SearchEnvironment(self._searcher, self.opener, self.document_chars)

    async def close(self) -> None:
        if self._searcher is not None:
            await self._searcher.close()
            self._searcher = None


class SearchEnvironment:
    """One question's episode."""

    def __init__(self, searcher: Searcher, opener: bool = True, document_chars: int = DOCUMENT_CHARS):
        self._searcher, self._document_chars = searcher, document_chars
        self._opener = OPENER if opener else ""
        self._text = ""

    async def reset(self, prompt_id: str, metadata: str) -> str:
        self._text = self._opener
        return self._opener

    async def step(self, text: str, last: bool) -> Reply:
        """Raises SearchError, an infrastructure error, when the service stays away, and SearchRefused for a query that it will not take."""
        asked = action(text)
        thought = {"think": thinking(self._opener + text)}
        self._text += text
        if asked is None:
            self._text += TOLD
            return Reply(TOLD, done=True, record={**thought, "action": "invalid"})
        if asked.kind == "answer":
            return Reply(done=True, record={**thought, **self._answered(asked)})
        record = {**thought, "action": "search", "query": asked.text}
        if last:
            return Reply(done=False, record=record)
        (found,) = await self._searcher.search([asked.text])
        observation = f"\n\n<information>{shown(found, self._document_chars)}</information>\n\n{self._opener}"
        self._text += observation
        return Reply(observation, record={**record, "doc_ids": [one.id for one in found], "titles": [one.title for one in found]})

    def _answered(self, asked: Action) -> dict[str, Any]:
        return {"action": "answer", "answer": asked.text, "valid": format_valid(self._text)}


def settings_of(config: SearchAgentConfig) -> SearchSettings:
    """The client's settings that a run asks for."""
    part = config.search
    return SearchSettings(
        url=part.url or "",
        topk=part.topk,
        candidates=part.candidates,
        timeout=part.timeout,
        retries=part.retries,
        deadline=part.deadline,
        gather=part.gather,
        seed=config.seed,
    )


def episodes_of(config: SearchAgentConfig, own: Searcher | None = None) -> EpisodeSpec:
    """Episodes that ask the service of `search.url`, or the run's own search."""
    connect = partial(SearchClient, settings_of(config)) if own is None else Given(own)
    made = SearchEnvironments(connect, config.opener, config.search.document_chars)
    return EpisodeSpec(made, config.generations, config.turn_tokens)


@dataclass(frozen=True)
class Given:
    """Gives every worker the same searcher."""

    searcher: Searcher

    def __call__(self) -> Searcher:
        return self.searcher


def finder(corpus: Path, topk: int) -> Callable[[str], list[Passage]]:
    """What an episode's search over a corpus shows for a query."""
    from raysys.retrieval.documents import from_contents
    from raysys.retrieval.search import IndexSettings, LocalSearch

    search = LocalSearch(IndexSettings(corpus=str(corpus), topk=topk))

    def find(query: str) -> list[Passage]:
        found = [from_contents(one.contents, one.id, one.score) for one in search.find([query])[0]]
        return [Passage(one.id, one.title, one.body) for one in found]

    return find


@contextmanager
def own_search(config: SearchAgentConfig) -> Iterator[Searcher | None]:
    """The search over `search.corpus`, as an actor that Ray starts again if it dies; None where a service is asked.

    Raises:
        ConfigError, DataError: see `raysys.retrieval.search.LocalSearch`.
        DeadlineError: the index is not open in `deadlines.start`.
    """
    if config.search.corpus is None:
        yield None
        return
    import ray

    from raysys.retrieval.deployment import start_actor
    from raysys.retrieval.search import IndexSettings

    corpus = str(Path(config.search.corpus).absolute())  # an actor's working directory is another one
    settings = IndexSettings(corpus=corpus, topk=config.search.topk, candidates=config.search.candidates)
    search = start_actor(settings, config.search.deadline, num_cpus=1, max_restarts=-1, max_task_retries=-1)
    try:
        asyncio.run(search.wait_healthy(config.deadlines.start, "deadlines.start"))
        yield search
    finally:
        ray.kill(search.actor)


async def reachable(settings: SearchSettings, seconds: float = 10.0) -> None:
    """Returns if the service answers within so many seconds. Raises SearchError."""
    client = SearchClient(settings)
    try:
        await client.wait_healthy(seconds)
    finally:
        await client.close()


class Judge:
    """The loop's scorers: no model is asked."""

    def annotate(self, batch: Batch, queries: Any = None) -> Batch:
        return judged(batch)


def text_reward(verifier: str, text: str, answer: str, metadata: str) -> float:
    """F1 times validity of a response's text, as evaluations judge: see `raysys.methods.calibadv_text.reward`."""
    return reward(text, accepted(answer, "a held-out question"))


def thinking(text: str) -> str:
    """What a generation thinks: the text of its first `<think>` pair, up to its action where the pair is not closed."""
    _, opened, rest = text.partition("<think>")
    inside = rest if opened else text
    for tag in ("</think>", "<search>", "<answer>"):
        inside = inside.partition(tag)[0]
    return inside.strip()


def shown(documents: Sequence[Document], most: int = DOCUMENT_CHARS) -> str:
    """Documents as the model reads them, a line each; nothing in them can be taken for a tag or for a marker of a chat template."""
    lines = [f"Doc {place}(Title: {_plain(one.title)}) {_plain(one.body[:most])}" for place, one in enumerate(documents, 1)]
    return "\n".join(line.strip() for line in lines)


def _plain(text: str) -> str:
    for mark in END_MARKERS:
        text = text.replace(mark, mark.replace("<", "&lt;"))
    return escape_tags(text).replace(NOTICE, NOTICE.lower())


def judged(batch: Batch) -> Batch:
    """The same episodes with `reward`: F1 of the answer against the row's golds where the form is valid, else 0.

    Raises:
        DataError: a row's `answer` is no text or JSON list of texts.
    """
    return batch.with_columns(reward=[answer_f1(turn["answer"], gold) if turn.get("valid") else 0.0 for turn, gold in _ended(batch)])


def f1(batch: Batch) -> list[float]:
    """F1 of each episode's answer against the row's golds, whatever its form; 0 without an answer."""
    return [answer_f1(turn["answer"], gold) if "answer" in turn else 0.0 for turn, gold in _ended(batch)]


def exact(batch: Batch) -> list[bool]:
    """Whether each episode's answer is one of the row's golds, whatever its form."""
    return ["answer" in turn and exact_match(turn["answer"], gold) for turn, gold in _ended(batch)]


def _ended(batch: Batch) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Each episode's last turn, {} if it has none, and its golds."""
    for turns, text, name in zip(played(batch), batch.strings("answer"), batch.ids, strict=True):
        yield turns[-1] if turns else {}, accepted(text, name)


def played(batch: Batch) -> list[list[dict[str, Any]]]:
    """The turns of each episode."""
    return [json.loads(text)["turns"] for text in batch.strings("episode")]


def accepted(text: str, name: str) -> list[str]:
    """The golds of a row: its `answer` is one of them, or a JSON list of all. Raises DataError naming the row."""
    if not text.lstrip().startswith("["):
        return [text]
    try:
        golds = json.loads(text)
    except json.JSONDecodeError:
        return [text]
    if not golds or not all(isinstance(gold, str) for gold in golds):
        raise DataError(f"{name}: its answer is a list, but not of texts: {text[:80]}", "give a text, or a JSON list of accepted texts")
    return golds
