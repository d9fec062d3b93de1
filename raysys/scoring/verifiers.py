"""Verifiers: what a response is worth, in [0, 1]. Model text is data: it is parsed here, never evaluated.

| name | judges |
|---|---|
| (empty) | nothing: 0 |
| exact | the whole text equals the answer, outer whitespace aside |
| math | the last `\\boxed{...}`, or else the last number, equals the answer as a number (fractions and decimals), or else as text |
| scratchpad:<task> | the text after the last `>`, by the task's own scorer; 0 without a `>` |
| reasoning_gym:<task> | the whole text, by the task's own scorer |

1 means right. The tasks' own scorers give partial credit below 1 (letters in place, an answer inside a longer text): accuracy
counts ones, a reward takes the value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

from raysys import tasks
from raysys.errors import DataError

LONGEST = 1000
"""Characters of a mathematical answer; a longer one is wrong."""

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_NUMBER = rf"[-+]?(?:{_DIGITS}(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{{1,3}})?"
_NUMBERS = re.compile(rf"(?<![\w.]){_NUMBER}(?:\s*/\s*{_NUMBER})?", re.ASCII)
_WHOLE = re.compile(rf"({_NUMBER})(?:\s*/\s*({_NUMBER}))?", re.ASCII)
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
_BRACES = re.compile(r"\\boxed\s*\{|[{}]")
_WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")


def score(verifier: str, text: str, answer: str, metadata: str) -> float:
    """What `text` is worth.

    Args:
        verifier: a name of the table above.
        text: the decoded response without special tokens. Any text at all; none raises.
        answer: what is right.
        metadata: JSON of the row, "" for none; only the tasks' own scorers read it.

    Returns:
        A number in [0, 1].

    Raises:
        DataError: unknown verifier or task, or metadata that does not fit it.
    """
    if not verifier:
        return 0.0
    name, _, task = verifier.partition(":")
    if name in _PLAIN and verifier == name:
        return _PLAIN[name](text, answer)
    if name in _TASKS and task:
        part = _TASKS[name](text)
        return 0.0 if part is None else tasks.judge(task, part, answer, _metadata(metadata))
    raise DataError(f"unknown verifier '{verifier}'", f"known: {', '.join(known())}")


def check(verifier: str) -> None:
    """Raises DataError where `score` would, as far as the name alone tells."""
    name, _, task = verifier.partition(":")
    if not verifier:
        return
    if name in _TASKS and task:
        if task not in tasks.names():
            raise DataError(f"verifier '{verifier}': no scorer for task '{task}'", f"known tasks: {', '.join(tasks.names())}")
    elif verifier not in _PLAIN:
        raise DataError(f"unknown verifier '{verifier}'", f"known: {', '.join(known())}")


def known() -> list[str]:
    """The names that `score` takes."""
    return [*_PLAIN, *(f"{name}:<task>" for name in _TASKS)]


def exact(text: str, answer: str) -> float:
    """1 if both are the same text, outer whitespace aside."""
    return float(text.strip() == answer.strip())


def math(text: str, answer: str) -> float:
    """1 if the final answer of `text` equals `answer`: exactly as rational numbers, or else as text without spaces and markup.

    The final answer is the last complete `\\boxed{...}`, or else the last number (`1,234`, `-0.5`, `3/4`, `2e-3`). Per cent and
    dollar signs are dropped, not converted. Expressions are not simplified: `2\\sqrt{2}` equals only itself.
    """
    found, wanted = boxed(text), boxed(answer) or answer
    if found is None:
        numbers = _NUMBERS.findall(_plain(text))
        found = numbers[-1] if numbers else text
    if len(found) > LONGEST or len(wanted) > LONGEST:
        return 0.0
    left, right = _number(found), _number(wanted)
    if left is not None and right is not None:
        return float(left == right)
    return float(_tidy(found) == _tidy(wanted) != "")


def boxed(text: str) -> str | None:
    """What the last complete `\\boxed{...}` holds, braces balanced; None without one."""
    opened: list[int] = []
    best: tuple[int, int] | None = None
    for brace in _BRACES.finditer(text):
        if brace[0] != "}":
            opened.append(brace.end() if brace[0] != "{" else -1)
        elif opened and (start := opened.pop()) >= 0 and (best is None or start > best[0]):
            best = (start, brace.start())
    return None if best is None else text[best[0] : best[1]]


def after_scratchpad(text: str) -> str | None:
    """The text after the last `>`; None without one."""
    _, mark, rest = text.rpartition(">")
    return rest if mark else None


def _plain(text: str) -> str:
    """LaTeX fractions as `a/b`, wrappers and signs that do not change a number removed."""
    text = _FRACTION.sub(lambda match: f" {match[1] or match[2]}/{match[3] or match[4]} ", text)
    text = _WRAPPED.sub(r"\1", text)
    for drop in ("\\left", "\\right", "\\,", "\\!", "\\;", "\\$", "$", "\\%", "%", "\\ "):
        text = text.replace(drop, "")
    return text.replace("\u2212", "-").replace("{,}", ",")


def _tidy(text: str) -> str:
    return re.sub(r"\s+", "", _plain(text)).rstrip(".").removeprefix("+")


def _number(text: str) -> Fraction | None:
    match = _WHOLE.fullmatch(_plain(text).strip().rstrip("."))
    if match is None:
        return None
    above, below = (Fraction(Decimal(part.replace(",", ""))) if part else Fraction(1) for part in match.groups())
    return above / below if below else None


def _metadata(text: str) -> dict[str, object]:
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise DataError(f"metadata is not a JSON object: {text[:80]!r}")
    return value


_PLAIN: dict[str, Callable[[str, str], float]] = {"exact": exact, "math": math}
_TASKS: dict[str, Callable[[str], str | None]] = {"scratchpad": after_scratchpad, "reasoning_gym": lambda text: text}
