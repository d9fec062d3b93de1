"""Text sources cut into units: nothing lost at a cut, nothing read twice, bad input told apart from what is left out on purpose."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from raysys.config.corpora import Corpus, Source
from raysys.data.cleaning import Account, clean
from raysys.data.corpus import plan_units
from raysys.data.rows import BadRow
from raysys.errors import ConfigError, DataError


def units(path: Path | str, unit_bytes: int = 64, longest: int = 10_000, column: str = "text"):
    return plan_units(Source(path=str(path), column=column), "web", unit_bytes, longest)


def raws(found) -> list:
    return [document.raw for unit in found for document in unit.documents()]


def words(seed: int, count: int) -> list[str]:
    dice = random.Random(seed)
    return ["".join(dice.choices("aé日😀 \n", k=dice.randrange(1, 40))) for _ in range(count)]


@pytest.mark.parametrize("unit_bytes", [1, 7, 64, 1000, 10**6])
@pytest.mark.parametrize("ending", ["\n", ""])
def test_every_line_is_in_one_unit(tmp_path: Path, unit_bytes: int, ending: str) -> None:
    texts = words(0, 30)
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(lines) + ending, encoding="utf-8")
    found = units(tmp_path, unit_bytes)
    assert raws(found) == texts
    assert len(found) == -(-(tmp_path / "rows.jsonl").stat().st_size // unit_bytes) or unit_bytes > 1000


@pytest.mark.parametrize("unit_bytes", [1, 2, 3, 5, 16, 1000])
def test_text_is_cut_between_characters(tmp_path: Path, unit_bytes: int) -> None:
    text = "".join(words(1, 20))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8", newline="")
    documents = [document for unit in units(tmp_path / "long.txt", unit_bytes) for document in unit.documents()]
    assert all(isinstance(document.raw, bytes) for document in documents)
    assert "".join(document.raw.decode() for document in documents) == text, "each piece is whole characters"
    assert [document.last for document in documents] == [False] * (len(documents) - 1) + [True]


@pytest.mark.parametrize("unit_bytes", [20, 300, 10**6])
def test_every_parquet_row_is_in_one_unit(tmp_path: Path, unit_bytes: int) -> None:
    texts = words(2, 300)
    table = pa.table({"id": list(range(300)), "body": [*texts[:150], None, *texts[150:299]]})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=130, compression="none")
    read = raws(units(tmp_path, unit_bytes, column="body"))
    assert isinstance(read[150], BadRow) and "no text in `body`" in str(read[150])
    assert [raw.decode() for raw in read[:150] + read[151:]] == texts[:299]


def test_one_broken_string_leaves_its_neighbours(tmp_path: Path) -> None:
    broken = pa.array([b"one", b"\xff\xfe", b"three"]).view(pa.string())
    parquet.write_table(pa.table({"text": broken}), tmp_path / "rows.parquet")
    account = Account.new()
    read = [account.text(raw, "here", 1) for raw in raws(units(tmp_path))]
    assert read == ["one", None, "three"] and account.bad.reasons == {"not UTF-8": 1}


def test_small_files_are_read_together(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number:02}.md").write_text(f"{number:02} is its number")
    found = units(tmp_path, 160)
    assert [len(unit.pieces) for unit in found] == [10] * 4
    assert [raw.decode()[:2] for raw in raws(found)] == [f"{number:02}" for number in range(40)]
    assert all(document.last for unit in found for document in unit.documents())


def test_what_a_path_stands_for(tmp_path: Path) -> None:
    for name in ("a.txt", "deep/b.rst", "deep/c.py", "d.cfg", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert raws(units(tmp_path)) == [b"a.txt", b"deep/b.rst", b"deep/c.py"]
    assert raws(units(tmp_path / "**" / "*.cfg")) == [b"d.cfg"] == raws(units(tmp_path / "d.cfg"))
    (tmp_path / "deep" / "rows.jsonl").write_text('{"text": "row"}\n')
    assert raws(units(tmp_path)) == ["row"], "a data set's folder is more than its README"
    assert raws(units(f"file://{tmp_path}")) == ["row"]


def test_paths_without_text(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_text("?")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "rows.jsonl.gz").write_text("?")
    parquet.write_table(pa.table({"words": ["a"], "text": [[1]]}), tmp_path / "rows.parquet")
    for path, error, message in (
        ("gone", ConfigError, r"data\.sources\.web\.path=.*gone does not exist"),
        ("*.csv", ConfigError, "matches no file"),
        ("empty.txt", ConfigError, "is empty"),
        ("*.gz", ConfigError, "compressed files"),
        ("rows.parquet", DataError, r"no text column `text`, only one of type list.*data\.sources\.web\.column"),
    ):
        with pytest.raises(error, match=message):
            units(tmp_path / path)
    with pytest.raises(DataError, match="no text column `body`, only words, text"):
        units(tmp_path / "rows.parquet", column="body")
    (tmp_path / "rows.parquet").unlink()
    (tmp_path / "empty.txt").unlink()
    with pytest.raises(ConfigError, match=r"holds only image\.png, rows\.jsonl\.gz"):
        units(tmp_path)


def test_rows_that_cannot_be_read_are_counted_and_named(tmp_path: Path) -> None:
    lines = [
        b"\xef\xbb\xbf" + b'{"text": "first"}',
        b"{not json",
        b"\xff\xfe",
        b"[1]",
        b'{"other": 1}',
        b'{"text": 7}',
        b'{"text": "\\ud800"}',
        b'{"text": "' + b"x" * 300 + b'"}',
        b'{"text": "  \\n"}',
        b'{"text": "\\u0000\\u0001\\u0002PNG"}',
        b'{"text": "last"}',
    ]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    account = Account.new(0.5)
    found = [account.text(one.raw, one.where, 1) for unit in units(tmp_path, 50, longest=200) for one in unit.documents()]
    assert [text for text in found if text] == ["first", "last"]
    assert (account.bad.seen, account.bad.bad, account.kept, dict(account.dropped)) == (11, 8, 2, {"empty": 1})
    assert set(account.bad.reasons) == {
        *("invalid JSON", "not UTF-8", "not an object", "no text in `text`", "not valid Unicode", "too long", "binary"),
    }
    assert "rows.jsonl at byte 21: invalid JSON" in account.bad.examples[0]
    with pytest.raises(DataError, match=r"8 of 11 rows .* data\.max_bad_share=0\.5"):
        account.bad.check(complete=True)
    other = Account.new(1.0)
    for _ in range(2):
        other.add(json.loads(json.dumps(account.state())))
    assert (other.kept, other.bad.seen, other.bad.bad, other.dropped["empty"]) == (4, 22, 16, 2)
    assert other.lines()[0] == "2 documents were left out: empty"


def test_cleaning() -> None:
    assert clean("e\u0301 \u2028 x\r\ny\rz \t\n\n".encode()) == "é \u2028 x\ny\nz"
    assert clean("\ufeffa\tb" + "c" * 400 + "\x00\x0c") == "a\tb" + "c" * 400
    assert clean("more to come \n", last=False) == "more to come \n"
    assert clean(b"") == ""
    with pytest.raises(BadRow, match="binary: 2 of 3"):
        clean("\x00a\x07")
    with pytest.raises(BadRow, match="not UTF-8: at byte 1"):
        clean(b"a\xff")
    account = Account.new()
    assert [account.text(text, "", 3) for text in ("ab", "abc", " \n", "")] == [None, "abc", None, None]
    assert account.dropped == {"shorter than min_characters": 1, "empty": 2} and not account.bad.bad


def test_a_row_that_is_too_long_is_never_held(tmp_path: Path) -> None:
    with open(tmp_path / "rows.jsonl", "wb") as file:
        file.write(b'{"text": "before"}\n{"text": "')
        for _ in range(64):
            file.write(b"x" * 2**20)
        file.write(b'"}\n{"text": "after"}\n')
    found = units(tmp_path, 2**20, longest=2**20)
    tracemalloc.start()
    read = [document.raw for unit in found for document in unit.documents()]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read[0] == "before" and read[-1] == "after" and len(read) == 3
    assert str(read[1]).startswith(f"too long: a row of more than {2**20} bytes") and peak < 8 * 2**20


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = units(path)[0]
    assert before.key("s") == units(path)[0].key("s") != before.key("t")
    os.utime(path, ns=(1, 1))
    assert units(path)[0].key("s") != before.key("s")
    with pytest.raises(DataError, match=r"a\.txt changed while"):
        list(before.documents())
    path.unlink()
    with pytest.raises(DataError, match=r"a\.txt changed while"):
        list(before.documents())


def test_configs_that_cannot_work(tmp_path: Path) -> None:
    good = {"sources": {"web": {"path": "x"}}, "tokenizer": "t"}
    assert Corpus.parse(good).sources["web"].column == "text"
    for change, message in (
        ({"sources": {}}, "sources"),
        ({"sequence": 1}, "sequence=1 leaves nothing to predict"),
        ({"held_out_share": 0.9}, "held_out_share"),
        ({"sources": {"web": {"path": "x", "weight": 0}}}, r"sources\.web\.weight"),
        ({"sequences": 5}, "did you mean 'sequence'"),
    ):
        with pytest.raises(ConfigError, match=message):
            Corpus.parse(good | change)
    placed = {"cache": "c", "tasks": 3, "ahead": 4, "wait": 5.0, "max_bad_share": 0.2}
    assert Corpus.parse(good | placed).identity() == Corpus.parse(good).identity()
