"""Answers by real vLLM through Ray Data: killed and resumed they are the same bytes, and a job trains on them."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from raysys.config.runs import NewModel
from raysys.head import Head
from raysys.models.scratch import new_causal
from tests.e2e.test_gopd import ADD, REV, SMALL, Workplace, sft

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def place(ray_head: Head, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("runs"), ray_head)


def records(place: Workplace, name: str) -> list[Path]:
    return list((place.folder / name / "ledger" / "shards").glob("*.json"))


def await_shards(place: Workplace, run: subprocess.Popen[bytes], name: str, count: int) -> None:
    end = time.monotonic() + 120
    while len(records(place, name)) < count:
        assert run.poll() is None, (place.folder / f"{name}.log").read_text()[-3000:]
        assert time.monotonic() < end, f"no {count} shards in time"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def config(place: Workplace) -> dict[str, Any]:
    """One teacher of two domains."""
    teacher = str(new_causal(NewModel(**SMALL), place.folder / "teacher" / "export", seed=0))
    return {
        "teachers": {"add": teacher, "rev": teacher},
        "data": {"source": {"domains": {"add": ADD, "rev": REV}}},
        "rows": 80,
        "samples": 2,
        "max_prompt_tokens": 16,
        "max_response_tokens": 40,  # teachers of noise say <eos> once in a hundred tokens
        "shard_rows": 4,
        "rollout": {"max_sequences": 8},
    }


@pytest.fixture(scope="module")
def calm(place: Workplace, config: dict[str, Any]) -> Path:
    return place.run("generate", "calm", config)


@pytest.mark.long
def test_kill_nine_loses_no_row_and_doubles_none(place: Workplace, config: dict[str, Any], calm: Path) -> None:
    """All of the run is killed in the first of two domains."""
    run = place.start("generate", "killed", config)
    await_shards(place, run, "killed", 4)
    run.kill()  # the supervisor, and with it the driver and all that is its
    run.wait()
    done = records(place, "killed")
    before = {path.name: path.stat().st_mtime_ns for path in done}
    assert 4 <= len(done) < 20, "it was killed in the middle"
    run = place.start("generate", "killed", config)
    assert run.wait(timeout=180) == 0, (place.folder / "killed.log").read_text()[-3000:]

    log = (place.folder / "killed.log").read_text()
    resumed = re.search(r"resumed: (\d+) of 40 shards are finished", log)  # the actor may finish one after its driver's end
    assert resumed is not None and len(done) <= int(resumed[1]) < 20 and len(records(place, "killed")) == 40
    assert all((path.parent / name).stat().st_mtime_ns == when for path in done[:1] for name, when in before.items()), "not done twice"
    files = {path.name: path.read_bytes() for path in (calm / "data").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (place.folder / "killed" / "data").iterdir()} and len(files) > 35
    drop = ("seconds", "tokens_per_second")
    lines = [[{k: v for k, v in line.items() if k not in drop} for line in place.metrics(name)] for name in ("calm", "killed")]
    assert lines[0] == lines[1] and len(lines[0]) == 40


def test_answers_are_counted_and_shown(place: Workplace, calm: Path) -> None:
    lines = place.metrics("calm")
    assert [line["step"] for line in lines] == list(range(40)) and sum(line["samples"] for line in lines) == 320
    assert sum(line["kept"] for line in lines) > 50 and len(list((calm / "data").iterdir())) > 35
    report = (calm / "report.html").read_text()
    assert "answers kept, in 40 shards." in report and "left out as wrong" in report and "<h2>Samples" in report


def test_a_job_trains_on_the_tokens_that_were_sampled(place: Workplace, calm: Path) -> None:
    """The student is the teacher itself: its first loss is the cross-entropy of what it said, a little less than uniform."""
    config = sft(False, {}, steps=1, batch=32, student=str(place.folder / "teacher" / "export"), max_response_tokens=40)
    config["data"] = {"path": str(calm / "data")}
    place.run("sft", "taught", config)
    (line,) = place.metrics("taught")
    assert 3.0 < line["nll"] < 4.6 and line["nll/add"] != line["nll/rev"], "log 98 is 4.58"
    assert "another tokenizer" not in (place.folder / "taught.log").read_text()


def test_wrong_input_is_one_line_before_any_actor(place: Workplace, config: dict[str, Any]) -> None:
    rows = place.folder / "art.jsonl"
    rows.write_text('{"prompt": "1+1=", "domain": "art"}\n')
    wrong = {"teachers": {"add": config["teachers"]["add"]}, "data": {"path": str(rows)}}
    small = ("max_prompt_tokens=16", "max_response_tokens=8")
    for number, (override, told) in enumerate(
        (
            ("seed=0", "art.jsonl:1: unknown domain tag 'art' (teachers has add"),
            ("teachers={art: /nowhere}", "model folder /nowhere does not exist"),
            ("rollout.replay=x", "this job writes its answers to data/"),
        )
    ):
        assert place.start("generate", f"wrong-{number}", wrong, *small, override).wait(timeout=120) in (1, 2)
        lines = [line for line in (place.folder / f"wrong-{number}.log").read_text().splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and told in lines[0], lines
