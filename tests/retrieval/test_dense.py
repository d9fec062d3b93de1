"""Dense search and reranking with tiny random models: the arithmetic is what counts, not what they find."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from raysys.errors import ConfigError, DataError
from raysys.retrieval.corpus import Corpus
from raysys.retrieval.dense import DenseIndex, Encoder, Reranker
from raysys.retrieval.search import IndexSettings, LocalSearch
from tests.retrieval.conftest import ROWS, Writer

pytest.importorskip("faiss")


def new_model(folder: Path, labels: int | None) -> str:
    """A random BERT of two layers with a tokenizer of letters: an encoder, or a classifier of `labels` classes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

    signs = ["[PAD]", "[UNK]", *'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,:"\n']
    tokenizer = Tokenizer(models.WordLevel({sign: number for number, sign in enumerate(signs)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(signs), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    config.num_labels = labels or 2
    model = BertModel(config) if labels is None else BertForSequenceClassification(config)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_model(tmp_path_factory.mktemp("encoder"), None)


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_model(tmp_path_factory.mktemp("reranker"), 1)


def test_vectors_are_means_over_real_tokens_of_unit_length(encoder: str) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = ["a", "a much longer text than the other"]
    found = Encoder(encoder, query_prefix="query: ").queries(texts)
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    for vector, text in zip(found, texts, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer("query: " + text, return_tensors="pt")).last_hidden_state[0]
        mean = hidden.mean(0)
        assert vector == pytest.approx((mean / mean.norm()).numpy(), abs=1e-5)
    prefixed = Encoder(encoder, query_prefix="", passage_prefix="")
    assert np.allclose(prefixed.queries(["query: a"]), found[:1], atol=1e-5)
    assert np.allclose(prefixed.passages(["a"]), prefixed.queries(["a"]), atol=1e-6)


def test_the_nearest_come_first_and_a_blank_query_finds_nothing(encoder: str, write: Writer) -> None:
    search = LocalSearch(IndexSettings(corpus=str(write(ROWS)), kind="dense", encoder=encoder))
    model = Encoder(encoder)
    similar = model.queries(["the capital"]) @ model.passages(list(search.corpus.texts())).T
    found = search.find(["the capital", "", " ", "half \ud800"], 5)
    assert [each.id for each in found[0]] == [search.corpus.read([row])[0][0] for row in np.argsort(-similar[0]).tolist()]
    assert [each.score for each in found[0]] == pytest.approx(np.sort(similar[0])[::-1].tolist(), abs=1e-5)
    assert [len(each) for each in found] == [5, 0, 0, 5]
    again = LocalSearch(IndexSettings(corpus=str(search.corpus.path), kind="dense", encoder=encoder))
    assert [each.id for each in again.find(["the capital"], 5)[0]] == [each.id for each in found[0]]


def test_more_equal_scores_than_are_asked_for_go_by_id(encoder: str, write: Writer) -> None:
    ids = [str(number) for number in np.random.default_rng(0).permutation(100)]
    corpus = Corpus(write([{"id": doc_id, "contents": "all the same"} for doc_id in ids]))
    index = DenseIndex(corpus, Encoder(encoder))
    (rows, _), (few, _) = index.best(["x", "yy"], 7)
    assert [doc_id for doc_id, _ in corpus.read(rows)] == sorted(ids)[:7] and few == rows


def test_a_graph_index_finds_most(encoder: str, write: Writer) -> None:
    rng = np.random.default_rng(0)
    corpus = Corpus(write([{"id": str(n), "contents": "".join(rng.choice(list("abcdefgh "), 20))} for n in range(60)]))
    exact = DenseIndex(corpus, Encoder(encoder)).best(["abc"], 5)[0][0]
    with pytest.raises(ConfigError, match="other settings: search 'exact', now 'hnsw'"):
        DenseIndex(corpus, Encoder(encoder), hnsw_above=10)
    graph = DenseIndex(corpus, Encoder(encoder), hnsw_above=10, rebuild=True).best(["abc"], 5)[0][0]
    assert len(set(exact) & set(graph)) >= 4


def test_vectors_of_another_encoder_or_prefix_are_refused(encoder: str, write: Writer, tmp_path: Path) -> None:
    corpus = Corpus(write(ROWS))
    index = DenseIndex(corpus, Encoder(encoder))
    with pytest.raises(ConfigError, match="passage_prefix 'passage: ', now ''"):
        DenseIndex(corpus, Encoder(encoder, passage_prefix=""))
    DenseIndex(corpus, Encoder(encoder, query_prefix="other "))
    shutil.copytree(encoder, tmp_path / "copy")
    DenseIndex(corpus, Encoder(tmp_path / "copy"))
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    with pytest.raises(ConfigError, match="other settings: encoder"):
        DenseIndex(corpus, Encoder(tmp_path / "copy"))
    del index
    (corpus.folder / "dense" / "vectors.faiss").write_bytes(b"no")
    with pytest.raises(DataError, match="damaged"):
        DenseIndex(corpus, Encoder(encoder))


def test_weights_that_are_no_safetensors_are_refused(encoder: str, tmp_path: Path) -> None:
    import torch

    shutil.copytree(encoder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"cannot be loaded.*--encoder"):
        Encoder(tmp_path / "pickled")
    with pytest.raises(ConfigError, match=r"cannot be loaded.*--rerank"):
        Reranker(tmp_path / "nothing")


def test_a_reranker_orders_the_candidates_and_shows_the_first(reranker: str, write: Writer) -> None:
    path = str(write(ROWS))
    search = LocalSearch(IndexSettings(corpus=path, rerank=reranker))
    plain = LocalSearch(IndexSettings(corpus=path))
    queries = ["capital France", "", "yen volcanoes"]
    model = Reranker(reranker)
    for query, shown, all_ in zip(queries, search.find(queries, 2), plain.find(queries, 5), strict=True):
        scores = dict(zip([each.id for each in all_], model.scores([(query, each.contents) for each in all_]), strict=True))
        assert [each.id for each in shown] == sorted(scores, key=lambda doc_id: -scores[doc_id])[:2]
        assert [each.score for each in shown] == pytest.approx([scores[each.id] for each in shown], abs=1e-5)
    assert search.find(queries, 2, rerank=False) == plain.find(queries, 2)
    assert {each.id for each in search.find(queries[:1], 1, candidates=1)[0]} == {plain.find(queries[:1], 1)[0][0].id}


def test_a_reranker_of_two_classes_scores_the_second(tmp_path: Path) -> None:
    folder = new_model(tmp_path, 2)
    scores = Reranker(folder).scores([("a", "b"), ("a", "a long document about nothing")])
    assert len(scores) == 2 and scores[0] != scores[1]
    with pytest.raises(ConfigError, match="has 3 classes"):
        Reranker(new_model(tmp_path / "three", 3))
