"""A unit of text as packed sequences of tokens in the cache: cleaned, encoded, packed and written in one task.

Neither transformers nor Ray is imported: tasks start in fresh processes, and those imports take longer than a unit.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from raysys.config.corpora import Corpus
from raysys.data.cleaning import Account
from raysys.data.corpus import Unit
from raysys.data.shards import Folder, write_shard
from raysys.errors import ConfigError

FORMAT = 1
"""Raised when the same text is to give other shards."""
_BATCH = 1 << 19
_PIECE = 1 << 18
"""Characters that are encoded at once, and of one document: an encoding takes a hundred times the bytes of its text."""
_PLANES = pa.schema([("ids", pa.list_(pa.int32())), ("lengths", pa.list_(pa.int32()))])


@dataclass(frozen=True)
class Codec:
    """A tokenizer as bytes, so that no task needs its folder. Equal if the digests are.

    Attributes:
        digest: hash of everything that decides which ids a text becomes.
        eos: id of the end token.
        vocabulary: number of ids.
    """

    digest: str
    eos: int
    vocabulary: int
    model: bytes = field(compare=False, repr=False)

    @classmethod
    def of(cls, folder: str) -> Codec:
        """The tokenizer of a Hugging Face folder or id. Raises ConfigError: not there, or it has no end token."""
        from raysys.data.text import load_tokenizer

        tokenizer = load_tokenizer(folder)
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"the tokenizer of {folder} has no end token, so documents cannot end", "set eos_token in its tokenizer_config.json"
            )
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        model = backend.to_str().encode()
        digest = hashlib.blake2b(model + f"|{tokenizer.eos_token_id}".encode(), digest_size=8).hexdigest()
        return cls(digest, tokenizer.eos_token_id, len(tokenizer), model)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, no special tokens added; the names of special tokens in a text are text."""
        return [encoding.ids for encoding in _backend(self).encode_batch_fast(texts, add_special_tokens=False)]


@lru_cache(maxsize=2)
def _backend(codec: Codec) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(codec.model.decode())
    tokenizer.encode_special_tokens = True  # else a web page could end documents
    return tokenizer


@dataclass(frozen=True)
class Work:
    """How text becomes sequences; travels to tasks."""

    codec: Codec
    folder: Folder
    sequence: int
    min_characters: int
    max_document_tokens: int | None
    held_out_share: float

    @classmethod
    def of(cls, corpus: Corpus, folder: Folder) -> Work:
        """Raises ConfigError: see `Codec.of`."""
        cutting = (corpus.sequence, corpus.min_characters, corpus.max_document_tokens, corpus.held_out_share)
        return cls(Codec.of(corpus.tokenizer), folder, *cutting)

    @property
    def cutting(self) -> str:
        """Everything that decides what a unit's shards hold, beside its text and the tokenizer."""
        return json.dumps([FORMAT, self.sequence, self.min_characters, self.max_document_tokens, self.held_out_share])

    @property
    def settings(self) -> str:
        return f"{self.codec.digest} {self.cutting}"

    def key(self, unit: Unit) -> str:
        return unit.key(self.settings)


def tokenise(work: Work, unit: Unit) -> dict[str, Any]:
    """Writes a unit's shards.

    Returns:
        What is known of them: `key`, `rows` and `tokens` of the training split, `held_rows` and `held_tokens` of the other, `size` and
        `held_size` in bytes, and the `account` of its documents.

    Raises:
        DataError: a file is gone, changed or damaged.
        InfrastructureError: the cache cannot be written.
    """
    account = Account.new()
    train, held = _Pile(), _Pile()
    for texts in _batches(unit, account, work.min_characters):
        for (text, last), ids in zip(texts, _encoded(work.codec, [text for text, _ in texts])):
            pile = held if held_out(text, work.held_out_share) else train
            pile.add([*ids, work.codec.eos] if last else ids, work.max_document_tokens)
    key = work.key(unit)
    kept, aside = pack(*train.arrays(), work.sequence), pack(*held.arrays(), work.sequence)
    note: dict[str, Any] = {
        "key": key,
        "rows": kept.num_rows,
        "tokens": train.tokens,
        "held_rows": aside.num_rows,
        "held_tokens": held.tokens,
        "account": account.state(),
    }
    # The training shard comes last: where it is, both are.
    held_size = write_shard(work.folder, key, "validation", aside, note) if aside.num_rows else 0
    return note | {"size": write_shard(work.folder, key, "train", kept, note), "held_size": held_size}


def held_out(text: str, share: float) -> bool:
    """Whether a document is kept from training: decided by its text alone, so copies of it are too."""
    if share == 0:
        return False
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) < share * 2**64


def pack(ids: np.ndarray, ends: np.ndarray, sequence: int) -> pa.Table:
    """Documents, one behind another, cut into sequences.

    Args:
        ids: int32 [tokens].
        ends: int64, ascending: how many tokens there are up to the end of each document; the last one is the number of tokens.
        sequence: tokens of a row; the last row may be shorter.

    Returns:
        `ids` and `lengths` list<int32>: the lengths of a row are those of the documents in it or of their parts, and sum to the row's.
    """
    edges = np.append(np.arange(0, len(ids), sequence), len(ids))
    cuts = np.union1d(ends, edges[1:]) if len(ids) else np.zeros(0, np.int64)
    lengths = np.diff(cuts, prepend=0).astype(np.int32)
    inside = np.searchsorted(cuts, edges, side="right")
    lists = [
        pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))
        for offsets, values in ((edges, ids), (inside, lengths))
    ]
    return pa.Table.from_arrays(lists, schema=_PLANES)


class _Pile:
    """Documents on their way into sequences."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._ends: list[int] = []
        self.tokens = 0

    def add(self, ids: list[int], longest: int | None) -> None:
        if not ids:
            return
        self._parts.append(np.array(ids, np.int32))
        if longest is not None:
            self._ends += range(self.tokens + longest, self.tokens + len(ids), longest)
        self.tokens += len(ids)
        self._ends.append(self.tokens)

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate([np.zeros(0, np.int32), *self._parts]), np.array(self._ends, np.int64)


def _batches(unit: Unit, account: Account, min_characters: int) -> Iterator[list[tuple[str, bool]]]:
    """Cleaned documents and whether they end here, together as many as are worth a call."""
    batch: list[tuple[str, bool]] = []
    characters = 0
    for document in unit.documents():
        text = account.text(document.raw, document.where, min_characters, document.last)
        if text is None:
            continue
        batch.append((text, document.last))
        characters += len(text)
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoded(codec: Codec, texts: list[str]) -> Iterator[list[int]]:
    """Ids of each text. A very long one is encoded piece by piece; where it is cut a word may have other tokens than elsewhere."""
    together: list[str] = []
    for text in texts:
        if len(text) <= _PIECE:
            together.append(text)
            continue
        yield from codec.encode(together)
        together = []
        yield [token for piece in pieces_of(text) for token in codec.encode([piece])[0]]
    yield from codec.encode(together)


def pieces_of(text: str, longest: int = _PIECE) -> Iterator[str]:
    """The text in pieces of at most `longest` characters, cut before a line's end where there is one in the last quarter."""
    at = 0
    while at < len(text):
        stop = min(at + longest, len(text))
        if stop < len(text):
            line = text.rfind("\n", stop - longest // 4, stop)
            stop = line if line > at else stop
        yield text[at:stop]
        at = stop


def one_thread() -> None:
    """Tasks run beside each other: none of them may take all cores for its encoding. Read by the tokenizers at each call."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def tokenise_all(work: Work, units: Iterable[Unit]) -> Iterator[dict[str, Any]]:
    """Units one after another in this process, as the Ray tasks do it."""
    one_thread()
    for unit in units:
        yield tokenise(work, unit)
