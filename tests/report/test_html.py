"""The report: complete where the run was, tolerant where it was not, and deaf to what a model writes."""

from __future__ import annotations

import json
from pathlib import Path

from raysys.report.html import render_report
from raysys.report.study import render_study

EVIL = "<script>alert('x')</script></pre>{{ 7 * 7 }}"


def domains(add: float, rev: float) -> dict:
    return {name: {"n": 256, "mean": mean, "low": mean - 0.05, "high": mean + 0.05} for name, mean in (("add", add), ("rev", rev))}


def run_folder(folder: Path, steps: int = 30) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "job": "gopd", "title": "gopd", "command": "python jobs/gopd.py reward_scale=1.25", "versions": {"ray": "2.60.0"},
        "seeds": {"seed": 0}, "code_revision": "abc123", "machine": {"cores": 2}, "finished": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    (folder / "about.json").write_text(json.dumps(about))
    (folder / "config.yaml").write_text("name: one\nmax_prompt_tokens: 16\nhub: {auth_token: hf_abcdef, path: 's3://user:pass@bucket/x'}\n")
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(steps):
            seconds = {"generate": 0.5, "score": 0.1, "train": 0.3, "push": 0.05, "other": 0.01, "total": 0.96}
            kl = 1.5 * 0.97**step
            record = {
                "step": step, "version": step + 1, "loss": kl, "reward": 0.2 + step / 60, "reward/add": 0.1 + step / 50, "reverse_kl": kl,
                "reverse_kl/add": kl * 1.2, "response_tokens": 6 + step / 30, "entropy": 0.9 - step / 60, "age_max": 0.0,
                "parity_gap": 1e-6 * (1 + step % 3), "fingerprint": "f" * 20, "seconds": seconds,
            }  # fmt: skip
            file.write(json.dumps(record) + "\n")
        file.write('{"step": 30, "torn')
    with open(folder / "evaluation.jsonl", "w") as file, open(folder / "samples.jsonl", "w") as samples:
        for step, label in ((0, "before"), (15, "step 15"), (30, "after")):
            file.write(
                json.dumps({"step": step, "label": label, "split": "choose", "domains": domains(0.26 + step / 100, 0.25 + step / 60)})
                + "\n"
            )
            for number in range(6):
                row = {
                    "step": step,
                    "label": label,
                    "domain": "rev",
                    "prompt": f"word{number}<",
                    "response": EVIL,
                    "answer": "drow",
                    "score": float(step > 0),
                }
                samples.write(json.dumps(row) + "\n")
    return folder


def test_a_run_shows_all_of_it(tmp_path: Path) -> None:
    page = render_report(run_folder(tmp_path / "one")).read_text()
    for text in (
        "add accuracy 26.0% to 56.0%",
        "Reverse KL to the teacher",
        "Where a step",
        "word5&lt;",
        "reward_scale=1.25",
        "abc123",
        "2.60.0",
    ):
        assert text in page
    body = page.partition("<body>")[2]
    assert 'src="' not in body and 'href="http' not in page.partition("<script>")[0] + body


def test_what_a_model_writes_stays_text(tmp_path: Path) -> None:
    page = render_report(run_folder(tmp_path / "one")).read_text()
    assert EVIL not in page and "&lt;script&gt;alert" in page and "{{ 7 * 7 }}" in page and "49</pre>" not in page


def test_secrets_are_masked_and_limits_are_not(tmp_path: Path) -> None:
    page = render_report(run_folder(tmp_path / "one")).read_text()
    assert "hf_abcdef" not in page and "user:pass" not in page and "max_prompt_tokens: 16" in page


def test_a_study_s_secrets_are_masked_too(tmp_path: Path) -> None:
    uri = "s3://AKIA:verysecret@bucket/text"
    run = {
        "name": "a-0", "seed": 0, "status": "failed", "reason": f"{uri} cannot be reached", "steps": 0, "steps_asked": 3, "values": {},
    }  # fmt: skip
    cell = {"cell": "a", "set": {"data.path": uri, "hub.token": "hf_abcdef"}, "mean": {}, "runs": [run], "settled": 1, "collapsed": 0}
    study = {"study": "s", "job": "j", "title": "t", "seeds": [0], "columns": [], "cells": [cell], "pareto": None}
    (tmp_path / "study.json").write_text(json.dumps(study))
    (tmp_path / "about.json").write_text(json.dumps({"job": "j", "command": f"python jobs/j.py data.path={uri}"}))
    page = render_study(tmp_path).read_text()
    assert "verysecret" not in page and "hf_abcdef" not in page and page.count("s3://***@bucket/text") >= 3


def test_a_run_that_writes_data_shows_what_became_of_the_answers(tmp_path: Path) -> None:
    counts = {"prompts": 1000, "samples": 1500, "kept": 1200, "cut_off": 300, "judged": 1500, "correct": 750, "tokens": 15000}
    lines = [{"step": step, "kept": 1200, "counts": {"add": counts, "": {"samples": 3, "kept": 1}}} for step in range(2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sample = {"step": 0, "label": "teacher", "domain": "add", "prompt": "1+1=", "response": EVIL, "answer": "", "score": None}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    page = render_report(tmp_path).read_text()
    assert "2,402 of 3,006 answers kept, in 2 shards." in page and EVIL not in page
    table = page.partition("<h2>Answers</h2>")[2].partition("</section>")[0]
    for text in ("add", "no tag", "2,000", "3,000", "2,400", "600", "50.0&thinsp;%", "10.0"):
        assert f">{text}<" in table, text


def test_a_run_that_died_at_once_still_has_a_page(tmp_path: Path) -> None:
    assert "0 steps." in render_report(tmp_path).read_text()


def test_a_pipeline_compares_and_links(tmp_path: Path) -> None:
    run_folder(tmp_path / "opd-1")
    render_report(tmp_path / "opd-1")
    whole = tmp_path / "quickstart"
    whole.mkdir()
    (whole / "about.json").write_text(json.dumps({"job": "pipeline", "title": "One student, two teachers"}))
    stage = {"name": "opd", "job": "gopd", "run_dir": str(tmp_path / "opd-1"), "seconds": 93.4, "status": "done", "note": ""}
    (whole / "stages.json").write_text(json.dumps([stage]))
    rows = [{"label": "student", "domains": domains(0.26, 0.25)}, {"label": "OPD", "domains": domains(0.6, 0.8)}]
    (whole / "comparison.json").write_text(json.dumps({"split": "report", "columns": ["add", "rev"], "rows": rows}))
    page = render_report(whole).read_text()
    assert "Best in its weakest domain: OPD (add 60.0%, rev 80.0%)" in page and 'href="../opd-1/report.html"' in page


def test_models_side_by_side_are_no_course_of_a_run(tmp_path: Path) -> None:
    shares = {"add": {"n": 9, "samples": 1, "mean": 0.5, "low": 0.4, "high": 0.6, "score": 0.5}}
    lines = [{"step": 0, "label": label, "mean": 0.5, "domains": shares, "measures": {}} for label in "abc"]
    (tmp_path / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = render_report(tmp_path).read_text()
    assert "3 models evaluated." in page and "Over the run" not in page and "0 steps" not in page


def test_a_run_that_was_extended_shows_its_last_samples(tmp_path: Path) -> None:
    steps = ((0, "before"), (100, "after"), (150, "step 150"), (200, "after"))
    row = {"domain": "add", "prompt": "1+1=", "answer": "2", "score": 1.0}
    lines = [row | {"step": step, "label": label, "response": f"says {step}"} for step, label in steps]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = render_report(tmp_path).read_text().partition("<h2>Samples")[2]
    assert [step for step, _ in steps if f"says {step}" in shown] == [0, 200]
