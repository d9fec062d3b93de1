"""Metrics keep every bit; the progress line says what a person wants to know."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest

from raysys.report.metrics import MetricsWriter
from raysys.report.progress import Progress, duration, line

RECORD = {
    "step": 11,
    "version": 12,
    "loss": 0.1 + 0.2,
    "reverse_kl": 1.32,
    "fingerprint": "ab",
    "seconds": {"generate": 0.41, "train": 0.3, "total": 0.92},
}


def test_floats_survive_and_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, "gopd", "one") as writer:
        writer.write(RECORD | {"gap": math.nan})
        writer.write(RECORD | {"step": 12})
    first, second = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert first == RECORD | {"gap": None} and second["step"] == 12 and first["loss"] == 0.1 + 0.2
    assert list((tmp_path / "tensorboard").iterdir())


def test_the_line_has_step_kl_phases_and_eta() -> None:
    assert line(RECORD, 100, 80) == "step 12/100  kl 1.320  0.92 s (gen 0.41 train 0.30)  eta 1m20s"
    assert [duration(seconds) for seconds in (4.4, 61, 7500)] == ["4s", "1m01s", "2h05m"]


def test_a_log_gets_the_first_and_last_step_and_few_between() -> None:
    stream = io.StringIO()
    progress = Progress(50, stream, pause=60)
    for step in range(50):
        progress.show({"step": step})
    assert [text.split()[1] for text in stream.getvalue().splitlines()] == ["1/50", "50/50"]


def test_a_board_that_cannot_be_written_is_given_up_and_the_records_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with MetricsWriter(tmp_path, "gopd", "one") as writer:
        writer.write(RECORD)
        (board,) = (tmp_path / "tensorboard").iterdir()
        with open("/dev/full", "wb", buffering=0) as full:
            writer._board._py_recordio_writer._writer = full
            writer.write(RECORD | {"step": 12})
        writer.write(RECORD | {"step": 13})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3 and board.stat().st_size > 100
    assert caplog.text.count("could not be written") == 1 and "metrics.jsonl goes on" in caplog.text


def test_the_board_holds_what_the_records_hold(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, "gopd", "one") as writer:
        writer.write(RECORD)
    with MetricsWriter(tmp_path, "gopd", "one") as writer:  # resumed at the same step: what was beyond is hidden
        writer.write(RECORD | {"loss": 2.0})
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(11, 2.0)]
    assert {"reverse_kl", "seconds/train"} <= set(read.Tags()["scalars"])


def test_a_part_that_a_step_lacks_is_none_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, float] = {}

    class Gauge:
        def __init__(self, name: str, **_: object):
            self._name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            shown[self._name] = value

    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.util.metrics.Gauge", Gauge)
    with MetricsWriter(tmp_path, "gopd", "one") as writer:
        writer.write({"step": 0, "age/0": 0.5, "age/1": 0.5, "validation_loss": 2.0, "seconds": {"train": 1.0, "checkpoint": 9.0}})
        writer.write({"step": 1, "age/0": 1.0, "seconds": {"train": 1.0}})
    assert (shown["raysys_age_0"], shown["raysys_age_1"], shown["raysys_seconds_checkpoint"]) == (1.0, 0.0, 0.0)
    assert shown["raysys_validation_loss"] == 2.0, "the newest there is"
