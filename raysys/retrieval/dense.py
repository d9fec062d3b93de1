"""Search by vectors: a transformers encoder, mean pooling, unit length, and a faiss index of inner products on disk, mapped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from raysys.errors import ConfigError, DataError
from raysys.retrieval.corpus import Corpus
from raysys.retrieval.documents import utf8
from raysys.retrieval.folders import open_or_build

HNSW_ABOVE = 1_000_000
"""Documents from which on the index is a graph of neighbours, which may miss some, and not a table that is gone through."""
_BATCH = 64
_SLACK = 16
_DIGITS = 5


class Encoder:
    """Texts to vectors of unit length, [texts, width] in float32.

    Args:
        folder: a Hugging Face encoder with its tokenizer, weights as safetensors.
        query_prefix, passage_prefix: what the model was trained to see before a text (E5: "query: ", "passage: ").
        max_tokens: longer texts are cut.
        device: where torch computes.

    Raises:
        ConfigError: no such model there.
    """

    def __init__(
        self,
        folder: str | Path,
        query_prefix: str = "query: ",
        passage_prefix: str = "passage: ",
        max_tokens: int = 256,
        device: str = "cpu",
    ):
        self.query_prefix, self.passage_prefix, self.max_tokens = query_prefix, passage_prefix, max_tokens
        self.identity = weights_digest(folder)
        self._tokenizer, self._model = load(folder, "AutoModel", "--encoder", device)
        self.width = int(self._model.config.hidden_size)

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        return self._encode([self.query_prefix + text for text in texts])

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        return self._encode([self.passage_prefix + text for text in texts])

    def _encode(self, texts: list[str]) -> np.ndarray:
        import torch

        vectors = np.empty((len(texts), self.width), np.float32)
        order = np.argsort([len(text) for text in texts], kind="stable")  # texts of like length share a batch: little padding
        with torch.inference_mode():
            for first in range(0, len(order), _BATCH):
                chosen = order[first : first + _BATCH]
                inputs = self._tokenizer(
                    [utf8(texts[index]) for index in chosen],
                    padding=True,
                    truncation=True,
                    max_length=self.max_tokens,
                    return_tensors="pt",
                ).to(self._model.device)
                hidden = self._model(**inputs).last_hidden_state
                mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
                mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
                vectors[chosen] = torch.nn.functional.normalize(mean, dim=-1).float().cpu().numpy()
        return vectors


class DenseIndex:
    """The vectors of a corpus in `corpus.folder / "dense"`, computed if they are not there.

    Scores repeat to about 1e-6: an encoder rounds differently in another batch. The order is that of scores rounded to five
    digits, equal ones by id.

    Args:
        hnsw_above: corpora larger than this get an approximate index.
        rebuild: compute them again, whatever is there.

    Raises:
        ConfigError: faiss is not installed, or the folder holds the vectors of another corpus, encoder or prefix.
    """

    kind = "dense"

    def __init__(self, corpus: Corpus, encoder: Encoder, hnsw_above: int = HNSW_ABOVE, rebuild: bool = False):
        faiss = _faiss()
        self._encoder = encoder
        self._exact = len(corpus) <= hnsw_above
        folder = corpus.folder / self.kind
        wanted = {
            "kind": self.kind,
            "corpus": corpus.hash,
            "encoder": encoder.identity,
            "passage_prefix": encoder.passage_prefix,
            "max_tokens": encoder.max_tokens,
            "search": "exact" if self._exact else "hnsw",
        }
        open_or_build(folder, wanted, self._builder(corpus), rebuild)
        try:
            self._index = faiss.read_index(str(folder / "vectors.faiss"), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise DataError(f"index {folder} is damaged: {str(error).splitlines()[-1][:200]}", "give --rebuild") from None
        self._rank = corpus.rank

    def best(self, queries: Sequence[str], k: int) -> list[tuple[list[int], list[float]]]:
        """Rows and scores of each query, best first. A blank query has none."""
        found: list[tuple[list[int], list[float]]] = [([], [])] * len(queries)
        asked = [place for place, query in enumerate(queries) if query.strip()]
        if asked:
            vectors = self._encoder.queries([queries[place] for place in asked])
            for place, rows in zip(asked, self._nearest(vectors, min(k, len(self._rank))), strict=True):
                found[place] = rows
        return found

    def _nearest(self, vectors: np.ndarray, k: int) -> Iterator[tuple[list[int], list[float]]]:
        some = min(k + _SLACK, len(self._rank))
        scores, rows = self._index.search(vectors, some)
        for number in range(len(vectors)):
            near, which, more = scores[number], rows[number], some
            # Equal scores that go on beyond what was asked for: the first of them by id may be further down.
            while self._exact and more < len(self._rank) and near[k - 1].round(_DIGITS) == near[-1].round(_DIGITS):
                more = min(4 * more, len(self._rank))
                near, which = (each[0] for each in self._index.search(vectors[number : number + 1], more))
            near, which = near[which >= 0], which[which >= 0]
            order = np.lexsort((self._rank[which], -near.round(_DIGITS)))[:k]
            yield which[order].tolist(), near[order].tolist()

    def _builder(self, corpus: Corpus) -> Any:
        def build(draft: Path) -> None:
            faiss = _faiss()
            metric, width = faiss.METRIC_INNER_PRODUCT, self._encoder.width
            index = faiss.IndexFlatIP(width) if self._exact else faiss.IndexHNSWFlat(width, 32, metric)
            chunk: list[str] = []
            for text in corpus.texts():
                chunk.append(text)
                if len(chunk) == 16 * _BATCH:
                    index.add(self._encoder.passages(chunk))
                    chunk = []
            if chunk:
                index.add(self._encoder.passages(chunk))
            faiss.write_index(index, str(draft / "vectors.faiss"))

        return build


class Reranker:
    """A cross-encoder that reads a query and a document together: one score for each pair, the higher the better.

    Args:
        folder: a Hugging Face sequence classifier with its tokenizer, weights as safetensors; of two classes the second is "relevant".

    Raises:
        ConfigError: no such model there.
    """

    def __init__(self, folder: str | Path, max_tokens: int = 512, device: str = "cpu"):
        self.max_tokens = max_tokens
        self._tokenizer, self._model = load(folder, "AutoModelForSequenceClassification", "--rerank", device)
        if self._model.config.num_labels not in (1, 2):
            raise ConfigError(f"reranker {folder} has {self._model.config.num_labels} classes, expected 1 or 2", "check --rerank")

    def scores(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The score of each (query, contents)."""
        import torch

        found = np.empty(len(pairs), np.float32)
        order = np.argsort([len(query) + len(contents) for query, contents in pairs], kind="stable")
        with torch.inference_mode():
            for first in range(0, len(order), _BATCH):
                chosen = order[first : first + _BATCH]
                inputs = self._tokenizer(
                    [utf8(pairs[index][0]) for index in chosen],
                    [utf8(pairs[index][1]) for index in chosen],
                    padding=True,
                    truncation=True,
                    max_length=self.max_tokens,
                    return_tensors="pt",
                ).to(self._model.device)
                logits = self._model(**inputs).logits.float()
                score = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
                found[chosen] = score.cpu().numpy()
        return found.tolist()


def load(folder: str | Path, kind: str, option: str, device: str) -> tuple[Any, Any]:
    """Tokenizer and model, ready to compute. Weights that could run code when they are read are refused. Raises ConfigError."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = getattr(transformers, kind).from_pretrained(folder, use_safetensors=True, dtype="float32")
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {folder} cannot be loaded: {str(error).splitlines()[0][:300]}", f"check {option}") from None
    return tokenizer, model.to(device).eval()


def weights_digest(folder: str | Path) -> str:
    """What tells one model from another: a hash of a folder's files, or the name of a model that is not in a folder."""
    if not Path(folder).is_dir():
        return str(folder)
    found = blake3()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".safetensors", ".json", ".txt", ".model"):
            found.update(path.name.encode() + b"\0")
            found.update_mmap(path)
    return found.hexdigest(length=16)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise ConfigError("the dense index needs faiss, which is not installed", "pip install faiss-cpu, or take --kind bm25") from None
    return faiss
