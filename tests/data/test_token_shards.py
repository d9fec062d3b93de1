"""Units as packed sequences: the tokenizer's own tokens, all of them, once, with right boundaries."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.config.corpora import Corpus, Source
from raysys.data import tokenise as module
from raysys.data.corpus import plan_units
from raysys.data.shards import Folder, read_note, read_shard, shard_name
from raysys.data.text import load_tokenizer
from raysys.data.tokenise import Work, held_out, pack, pieces_of, tokenise
from raysys.errors import ConfigError, DataError, InfrastructureError


def corpus_of(path: Path, tokenizer: str, **more) -> Corpus:
    return Corpus(**{"sources": {"web": Source(path=str(path))}, "tokenizer": tokenizer, "sequence": 16, "held_out_share": 0.0} | more)


def made(corpus: Corpus, cache: Path):
    """Work, units and notes of the corpus's only source."""
    work = Work.of(corpus, Folder.at(str(cache)))
    units = plan_units(corpus.sources["web"], "web", corpus.unit_bytes, corpus.longest_row)
    return work, units, [tokenise(work, unit) for unit in units]


def sequences(work: Work, note: dict, split="train") -> list[tuple[list[int], list[int]]]:
    shard = read_shard(work.folder, note["key"], split, note["rows" if split == "train" else "held_rows"])
    return [
        (
            shard.ids[shard.starts[row] : shard.starts[row + 1]].tolist(),
            shard.lengths[shard.pieces[row] : shard.pieces[row + 1]].tolist(),
        )
        for row in range(shard.rows)
    ]


def write(folder: Path, texts: list[str]) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder / "rows.jsonl"


@given(st.lists(st.integers(1, 12), max_size=20), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_packing_loses_and_doubles_nothing(documents: list[int], sequence: int) -> None:
    ends = np.cumsum(documents, dtype=np.int64)
    total = int(ends[-1]) if documents else 0
    table = pack(np.arange(total, dtype=np.int32), ends, sequence)
    rows, lengths = table.column("ids").to_pylist(), table.column("lengths").to_pylist()
    assert [token for row in rows for token in row] == list(range(total))
    assert all(len(row) == sequence for row in rows[:-1]) and all(1 <= len(row) <= sequence for row in rows)
    assert [sum(own) for own in lengths] == [len(row) for row in rows] and all(one > 0 for own in lengths for one in own)
    cuts = np.cumsum([one for own in lengths for one in own]).tolist()
    assert cuts == sorted({*ends.tolist(), *range(sequence, total, sequence)}), "at ends of documents and of sequences, nowhere else"


def test_a_worked_example() -> None:
    table = pack(np.arange(10, dtype=np.int32), np.array([3, 5, 10]), 4)
    assert table.column("ids").to_pylist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert table.column("lengths").to_pylist() == [[3, 1], [1, 3], [2]]


def test_units_hold_the_tokenizers_own_tokens(tmp_path: Path, bytewise: str) -> None:
    dice = random.Random(0)
    texts = ["".join(dice.choices(["the ", "quick", "\n", "é", "7", "日本"], k=dice.randrange(1, 60))) + "." for _ in range(100)]
    work, units, notes = made(corpus_of(write(tmp_path, texts), bytewise, unit_bytes=2000), tmp_path / "cache")
    assert len(units) > 5
    tokenizer = load_tokenizer(bytewise).backend_tokenizer
    expected = [token for text in texts for token in [*tokenizer.encode(text).ids, 1]]
    rows = [row for note in notes for row in sequences(work, note)]
    assert [token for ids, _ in rows for token in ids] == expected
    assert sum(note["tokens"] for note in notes) == len(expected) and sum(note["rows"] for note in notes) == len(rows)
    for ids, lengths in rows:
        assert sum(lengths) == len(ids) <= 16
        ends = {end for end in np.cumsum(lengths).tolist() if end < len(ids)}
        assert ends == {place + 1 for place, token in enumerate(ids[:-1]) if token == 1}, "documents end at end tokens only"
    assert sum(note["account"]["kept"] for note in notes) == 100


def test_names_of_special_tokens_are_text(tmp_path: Path, bytewise: str) -> None:
    work, _, (note,) = made(corpus_of(write(tmp_path, ["a<eos>b<pad>"]), bytewise), tmp_path / "cache")
    ids = [token for row, _ in sequences(work, note) for token in row]
    assert ids.count(1) == 1 and ids[-1] == 1 and 0 not in ids
    assert load_tokenizer(bytewise).decode(ids[:-1]) == "a<eos>b<pad>"


def test_long_documents_are_cut_and_end_once(tmp_path: Path, bytewise: str) -> None:
    texts = ["x" * 50, "yy"]
    cut = corpus_of(write(tmp_path, texts), bytewise, sequence=100, max_document_tokens=20)
    work, _, (note,) = made(cut, tmp_path / "cache")
    ((ids, lengths),) = sequences(work, note)
    own = [len(load_tokenizer(bytewise).backend_tokenizer.encode(text).ids) + 1 for text in texts]
    assert own[0] > 40 and lengths == [20, 20, own[0] - 40, own[1]] and ids.count(1) == 2


def test_a_file_of_many_units_ends_once(tmp_path: Path, bytewise: str) -> None:
    text = "".join(f"line {number} é\n" for number in range(500))
    (tmp_path / "long.txt").write_text(text)
    work, units, notes = made(corpus_of(tmp_path / "long.txt", bytewise, unit_bytes=700), tmp_path / "cache")
    ids = [token for note in notes for row, _ in sequences(work, note) for token in row]
    assert len(units) > 5 and ids.count(1) == 1 and ids[-1] == 1
    assert load_tokenizer(bytewise).decode(ids[:-1]) == text.rstrip()


def test_pieces_of_a_long_text_join_to_it() -> None:
    text = "".join(random.Random(0).choices("ab \n", k=1000)) + "c" * 500
    pieces = list(pieces_of(text, 64))
    assert "".join(pieces) == text and all(0 < len(piece) <= 64 for piece in pieces)
    assert sum(piece.startswith("\n") for piece in pieces) > 10
    assert list(pieces_of("")) == []


def test_memory_follows_the_unit_not_the_document(tmp_path: Path, bytewise: str) -> None:
    with open(tmp_path / "long.txt", "w") as file:
        for number in range(400_000):
            file.write(f"{number} is a number\n")  # 8 MB
    corpus = corpus_of(tmp_path / "long.txt", bytewise, unit_bytes=2**18, sequence=512)
    work = Work.of(corpus, Folder.at(str(tmp_path / "cache")))
    units = plan_units(corpus.sources["web"], "web", corpus.unit_bytes, corpus.longest_row)
    assert len(units) == -(-(tmp_path / "long.txt").stat().st_size // 2**18) > 25
    tokenise(work, units[0])
    tracemalloc.start()
    tokenise(work, units[7])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30 * 2**18


def test_held_out_documents_are_chosen_by_their_text(tmp_path: Path, bytewise: str) -> None:
    texts = [f"document number {number % 300}" for number in range(600)]
    corpus = corpus_of(write(tmp_path, texts), bytewise, unit_bytes=3000, held_out_share=0.2)
    work, _, notes = made(corpus, tmp_path / "cache")
    tokenizer = load_tokenizer(bytewise)

    def documents(split) -> list[str]:
        ids = [token for note in notes for row, _ in sequences(work, note, split) for token in row]
        return tokenizer.decode(ids).split("<eos>")[:-1]

    train, held = documents("train"), documents("validation")
    assert sorted(train + held) == sorted(texts) and not set(train) & set(held)
    assert 0.12 < len(held) / len(texts) < 0.28 and all(held_out(text, 0.2) for text in held)
    assert sum(note["held_tokens"] for note in notes) > 0
    assert not held_out("anything", 0.0)


def test_a_tokenizer_that_cannot_end_documents(tmp_path: Path, bytewise: str) -> None:
    endless = tmp_path / "endless"
    tokenizer = load_tokenizer(bytewise)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(endless)
    with pytest.raises(ConfigError, match=r"has no end token, .*eos_token"):
        Work.of(corpus_of(tmp_path, str(endless)), Folder.at(str(tmp_path)))


def test_keys_follow_settings(tmp_path: Path, bytewise: str) -> None:
    corpus = corpus_of(write(tmp_path, ["a"]), bytewise)
    (unit,) = plan_units(corpus.sources["web"], "web", corpus.unit_bytes, corpus.longest_row)
    folder = Folder.at(str(tmp_path))
    changes = [{}, {"sequence": 17}, {"min_characters": 2}, {"max_document_tokens": 4}, {"held_out_share": 0.1}]
    keys = [Work.of(corpus.model_copy(update=change), folder).key(unit) for change in changes]
    assert len(set(keys)) == len(keys) and keys[0] == pickle.loads(pickle.dumps(Work.of(corpus, folder))).key(unit)
    other = load_tokenizer(bytewise)
    other.eos_token = "the"
    other.save_pretrained(tmp_path / "other")
    assert Work.of(corpus.model_copy(update={"tokenizer": str(tmp_path / "other")}), folder).key(unit) not in keys


def test_damaged_shards_are_not_believed(tmp_path: Path, bytewise: str) -> None:
    work, _, (note,) = made(corpus_of(write(tmp_path, ["some text " * 200]), bytewise), tmp_path / "cache")
    path = tmp_path / "cache" / shard_name(note["key"], "train")
    assert {key: value for key, value in note.items() if "size" not in key} == read_note(work.folder, note["key"])
    assert note["size"] == path.stat().st_size
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert read_note(work.folder, note["key"]) is None
    with pytest.raises(DataError, match=r"cannot be read: .*delete this file"):
        read_shard(work.folder, note["key"], "train", note["rows"])
    path.write_bytes(whole[:60] + bytes([whole[60] ^ 1]) + whole[61:])
    with pytest.raises(DataError, match=r"cannot be read: .*delete this file"):
        read_shard(work.folder, note["key"], "train", note["rows"])
    path.write_bytes(whole)
    with pytest.raises(DataError, match=f"has {note['rows']} rows, 999 were written"):
        read_shard(work.folder, note["key"], "train", 999)


KILLED = """
import os, signal, sys
from raysys.data.shards import Folder
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
Folder.at(sys.argv[1]).write("shards/k.parquet", b"half of it")
"""


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file(tmp_path: Path) -> None:
    folder = Folder.at(str(tmp_path))
    folder.write("shards/k.parquet", b"old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    assert folder.read("shards/k.parquet") == b"old" and folder.read("gone") is None
    (draft,) = (tmp_path / "shards").glob(".*.draft")
    folder.sweep()
    assert draft.exists(), "it may be of a task that lives"
    os.utime(draft, (1, 1))
    folder.sweep()
    assert not draft.exists() and folder.sizes() == {"shards/k.parquet": 3}


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InfrastructureError, match=r"k could not be written: .*No space left.*data\.cache"):
        Folder.at(str(tmp_path)).write("k", b"data")
    assert list(tmp_path.iterdir()) == []


def test_batches_are_bounded(tmp_path: Path, bytewise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH", 100)
    monkeypatch.setattr(module, "_PIECE", 30)
    texts = [f"{number}\nis a number " * (number % 7) for number in range(50)]
    small = made(corpus_of(write(tmp_path, texts), bytewise), tmp_path / "small")
    ids = [token for row, _ in sequences(small[0], small[2][0]) for token in row]
    assert load_tokenizer(bytewise).decode(ids) == "".join(text.rstrip() + "<eos>" for text in texts if text)
