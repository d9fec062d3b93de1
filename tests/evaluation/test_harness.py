"""lm-eval's tasks: names of what is measured, refusals, and a real run where the library is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raysys.config.runs import EvaluateConfig, Harness, NewModel
from raysys.errors import ConfigError
from raysys.evaluation.harness import HarnessWorker, check_harness, measures

TASK = """
task: tiny_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def tasks(folder: Path) -> Path:
    rows = [{"q": f"{a}+{b}=", "choices": [str(a + b), str(a + b + 1)], "label": 0} for a in range(1, 5) for b in range(1, 4)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(TASK.format(rows=folder / "sums.jsonl"))
    return folder


def test_measures_are_numbers_by_task_metric_and_filter() -> None:
    results = {
        "arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 7},
        "gsm8k": {"exact_match,strict": 0.25, "exact_match_stderr,strict": "N/A", "higher_is_better": True},
    }
    assert measures(results, ["gsm8k"]) == {"gsm8k exact_match strict": 0.25, "arc acc": 0.5, "arc acc ±": 0.1}
    assert list(measures(results, ["gsm8k"])) == ["gsm8k exact_match strict", "arc acc", "arc acc ±"], (
        "those that were asked for come first"
    )


def test_a_run_has_tasks_of_one_kind() -> None:
    kept = {"models": {"a": "x"}}
    assert EvaluateConfig.model_validate(kept | {"harness": {"tasks": ["arc_easy"]}}).evaluation is None
    for both in ({}, {"harness": {"tasks": ["arc_easy"]}, "evaluation": {"data": {"path": "x"}}}):
        with pytest.raises(ValueError, match="either evaluation"):
            EvaluateConfig.model_validate(kept | both)


def test_without_the_library_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        check_harness(Harness(tasks=["arc_easy"]))


@pytest.mark.slow
def test_what_is_unknown_is_named(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install '.[harness]')")
    check_harness(Harness(tasks=["tiny_sums"], include=str(tasks(tmp_path))))
    with pytest.raises(ConfigError, match=r"correct harness\.tasks: tiny_sums"):
        check_harness(Harness(tasks=["tiny_sumz"], include=str(tmp_path)))
    with pytest.raises(ConfigError, match="is no folder"):
        check_harness(Harness(tasks=["tiny_sums"], include=str(tmp_path / "nowhere")))


@pytest.mark.slow
def test_a_task_of_ones_own_on_a_real_model_is_what_log_probs_say(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install '.[harness]')")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from raysys.models.scratch import new_causal

    folder = str(new_causal(NewModel(), tmp_path / "model", seed=1))
    part = Harness(tasks=["tiny_sums"], include=str(tasks(tmp_path)))
    found = HarnessWorker().run(folder, part, "cpu", "float32", 1, 0.9, 0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def score(question: str, choice: str) -> float:
        start, whole = (tokenizer(text)["input_ids"] for text in (question, question + choice))
        with torch.no_grad():
            table = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(float(table[i - 1, whole[i]]) for i in range(len(start), len(whole)))

    rows = [json.loads(line) for line in (tmp_path / "sums.jsonl").read_text().splitlines()]
    right = [score(row["q"], row["choices"][0]) > score(row["q"], row["choices"][1]) for row in rows]
    assert found["tiny_sums acc"] == pytest.approx(sum(right) / len(rows)) and found["tiny_sums acc ±"] > 0
