"""File sources through Ray Data: order, shuffling, resume, bad rows by file and line; preflight without Ray."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from raysys.config.parts import Data
from raysys.data.preflight import check_vocabularies, preflight
from raysys.data.sources import shuffled
from raysys.data.stream import PromptStream
from raysys.data.text import Decoder
from raysys.errors import ConfigError, DataError
from raysys.head import Head


@pytest.fixture(scope="module")
def cluster(ray_head: Head):
    import ray

    ray.init(address=ray_head.gcs, log_to_driver=False)
    yield
    ray.shutdown()


def write(folder: Path, rows: list, name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def rows(count: int) -> list[dict]:
    return [{"prompt": f"{i}+1=", "answer": str(i + 1), "domain": "add"} for i in range(count)]


def check(path: str, tiny: str | None, **more) -> None:
    domains = more.pop("domains", None)
    preflight(Data(path=path, **more), tiny, max_prompt_tokens=16, max_response_tokens=14, domains=domains)


def test_order_epochs_and_resume(tmp_path: Path, tiny: str, cluster) -> None:
    data = Data(path=write(tmp_path, rows(40)))
    straight = PromptStream(data, tiny, 3, 16, 14, supervised=True)
    first = straight.take(25)
    state = straight.state()
    rest = straight.take(30)
    assert sorted(first.strings("answer") + rest.strings("answer")[:15], key=int) == [str(i) for i in range(1, 41)]
    assert first.strings("answer") != [str(i) for i in range(1, 26)], "an epoch is shuffled"
    ids = first.strings("prompt_id") + rest.strings("prompt_id")
    assert len(set(ids)) == 55 and ids[0].endswith("@0") and ids[-1].endswith("@1")
    resumed = PromptStream(data, tiny, 3, 16, 14, supervised=True)
    resumed.restore(state)
    assert resumed.take(30).table.equals(rest.table)
    assert Decoder(tiny).texts(first.ragged("response_ids").rows()) == first.strings("answer")


def test_parquet_unshuffled_keeps_the_files_order(tmp_path: Path, tiny: str, cluster) -> None:
    parquet.write_table(pa.Table.from_pylist(rows(10)), tmp_path / "rows.parquet")
    stream = PromptStream(Data(path=str(tmp_path / "rows.parquet"), shuffle=False), tiny, 0, 16, 14)
    assert stream.take(10).strings("answer") == [str(i) for i in range(1, 11)]


def test_bad_rows_are_counted_named_and_limited(tmp_path: Path, tiny: str, cluster) -> None:
    lines = [*rows(3), "{not json", {"no": "prompt"}, {"prompt": 7}, {"prompt": "x" * 99}, *rows(3)]
    path = write(tmp_path, lines)
    lenient = PromptStream(Data(path=path, max_bad_share=0.5, shuffle=False), tiny, 0, 16, 14)
    assert len(lenient.take(6)) == 6 and lenient.take(1)
    text = " ".join(lenient.report().lines())
    assert "4 of 10 rows left out" in text and "rows.jsonl:4: invalid JSON" in text
    with pytest.raises(DataError, match=r"4 of 10 rows are unusable.*rows\.jsonl:4"):
        PromptStream(Data(path=path), tiny, 0, 16, 14).take(7)


def test_the_teacher_reads_the_context_and_the_response_stays(tmp_path: Path, tiny: str, cluster) -> None:
    path = write(tmp_path, [{"prompt": "2+2=", "answer": "4", "solution": "4"}])
    data = Data(path=path, context_field="solution", context_template="{context}|{prompt}")
    batch = PromptStream(data, tiny, 0, 16, 14, supervised=True).take(1)
    decoder = Decoder(tiny)
    assert decoder.texts(batch.ragged("teacher_prompt_ids").rows()) == ["4|2+2="]
    assert decoder.texts(batch.ragged("prompt_ids").rows()) == ["2+2="]


def test_preflight_names_what_is_wrong(tmp_path: Path, tiny: str) -> None:
    with pytest.raises(ConfigError, match=r"gone\.jsonl does not exist"):
        check(str(tmp_path / "gone.jsonl"), tiny)
    with pytest.raises(ConfigError, match="no usable row.*empty"):
        check(write(tmp_path, [], "empty.jsonl"), tiny)
    path = write(tmp_path, rows(3))
    check(path, tiny, domains={"add"})
    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: domain 'add' has no teacher \(teachers has: math"):
        check(path, tiny, domains={"math"})
    with pytest.raises(ConfigError, match="no domain and there is no default"):
        check(write(tmp_path, [{"prompt": "a"}], "untagged.jsonl"), tiny, domains={"math"})
    check(write(tmp_path, [{"prompt": "a"}], "untagged.jsonl"), tiny, domains={"default"})
    with pytest.raises((ConfigError, DataError), match=r"long\.jsonl:1: prompt too long: 99 tokens, max_prompt_tokens is 16"):
        check(write(tmp_path, [{"prompt": "x" * 99}], "long.jsonl"), tiny)
    with pytest.raises(ConfigError, match="id 'a' is used before"):
        check(write(tmp_path, [{"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}], "twice.jsonl"), tiny)
    with pytest.raises(ConfigError, match="exceeds the context"):
        preflight(Data(path=path), tiny, max_prompt_tokens=60, max_response_tokens=60, domains=None)


def test_vocabularies_are_compared_by_id(tmp_path: Path, tiny: str) -> None:
    check_vocabularies({"student": tiny, "teachers.add": tiny})
    other = tmp_path / "other"
    other.mkdir()
    for file in Path(tiny).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    text = (other / "tokenizer.json").read_text()
    spec = json.loads(text)
    vocab = spec["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ConfigError, match=r"student and teachers\.add have different vocabularies: id \d+ is 'a' and 'b'"):
        check_vocabularies({"student": tiny, "teachers.add": str(other)})
    with pytest.raises(ConfigError, match="does not exist"):
        check_vocabularies({"student": str(tmp_path / "nowhere")})


def test_shuffling_is_a_permutation_of_the_window() -> None:
    order = list(shuffled(iter(range(100)), random.Random(1), 10))
    assert sorted(order) == list(range(100)) and order != list(range(100))
    assert all(item <= at + 10 for at, item in enumerate(order))
