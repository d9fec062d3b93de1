"""Verifiers: is a model's answer right? Plain functions of text; whatever the text, they answer and never evaluate it."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from raysys.errors import DataError

Verifier = Callable[[str, str, str], float]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_LONGEST = 100_000


def score(verifier: str, text: str, answer: str, metadata: str = "") -> float:
    """How right `text` is, in [0, 1].

    Args:
        verifier: `exact` (equal but for space around), `math` (last boxed expression or last number, compared as numbers),
            `reasoning_gym:<task>` (the task's own scorer), `scratchpad:<task>` (the same on what follows the last `>`), "" (always 0).
        text: what the model wrote; data, never code.
        answer: the right answer.
        metadata: JSON object that the task's scorer may want.

    Raises:
        DataError: no such verifier.
    """
    kind, _, task = verifier.partition(":")
    if not verifier:
        return 0.0
    text = text[:_LONGEST]
    if kind == "exact":
        return float(text.strip() == answer.strip())
    if kind == "math":
        return float(_same_value(_final_expression(text), answer))
    if kind == "reasoning_gym" and task:
        return _by_task(task, text, answer, metadata)
    if kind == "scratchpad" and task:
        return _by_task(task, text.rpartition(">")[2], answer, metadata)
    raise DataError(f"unknown verifier '{verifier}'", "known: exact, math, reasoning_gym:<task>, scratchpad:<task>")


def _by_task(task: str, text: str, answer: str, metadata: str) -> float:
    try:
        facts = json.loads(metadata) if metadata else {}
    except json.JSONDecodeError:
        raise DataError(f"metadata of a row for verifier '{task}' is not JSON: {metadata[:80]!r}") from None
    try:
        value = float(_scorer(task)(text, {"question": "", "answer": answer, "metadata": facts}))
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError):
        return 0.0  # the scorers are written for well-formed answers; one that chokes on a text does not accept it
    return min(1.0, max(0.0, value)) if value == value else 0.0


@functools.cache
def _scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(task, size=1, seed=0).score_answer
    except ValueError:
        raise DataError(f"reasoning-gym has no task '{task}'", "see the row's verifier column") from None


def _final_expression(text: str) -> str:
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth, begin = 0, start + len("\\boxed{")
        for position in range(begin, len(text)):
            if text[position] == "{":
                depth += 1
            elif text[position] == "}":
                if depth == 0:
                    return text[begin:position]
                depth -= 1
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else ""


def _same_value(found: str, answer: str) -> bool:
    left, right = _number(found), _number(answer)
    if left is not None and right is not None:
        return left == right
    return bool(found.strip()) and _squeeze(found) == _squeeze(answer)


def _number(text: str) -> Fraction | None:
    text = _squeeze(text)
    fraction = re.fullmatch(r"(-?)\\d?frac\{(-?\d+)\}\{(-?\d+)\}", text)
    if fraction:
        text = f"{fraction[1]}{fraction[2]}/{fraction[3]}"
    text = text.replace(",", "").rstrip(".")
    if len(text) > 200 or not re.fullmatch(r"[+-]{0,2}\d*\.?\d*(?:/-?\d+)?%?", text):
        return None
    try:
        return Fraction(text.removesuffix("%").replace("--", ""))
    except (ValueError, ZeroDivisionError):
        return None


def _squeeze(text: str) -> str:
    return re.sub(r"\s+|\\left|\\right|\\!|\\,|\$", "", text)
