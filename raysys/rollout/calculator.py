"""A tool for models that calculate: `<calc> 3 * (4 + 5) </calc>` is answered by `<result> 27 </result>`, `<answer> ... </answer>` ends.

What the model writes is parsed, never run: of Python's grammar only numbers and the operators below are known, in bounds.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from raysys.rollout.environment import Reply

_OPEN, _CLOSE, _END = "<calc>", "</calc>", "</answer>"
_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
LONGEST = 200
"""Characters of an expression."""
DIGITS = 60
"""Of numerator and denominator of anything calculated."""


def calculate(text: str) -> Fraction:
    """The value of an expression of decimal numbers, + - * / and parentheses.

    Raises:
        ValueError: it is something else, too long, grows too large, or divides by zero; says which.
    """
    if len(text) > LONGEST:
        raise ValueError(f"an expression of {len(text)} characters, at most {LONGEST} are read")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError("not an expression") from None
    return _value(tree.body)


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(Fraction(str(node.value)) if str(node.value) not in ("inf", "nan") else None)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Div) and right == 0:
            raise ValueError("division by zero")
        return _bounded(_BINARY[type(node.op)](left, right))
    raise ValueError("only numbers, + - * / and parentheses are known")


def _bounded(value: Fraction | None) -> Fraction:
    if value is None or max(abs(value.numerator), value.denominator) >= 10**DIGITS:
        raise ValueError(f"a number of more than {DIGITS} digits")
    return value


@dataclass(frozen=True)
class Calculators:
    """Environments that answer calculations."""

    stops: Sequence[str] = (_CLOSE, _END)

    async def open(self) -> None: ...
    async def close(self) -> None: ...

    def new(self) -> Calculator:
        return Calculator()


class Calculator:
    """One episode: any number of calculations, then an answer. Anything else ends it."""

    async def reset(self, prompt_id: str, metadata: str) -> str:
        return ""

    async def step(self, text: str, last: bool) -> Reply:
        _, opened, rest = text.partition(_OPEN)
        asked, closed, _ = rest.partition(_CLOSE)
        if not (opened and closed):
            return Reply(done=True, record={"action": "answer" if _END in text else "none"})
        try:
            told = str(calculate(asked))
        except ValueError as error:
            told = f"error: {error}"
        return Reply(f"<result> {told} </result>", record={"action": "calculate", "asked": asked.strip(), "told": told})
