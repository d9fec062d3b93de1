"""The lexical index against bm25s itself, its ties, its empty queries, and what it refuses to be opened with."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raysys.errors import ConfigError, DataError
from raysys.retrieval import kernel
from raysys.retrieval.corpus import Corpus
from raysys.retrieval.lexical import LexicalIndex, Words
from raysys.retrieval.search import IndexSettings, LocalSearch
from tests.retrieval.conftest import ROWS, Writer


def synthetic(path: Path, documents: int, seed: int = 0) -> list[str]:
    """Writes a corpus of rare and frequent words; returns some queries."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, 301)
    share /= share.sum()

    def text(words: int) -> str:
        return " ".join(f"w{word}" for word in rng.choice(300, size=words, p=share))

    path.write_text(
        "".join(json.dumps({"id": f"d{number}", "contents": text(int(rng.integers(3, 9)))}) + "\n" for number in range(documents))
    )
    return [text(int(rng.integers(1, 5))) for _ in range(60)]


def test_scores_are_those_of_bm25s_and_ties_go_by_id(tmp_path: Path) -> None:
    import bm25s

    queries = synthetic(tmp_path / "c.jsonl", 400)
    corpus = Corpus(tmp_path / "c.jsonl")
    index = LexicalIndex(corpus)
    bare = bm25s.BM25.load(corpus.folder / "bm25", mmap=True)
    tied = 0
    for query, (rows, scores) in zip(queries, index.best(queries, 10), strict=True):
        everything = bare.get_scores(Words()(query))
        order = np.lexsort((corpus.rank, -everything))[: len(rows)]
        assert rows == order.tolist() and scores == pytest.approx(everything[order].tolist(), rel=1e-6)
        assert len(rows) == min(10, (everything > 0).sum())
        tied += len(set(scores)) < len(scores)
    assert tied > 20, "the case is one of ties"


@pytest.mark.parametrize("sparse", [1, 10**9])
def test_both_ways_through_the_sums_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sparse: int) -> None:
    queries = synthetic(tmp_path / "c.jsonl", 300)
    index = LexicalIndex(Corpus(tmp_path / "c.jsonl"))
    expected = index.best(queries, 7)
    monkeypatch.setattr(kernel, "SPARSE", sparse)
    index._search = kernel.best_rows  # uncompiled, so that it sees the constant
    assert index.best(queries, 7) == expected
    assert not index._scratch()[0].any(), "the room is clean for the next query"


def test_a_batch_gives_what_each_query_gives_alone_also_from_many_threads(tmp_path: Path) -> None:
    queries = synthetic(tmp_path / "c.jsonl", 300)
    index = LexicalIndex(Corpus(tmp_path / "c.jsonl"))
    expected = index.best(queries, 5)
    assert [index.best([query], 5)[0] for query in queries] == expected
    assert index.best(queries, 3) == [(rows[:3], scores[:3]) for rows, scores in expected]
    found: list[bool] = []
    threads = [threading.Thread(target=lambda: found.append(index.best(queries, 5) == expected)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


def test_queries_without_a_known_word_find_nothing_and_spoil_nothing(local: LocalSearch) -> None:
    found = local.find(["", "   ", "the of and", "xyzzy", "?!", "capital France"])
    assert [len(each) for each in found] == [0, 0, 0, 0, 0, 3]
    assert local.find([]) == []


def test_words_are_the_same_in_documents_and_queries(local: LocalSearch) -> None:
    for query in ("sao tome", "SÃO TOMÉ", "Sa\u0303o Tome\u0301"):
        assert local.find([query], 1)[0][0].id == "4"
    assert Words()("The U.S. in 1999: Côte d'Ivoire") == ["u", "s", "1999", "cote", "d", "ivoire"]
    assert "the" in Words("none")("The yen")


def test_fewer_documents_than_asked_for_are_fine(local: LocalSearch) -> None:
    assert sorted(each.id for each in local.find(["capital france currency volcanoes"], 100)[0]) == ["2", "30", "4", "5", "9"]


def test_an_index_is_built_once_and_opened_again(write: Writer) -> None:
    settings = IndexSettings(corpus=str(write(ROWS)))
    first = LocalSearch(settings)
    built = {path: path.stat().st_mtime_ns for path in first.corpus.folder.rglob("*")}
    again = LocalSearch(settings)
    assert again.find(["yen", "france"]) == first.find(["yen", "france"])
    assert {path: path.stat().st_mtime_ns for path in first.corpus.folder.rglob("*")} == built
    assert not [path for path in built if "draft" in path.name]


def test_an_index_of_another_corpus_or_of_other_words_is_refused(write: Writer, tmp_path: Path) -> None:
    corpus = Corpus(write(ROWS))
    LexicalIndex(corpus)
    with pytest.raises(ConfigError, match="other settings: stopwords 'english', now 'none'"):
        LexicalIndex(corpus, stopwords="none")
    other = Corpus(write(ROWS[:2]), index=tmp_path / "other")
    (tmp_path / "other" / "bm25").symlink_to(corpus.folder / "bm25")
    with pytest.raises(ConfigError, match=f"hash {corpus.hash}, the corpus given has {other.hash}"):
        LexicalIndex(other)


def test_a_damaged_index_says_how_to_mend_it(write: Writer) -> None:
    corpus = Corpus(write(ROWS))
    LexicalIndex(corpus)
    (corpus.folder / "bm25" / "words.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"is damaged.*--rebuild"):
        LexicalIndex(corpus)
    assert LexicalIndex(corpus, rebuild=True).best(["yen"], 1)[0][0] == [2]


def test_a_corpus_without_a_word_is_refused(write: Writer) -> None:
    with pytest.raises(DataError, match="has a word"):
        LexicalIndex(Corpus(write([{"id": "1", "contents": "the of !"}])))


def test_settings_that_cannot_go_together_are_refused() -> None:
    wrongs: list[dict[str, Any]] = [{"kind": "dense"}, {"encoder": "x"}, {"kind": "tf"}, {"stopwords": "x"}, {"topk": 0}]
    for wrong in wrongs:
        with pytest.raises(ConfigError):
            IndexSettings(corpus="c.jsonl", **wrong)
