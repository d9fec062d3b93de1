"""Verifiers judge text and survive any of it."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys import tasks
from raysys.errors import DataError
from raysys.scoring.verifiers import boxed, check, score

ANY = ["exact", "math", "reasoning_gym:chain_sum", "scratchpad:chain_sum", "reasoning_gym:spell_backward"]


@pytest.mark.parametrize(
    ("verifier", "text", "answer", "expected"),
    [
        ("exact", " yes \n", "yes", 1.0),
        ("exact", "yes!", "yes", 0.0),
        ("exact", "", "", 1.0),
        ("math", r"so \boxed{\frac{1}{2}} it is", "0.5", 1.0),
        ("math", r"\boxed{\dfrac12}", r"\boxed{1/2}", 1.0),
        ("math", r"\boxed{3} no, \boxed{4}", "4", 1.0),
        ("math", r"\boxed{4} and an unfinished \boxed{5", "4", 1.0),
        ("math", r"\boxed{x^{2}+1}", "x^{2} + 1", 1.0),
        ("math", r"\boxed{x^{2}+1}", "x^{2} + 2", 0.0),
        ("math", r"\boxed{50\%}", "50", 1.0),
        ("math", r"\boxed{\text{Tuesday}}", "Tuesday", 1.0),
        ("math", r"\boxed{}", "", 0.0),
        ("math", "first 3, then 1,234.0", "1234", 1.0),
        ("math", "it is 1,23", "123", 0.0),
        ("math", "so 3/6.", "0.5", 1.0),
        ("math", "-0.50", "-1/2", 1.0),
        ("math", "2e3", "2000", 1.0),
        ("math", "1/0", "0", 0.0),
        ("math", "the answer is 7", "8", 0.0),
        ("math", "no number at all", "8", 0.0),
        ("math", "0.1 + 0.2 is 0.30000000000000004", "0.3", 0.0),
        ("math", "__import__('os').system('true')", "0", 0.0),
        ("reasoning_gym:spell_backward", "noen", "noen", 1.0),
        ("reasoning_gym:chain_sum", "17", "17", 1.0),
        ("scratchpad:chain_sum", "71>17", "17", 1.0),
        ("scratchpad:chain_sum", "82->-28", "-28", 1.0),
        ("scratchpad:chain_sum", "1>2>17", "17", 1.0),
        ("scratchpad:chain_sum", "17>", "17", 0.0),
        ("scratchpad:chain_sum", "17", "17", 0.0),
        ("", "anything", "anything", 0.0),
    ],
)
def test_judgements(verifier: str, text: str, answer: str, expected: float) -> None:
    assert score(verifier, text, answer, "{}") == expected


def test_what_is_partly_right_scores_below_one() -> None:
    assert 0 < score("reasoning_gym:spell_backward", "noex", "noen", "") < 1
    assert 0 < score("scratchpad:chain_sum", "71>170", "17", "") < 1
    # Six credits of a sixth add up to almost 1, and to 1 in float32.
    assert score("reasoning_gym:spell_backward", "sdrows and more", "sdrows", "") == 0.99


def test_a_recipe_makes_the_entry_again() -> None:
    entry = tasks.entry("chain_sum", "{}", 5, 40)
    metadata = tasks.recipe({}, 5, 40)
    assert score("reasoning_gym:chain_sum", entry["answer"], "not looked at", metadata) == 1.0


def test_unknown_verifiers_are_refused() -> None:
    for name in ("judge", "exact:", "math:x", "scratchpad", "reasoning_gym:", "reasoning_gym:none_such"):
        with pytest.raises(DataError):
            score(name, "a", "a", "")
        with pytest.raises(DataError):
            check(name)
    with pytest.raises(DataError, match="known: exact, math, scratchpad:<task>, reasoning_gym:<task>"):
        score("judge", "a", "a", "")
    for name in ("", *ANY):
        check(name)


def test_metadata_that_does_not_fit_is_an_error_and_bad_text_is_not() -> None:
    with pytest.raises(DataError, match="not a JSON object"):
        score("reasoning_gym:chain_sum", "1", "1", "[1]")
    with pytest.raises(DataError, match="does not fit task 'sudoku'"):
        score("reasoning_gym:sudoku", "1 2 3", "1 2 3", "{}")


def test_scorers_that_run_text_are_refused(tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    for task in tasks.EVALUATES_TEXT:
        with pytest.raises(DataError):
            score(f"reasoning_gym:{task}", f"__import__('pathlib').Path({str(proof)!r}).touch()", "1", json.dumps({"solution": [[1]]}))
    assert not proof.exists()


def test_no_other_scorer_runs_text() -> None:
    """Every `score_answer` of the tasks that are allowed: none calls what evaluates."""
    runs = {"eval", "exec", "compile", "parse_expr", "sympify", "S", "simplify"}
    for task in tasks.names():
        scorer = tasks._registry()[task][0].score_answer
        tree = ast.parse(textwrap.dedent(inspect.getsource(scorer)))
        called = {getattr(node.func, "id", getattr(node.func, "attr", "")) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not called & runs, f"{task}: {called & runs}"
    assert len(tasks.names()) > 80


def test_boxes_are_balanced_and_the_last_complete_one_counts() -> None:
    assert boxed(r"\boxed{a{b}c} x") == "a{b}c"
    assert boxed(r"\boxed{1} \boxed{2") == "1"
    assert boxed("none") is None


@pytest.mark.parametrize(
    "text", ["\\boxed{" * 20_000, "{" * 100_000, "1," * 50_000, "1e999", "9" * 100_000, "1/" * 50_000, "\\frac" * 20_000, " " * 100_000]
)
def test_long_nonsense_is_judged_quickly(text: str) -> None:
    before = time.process_time()  # whatever else the machine does
    for verifier in ANY:
        assert 0.0 <= score(verifier, text, "17", "") <= 1.0
    assert time.process_time() - before < 5.0


@settings(max_examples=200, deadline=None)
@given(st.text(), st.text(), st.sampled_from(ANY))
def test_no_text_breaks_a_verifier(text: str, answer: str, verifier: str) -> None:
    for said in (text, "\\boxed{" + text + "}", ">" + text):
        assert 0.0 <= score(verifier, said, "17", "{}") <= 1.0
    if verifier in ("exact", "math"):
        assert 0.0 <= score(verifier, text, answer, "") <= 1.0


@settings(max_examples=100, deadline=None)
@given(st.fractions(), st.text(alphabet="abc .,\n$"))
def test_a_number_equals_itself_in_any_dress(value, around: str) -> None:
    assert score("math", f"{around} \\boxed{{{value}}} {around}", str(value), "") == 1.0
    assert score("math", f"\\boxed{{{value + 1}}}", str(value), "") == 0.0
