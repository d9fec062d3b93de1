"""An index and its documents as one object that answers queries: plain Python, which one line makes an actor or a service."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from raysys.errors import ConfigError
from raysys.retrieval.corpus import Corpus
from raysys.retrieval.documents import Document, Found, from_contents
from raysys.retrieval.lexical import LexicalIndex, Stopwords


class Index(Protocol):
    kind: str

    def best(self, queries: Sequence[str], k: int) -> list[tuple[list[int], list[float]]]: ...


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """What to search in and how. Raises ConfigError for what cannot go together."""

    corpus: str
    index: str | None = None
    """Folder for the index (default: the corpus' path with `.index`)."""
    kind: Literal["bm25", "dense"] = "bm25"
    stopwords: Stopwords = "english"
    encoder: str | None = None
    """Folder of the encoder of a dense index."""
    query_prefix: str = "query: "
    passage_prefix: str = "passage: "
    rerank: str | None = None
    """Folder of a cross-encoder that orders the first `candidates` anew."""
    candidates: int = 20
    topk: int = 3
    """Documents of a query that does not say how many."""
    device: str = "cpu"
    rebuild: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("bm25", "dense"):
            raise ConfigError(f"there is no index of kind {self.kind!r}", "--kind is bm25 or dense")
        if (self.kind == "dense") != (self.encoder is not None):
            raise ConfigError(
                "a dense index needs an encoder" if self.kind == "dense" else "an encoder is for a dense index",
                "give --kind dense and --encoder together",
            )
        if self.stopwords not in ("english", "none"):
            raise ConfigError(f"there are no stop words {self.stopwords!r}", "--stopwords is english or none")
        if self.topk < 1 or self.candidates < 1:
            raise ConfigError(f"topk={self.topk} and candidates={self.candidates} must be at least 1", "raise them")


class LocalSearch:
    """Search in the same process. Opens the index, or builds it if there is none.

    Raises:
        ConfigError, DataError: see `Corpus`, `LexicalIndex`, `DenseIndex` and `Reranker`.
    """

    def __init__(self, settings: IndexSettings):
        self.settings = settings
        self.corpus = Corpus(settings.corpus, settings.index, settings.rebuild)
        self.index: Index
        if settings.encoder is None:
            self.index = LexicalIndex(self.corpus, settings.stopwords, settings.rebuild)
        else:
            from raysys.retrieval.dense import DenseIndex, Encoder

            encoder = Encoder(settings.encoder, settings.query_prefix, settings.passage_prefix, device=settings.device)
            self.index = DenseIndex(self.corpus, encoder, rebuild=settings.rebuild)
        self._reranker = None
        if settings.rerank is not None:
            from raysys.retrieval.dense import Reranker

            self._reranker = Reranker(settings.rerank, device=settings.device)

    def find(
        self, queries: Sequence[str], topk: int | None = None, candidates: int | None = None, rerank: bool = True
    ) -> list[list[Found]]:
        """Documents of each query, best first; fewer than `topk` where fewer fit, none for a query without words. Thread-safe.

        Args:
            topk, candidates: documents shown, and documents that the reranker orders; null takes the settings'.
            rerank: False keeps the index' order and scores.
        """
        topk = topk or self.settings.topk
        reranker = self._reranker if rerank else None
        wanted = topk if reranker is None else max(topk, candidates or self.settings.candidates)
        found = []
        for rows, scores in self.index.best(queries, wanted):
            found.append([Found(*pair, score) for pair, score in zip(self.corpus.read(rows), scores, strict=True)])
        if reranker is not None:
            scored = iter(reranker.scores([(query, each.contents) for query, list_ in zip(queries, found) for each in list_]))
            found = [_ordered([each._replace(score=next(scored)) for each in list_])[:topk] for list_ in found]
        return found

    async def search(self, queries: Sequence[str], topk: int | None = None) -> list[list[Document]]:
        """As `SearchClient.search`, without a service."""
        found = await asyncio.to_thread(self.find, queries, topk)
        return [[from_contents(each.contents, each.id, each.score) for each in list_] for list_ in found]

    async def wait_healthy(self, deadline: float | None = None) -> None:
        """An index that is open answers."""

    async def close(self) -> None:
        """Nothing is held that would have to be given back."""

    def describe(self) -> dict[str, Any]:
        """What `/health` tells."""
        return {
            "documents": len(self.corpus),
            "corpus": self.corpus.hash,
            "index": self.index.kind,
            "rerank": self._reranker is not None,
        }


def _ordered(found: list[Found]) -> list[Found]:
    """By score, equal ones by id; rounded, because a model rounds differently in another batch."""
    return sorted(found, key=lambda each: (-np.float32(each.score).round(5), each.id.encode()))
