"""Cells are what they say, plans skip what is settled, and the table's numbers add up. No Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysys import job
from raysys.config.agents import SearchAgentConfig
from raysys.errors import ConfigError
from raysys.studies import ablation
from raysys.studies.measures import Seen
from raysys.studies.search_agent import ABLATION, STUDIES
from raysys.studies.summary import publish, summarize, table
from raysys.studies.trial import LOG, judge

SOURCE = {"source": {"split": "train", "domains": {"rev": {"task": "spell_backward"}}}}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "agent.yaml"
    search = {"url": "http://127.0.0.1:8001"}
    path.write_text(yaml.safe_dump({"student": "m", "data": SOURCE, "search": search, "steps": 4, "rebalance": 2.0, "name": "mine"}))
    return path


def planned(config: Path, *overrides: str, seeds: str = "0,1", name: str = "ablation") -> ablation.Plan:
    return ablation.plan("search_agent", name, STUDIES, SearchAgentConfig, config, overrides, seeds, config.parent / "runs")


def leave(one: ablation.Planned, steps: int, outcome: dict[str, Any] | None = None, **evaluations: dict[str, Any]) -> None:
    """What a run leaves: `steps` records, evaluations by label, and how it ended (None: it finished)."""
    (one.folder / "ledger").mkdir(parents=True)
    (one.folder / "config.yaml").write_text(one.config.to_yaml())
    records = [{"step": step, "reward": step / 10, "high_ppl": 0.01 * (one.seed + 1), "softened_of_negative": 0.5} for step in range(steps)]
    (one.folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = [{"step": 0 if label == "before" else steps, "label": label} | facts for label, facts in evaluations.items()]
    (one.folder / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if outcome is None:
        (one.folder / "ledger" / "finished.json").write_text(json.dumps({"step": steps, "steps_asked": steps}))
    else:
        (one.folder / ablation.OUTCOME).write_text(json.dumps({"config": one.digest, "exit_code": 1, "reason": "so"} | outcome))


def test_cells_are_what_they_say(config: Path) -> None:
    plan = planned(config, "batch=8")
    found = {one.name: one.config for one in plan.runs}
    parts = {name: (one.advantage, one.opener, one.soft_penalty, one.rebalance) for name, one in found.items() if one.seed == 1}  # type: ignore[attr-defined]
    assert parts == {
        "grpo-seed1": ("grpo", False, True, 1.0),
        "calibadv-seed1": ("calibadv", True, True, 1.0),
        "no-opener-seed1": ("calibadv", False, True, 1.0),
        "no-soft-penalty-seed1": ("calibadv", True, False, 1.0),
        "no-rebalance-seed1": ("calibadv", True, True, None),
        "rebalance-0.5-seed1": ("calibadv", True, True, 0.5),
    }
    assert [one.seed for one in plan.runs] == [0] * 6 + [1] * 6, "one seed of all cells comes first"
    assert all(one.batch == 8 and one.steps == 4 for one in found.values())  # type: ignore[attr-defined]
    assert plan.folder == config.parent / "runs" / "mine"
    assert [one.folder for one in plan.runs] == [plan.folder / one.name for one in plan.runs]
    assert len({json.dumps(one.identity(), default=str) for one in found.values()}) == 12


def test_some_cells_are_started_and_the_table_has_all(config: Path) -> None:
    plan = ablation.plan("search_agent", "ablation", STUDIES, SearchAgentConfig, config, [], "0", config.parent, "grpo, calibadv")
    assert [one.cell for one in plan.left] == ["grpo", "calibadv"] and len(plan.runs) == 6
    leave(plan.runs[0], 4)
    leave(plan.runs[2], 4)
    assert [one.cell for one in plan.left] == ["calibadv"] and plan.settled == 2
    assert [one["settled"] for one in summarize(plan)["cells"]] == [1, 0, 1, 0, 0, 0]
    assert [line.split()[:1] for line in table(summarize(plan), seeds=False).splitlines()[1:]] == [["grpo"], ["no-opener"]]
    with pytest.raises(ConfigError, match=r"no cell 'gropo' \(there are grpo, calibadv"):
        ablation.plan("search_agent", "ablation", STUDIES, SearchAgentConfig, config, [], "0", config.parent, "gropo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "ablatoin"}, "no study 'ablatoin' .*studies of search_agent: ablation"),
        ({"seeds": "0,x"}, "--seeds=0,x is no list"),
        ({"seeds": "1,01"}, "is no list of different"),
        ({"seeds": ""}, "--seeds= is no list"),
    ],
)
def test_what_is_wrong_is_one_line(config: Path, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(config, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("opener=false", "opener is what the study varies"),
        ("seed=3", "give --seeds"),
        ("bacth=3", "did you mean 'batch'"),
        ("samples=1", "samples: .*greater than or equal to 2"),
    ],
)
def test_overrides_are_judged_before_anything_starts(config: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(config, override)


def test_a_plan_skips_what_is_settled_and_only_that(config: Path) -> None:
    done, collapsed, failed, begun, *_ = planned(config).runs
    leave(done, 4)
    leave(collapsed, 2, {"status": "collapsed"})
    leave(failed, 2, {"status": "failed"})
    leave(begun, 2)
    (begun.folder / "ledger" / "finished.json").unlink()
    plan = planned(config)
    assert [one.state()[0] for one in plan.runs[:5]] == ["done", "collapsed", "failed", "begun", "to run"]
    assert plan.runs[2].state()[1] == "so"
    assert plan.left == plan.runs[2:]
    assert done.name in {one.name for one in planned(config, "steps=6").left}, "more steps are more to do"
    assert collapsed.name in {one.name for one in planned(config, "stop_on_collapse=false").left}


def test_a_folder_of_another_run_is_refused(config: Path) -> None:
    leave(planned(config).runs[0], 4)
    with pytest.raises(ConfigError, match=r"grpo-seed0: .*another identity: learning_rate: .*name="):
        planned(config, "learning_rate=1e-3")


def test_the_table_is_the_mean_of_settled_seeds(config: Path) -> None:
    plan = planned(config, seeds="0,1,2")
    grpo = [one for one in plan.runs if one.cell == "grpo"]
    plain = {"mean": 0.0, "domains": {"a": {"score": 0.2}, "b": {"score": 0.4}}}
    leave(grpo[0], 4, before=plain, after={"measures": {"f1": 0.5, "exact_match": 0.25, "searches": 2.0, "high_ppl": 0.0}})
    leave(grpo[1], 2, {"status": "collapsed", "reason": "training has collapsed: F1"}, after={"measures": {"f1": 0.1, "searches": 4.0}})
    leave(grpo[2], 3, {"status": "failed"}, after={"measures": {"f1": 0.9}})
    summary = publish(plan)
    cell = summary["cells"][0]
    assert (cell["cell"], cell["settled"], cell["collapsed"]) == ("grpo", 2, 1)
    mean = cell["mean"]
    assert mean["F1 after"] == pytest.approx(0.3) and mean["F1 before"] == pytest.approx(0.3) and mean["EM after"] == 0.25
    assert (mean["searches"], mean["steps"], mean["softened"]) == (3.0, 3.0, 0.5)
    assert mean["high PPL in training"] == pytest.approx(0.015) and mean["EM before"] is None
    assert [run["evaluated_at"] for run in cell["runs"]] == [4, 2, 3]
    assert json.loads((plan.folder / "study.json").read_text()) == summary
    text = table(summary)
    assert "2 of 3 seeds, 1 collapsed" in text and "collapsed: training has collapsed: F1" in text and "2/4" in text
    page = (plan.folder / "report.html").read_text()
    assert "training has collapsed: F1" in page and "no-soft-penalty" in page and "1 done, 1 collapsed, 1 failed" in page


def test_a_study_that_has_not_begun_has_an_empty_table(config: Path) -> None:
    summary = summarize(planned(config))
    assert {run["status"] for cell in summary["cells"] for run in cell["runs"]} == {"to run"}
    assert "0 of 2 seeds" in table(summary)


def test_ends_are_means_over_the_last_steps_that_have_a_value() -> None:
    seen = Seen([{"step": step, **({"high_ppl": float(step)} if step != 3 else {"high_ppl": None})} for step in range(4)], [])
    assert seen.mean("high_ppl", 2) == 1.5 and seen.mean("high_ppl") == 1.0 and seen.mean("reward") is None
    assert ABLATION.columns[0].of(seen) is None


@pytest.mark.parametrize(
    ("code", "output", "expected"),
    [
        (job.COLLAPSED, "error: NumericsError: training has collapsed: F1 (see)\n", ("collapsed", "training has collapsed: F1 (see)")),
        (1, "error: old\nerror: InfrastructureError: a node is gone\nmore\n", ("failed", "InfrastructureError: a node is gone")),
        (-9, "error: old\n", ("failed", "killed by SIGKILL")),
        (7, "nothing\n", ("failed", "exit code 7, see ")),
        (0, "", ("failed", "left no ledger/finished.json")),
    ],
)
def test_how_a_run_ended(tmp_path: Path, code: int, output: str, expected: tuple[str, str]) -> None:
    (tmp_path / LOG).write_text("error: of an attempt before\n" + output)
    found = judge(code, tmp_path, len("error: of an attempt before\n"))
    assert found["status"] == expected[0] and found["exit_code"] == code
    assert found["reason"].startswith(expected[1])


def test_the_command_line_names_what_is_wrong(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--study", "x"], "error: there is no study 'x' (studies of search_agent: ablation)"),
        (["--study", "ablation", "--seeds", "a"], "error: --seeds=a is no list of different whole numbers (write e.g. --seeds 0,1,2)"),
        (["--study", "ablation", "--concurrent", "0"], "error: --concurrent=0 must be at least 1"),
        (["--seeds", "0"], "error: --seeds, --cells and --concurrent are of --study (studies of search_agent: ablation)"),
    ):
        assert job.main("search_agent", SearchAgentConfig, ["--config", str(config), *arguments], studies=STUDIES) == 2
        assert capsys.readouterr().err.strip() == message
