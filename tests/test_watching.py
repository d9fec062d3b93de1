"""What `raysys doctor --job` tells of a run, and what Prometheus gets of it."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raysys import cli, watching, wiring
from raysys.config.runs import GopdConfig, HpdConfig, SftConfig
from raysys.errors import ConfigError
from raysys.report.live import GAUGES, PHASES, Live, actor_phases, gauges
from raysys.rollout.recorded import Recorder
from raysys.runtime import waiting
from tests.fakes import FakeSource, FakeTrainer

STATUS: dict[str, Any] = {
    "pid": 7,
    "host": "h",
    "submission_id": "raysubmit_1",
    "step": 12,
    "phase": "generate",
    "waits": [{"for": "the rollout pool", "operation": "generate", "limit_s": 1800.0, "knob": "deadlines.generate", "waited_s": 61.5}],
    "trainers": ["trainer rank 0"],
    "scorers": ["scorer 0"],
    "pool": {
        "workers": [
            {
                "name": "rollout worker 0",
                "state": "ready",
                "version": 12,
                "running": 3,
                "held": 5,
                "heard_s": 0.4,
                "tokens": 900,
                "kv_share": 0.5,
            },
            {"name": "rollout worker 2", "state": "starting", "version": -1, "running": 0, "held": 0, "heard_s": 2.0, "tokens": 0},
        ],
        "waiting": 4,
        "redispatched": 2,
        "lost_workers": 1,
    },
    "source": {"groups": 9, "complete": 3, "bytes": 4096},
}


def folder(runs: Path, name: str, status: dict[str, Any]) -> Path:
    ledger = runs / name / "ledger"
    ledger.mkdir(parents=True)
    (ledger / "status.json").write_text(json.dumps(status))
    return runs / name


def test_a_run_is_found_by_folder_name_and_ray_job(tmp_path: Path) -> None:
    run = folder(tmp_path, "mine", STATUS)
    folder(tmp_path, "other", STATUS | {"submission_id": "raysubmit_2"})
    for name in (str(run), "mine", "raysubmit_1"):
        assert watching.find_run(name, tmp_path) == run
    with pytest.raises(ConfigError, match="no run 'raysubmit_3'"):
        watching.find_run("raysubmit_3", tmp_path)


def test_who_waits_for_whom_is_told_and_so_is_silence(tmp_path: Path, monkeypatch, capsys) -> None:
    run = folder(tmp_path, "mine", STATUS)
    monkeypatch.setenv("RAYSYS_RUNS_DIR", str(tmp_path))
    assert cli.main(["doctor", "--job", "mine"]) == 0
    told = capsys.readouterr().out
    for line in (
        "mine: step 12, generate; pid 7 on h",
        "the driver waits for the rollout pool: generate, 61.5 of 1800 s (deadlines.generate)",
        "rollout worker 0: generating; ready, weights 12, has 5, heard 0.4 s ago",
        "rollout worker 2: starting",
        "trainer rank 0: idle",
        "9 prompts under way, 3 complete (4096 bytes); 4 samples free, 2 given again; 1 workers lost",
    ):
        assert line in told
    old = (run / "ledger" / "status.json").stat().st_mtime - 100
    os.utime(run / "ledger" / "status.json", (old, old))
    assert "SILENT for 10" in watching.describe(run)[0]
    (run / "ledger" / "finished.json").touch()
    assert "finished" in watching.describe(run)[0] and "SILENT" not in watching.describe(run)[0]


@pytest.mark.parametrize(
    ("phase", "want"),
    [("train", "training"), ("push", "pushing"), ("generate", "idle"), ("", "idle")],
)
def test_the_loops_phase_is_that_of_trainer_and_scorers(phase: str, want: str) -> None:
    found = actor_phases(STATUS | {"phase": phase})
    assert found["trainer rank 0"] == want and found["scorer 0"] == "idle"
    assert actor_phases(STATUS | {"phase": "score"})["scorer 0"] == "scoring"


def test_every_gauge_is_described_and_each_actor_is_in_one_phase() -> None:
    values = gauges(STATUS, lambda key, total: total / 10)
    assert {name for name, _ in values} == set(GAUGES)
    for actor in actor_phases(STATUS):
        assert sum(values["raysys_actor_phase", (("actor", actor), ("phase", phase))] for phase in PHASES) == 1
    assert values["raysys_actor_tokens_per_second", (("actor", "rollout worker 0"),)] == 90.0
    assert values["raysys_groups", (("state", "generating"),)] == 6.0 and values["raysys_queue_bytes", ()] == 4096.0


MODELS = {"student": "s", "teachers": {"default": "t"}, "data": {"path": "p.jsonl"}}


def test_who_shares_a_device_is_counted_once() -> None:
    pool: Any = SimpleNamespace(workers=[1, 2, 3, 4], busy_seconds=lambda: 240.0)
    turns = {"colocate": True, "rollout": {"workers": 4}, "trainer": {"ranks": 4}, "price_per_device_hour": 36.0}
    usage = watching.Usage(pool, GopdConfig.parse(MODELS | turns))
    # four devices in turns, a fifth for the scorer
    spent = usage.lap({"total": 100.0, "generate": 60.0, "score": 10.0, "train": 28.0, "push": 2.0})
    wanted = {"generating": 240.0, "scoring": 10.0, "training": 112.0, "pushing": 8.0, "idle": 130.0}
    assert spent == pytest.approx({f"device/{name}": value for name, value in wanted.items()})
    assert usage.summary().startswith("device time: 500 s") and usage.summary().endswith("cost 5.00 at 36 an hour")
    lodging = {"scoring": {"ranks": 2, "placement": "colocated"}, "trainer": {"ranks": 2}}
    spent = watching.Usage(None, HpdConfig.parse(MODELS | lodging)).lap({"total": 10.0, "score": 4.0, "train": 5.0})
    assert sum(spent.values()) == 20.0 and spent["device/scoring"] == 8.0


def test_an_evaluations_engines_are_held_all_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = SimpleNamespace(workers=[1, 2], busy_seconds=lambda: 5.0, start=None)
    usages: list[watching.Usage] = []
    for name in ("open_evaluator", "resume", "Live", "finish", "tell_bad_rows"):
        monkeypatch.setattr(wiring, name, lambda *_, **__: nullcontext(SimpleNamespace(shows=lambda status: None)))
    monkeypatch.setattr(wiring.Hardware, "choose", lambda *_: wiring.Hardware("cpu", "float32"))
    monkeypatch.setattr(wiring, "open_trainer", lambda *_: nullcontext(SimpleNamespace(start=None)))
    monkeypatch.setattr(wiring, "open_pool", lambda *_: nullcontext(pool))
    monkeypatch.setattr(wiring, "open_pusher", lambda *_: SimpleNamespace(push=None))
    monkeypatch.setattr(wiring, "_open_data", lambda *given: given[-1].append(None))
    monkeypatch.setattr(wiring, "start_all", lambda data, **_: data())
    monkeypatch.setattr(wiring, "open_metrics", lambda *given: usages.append(given[-1]))
    engines = {"rollout": {"workers": 2, "tensor_parallel": 4}, "trainer": {"ranks": 2}, "evaluation": {"data": {"path": "q"}}}
    session: Any = SimpleNamespace(folder=tmp_path, job="sft", ledger=None)
    wiring.run_sft(SftConfig.parse({"student": "s", "data": {"path": "p"}} | engines), session)
    spent = usages[0].lap({"total": 100.0, "train": 90.0})
    assert spent["device/generating"] == 20.0 and sum(spent.values()) == 1000.0


def test_a_recording_does_not_hide_the_queue(tmp_path: Path) -> None:
    source = FakeSource(FakeTrainer())
    source.take(3, 0)
    session: Any = SimpleNamespace(folder=tmp_path, submission_id="", ledger=SimpleNamespace(committed=0))
    parts: Any = SimpleNamespace(watch=SimpleNamespace(phase=""))
    found = watching.status(GopdConfig.parse(MODELS), session, parts, None, Recorder(source, tmp_path / "kept"))
    assert found["source"] == source.status() == {"groups": 3}


def test_a_run_that_starts_tells_whom_it_waits_for(tmp_path: Path) -> None:
    session: Any = SimpleNamespace(folder=tmp_path, submission_id="", ledger=SimpleNamespace(committed=4))
    config = GopdConfig.parse(MODELS)
    (tmp_path / "ledger").mkdir()
    live = Live(tmp_path, "gopd", lambda: watching.status(config, session, None, None, None))
    with waiting("the cluster", "give the trainer a place", 300.0, "deadlines.placement"):
        live.show()
    told = watching.describe(tmp_path)
    assert "step 4, start;" in told[0] and {"  trainer rank 0: starting", "  scorer 0: starting"} <= set(told)
    assert "  the driver waits for the cluster: give the trainer a place, 0 of 300 s (deadlines.placement)" in told
    live.shows(lambda: {"phase": "train", "step": 5})
    live.show()
    assert "step 5, train;" in watching.describe(tmp_path)[0]
