"""BM25 over words: built by bm25s (Lucene's scoring), kept as memory-mapped arrays, searched by `kernel`.

Building holds the word numbers of all documents and bm25s' matrix: about 2.5 KB a document of 60 words, 2.5 GB for a million.
Serving maps 8 bytes a word and document from disk (400 MB for that million, which the system may take back) and holds 8 bytes a
document for each thread.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from raysys.errors import ConfigError, DataError
from raysys.retrieval import kernel
from raysys.retrieval.corpus import Corpus
from raysys.retrieval.folders import mapped, open_or_build

Stopwords = Literal["english", "none"]
_WORD = re.compile(r"\w+")
_ACCENT = re.compile("[\u0300-\u036f]")


class Words:
    """Text to words, the same for documents and queries: lower case, accents off, runs of letters and digits, no stop words.

    Languages that put no spaces between words are not taken apart; use a dense index for them.
    """

    def __init__(self, stopwords: Stopwords = "english"):
        from bm25s.stopwords import STOPWORDS_EN

        self._stop = frozenset(STOPWORDS_EN if stopwords == "english" else ())

    def __call__(self, text: str) -> list[str]:
        text = text.lower()
        if not text.isascii():
            text = _ACCENT.sub("", unicodedata.normalize("NFKD", text))
        return [word for word in _WORD.findall(text) if word not in self._stop]


class LexicalIndex:
    """The index of a corpus in `corpus.folder / "bm25"`, built if it is not there. Safe from several threads.

    Args:
        stopwords: "english" leaves its most frequent words out of documents and queries; "none" keeps all words.
        rebuild: build it again, whatever is there.

    Raises:
        ConfigError: the folder holds an index of another corpus or of other stop words, or cannot be written.
        DataError: no document has a word, or the folder is damaged.
    """

    kind = "bm25"

    def __init__(self, corpus: Corpus, stopwords: Stopwords = "english", rebuild: bool = False):
        self._words = Words(stopwords)
        folder = corpus.folder / self.kind
        wanted = {"kind": self.kind, "corpus": corpus.hash, "stopwords": stopwords, "pattern": _WORD.pattern}
        open_or_build(folder, wanted, lambda draft: _build(corpus, self._words, draft), rebuild)
        names = ("data.csc.index", "indices.csc.index", "indptr.csc.index", "words", "word_numbers")
        self._weights, self._rows, self._starts, self._hashes, self._numbers = mapped(folder, *names)
        self._rows = self._rows.view(np.uint32)
        self._rank = corpus.rank
        self._room = threading.local()
        self._search = kernel.compiled()
        self.best(["warm"], 1)

    def best(self, queries: Sequence[str], k: int) -> list[tuple[list[int], list[float]]]:
        """Rows and scores of each query, best first; equal scores in the order of ids. Only documents with a word of the query.

        A query without any known word has none.
        """
        words, bounds = self._numbered(queries)
        k = min(k, len(self._rank))
        best = np.empty((len(queries), k), np.uint32)
        scores = np.empty((len(queries), k), np.float32)
        counts = np.zeros(len(queries), np.int32)
        sums, touched = self._scratch()
        self._search(self._weights, self._rows, self._starts, self._rank, words, bounds, sums, touched, best, scores, counts)
        return [(rows[:count], found[:count]) for rows, found, count in zip(best.tolist(), scores.tolist(), counts.tolist(), strict=True)]

    def _numbered(self, queries: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of all known words, and where each query's begin."""
        hashes, owners = array("Q"), array("q")
        for query, text in enumerate(queries):
            for word in self._words(text):
                hashes.append(_hash(word))
                owners.append(query)
        wanted, owner = np.frombuffer(hashes, np.uint64), np.frombuffer(owners, np.int64)
        places = np.searchsorted(self._hashes, wanted)
        places[places == len(self._hashes)] = 0
        known = self._hashes[places] == wanted
        bounds = np.zeros(len(queries) + 1, np.int64)
        np.cumsum(np.bincount(owner[known], minlength=len(queries)), out=bounds[1:])
        return self._numbers[places[known]], bounds

    def _scratch(self) -> tuple[np.ndarray, np.ndarray]:
        if not hasattr(self._room, "sums"):
            self._room.sums = np.zeros(len(self._rank), np.float32)
            self._room.touched = np.empty(len(self._rank), np.uint32)
        return self._room.sums, self._room.touched


def _build(corpus: Corpus, words: Words, draft: Path) -> None:
    """bm25s' own files, and in place of its vocabulary, which would be a dictionary in memory, two arrays that can be mapped."""
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    numbers: dict[str, int] = {}
    documents: list[Any] = list(_counted(corpus, words, numbers))
    if not numbers:
        raise DataError(f"no document of {corpus.path} has a word", "give a corpus with text, or --stopwords none")
    hashes = np.fromiter(map(_hash, numbers), np.uint64, len(numbers))
    order = np.argsort(hashes)
    if (hashes[order][1:] == hashes[order][:-1]).any():
        raise DataError(f"two words of {corpus.path} have the same 64-bit hash", "remove a document")
    model = bm25s.BM25(method="lucene", backend="numpy")
    try:
        model.index((documents, numbers), create_empty_token=False, show_progress=False)
    except MemoryError:
        raise ConfigError(f"no memory to index {len(corpus)} documents", "build it on a larger machine with --build-only") from None
    model.save(draft, show_progress=False)
    np.save(draft / "words.npy", hashes[order])
    np.save(draft / "word_numbers.npy", order.astype(np.int32))


def _counted(corpus: Corpus, words: Words, numbers: dict[str, int]) -> Iterator[array[int]]:
    """Word numbers of each document, four bytes each; new words get the next number."""
    for text in corpus.texts():
        yield array("i", [numbers.setdefault(word, len(numbers)) for word in words(text)])


def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")
