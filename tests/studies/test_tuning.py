"""A whole study over a real Ray head, with a script that leaves what a run leaves."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from raysys.head import Head
from raysys.studies import tuning
from tests.processes import gone

FAKE_JOB = """
import json, os, pathlib, signal, sys, time, yaml
config = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
folder, cell = pathlib.Path(config["run_dir"]), config["new_model"]["ffn_size"]
(folder / "ledger").mkdir(parents=True, exist_ok=True)
(folder / "config.yaml").write_text(yaml.safe_dump(config))
with open(folder / "starts", "a") as file:
    file.write(f"{os.getpid()} {os.environ['RAY_ADDRESS']} {os.getcwd()}\\n")
with open(folder / "metrics.jsonl", "w") as file:
    for step in range(config["steps"]):
        file.write(json.dumps({"step": step, "loss": 1.0 / (step + 1) + config["seed"]}) + "\\n")
        file.flush()
if cell == 2:
    print("error: NumericsError: training has collapsed: so")
    sys.exit(3)
first = not (folder / "again").exists()
(folder / "again").touch()
if cell == 3 and first:
    os.kill(os.getpid(), signal.SIGKILL)
if cell == 4 and first:
    time.sleep(600)
(folder / "evaluation.jsonl").write_text(json.dumps({"step": config["steps"], "label": "after", "measures": {"f1": 0.5 + config["seed"]}}))
(folder / "ledger" / "finished.json").write_text(json.dumps({"step": config["steps"], "steps_asked": config["steps"]}))
"""

ENDS = ["done", "collapsed", "failed"]

DRIVER = """
import sys
from pathlib import Path
from raysys import job, stages
from raysys.config.runs import SftConfig
from raysys.studies import ablation, tuning
from raysys.studies.measures import Column
import logging
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
place, cells = Path(sys.argv[1]), sys.argv[2].split(",")
study = ablation.Study(
    title="t",
    cells={f"cell{number}": {"new_model.ffn_size": int(number)} for number in cells},
    columns=(Column("f1", lambda seen: seen.held_out("f1"), share=False), Column("loss", lambda seen: seen.mean("loss", 1), share=False)),
)
plan = ablation.plan("sft", "t", {"t": study}, SftConfig, place / "sft.yaml", (), "0", place / "runs")
job.find_ray()
job.connect()
sys.exit(tuning.execute(plan, place / "job.py", 4))
"""


def place(tmp_path: Path) -> Path:
    (tmp_path / "job.py").write_text(FAKE_JOB)
    (tmp_path / "driver.py").write_text(DRIVER)
    data = {"source": {"split": "train", "domains": {"rev": {"task": "spell_backward"}}}}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump({"data": data, "steps": 3}))
    return tmp_path


def study(folder: Path, head: Head, cells: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(folder / "driver.py"), str(folder), cells]
    return subprocess.Popen(command, env=head.env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def starts(folder: Path) -> dict[str, list[list[str]]]:
    return {path.parent.name: [line.split() for line in path.read_text().splitlines()] for path in folder.glob("runs/*/*/starts")}


def runs(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "runs/sft-t/study.json"
    if not path.is_file():
        return {}
    return {run["name"]: run for cell in json.loads(path.read_text())["cells"] for run in cell["runs"]}


def test_an_experiment_is_restored_for_just_the_runs_that_it_has_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`a` has ended well, `b` failed, `c` was under way or waiting when the study was killed."""
    had = {"concurrent": 2, "runs": {"a": "1", "b": "2", "c": "3"}}
    (tmp_path / "start-1.json").write_text(json.dumps(had))
    statuses = {"a": "done", "b": "failed", "c": "running"}
    results = [SimpleNamespace(metrics={"status": status, "config": {"run": {"name": name}}}) for name, status in statuses.items()]
    restored = SimpleNamespace(get_results=lambda: [*results, SimpleNamespace(metrics=None)])
    monkeypatch.setattr(tuning.tune.Tuner, "can_restore", lambda path: path == str(tmp_path / "start-1"))
    monkeypatch.setattr(tuning.tune.Tuner, "restore", lambda *args, **options: restored)

    def found(settled: str, concurrent: int = 2, start: int = 1, **runs: str) -> Any:
        return tuning._restored(tmp_path / f"start-{start}", None, {"concurrent": concurrent, "runs": runs}, set(settled))

    assert found("ab", c="3") is restored  # as if `b` had collapsed, or was done by hand
    assert found("ab", c="4") is None and found("ab", c="3", d="1") is None  # another config, a seed that was added
    assert found("ab", concurrent=4, c="3") is None and found("ab", start=0, c="3") is None
    assert found("a", c="3") is None  # `b` is not asked for now, and would start
    assert found("a", b="2", c="3") is None  # for Tune `b` has ended
    monkeypatch.setattr(tuning.tune.Tuner, "restore", lambda *args, **options: 1 / 0)
    assert found("ab", c="3") is None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_study_survives_its_runs_and_its_own_end(tmp_path: Path, ray_head: Head) -> None:
    """One run is done, one collapses, one is killed, and the study is killed while one still works; then the same command again."""
    folder = place(tmp_path)
    ended = [folder / f"runs/sft-t/cell{n}-seed0/outcome.json" for n in (1, 2, 3)]
    killed = study(folder, ray_head, "1,2,3,4")
    try:
        _until(lambda: len(starts(folder)) == 4 and all(path.is_file() for path in ended) and _statuses(folder)[:3] == ENDS)
    finally:
        killed.kill()
        output = killed.communicate()[0]
    begun = starts(folder)
    assert {name: len(lines) for name, lines in begun.items()} == {f"cell{n}-seed0": 1 for n in (1, 2, 3, 4)}, output
    where = [(line[1].rpartition(":")[2], line[2]) for lines in begun.values() for line in lines]
    assert where == [(ray_head.gcs.rpartition(":")[2], str(folder))] * 4
    found = runs(folder)
    assert found["cell2-seed0"]["reason"] == "training has collapsed: so" and found["cell3-seed0"]["reason"] == "killed by SIGKILL"
    assert found["cell1-seed0"]["values"] == {"f1": 0.5, "loss": 1 / 3} and "cell1-seed0: step 3/3  loss 0.3333" in output
    hanging = int(begun["cell4-seed0"][0][0])
    _until(lambda: gone(hanging))

    again = study(folder, ray_head, "1,2,3,4")
    output = again.communicate(timeout=200)[0]
    assert again.returncode == 0, output
    assert {name: len(lines) for name, lines in starts(folder).items()} == {f"cell{n}-seed0": 1 + n // 3 for n in (1, 2, 3, 4)}
    assert _statuses(folder) == ["done", "collapsed", "done", "done"]
    tune = sorted((folder / "runs/sft-t/tune").glob("start-*/cell3-seed0"))[-1]  # one more start if Tune had noted the failure
    told = [json.loads(line) for line in (tune / "result.json").read_text().splitlines()][-4:]
    assert [one["step"] for one in told] == [0, 1, 2, 2] and told[-1]["status"] == "done" and told[-1]["config"]["run"]["cell"] == "cell3"
    assert list(tune.glob("events.out.tfevents*"))
    assert (folder / "runs/sft-t/report.html").is_file()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_study_goes_on_in_the_same_experiment(tmp_path: Path, ray_head: Head) -> None:
    """Tune's own experiment is restored: what it has ended is not started again, nor what ended without its knowing."""
    folder = place(tmp_path)
    runs_of = folder / "runs/sft-t"
    killed = study(folder, ray_head, "1,4,5")
    try:
        _until(lambda: len(starts(folder)) == 3 and all((runs_of / f"cell{n}-seed0/outcome.json").is_file() for n in (1, 5)))
        _until(lambda: list((runs_of / "tune/start-1").glob("experiment_state-*.json")))
    finally:
        killed.kill()
        output = killed.communicate()[0]
    hanging = int(starts(folder)["cell4-seed0"][0][0])
    _until(lambda: gone(hanging))
    again = study(folder, ray_head, "1,4,5")
    output += again.communicate(timeout=200)[0]
    assert again.returncode == 0, output
    assert "Tune's experiment start-1 is restored" in output and not (runs_of / "tune/start-2").exists()
    assert {name: len(lines) for name, lines in starts(folder).items()} == {"cell1-seed0": 1, "cell4-seed0": 2, "cell5-seed0": 1}
    assert _statuses(folder) == ["done", "done", "done"]
    told = [json.loads(line) for line in (runs_of / "tune/start-1/cell4-seed0/result.json").read_text().splitlines()]
    assert told[-1]["status"] == "done"


def _statuses(folder: Path) -> list[str]:
    return [run["status"] for run in runs(folder).values()]


def _until(true: Any, seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
