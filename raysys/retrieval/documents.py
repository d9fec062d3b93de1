"""A document as a search returns it, and the text forms it travels in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from blake3 import blake3


@dataclass(frozen=True, slots=True)
class Document:
    """What a searcher gets. Two documents are the same if their ids are; `score` is NaN where the service sends none."""

    id: str
    title: str
    body: str
    score: float = math.nan


class Found(NamedTuple):
    """A document inside the service: `contents` as the corpus has it, letter by letter."""

    id: str
    contents: str
    score: float


class Searcher(Protocol):
    """What an episode is handed: a service behind HTTP, an actor, or an index in the same process."""

    async def search(self, queries: Sequence[str], topk: int | None = None) -> list[list[Document]]:
        """Documents of each query, best first. `topk`: null takes the searcher's own.

        Raises SearchRefused, and SearchError or another InfrastructureError when none came in time.
        """
        ...

    async def wait_healthy(self, deadline: float | None = None) -> None:
        """Returns when a search would be answered. `deadline`: seconds. Raises an InfrastructureError when it has passed."""
        ...

    async def close(self) -> None: ...


def split_contents(contents: str) -> tuple[str, str]:
    """Title and body of `"Title"\\nBody`: the first line without its quotes, and the rest. One line without quotes is a body."""
    first, newline, body = contents.partition("\n")
    title = first.strip()
    quoted = len(title) >= 2 and title[0] == title[-1] == '"'
    if not newline and not quoted:
        return "", contents
    return (title[1:-1] if quoted else title), body


def join_contents(title: str, body: str) -> str:
    return f'"{title}"\n{body}' if title else body


def from_contents(contents: str, doc_id: str | None, score: float) -> Document:
    """A document without an id gets one from its exact text."""
    title, body = split_contents(utf8(contents))
    return Document(text_id(contents) if doc_id is None else utf8(doc_id), title, body, score)


def utf8(text: str) -> str:
    """What UTF-8 can carry of a text: JSON may hold half a surrogate pair, which Arrow, tokenizers and files refuse."""
    return text.encode("utf-8", "replace").decode("utf-8")


def text_id(contents: str) -> str:
    return "text-" + blake3(contents.encode("utf-8", "replace")).hexdigest(length=16)
