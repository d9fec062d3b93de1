"""What is kept of answers, how it is written, and that training reads from it what the teacher sampled. No Ray, no engine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from raysys.data.files import open_files
from raysys.data.rows import Row, parse
from raysys.errors import CheckpointError, DataError, DeadlineError, InfrastructureError, RaysysError
from raysys.generation.answers import Answer, Record, heard, plain, sift, table, told
from raysys.generation.books import Books, publish
from raysys.generation.shards import Piece, Shard

CHAT = [{"role": "system", "content": "be short"}, {"role": "user", "content": "2+2="}]


def row(number: int, prompt: str | list = "1+1=", domain: str = "add") -> Row:
    return Row(id=f"{domain}:{number}", where="", prompt=prompt, domain=domain, answer="2", verifier="exact", metadata='{"a": 1}')


def answer(number: int, text: str = "2", ended: bool = True, score: float | None = 1.0, sample: int = 0, **more: str) -> Answer:
    return Answer(row(number, **more), sample, [20, 2], text, ended, score)


def shown(one: Row) -> str:
    return plain(one.prompt)


def test_what_is_left_out_is_counted_by_domain() -> None:
    answers = [
        answer(0),
        answer(0, "3", score=0.0, sample=1),
        answer(1, "2222", ended=False),
        answer(2, " "),
        answer(3, "4", score=None, domain="rev"),
    ]
    record = Record("s")
    assert sift(answers, "all", record, shown) == [answers[0], answers[1], answers[4]]
    assert record.counts == {
        "add": {"prompts": 3, "samples": 4, "kept": 2, "cut_off": 1, "empty": 1, "judged": 4, "correct": 3, "tokens": 8},
        "rev": {"prompts": 1, "samples": 1, "kept": 1, "tokens": 2},
    }
    assert [text["response"] for text in record.texts] == ["2", "3", "4"]
    record = Record("s")
    assert sift(answers, "correct", record, shown) == [answers[0]]
    assert record.counts["add"]["wrong"] == 1 and record.counts["rev"]["wrong"] == 1 and record.total("kept") == 1


def written(folder: Path, answers: list[Answer], tokenizer: str) -> list[Row]:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "ledger" / "shards").mkdir(parents=True, exist_ok=True)
    publish(folder, table(answers, tokenizer), Record("0-add-00000"))
    found = open_files(str(folder / "data"))
    raws = [raw for unit in found.units for raw in found.read(unit)]
    return [parse(raw.record, where="w", row_id="w", default_verifier="math", context_field=None) for raw in raws]


def test_rows_come_back_as_they_were_with_the_teachers_words(tmp_path: Path) -> None:
    one, two = written(tmp_path, [answer(0, "two"), answer(0, "2", sample=1)], "t")
    assert (one.id, two.id) == ("add:0/0", "add:0/1")
    assert (one.target, one.answer, one.verifier, one.metadata, one.domain) == ("two", "2", "exact", '{"a": 1}', "add")
    assert (one.prompt, one.response_ids, one.tokenizer) == ("1+1=", [20, 2], "t")


def test_messages_stay_messages_and_text_beside_them_is_one_of_the_users(tmp_path: Path) -> None:
    one, two = written(tmp_path, [answer(0, prompt=CHAT), answer(1)], "t")
    assert one.prompt == CHAT and two.prompt == [{"role": "user", "content": "1+1="}]


def test_a_row_without_an_answer_of_its_own_is_judged_by_nobody_later(tmp_path: Path) -> None:
    mute = Row(id="x", where="", prompt="say something")
    (one,) = written(tmp_path, [Answer(mute, 0, [5, 2], "something", True, None)], "t")
    assert (one.target, one.answer, one.verifier) == ("something", "", "")


SHARDS = [Shard(number, f"0-add-{number:05d}", "a", Piece(4, "add", (4 * number, 5 * number)), True) for number in range(3)]


def test_a_shard_is_finished_when_file_and_record_are_whole(tmp_path: Path) -> None:
    books = Books(tmp_path, SHARDS)
    assert books.finished() == {}
    publish(tmp_path, table([answer(0)], "t"), Record(SHARDS[0].name, seen=4))
    publish(tmp_path, table([], "t"), Record(SHARDS[1].name, seen=4))
    done = books.finished()
    assert list(done) == [0, 1] and done[0].size > 0 and done[1].size == 0 and done[0].seen == 4
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["0-add-00000.parquet"], "nothing kept, no file"
    (tmp_path / "ledger" / "shards" / "0-add-00001.json").write_text('{"shard": "0-a')
    os.truncate(tmp_path / "data" / "0-add-00000.parquet", 100)
    assert books.finished() == {}


def test_a_shard_published_again_is_the_same_file(tmp_path: Path) -> None:
    Books(tmp_path, SHARDS)
    path = tmp_path / "data" / "0-add-00000.parquet"
    publish(tmp_path, table([answer(0), answer(1)], "t"), Record(SHARDS[0].name))
    before = path.read_bytes()
    (tmp_path / "data" / ".0-add-00000.7.draft").write_bytes(before[:50])
    again = Books(tmp_path, SHARDS)
    publish(tmp_path, table([answer(0), answer(1)], "t"), Record(SHARDS[0].name, seconds=9.0))
    assert path.read_bytes() == before and list(again.finished()) == [0]
    assert [one.name for one in (tmp_path / "data").iterdir()] == ["0-add-00000.parquet"], "a torn draft is swept away"


def test_other_data_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    Books(tmp_path, SHARDS)
    with pytest.raises(CheckpointError, match="the data changed since the run began"):
        Books(tmp_path, SHARDS[:2])


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"0-add-00000\.parquet could not be written: .*No such file"):
        publish(tmp_path, table([answer(0)], "t"), Record(SHARDS[0].name))


def test_row_groups_stay_small_enough_to_shuffle(tmp_path: Path) -> None:
    Books(tmp_path, SHARDS)
    publish(tmp_path, table([answer(number) for number in range(2500)], "t"), Record(SHARDS[0].name))
    assert parquet.ParquetFile(tmp_path / "data" / "0-add-00000.parquet").num_row_groups == 3
    assert json.loads((tmp_path / "ledger" / "shards" / "0-add-00000.json").read_text())["size"] > 0


@pytest.mark.parametrize(
    ("sent", "kind"),
    [
        (DataError("row 3 is odd", "mend it"), DataError),
        (CheckpointError("the disk is full"), CheckpointError),
        (DeadlineError("engine", "answer", 3.0, "deadlines.generate"), InfrastructureError),
    ],
)
def test_what_ended_a_shard_crosses_as_text(sent: RaysysError, kind: type[RaysysError]) -> None:
    got = heard(told(sent))
    assert type(got) is kind and isinstance(got, RaysysError) and (got.message, got.remedy) == (sent.message, sent.remedy)
    record = Record("s", counts={"add": {"kept": 2}}, seen=3, reasons={"long": 1}, texts=[{"text": "<b>"}], rate=1.5)
    assert heard(told(record)) == record
