"""Accuracy on held-out tasks: greedy or avg@k, per domain, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from raysys.batch import Batch

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
RIGHT = 1 - 1e-9
_DRAWS = 1000


@dataclass(frozen=True)
class DomainAccuracy:
    """`mean` of right answers over `n` prompts with `samples` responses each, bounded by `low` and `high` at 95 %.

    `score` is the mean score, which counts partly right answers too.
    """

    n: int
    samples: int
    mean: float
    low: float
    high: float
    score: float


@dataclass(frozen=True)
class Example:
    """One response as a person reads it."""

    domain: str
    prompt: str
    response: str
    answer: str
    score: float


@dataclass(frozen=True)
class EvaluationResult:
    """What one evaluation found. `response_tokens` is a mean; `truncated` the share of responses cut at the limit."""

    domains: dict[str, DomainAccuracy]
    response_tokens: float
    truncated: float
    examples: list[Example]
    measures: dict[str, float] = field(default_factory=dict)
    """What a job measures besides, by name."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_evaluation(
    generate: Callable[[Batch], Batch],
    prompts: Batch,
    decode: Callable[[Sequence[Any]], list[str]],
    score: Callable[[str, str, str, str], float],
    samples: int = 1,
    examples: int = 5,
    measure: Callable[[Batch], dict[str, float]] | None = None,
) -> EvaluationResult:
    """Generates, judges and sums up.

    Args:
        generate: prompts to samples, same row order.
        prompts: each prompt `samples` times, side by side.
        decode: ids to texts.
        score: `(verifier, text, answer, metadata)` to [0, 1]; a response is right when it scores 1.
        examples: responses to keep, taken in turn from each domain.
        measure: of the samples, numbers for `measures`.
    """
    answered = generate(prompts)
    texts = decode(answered.ragged("response_ids").rows())
    answers = answered.strings("answer")
    judged = zip(answered.strings("verifier"), texts, answers, answered.strings("metadata"), strict=True)
    scores = np.array([score(*one) for one in judged])
    domains = answered.strings("domain")
    kept = _in_turn(domains, examples)
    questions = decode([answered.ragged("prompt_ids")[row] for row in kept])
    return EvaluationResult(
        domains=summarize(scores, domains, samples),
        response_tokens=float(np.mean(answered.lengths("response_ids"))),
        truncated=float(np.mean([reason == "length" for reason in answered.strings("stop_reason")])),
        examples=[
            Example(domains[row], text, texts[row], answers[row], float(scores[row])) for row, text in zip(kept, questions, strict=True)
        ],
        measures={} if measure is None else measure(answered),
    )


def summarize(scores: Sequence[float] | np.ndarray, domains: Sequence[str], samples: int = 1) -> dict[str, DomainAccuracy]:
    """Accuracy by domain.

    Args:
        scores: [rows] in [0, 1], a prompt's samples side by side.
        domains: tag of each row; rows without one count as "all".
        samples: responses a prompt. One: Wilson's interval. More: avg@k with a bootstrap over prompts, since samples of one
            prompt are not independent.

    Raises:
        ValueError: the rows are no whole number of prompts.
    """
    values = np.asarray(scores, dtype=np.float64)
    if len(values) % samples or len(values) != len(domains):
        raise ValueError(f"scores has {len(values)} rows, domains {len(domains)}, samples is {samples}: not whole prompts")
    tags = np.array([domain or "all" for domain in domains])
    found = {}
    for name in sorted(set(tags.tolist())):
        by_prompt = values[tags == name].reshape(-1, samples)
        right = (by_prompt >= RIGHT).mean(axis=1)
        mean = float(right.mean())
        low, high = wilson(mean, len(right)) if samples == 1 else bootstrap(right)
        found[name] = DomainAccuracy(len(right), samples, mean, low, high, float(by_prompt.mean()))
    return found


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share observed in `n` trials."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    middle = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the mean, resampling `values` [n] with a fixed seed."""
    draws = np.random.default_rng(0).integers(len(values), size=(_DRAWS, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def _in_turn(domains: Sequence[str], count: int) -> list[int]:
    """Rows of `count` examples, one of each domain in turn."""
    rows = {name: [i for i, domain in enumerate(domains) if domain == name] for name in sorted(set(domains))}
    order = [row for group in _zip_longest(list(rows.values())) for row in group]
    return order[:count]


def _zip_longest(groups: list[list[int]]) -> list[list[int]]:
    return [[group[i] for group in groups if i < len(group)] for i in range(max(map(len, groups), default=0))]
