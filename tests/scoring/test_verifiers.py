"""Verifiers judge text and survive any of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysys.errors import DataError
from raysys.scoring.verifiers import score


@pytest.mark.parametrize(
    ("verifier", "text", "answer", "expected"),
    [
        ("exact", " yes \n", "yes", 1.0),
        ("exact", "yes!", "yes", 0.0),
        ("math", r"so \boxed{\frac{1}{2}} it is", "0.5", 1.0),
        ("math", r"\boxed{x^{2}+1}", "x^{2} + 1", 1.0),
        ("math", "first 3, then 1,234.0", "1234", 1.0),
        ("math", "the answer is 7", "8", 0.0),
        ("math", "no number at all", "8", 0.0),
        ("math", "__import__('os').system('true')", "0", 0.0),
        ("reasoning_gym:spell_backward", "noen", "noen", 1.0),
        ("reasoning_gym:chain_sum", "17", "17", 1.0),
        ("scratchpad:chain_sum", "71>17", "17", 1.0),
        ("scratchpad:chain_sum", "17>", "17", 0.0),
        ("", "anything", "anything", 0.0),
    ],
)
def test_judgements(verifier: str, text: str, answer: str, expected: float) -> None:
    assert score(verifier, text, answer, "{}") == expected


def test_partly_right_words_score_between() -> None:
    assert 0 < score("reasoning_gym:spell_backward", "noex", "noen", "{}") < 1


def test_unknown_verifiers_are_refused() -> None:
    for name in ("judge", "reasoning_gym:", "reasoning_gym:none_such"):
        with pytest.raises(DataError):
            score(name, "a", "a", "")


@settings(max_examples=150, deadline=None)
@given(st.text(), st.sampled_from(["exact", "math", "reasoning_gym:chain_sum", "scratchpad:chain_sum", "reasoning_gym:spell_backward"]))
def test_no_text_breaks_a_verifier(text: str, verifier: str) -> None:
    assert 0.0 <= score(verifier, text, "17", "{}") <= 1.0
    assert 0.0 <= score(verifier, "\\boxed{" + text, "17", "{}") <= 1.0
