"""Token windows: texts, rows and tasks; the same again from the same seed; and what is told of few."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from raysys.compression.calibration import TokenWindows, token_windows, warnings
from raysys.config.quantising import Windows
from raysys.errors import ConfigError, DataError
from raysys.models.scratch import character_tokenizer

ADD = {"task": "chain_sum", "params": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}, "style": "scratchpad"}
END = 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    character_tokenizer(128).save_pretrained(folder)
    return str(folder)


def text(ids: np.ndarray) -> str:
    return "".join("|" if one == END else chr(int(one) - 3 + 32) for one in ids)


def windows(tokenizer: str, seed: int = 0, in_order: bool = False, **config: Any) -> TokenWindows:
    return token_windows(Windows.parse({"samples": 4, "length": 8} | config), tokenizer, seed, "calibration", in_order)


def test_texts_are_joined_and_cut(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"document number {n}"}) + "\n" for n in range(3)))
    found = windows(tokenizer, in_order=True, path=str(tmp_path / "texts.jsonl"), samples=3)
    assert [text(one) for one in found.ids] == ["document", " number ", "0|docume"]
    assert found.lengths.tolist() == [8, 8, 8] and found.starts.tolist() == [1, 1, 1] and found.tokens == 24
    (tmp_path / "plain.txt").write_text("document number 0")
    assert text(windows(tokenizer, in_order=True, path=str(tmp_path / "plain.txt")).ids[1]) == " number "


def test_texts_can_stay_apart(tokenizer: str, tmp_path: Path) -> None:
    rows = ["a", "", "second one", "third"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in rows))
    apart = {"path": str(tmp_path / "texts.jsonl"), "joined": False, "samples": 3}
    found = windows(tokenizer, in_order=True, **apart)
    assert [text(ids[:length]) for ids, length in zip(found.ids, found.lengths, strict=True)] == ["a|", "second o", "third|"]
    assert found.starts.tolist() == [1, 1, 1]
    drawn = [windows(tokenizer, seed=seed, **apart | {"samples": 2}) for seed in (0, 0, 1)]
    assert drawn[0].digest == drawn[1].digest and len(drawn[0]) == 2
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": ""}) + "\n")
    with pytest.raises(DataError, match="no usable text"):
        windows(tokenizer, **apart)


def test_a_seed_chooses_and_its_hash_says_what(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("".join(chr(32 + n % 90) for n in range(400)))
    path = str(tmp_path / "plain.txt")
    one, same, other = (windows(tokenizer, seed=seed, path=path) for seed in (0, 0, 1))
    assert (one.ids == same.ids).all() and one.digest == same.digest != other.digest
    assert len({text(ids) for ids in one.ids}) == 4, "no window twice"


def test_a_row_with_a_prompt_is_a_window_of_its_own(tokenizer: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": "1+1=", "answer": "2"},
        {"prompt": "ab", "response": "a long answer", "answer": "x"},
        {"prompt": "alone"},
        {"prompt": "long prompt", "answer": "2"},
        {"prompt": "10+10=", "answer": "20"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = windows(tokenizer, in_order=True, path=str(tmp_path / "rows.jsonl"), samples=5)
    told = [text(ids[:length]) for ids, length in zip(found.ids, found.lengths, strict=True)]
    assert told == ["1+1=2|", "aba long", "alone", "long pro", "10+10=20"] and found.starts.tolist() == [4, 2, 1, 11, 6]
    assert found.whole.tolist() == [True, False, True, False, False], "of the last one the end token is not there"
    assert warnings(found, 5, 0, "evaluation") == ["3 of 5 answers do not fit into evaluation.length: accuracy is that of the others"]
    assert windows(tokenizer, path=str(tmp_path / "rows.jsonl"), samples=1).ids.shape[0] == 1


def test_tasks_come_with_their_answers(tokenizer: str) -> None:
    found = windows(tokenizer, source={"domains": {"add": ADD}}, length=32, samples=6)
    told = [text(ids[:length]) for ids, length in zip(found.ids, found.lengths, strict=True)]
    assert all("=" in one and ">" in one and one.endswith("|") for one in told)
    assert all(one[: start + 1].count("=") == 1 and one[start - 1] == "=" for one, start in zip(told, found.starts, strict=True))
    held_out = {"source": {"split": "report", "domains": {"add": ADD}}, "length": 32}
    assert windows(tokenizer, seed=0, **held_out).digest == windows(tokenizer, seed=1, **held_out).digest


def test_few_windows_are_told(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("x" * 20)
    found = windows(tokenizer, path=str(tmp_path / "plain.txt"))
    few, columns = warnings(found, 4, 64)
    assert few == "calibration has 2 windows, fewer than calibration.samples=4"
    assert columns.startswith("calibration has 16 tokens, fewer than the 64 inputs of the widest linear layer") and "gptq.damp" in columns
    assert not warnings(found, 2, 16)


def test_wrong_data_are_one_line(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "empty.jsonl").write_text('{"other": 1}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": 3}\n')
    for path, kind, told in (
        ("short.txt", ConfigError, "holds 4 tokens, which make no window of calibration.length=8"),
        ("none.txt", ConfigError, "calibration.path="),
        ("empty.jsonl", DataError, "no usable text"),
        ("bad.jsonl", DataError, "no usable row"),
    ):
        with pytest.raises(kind, match=told) as caught:
            windows(tokenizer, path=str(tmp_path / path))
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="set exactly one of path and source"):
        Windows.parse({})


def test_errors_name_keys_that_there_are(tokenizer: str, tmp_path: Path) -> None:
    parquet.write_table(pa.table({"content": ["a b c"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"no text column `text`, only content \(rename the column\)"):
        windows(tokenizer, path=str(tmp_path / "x.parquet"))
    longer = r"calibration\.length is 4"
    for size, told in (
        (200, rf"unusable, more than a share of 0\.01: .*: 6 tokens, {longer}.*\(raise calibration\.length, or give calibration\.source"),
        (20, rf"no row of domain add is usable.*{longer} \(set calibration\.source\.domains\.add\.params so that rows fit\)"),
    ):
        with pytest.raises(DataError, match=told):
            windows(tokenizer, source={"domains": {"add": ADD}, "size": size}, length=4)
