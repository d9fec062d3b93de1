"""The driver and its actors over real Ray Data with an engine that is not one: what dies and hangs, what comes out."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from raysys.config.runs import GenerateConfig, NewModel
from raysys.data.files import open_files
from raysys.data.text import Decoder
from raysys.errors import ConfigError, DataError, DeadlineError, InfrastructureError, PlacementError
from raysys.generation import run
from raysys.generation.books import Books
from raysys.generation.run import generate, shards_at_once
from raysys.generation.shards import Prompts
from raysys.generation.teacher import Teacher
from raysys.generation.watch import Watch
from raysys.head import Head
from raysys.job import Session
from raysys.ledger import Ledger
from raysys.rollout.serving import Response

ADD = {"task": "chain_sum", "params": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}, "style": "scratchpad"}
REV = {"task": "spell_backward", "params": {"min_word_len": 3, "max_word_len": 6}, "style": "scratchpad"}


class Dice:
    """An engine whose answers come from the seed alone. Files beside the model say what goes wrong, once each."""

    def __init__(self, spec: Any, rank: int):
        self._folder = Path(spec.model)
        self._dead = False

    async def start(self) -> dict[str, Any]:
        if (self._folder / "no-start").exists():
            raise InfrastructureError("it does not start")
        return {}

    async def respond(self, ids: np.ndarray, sampling: Any, seed: int) -> Response:
        await asyncio.sleep(0.001)
        if self._happens("actor-dies"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._happens("engine-dies"):
            self._dead = True
        if self._dead or (self._folder / "never").exists():
            raise InfrastructureError("its engine process died")
        if self._happens("hangs"):
            await asyncio.sleep(600)
        random = np.random.default_rng(seed)
        length = int(random.integers(0, sampling.max_tokens + 3))
        reply = random.integers(3, 98, min(length, sampling.max_tokens)).tolist()
        return Response([*reply, 2], [0.0], [0, 0], "stop") if length < sampling.max_tokens else Response(reply, [0.0], [0, 0], "length")

    def _happens(self, what: str) -> bool:
        try:
            (self._folder / what).unlink()
        except FileNotFoundError:
            return False
        return True

    async def close(self) -> None:
        return None


@pytest.fixture(scope="module")
def cluster(ray_head: Head):
    import ray

    ray.init(address=ray_head.gcs, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    from raysys.models.scratch import new_causal  # torch: actors that take `Dice` from this module do without

    make = run._work
    monkeypatch.setattr(run, "_work", lambda *args: dataclasses.replace(make(*args), engine=Dice))
    spec = NewModel(hidden_size=32, layers=1, heads=1, kv_heads=1, ffn_size=32, context=64)
    return {tag: str(new_causal(spec, tmp_path / tag, 0)) for tag in ("add", "rev")}


def config(teachers: dict[str, str], **more: Any) -> GenerateConfig:
    values = {
        "teachers": teachers,
        "data": {"source": {"domains": {"add": ADD, "rev": REV}}},
        "rows": 12,
        "samples": 2,
        "max_prompt_tokens": 16,
        "max_response_tokens": 8,
        "shard_rows": 5,
        "rollout": {"max_sequences": 8, "threads": 1},
    }
    return GenerateConfig.parse(values | more)


def answered(folder: Path, wanted: GenerateConfig) -> Session:
    ledger = Ledger(folder, wanted)
    session = Session("generate", folder, ledger)
    try:
        generate(wanted, session, "cpu", "float32")
    finally:
        ledger.close()
    return session


def data(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "data").iterdir())}


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "tokens_per_second")} for line in lines]


@pytest.mark.slow
def test_what_dies_and_who_answers_changes_nothing(tmp_path: Path, teachers: dict[str, str], cluster) -> None:
    calm = answered(tmp_path / "calm", config(teachers))
    whole = data(tmp_path / "calm")
    assert list(whole) == [f"{teacher}-0000{number}.parquet" for teacher in ("0-add", "1-rev") for number in range(3)]
    lines = metrics(tmp_path / "calm")
    assert [line["step"] for line in lines] == list(range(6)) and [line["rows"] for line in lines] == [5, 5, 2, 5, 5, 2]
    for line in lines:
        assert line["samples"] == 2 * line["rows"] == sum(line[name] for name in ("kept", "cut_off", "empty", "wrong"))
    assert calm.ledger.finished and calm.ledger.moved and sum(line["cut_off"] for line in lines) > 0
    quoted = [json.loads(line) for line in (tmp_path / "calm" / "samples.jsonl").read_text().splitlines()]
    assert [one["domain"] for one in quoted] == ["add", "rev"] * 3

    for what in ("actor-dies", "engine-dies"):
        (Path(teachers["rev"]) / what).touch()
    (Path(teachers["add"]) / "hangs").touch()
    answered(tmp_path / "troubled", config(teachers, rollout={"workers": 2, "max_sequences": 8}, deadlines={"generate": 5.0}))
    assert data(tmp_path / "troubled") == whole and metrics(tmp_path / "troubled") == lines
    assert not list(Path(teachers["rev"]).glob("*-dies")) and not (Path(teachers["add"]) / "hangs").exists(), "all of it happened"


@pytest.mark.slow
def test_finished_shards_are_not_answered_again(tmp_path: Path, teachers: dict[str, str], cluster) -> None:
    (Path(teachers["rev"]) / "no-start").touch()
    with pytest.raises(InfrastructureError, match="it does not start"):
        answered(tmp_path / "run", config(teachers))
    assert [line["shard"] for line in metrics(tmp_path / "run")] == ["0-add-00000", "0-add-00001", "0-add-00002"]
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "data").iterdir()}
    (Path(teachers["rev"]) / "no-start").unlink()
    (Path(teachers["add"]) / "no-start").touch()  # nobody needs it any more
    answered(tmp_path / "run", config(teachers))
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(6))
    assert before == {name: (tmp_path / "run" / "data" / name).stat().st_mtime_ns for name in before}
    with pytest.raises(ConfigError, match="another identity: samples: 2 -> 3"):
        answered(tmp_path / "run", config(teachers, samples=3))


@pytest.mark.slow
def test_errors_are_ours_and_name_what_to_change(tmp_path: Path, teachers: dict[str, str], cluster) -> None:
    (Path(teachers["add"]) / "never").touch()
    with pytest.raises(InfrastructureError, match=r"sample add:\d+/\d could not be drawn: its engine process died \(rollout.retries"):
        answered(tmp_path / "never", config(teachers, rollout={"retries": 1}))
    (Path(teachers["add"]) / "never").unlink()
    rows = [{"prompt": "1+1=", "domain": "add"}] * 3 + [{"prompt": "x", "domain": "art"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    of_files = config(teachers, data={"path": str(tmp_path / "rows.jsonl")}, rows=None)
    with pytest.raises(DataError, match=r"prompt rows.jsonl:4\): unknown domain tag 'art'"):
        answered(tmp_path / "art", of_files)
    with pytest.raises(DataError, match=r"there is nothing to train on: 0 of 24 answers kept; .* wrong"):
        answered(tmp_path / "wrong", config({"add": teachers["add"]}, data={"source": {"domains": {"add": ADD}}}, keep="correct"))


def test_a_teacher_without_ray_reads_the_context_and_leaves_out_what_does_not_fit(
    tmp_path: Path, teachers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Context distillation: the teacher's prompt has the solution in it, the data's has not."""
    heard: list[str] = []

    class Echo(Dice):
        async def respond(self, ids: np.ndarray, sampling: Any, seed: int) -> Response:
            heard.append(Decoder(teachers["add"]).texts([ids])[0])
            return Response([*ids[:2].tolist(), 2], [0.0], [0, 0], "stop")

    (tmp_path / "run").mkdir()
    rows = [{"prompt": f"{number}=", "answer": f"{number}=", "solution": "abc" * number} for number in (1, 2, 7)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"prompt": "é="}])))
    source = {"path": str(tmp_path / "rows.jsonl"), "context_field": "solution", "context_template": "{context}|{prompt}"}
    wanted = config({"default": teachers["add"]}, data=source, rows=None, samples=1)
    prompts = Prompts.of(wanted.data, 0, wanted.teachers)
    (shard,) = prompts.cut(None, 8)
    Books(tmp_path / "run", [shard])
    work = run._work(wanted, tmp_path / "run", tmp_path, teachers["add"], {0: shard}, prompts, "cpu", "float32")
    record = Teacher(dataclasses.replace(work, engine=Echo)).answer(shard)
    assert sorted(heard) == ["abcabc|2=", "abc|1="]
    assert (record.seen, record.bad, record.total("kept"), record.total("correct")) == (4, 2, 2, 0)
    assert record.examples == [
        "rows.jsonl:3: prompt with context too long: 24 tokens, max_prompt_tokens is 16",
        "rows.jsonl:4: no `solution`, which data.context_field asks for",
    ]
    (unit,) = (files := open_files(str(tmp_path / "run" / "data"))).units
    assert [raw.record["prompt"] for raw in files.read(unit)] == ["1=", "2="]


def test_silence_is_told_with_its_knob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster) -> None:
    now = [0.0]
    monkeypatch.setattr("raysys.generation.watch.time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))

    def beat(**facts: Any) -> None:
        known = {"state": "generating", "running": 1, "finished": 0, "tokens": 0, "lost": 0, "beats": 1, "pid": 5} | facts
        (here / "a.json").write_text(json.dumps(known))

    def watch(**deadlines: float) -> tuple[Watch, Path]:
        look = Watch(config({"add": "t"}, deadlines=deadlines, rollout={"restarts": 1}), tmp_path)
        return look, look.begin("t", {"CPU": 1.0})

    def told(look: Watch, after: float) -> None:
        look.check()
        now[0] += after
        look.check()

    with pytest.raises(PlacementError, match="no place for rollout"):
        told(watch(placement=5)[0], 6)
    for facts, knob, kind in (({"state": "starting"}, "start", DeadlineError), ({}, "heartbeat", InfrastructureError)):
        look, here = watch(**{knob: 5.0})
        beat(**facts)
        told(look, 4)
        with pytest.raises(kind, match=rf"engine of t \(pid 5\).*deadlines.{knob}"):
            told(look, 2)
    look, here = watch(heartbeat=5)
    beat(running=0)
    told(look, 99)  # who has nothing to do may be gone
    look, here = watch(placement=5)
    beat(running=0)
    with pytest.raises(PlacementError, match="no place for rollout"):  # but not all of them
        told(look, 6)
    look, here = watch(placement=5, generate=4)
    doing = [
        {},
        {"running": 0},
        {"running": 0, "finished": 1},
        {"state": "starting"},
        {"state": "starting"},
        {"running": 0},
        {"running": 0},
    ]
    for beats, facts in enumerate(doing):
        beat(beats=beats, **facts)
        look.check()
        now[0] += 8
    look.shard()
    now[0] += 8
    beat(beats=8, running=0)
    look.check()
    now[0] += 2
    beat(beats=9, running=0)
    with pytest.raises(DeadlineError, match=r"engines of t did not finish 'generate' within 9 s \(raise deadlines.generate"):
        look.check()  # it beats, but nobody does anything about the shards that are left
    look, here = watch()
    beat()
    look.check()
    for pid in (6, 7):
        beat(pid=pid, beats=pid)
        if pid == 6:
            look.check()
        else:
            with pytest.raises(InfrastructureError, match="2 engines of t died with no shard finished in between"):
                look.check()


def test_an_engine_whose_start_hangs_is_told_with_its_knob(tmp_path: Path, teachers: dict[str, str]) -> None:
    """Its actor goes on beating meanwhile, so that the driver would wait for ever."""
    closed: list[bool] = []

    class Hangs(Dice):
        async def start(self) -> dict[str, Any]:
            await asyncio.sleep(600)
            return {}

        async def close(self) -> None:
            closed.append(True)

    wanted = config(teachers, deadlines={"start": 0.05})
    prompts = Prompts.of(wanted.data, 0, wanted.teachers)
    shard, *_ = prompts.cut(2, 8)
    Books(tmp_path, [shard])
    work = run._work(wanted, tmp_path, tmp_path, teachers["add"], {0: shard}, prompts, "cpu", "float32")
    with pytest.raises(DeadlineError, match=r"engine of .*add did not finish 'start' within 0.05 s \(raise deadlines.start"):
        Teacher(dataclasses.replace(work, engine=Hangs)).answer(shard)
    assert closed == [True]


def test_shards_that_keep_the_seats_full() -> None:
    assert (shards_at_once(128, 256), shards_at_once(128, 64), shards_at_once(128, 1), shards_at_once(100, 64)) == (2, 3, 32, 3)
