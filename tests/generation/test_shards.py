"""How prompts are cut into shards: every row in one shard of one teacher, wherever the cuts fall. No Ray, no engine."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from raysys.config.parts import Data
from raysys.data import files
from raysys.data.procedural import Stream
from raysys.data.rows import BadRow, Row
from raysys.errors import DataError
from raysys.generation.shards import Prompts, digest
from raysys.rollout.spec import Sampling

ADD = {"task": "chain_sum", "params": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}, "style": "scratchpad"}
REV = {"task": "spell_backward", "params": {"min_word_len": 3, "max_word_len": 6}, "style": "scratchpad"}


def procedural(split: str = "train", size: int | None = None, **domains: dict) -> Data:
    return Data.parse({"source": {"split": split, "size": size, "domains": domains}})


def ids(prompts: Prompts, rows: int | None, shard_rows: int) -> list[str]:
    found = [row for shard in prompts.cut(rows, shard_rows) for _, row in prompts.read(shard)]
    return [row.id for row in found if isinstance(row, Row)]


@pytest.mark.parametrize("split", ["train", "choose"])
@pytest.mark.parametrize("shard_rows", [1, 7, 20, 64])
def test_a_stream_cut_anywhere_is_the_stream(split: str, shard_rows: int) -> None:
    data = procedural(split, add=ADD, rev=REV | {"weight": 2})
    prompts = Prompts.of(data, 5, {"default": "x", "add": "a", "rev": "b"})
    shards = prompts.cut(20, shard_rows)
    read = {name: [row for shard in shards if shard.teacher == name for _, row in prompts.read(shard)] for name in "xab"}
    assert data.source is not None and not read["x"]
    for name, domain, count in (("a", "add", 20), ("b", "rev", 40)):
        stream = Stream(domain, data.source.domains[domain], data.source, 5, True)
        assert read[name] == [stream.next()[0] for _ in range(count)], "twice the weight, twice the rows"
    assert [shard.number for shard in shards] == list(range(len(shards))) and len({shard.name for shard in shards}) == len(shards)
    assert max(shard.piece.rows for shard in shards) <= shard_rows


def test_a_stream_that_repeats_ends_with_its_size() -> None:
    prompts = Prompts.of(procedural("train", 10, add=ADD), 0, {"add": "a"})
    assert ids(prompts, None, 4) == ids(prompts, 99, 4) == [f"add:{number}" for number in range(10)]
    assert ids(prompts, 3, 4) == ["add:0", "add:1", "add:2"]


def test_a_domain_without_a_teacher_is_named() -> None:
    with pytest.raises(DataError, match="unknown domain tag 'rev'"):
        Prompts.of(procedural(rev=REV), 0, {"add": "a"}).cut(4, 4)


def lines(count: int) -> list[str]:
    rows = [json.dumps({"prompt": f"{number}=", "domain": ("m", "c", "")[number % 3], "id": str(number)}) for number in range(count)]
    rows[4], rows[11] = "", "{nonsense"
    return rows


@pytest.mark.parametrize("shard_rows", [1, 3, 8, 100])
def test_each_row_of_files_goes_to_its_teacher_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_rows: int) -> None:
    monkeypatch.setattr(files, "UNIT_ROWS", 8)
    (tmp_path / "a.jsonl").write_text("\n".join(lines(29)))
    more = [{"prompt": "p", "domain": "c", "id": f"x{number}"} for number in range(17)]
    parquet.write_table(pa.Table.from_pylist(more), tmp_path / "b.parquet", row_group_size=10)
    prompts = Prompts.of(Data(path=str(tmp_path)), 0, {"m": "one", "c": "two", "default": "one"})
    found: dict[str, list[str]] = {"one": [], "two": []}
    bad = []
    for shard in prompts.cut(None, shard_rows):
        assert shard.piece.rows <= shard_rows
        for where, row in prompts.read(shard):
            if isinstance(row, BadRow):
                bad.append((shard.teacher, where))
            else:
                found[shard.teacher].append(row.id)
    whole = [number for number in range(29) if number not in (4, 11)]
    assert found["one"] == [str(number) for number in whole if number % 3 != 1]
    assert found["two"] == [str(number) for number in whole if number % 3 == 1] + [f"x{number}" for number in range(17)]
    assert bad == [("one", "a.jsonl:12")], "who reads nothing else reports it, and only once"


def test_the_first_rows_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(lines(29)))
    prompts = Prompts.of(Data(path=str(tmp_path)), 0, {"m": "one", "c": "one", "default": "one"})
    assert ids(prompts, 10, 4) == ["0", "1", "2", "3", "5", "6", "7", "8", "9"], "a blank line counts"


def test_a_row_without_a_teacher_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(lines(29)))
    prompts = Prompts.of(Data(path=str(tmp_path)), 0, {"m": "one", "c": "two"})
    with pytest.raises(DataError, match=r"prompt a\.jsonl:3\): no domain tag"):
        ids(prompts, None, 8)


def test_names_of_files_show_no_odd_tag_and_are_not_hidden() -> None:
    prompts = Prompts.of(procedural(**{"../add": ADD, "_rev": REV}), 0, {"../add": "a", "_rev": "b"})
    assert [shard.name for shard in prompts.cut(2, 2)] == ["0-___add-00000", "1-_rev-00000"]


def test_the_digest_knows_prompts_and_cut_and_not_where_teachers_lie() -> None:
    def of(seed: int, rows: int, shard_rows: int, teacher: str = "a") -> str:
        return digest(Prompts.of(procedural("train", add=ADD), seed, {"add": teacher}).cut(rows, shard_rows))

    same = of(0, 9, 3)
    assert same == of(0, 9, 3, "elsewhere/a")
    assert len({same, of(1, 9, 3), of(0, 8, 3), of(0, 9, 4)}) == 4


def test_a_sample_has_its_own_seed() -> None:
    sampling = Sampling(max_tokens=4, seed=0)
    seeds = {sampling.seed_of(prompt, sample) for prompt in ("add:0", "add:1", "add:1/0") for sample in range(3)}
    assert len(seeds) == 9 and sampling.seed_of("add:0", 2) == Sampling(max_tokens=9, seed=0).seed_of("add:0", 2)
