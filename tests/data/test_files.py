"""File sources: order, shuffling, resume, bad rows by file and line through Ray Data; without it, how files are cut and rows are read."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from raysys.config.parts import Data
from raysys.data import files, sources
from raysys.data.files import open_files
from raysys.data.rows import BadRow, BadRows, parse
from raysys.data.stream import PromptStream
from raysys.data.text import Decoder
from raysys.errors import CheckpointError, ConfigError, DataError, DeadlineError, InfrastructureError
from raysys.head import Head


@pytest.fixture(scope="module")
def cluster(ray_head: Head):
    import ray

    ray.init(address=ray_head.gcs, log_to_driver=False)
    yield
    ray.shutdown()


def write(folder: Path, rows: list, name: str = "rows.jsonl") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def rows(count: int, start: int = 0) -> list[dict]:
    return [{"prompt": f"{i}+1=", "answer": str(i + 1), "domain": "add"} for i in range(start, start + count)]


def stream(path: str, tiny: str, seed: int = 0, supervised: bool = True, **more) -> PromptStream:
    return PromptStream(Data(path=path, **more), tiny, seed, 16, 14, supervised)


# -- through Ray Data


def test_order_epochs_and_resume(tmp_path: Path, tiny: str, cluster) -> None:
    path = write(tmp_path, rows(40))
    straight = stream(path, tiny, 3)
    straight.prefetch()
    first = straight.take(25)
    state = json.loads(json.dumps(straight.state()))
    rest = straight.take(75)
    answers = [int(answer) for answer in first.strings("answer") + rest.strings("answer")]
    assert sorted(answers[:40]) == sorted(answers[40:80]) == list(range(1, 41))
    assert answers[:40] != answers[40:80] and answers[:40] != sorted(answers[:40]), "each epoch has an order of its own"
    ids = first.strings("prompt_id") + rest.strings("prompt_id")
    assert len(set(ids)) == 100 and set(ids[:40]) == {f"rows.jsonl:{line}@0" for line in range(1, 41)} and ids[-1].endswith("@2")
    assert first.strings("verifier") == ["exact"] * 25
    assert Decoder(tiny).texts(first.ragged("response_ids").rows()) == first.strings("answer")
    assert all(row[-1] == 2 for row in first.ragged("response_ids").rows())
    resumed = stream(path, tiny, 3)
    resumed.prefetch()  # of the beginning, which is then not what is wanted
    resumed.restore(state)
    assert resumed.take(75).table.equals(rest.table) and resumed.state() == straight.state()
    later = straight.state()
    resumed.restore(state)
    resumed.take(75)
    assert resumed.state() == later
    assert stream(path, tiny, 4).take(25).strings("answer") != first.strings("answer")


def test_a_resume_at_the_end_of_an_epoch_goes_on_with_the_next(tmp_path: Path, tiny: str, cluster) -> None:
    path = write(tmp_path, [*rows(8), ""])
    straight = stream(path, tiny)
    straight.take(8)
    state = straight.state()
    resumed = stream(path, tiny)
    resumed.restore(state)
    assert resumed.take(20).table.equals(straight.take(20).table) and resumed.state() == straight.state()
    write(tmp_path, ["{" + json.dumps(row)[:-1] for row in rows(8)] + [""])  # as many bytes: the cursor cannot tell
    broken = stream(path, tiny, max_bad_share=1.0)
    broken.restore(state)
    with pytest.raises(DataError, match="no row of the data set is usable"):
        broken.take(1)


def test_many_units_windows_and_files(tmp_path: Path, tiny: str, cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "UNIT_ROWS", 8)
    monkeypatch.setattr(sources, "WINDOW", 32)
    write(tmp_path, rows(77), "a.jsonl")
    write(tmp_path, rows(50, 77), "deeper/b.jsonl")
    parquet.write_table(pa.Table.from_pylist(rows(33, 127)), tmp_path / "c.parquet", row_group_size=10)
    in_order = stream(str(tmp_path), tiny, shuffle=False).take(320).strings("answer")
    assert [int(answer) for answer in in_order] == [*range(1, 78), *range(128, 161), *range(78, 128)] * 2, "a, c, deeper/b"
    straight = stream(str(tmp_path), tiny, 1)
    taken, states = [], []
    for count in (1, 30, 60, 90, 140, 100):
        states.append(straight.state())
        taken.append(straight.take(count))
    answers = [int(answer) for piece in taken for answer in piece.strings("answer")]
    assert sorted(answers[:160]) == sorted(answers[160:320]) == list(range(1, 161)) and answers[:160] != answers[160:320]
    for state, piece in zip(states, taken, strict=True):
        resumed = stream(str(tmp_path), tiny, 1)
        resumed.restore(state)
        assert resumed.take(len(piece)).table.equals(piece.table)
        resumed.close()
    straight.close()
    ends = time.monotonic() + 30
    while any(thread.name == "data reader" for thread in threading.enumerate()) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not any(thread.name == "data reader" for thread in threading.enumerate())


def test_bad_rows_are_counted_named_and_limited(tmp_path: Path, tiny: str, cluster) -> None:
    lines = [*rows(3), "{not json", {"no": "prompt"}, {"prompt": 7}, {"prompt": "x" * 99, "answer": "1"}, "", *rows(3, 3)]
    path = write(tmp_path, lines)
    lenient = stream(path, tiny, max_bad_share=0.5, shuffle=False)
    assert lenient.take(15).strings("answer") == ["1", "2", "3", "4", "5", "6"] * 2 + ["1", "2", "3"]
    report = lenient.report()
    assert (report.seen, report.bad) == (10, 4), "the blank line does not count, nor do later epochs"
    text = "\n".join(report.lines())
    for line in (
        "rows.jsonl:4: invalid JSON",
        "rows.jsonl:5: no `prompt`",
        "rows.jsonl:6: `prompt` has the wrong type",
        "rows.jsonl:7: prompt too long: 99",
    ):
        assert line in text
    resumed = stream(path, tiny, max_bad_share=0.5, shuffle=False)
    resumed.restore(lenient.state())
    assert resumed.report() == report
    with pytest.raises(DataError, match=r"4 of 10 rows are unusable.*rows\.jsonl:4"):
        stream(path, tiny).take(7)
    with pytest.raises(DataError, match="no row of the data set is usable"):
        stream(write(tmp_path, ["{"] * 3, "bad.jsonl"), tiny, max_bad_share=1.0).take(1)


def test_chat_messages_and_context_reach_the_teacher(tmp_path: Path, chatty: str, cluster) -> None:
    rows = [
        {"id": "x", "prompt": "2+2=", "answer": 4, "solution": "4!", "metadata": {"hard": False}, "verifier": "math"},
        {
            "id": 7,
            "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "3+3="}],
            "answer": "6",
            "solution": "{prompt}",
        },
    ]
    data = Data(
        path=write(tmp_path, rows), context_field="solution", context_template="{context}|{prompt}", shuffle=False, enable_thinking=True
    )
    batch = PromptStream(data, chatty, 0, 40, 14, True).take(2)
    texts = {name: Decoder(chatty).texts(batch.ragged(name).rows()) for name in ("prompt_ids", "teacher_prompt_ids", "response_ids")}
    assert texts["prompt_ids"] == ["[user]2+2=[assistant]think", "[system]S[user]3+3=[assistant]think"]
    assert texts["teacher_prompt_ids"] == ["[user]4!|2+2=[assistant]think", "[system]S[user]{prompt}|3+3=[assistant]think"]
    assert texts["response_ids"] == ["4", "6"]
    assert batch.strings("prompt_id") == ["x@0", "7@0"] and batch.strings("verifier") == ["math", "exact"]
    assert json.loads(batch.strings("metadata")[0]) == {"hard": False}


def test_a_cursor_of_changed_files_is_refused(tmp_path: Path, tiny: str, cluster) -> None:
    path = write(tmp_path, rows(9))
    state = stream(path, tiny).state()
    write(tmp_path, rows(10))
    with pytest.raises(CheckpointError, match="files changed"):
        stream(path, tiny).restore(state)


def test_a_damaged_file_is_an_error_of_ours(tmp_path: Path, tiny: str, cluster) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist(rows(2000)), path, compression="none")
    source = stream(str(path), tiny)
    whole = bytearray(path.read_bytes())
    whole[10:4000] = np.random.default_rng(0).bytes(3990)
    path.write_bytes(whole)
    with pytest.raises((DataError, InfrastructureError), match=r"rows\.parquet: row group 0 cannot be read"):
        source.take(5)


def test_a_reader_that_hangs_names_the_knob(tmp_path: Path, tiny: str, cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = threading.Event()
    monkeypatch.setattr(sources._Ahead, "_blocks", lambda self: (hangs.wait() for _ in range(1)))
    monkeypatch.setattr(sources, "_STOP_SECONDS", 0.1)
    source = PromptStream(Data(path=write(tmp_path, rows(9))), tiny, 0, 16, 14, deadline=0.2)
    with pytest.raises(DeadlineError, match=r"data reader did not finish .* within 0\.2 s .*deadlines\.start"):
        source.take(1)
    hangs.set()
    source.close()


# -- files and rows, without Ray


@pytest.mark.parametrize("ending", ["\n", ""])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 100])
def test_lines_are_cut_where_they_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, ending: str) -> None:
    monkeypatch.setattr(files, "UNIT_ROWS", 8)
    for chunk in (1, 3, 1000):
        monkeypatch.setattr(files, "_CHUNK", chunk)
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(json.dumps({"prompt": "é" * (row % 5)}) for row in range(count)) + ending)
        found = open_files(str(path))
        assert [unit.rows for unit in found.units] == [8] * (count // 8) + ([count % 8] if count % 8 else [])
        raws = [raw for unit in found.units for raw in found.read(unit)]
        assert [raw.number for raw in raws] == list(range(1, count + 1))
        assert [raw.record["prompt"] for raw in raws] == ["é" * (row % 5) for row in range(count)]


def test_lines_that_are_not_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\xff\xfe\n' + b"[" * 100_000 + b"\n" + b"9" * 5000 + b"\n\n   \n[1]\n")
    found = open_files(str(path))
    raws = list(found.read(found.units[0]))
    assert raws[0].record == {"prompt": "a"} and raws[1].error == "invalid JSON: not UTF-8 at byte 0"
    assert raws[2].error.startswith("invalid JSON") and raws[3].error.startswith("invalid JSON")
    assert [raw.record or raw.error for raw in raws[4:]] == ["", "", [1]]


def test_files_folders_globs_and_uris(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.ndjson", "sub/c.jsonl", "sub/deep/d.jsonl", "_hidden.jsonl", "info.json", "read.me"):
        write(tmp_path, rows(1), name)

    def names(path: str) -> list[str]:
        return [unit.name for unit in open_files(path).units]

    assert names(str(tmp_path)) == ["a.jsonl", "b.ndjson", "sub/c.jsonl", "sub/deep/d.jsonl"] == names(f"file://{tmp_path}")
    assert names(str(tmp_path / "*.jsonl")) == ["_hidden.jsonl", "a.jsonl"] == names(f"file://{tmp_path}/*.jsonl")
    assert names(str(tmp_path / "**" / "?.jsonl")) == ["a.jsonl", "sub/c.jsonl", "sub/deep/d.jsonl"]
    assert names(str(tmp_path / "s*" / "*.jsonl")) == ["sub/c.jsonl"]
    assert names(str(tmp_path / "info.json")) == ["info.json"]
    for path, message in (
        (tmp_path / "gone.jsonl", "does not exist"),
        (tmp_path / "*.csv", "matches no file"),
        (tmp_path / "read.me", r"holds only read\.me"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_files(str(path))
    with pytest.raises(ConfigError, match="cannot be reached"):
        open_files("nowhere://bucket/rows.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        open_files(str(tmp_path / "empty.jsonl"))


def test_parquet_without_prompt_or_not_parquet(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"question": ["a"]}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="no column `prompt` or `messages`, only question"):
        open_files(str(tmp_path / "rows.parquet"))
    (tmp_path / "text.parquet").write_text("not it")
    with pytest.raises(DataError, match="not a Parquet file"):
        open_files(str(tmp_path / "text.parquet"))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([1], "not an object: found list"),
        ({}, "no `prompt`"),
        ({"prompt": ""}, "no `prompt`"),
        ({"prompt": 3}, "`prompt` has the wrong type: int"),
        ({"prompt": ["hello"]}, "message 0 needs `role`"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "message 0 needs"),
        ({"prompt": "a", "answer": ["b"]}, "`answer` has the wrong type: list"),
        ({"prompt": "a", "domain": 3}, "`domain` has the wrong type"),
        ({"prompt": "a", "id": True}, "`id` has the wrong type"),
        ({"prompt": "a", "metadata": "{"}, "`metadata` is not JSON"),
        ({"prompt": "a", "metadata": [1]}, "`metadata` has the wrong type"),
        ({"prompt": "\ud800"}, "not valid Unicode"),
        ({"prompt": "a"}, "no `hint`"),
    ],
)
def test_what_a_row_must_be(record, reason: str) -> None:
    with pytest.raises(BadRow) as error:
        parse(record, where="f:1", row_id="f:1", default_verifier="exact", context_field="hint" if "hint" in reason else None)
    assert reason in str(error.value)


def test_a_plain_row() -> None:
    row = parse({"prompt": "a", "answer": 0.5, "extra": 1}, where="f:1", row_id="f:1", default_verifier="math", context_field=None)
    assert (row.id, row.answer, row.target, row.verifier, row.domain) == ("f:1", "0.5", "0.5", "math", "")
    assert parse({"prompt": "a"}, where="f:1", row_id="f:1", default_verifier="math", context_field=None).verifier == ""


def test_the_share_is_judged_when_enough_was_seen() -> None:
    report = BadRows(0.01)
    for number in range(10):
        report.add(f"f:{number}", "no `prompt`")
    report.check()
    with pytest.raises(DataError):
        report.check(complete=True)
    report.good(980)
    report.check()
    report.good(10)
    report.check(complete=True)
    report.add("f:1000", "invalid JSON: x")
    with pytest.raises(DataError, match="11 of 1001"):
        report.check()
    assert len(report.lines()) == 12 and report.lines()[0].startswith("11 of 1001 data rows were unusable: 10 x no `prompt`")


def test_windows_mix_units_and_depend_on_the_epoch(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "UNIT_ROWS", 4)
    monkeypatch.setattr(sources, "WINDOW", 12)
    source = stream(write(tmp_path, rows(50)), tiny)._rows
    assert isinstance(source, sources.FileRows)
    orders = [source._windows(epoch) for epoch in range(3)]
    assert all(sorted(np.concatenate(order).tolist()) == list(range(13)) for order in orders)
    assert orders[0] != orders[1] and orders[0] == source._windows(0)
    assert all(len(window) <= 4 for order in orders for window in order)
