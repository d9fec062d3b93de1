"""Stages: addressing, skipping, references, overrides, failure, stopping. The jobs here are small scripts with a job's interface."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from raysys import pipeline, stages
from raysys.config.runs import Run
from raysys.errors import ConfigError

FAKE_JOB = """
import json, os, pathlib, sys, time, yaml
config = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
folder = pathlib.Path(config["run_dir"])
(folder / "ledger").mkdir(parents=True, exist_ok=True)
(folder / "export").mkdir(exist_ok=True)
print("training", config["name"], "from", config.get("student"), os.environ.get("MARK"))
if (folder.parent / "fail").exists():
    sys.exit(3)
if (folder.parent / "wait").exists():
    (folder / "pid.draft").write_text(str(os.getpid()))
    (folder / "pid.draft").rename(folder / "pid")  # whole, for who waits for it
    time.sleep(60)
for number, label in enumerate(config.get("models", {})):
    fact = {"mean": number / 4, "low": 0.0, "high": 1.0, "n": 8}
    record = {"step": 0, "label": label, "mean": number / 4, "domains": {"rev": fact}}
    with open(folder / "evaluation.jsonl", "a") as file:
        file.write(json.dumps(record) + "\\n")
(folder / "ledger" / "finished.json").write_text('{"step": 1, "steps_asked": 1}')
"""

SOURCE = {"source": {"split": "report", "domains": {"rev": {"task": "spell_backward"}}}}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "jobs").mkdir()
    for job in ("sft", "gopd", "evaluate"):
        (tmp_path / "jobs" / f"{job}.py").write_text(FAKE_JOB)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "sft.yaml").write_text(yaml.safe_dump({"steps": 5, "data": SOURCE, "trainer": {"clip": 2.0}}))
    gopd = {"student": "${base}", "teachers": {"default": "${teacher}"}, "data": SOURCE}
    stage_list = {
        "base": {"job": "sft", "config": "sft.yaml"},
        "teacher": {"job": "sft", "config": "sft.yaml", "set": {"student": "${base}", "trainer.clip": 1.0}},
        "opd": {"job": "gopd", "main": True, "set": {**gopd, "steps": 7}},
        "exopd": {"job": "gopd", "main": True, "set": {**gopd, "steps": 7, "reward_scale": 1.25, "reference": "${base}"}},
        "table": {"job": "evaluate", "set": {"models": {"before": "${base}", "after": "${opd}"}, "evaluation": {"data": SOURCE}}},
    }
    (tmp_path / "configs" / "story.yaml").write_text(yaml.safe_dump({"title": "t", "stages": stage_list}, sort_keys=False))
    return tmp_path


def planned(place: Path, *overrides: str) -> pipeline.Plan:
    return pipeline.plan(place / "configs" / "story.yaml", overrides, place / "runs")


def digests(plan: pipeline.Plan) -> dict[str, str]:
    return {stage.name: stage.digest for stage in plan.stages}


def execute(place: Path, *overrides: str) -> int:
    return stages.execute(planned(place, *overrides), place / "jobs", {**os.environ, "MARK": "m"})


def statuses(place: Path, plan: pipeline.Plan) -> dict[str, str]:
    return {record["name"]: record["status"] for record in json.loads((plan.run_dir / "stages.json").read_text())}


def test_plan_is_deterministic_and_touches_nothing(place: Path) -> None:
    before = sorted(place.rglob("*"))
    assert digests(planned(place)) == digests(planned(place))
    assert sorted(place.rglob("*")) == before


def test_references_become_folders_of_earlier_stages(place: Path) -> None:
    plan = planned(place)
    base, teacher, opd = plan.stages[:3]
    assert opd.config.model_dump()["student"] == str(base.run_dir / "export")
    assert opd.config.model_dump()["teachers"] == {"default": str(teacher.run_dir / "export")}
    assert teacher.config.model_dump()["trainer"]["clip"] == 1.0 and base.config.model_dump()["trainer"]["clip"] == 2.0


def test_a_key_is_set_below_one_that_the_file_leaves_empty(place: Path) -> None:
    (place / "configs" / "sft.yaml").write_text(yaml.safe_dump({"steps": 5, "data": SOURCE, "trainer": None}))
    path = place / "configs" / "one.yaml"
    path.write_text(yaml.safe_dump({"stages": {"base": {"job": "sft", "config": "sft.yaml", "set": {"trainer.clip": 3.0}}}}))
    assert pipeline.plan(path, (), place / "runs").stages[0].config.model_dump()["trainer"]["clip"] == 3.0


def test_a_measurement_that_a_kill_tore_is_left_out_of_the_table(place: Path) -> None:
    plan = planned(place)
    table = plan.stages[-1].run_dir / "evaluation.jsonl"
    table.parent.mkdir(parents=True)
    table.write_text('{"label": "before", "domains": {}}\n{"label": "aft')
    compared = pipeline.comparison(plan.stages)
    assert compared is not None and [row["label"] for row in compared["rows"]] == ["before"]


def test_a_stage_reads_the_data_that_another_wrote(place: Path) -> None:
    stages = {
        "base": {"job": "sft", "config": "sft.yaml"},
        "answers": {"job": "generate", "set": {"teachers": {"rev": "${base}"}, "data": SOURCE, "rows": 8}},
        "taught": {"job": "sft", "set": {"data.path": "${answers:run}/data", "student": "${base}"}},
    }
    path = place / "configs" / "answers.yaml"

    def plan() -> pipeline.Plan:
        path.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
        return pipeline.plan(path, (), place / "runs")

    before = plan()
    assert before.stages[2].config.model_dump()["data"]["path"] == str(before.stages[1].run_dir / "data")
    stages["answers"]["set"] |= {"samples": 2}
    after = digests(plan())
    assert [name for name, digest in digests(before).items() if after[name] != digest] == ["answers", "taught"]


def test_a_change_moves_the_stage_and_what_follows_it_only(place: Path) -> None:
    before = digests(planned(place))
    path = place / "configs" / "story.yaml"
    values = yaml.safe_load(path.read_text())
    values["stages"]["teacher"]["set"]["trainer.clip"] = 3.0
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    after = digests(planned(place))
    assert after["base"] == before["base"]
    assert all(after[name] != before[name] for name in ("teacher", "opd", "exopd", "table"))


def test_placement_does_not_move_a_stage_but_steps_do(place: Path) -> None:
    before = digests(planned(place))
    assert digests(planned(place, "trainer.ranks=2", "checkpoint_every=3")) == before
    after = digests(planned(place, "steps=9"))
    assert after["opd"] != before["opd"] and after["base"] == before["base"]


def test_a_key_that_a_later_version_adds_moves_no_stage_while_it_is_unset(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, identity = digests(planned(place)), Run.identity
    monkeypatch.setattr(Run, "identity", lambda self: identity(self) | {"later": None, "laters": []})
    assert digests(planned(place)) == before
    monkeypatch.setattr(Run, "identity", lambda self: identity(self) | {"later": 0})
    assert digests(planned(place)) != before


def test_seed_goes_to_every_stage(place: Path) -> None:
    before, after = digests(planned(place)), digests(planned(place, "seed=1"))
    assert all(before[name] != after[name] for name in before)
    assert all(stage.config.seed == 1 for stage in planned(place, "seed=1").stages)


def test_overrides_give_the_pipeline_its_own_folder(place: Path) -> None:
    assert planned(place).name == "configs-story"
    assert planned(place, "steps=9").name.startswith("configs-story-")
    assert planned(place, "steps=9", "name=mine").run_dir == place / "runs" / "mine"


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["reward_scal=1"], "did you mean 'reward_scale'"),
        (["steps=many"], "stage opd"),
        (["reward_scale=1.5"], "needs reference"),
    ],
)
def test_wrong_input_names_the_stage(place: Path, overrides: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        planned(place, *overrides)


def test_unknown_references_and_jobs_are_refused(place: Path) -> None:
    path = place / "configs" / "bad.yaml"
    path.write_text(yaml.safe_dump({"stages": {"one": {"job": "sft", "config": "sft.yaml", "set": {"student": "${later}"}}}}))
    with pytest.raises(ConfigError, match="later"):
        pipeline.plan(path, (), place / "runs")
    path.write_text(yaml.safe_dump({"stages": {"one": {"job": "stf"}}}))
    with pytest.raises(ConfigError, match="unknown job 'stf'"):
        pipeline.plan(path, (), place / "runs")
    path.write_text(yaml.safe_dump({"stages": {"one": {"job": "sft", "config": "sft.yaml"}}}))
    with pytest.raises(ConfigError, match="no stage marked main"):
        pipeline.plan(path, ("steps=3",), place / "runs")


def test_runs_all_then_skips_all_and_compares(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert execute(place) == 0
    first = capfd.readouterr().out
    plan = planned(place)
    assert "[base] training base-" in first and "[teacher] training" in first and " m\n" in first
    assert set(statuses(place, plan).values()) == {"done"}
    compared = json.loads((plan.run_dir / "comparison.json").read_text())
    assert compared["split"] == "report" and compared["columns"] == ["rev"]
    assert [(row["label"], row["domains"]["rev"]["mean"]) for row in compared["rows"]] == [("before", 0.0), ("after", 0.25)]
    assert "after" in first and "0.250 [0.000, 1.000]" in first
    seconds = {record["name"]: record["seconds"] for record in json.loads((plan.run_dir / "stages.json").read_text())}
    assert execute(place) == 0
    assert "[base]" not in capfd.readouterr().out
    assert set(statuses(place, plan).values()) == {"skipped"}
    assert seconds == {record["name"]: record["seconds"] for record in json.loads((plan.run_dir / "stages.json").read_text())}
    about = json.loads((plan.run_dir / "about.json").read_text())
    assert about["job"] == "pipeline" and about["title"] == "t" and about["finished"] >= about["started"]


def test_stages_with_the_same_content_run_once(place: Path) -> None:
    plan = planned(place, "reward_scale=1", "reference=null")
    assert plan.stages[3].same_as == "opd" and plan.stages[3].run_dir == plan.stages[2].run_dir
    assert stages.execute(plan, place / "jobs", os.environ) == 0
    assert statuses(place, plan)["exopd"] == "same"


def test_a_failed_stage_stops_the_list_and_the_next_run_goes_on_from_it(place: Path) -> None:
    plan = planned(place)
    (place / "runs").mkdir()
    (plan.stages[0].run_dir / "ledger").mkdir(parents=True)
    (plan.stages[0].run_dir / "ledger" / "finished.json").write_text("{}")
    (place / "runs" / "fail").touch()
    assert execute(place) == 3
    assert statuses(place, plan) == {"base": "skipped", "teacher": "failed"}
    (place / "runs" / "fail").unlink()
    assert execute(place) == 0
    assert statuses(place, plan)["teacher"] == "done"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_running_stage_too(place: Path, signum: signal.Signals) -> None:
    (place / "runs").mkdir()
    (place / "runs" / "wait").touch()
    base = planned(place).stages[0].run_dir
    script = Path(__file__).parent.parent / "jobs" / "pipeline.py"
    env = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1", "RAYSYS_RUNS_DIR": str(place / "runs")}
    command = [sys.executable, str(script), str(place / "configs" / "story.yaml")]
    # Another script folder: the real jobs would look for a Ray.
    launcher = f"import runpy,sys,pathlib; import raysys.stages as s; e=s.execute; s.execute=lambda p,j,v: e(p,pathlib.Path({str(place / 'jobs')!r}),v); sys.argv={command[1:]!r}; runpy.run_path(sys.argv[0], run_name='__main__')"  # noqa: E501
    process = subprocess.Popen(
        [sys.executable, "-c", launcher], env=env, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 60
    while not (base / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)  # whoever started it reads its output by then
    stage = int((base / "pid").read_text())
    os.killpg(process.pid, signum)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, output.decode()
    assert not Path(f"/proc/{stage}").exists()
    assert b"the same command goes on" in output


def test_a_stage_ends_when_nobody_reads_the_output_any_more(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*said: object, **how: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    (place / "says.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen
    monkeypatch.setattr(stages.subprocess, "Popen", lambda *command, **how: started.append(popen(*command, **how)) or started[0])
    monkeypatch.setattr(stages, "print", gone, raising=False)
    with pytest.raises(BrokenPipeError):
        stages._run([sys.executable, str(place / "says.py")], "base", os.environ)
    assert started[0].returncode == -signal.SIGTERM


def test_check_prints_the_plan_and_runs_nothing(place: Path) -> None:
    script = Path(__file__).parent.parent / "jobs" / "pipeline.py"
    env = {**os.environ, "RAYSYS_RUNS_DIR": str(place / "runs")}
    story = str(place / "configs" / "story.yaml")
    good = subprocess.run([sys.executable, str(script), "--check", story], env=env, capture_output=True, text=True)
    assert good.returncode == 0 and "table: evaluate, to run" in good.stdout and not (place / "runs").exists()
    bad = subprocess.run([sys.executable, str(script), "--check", story, "nothing=1"], env=env, capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.startswith("error: unknown key 'nothing'") and bad.stderr.count("\n") == 1
