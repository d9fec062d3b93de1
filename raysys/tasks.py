"""reasoning-gym's tasks: made by number, judged by their own scorers. The only place that imports the library.

An entry is decided by (task, params, seed, index) alone, so a row need not carry what its scorer reads: it carries those four
and the entry is made again where it is judged.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from raysys.errors import ConfigError, DataError

SEEDS = 2**31
"""Seeds lie below this: some tasks hand theirs to NumPy, which takes 32 bits."""

EVALUATES_TEXT = frozenset(
    {
        "binary_matrix", "countdown", "intermediate_integration", "n_queens", "number_sorting", "polynomial_multiplication",
        "puzzle24", "simple_integration", "spiral_matrix", "string_insertion",
    }
)  # fmt: skip
"""Tasks whose own scorer runs text as code (`eval`, or sympy's parser, which does). Model text is data, so these are refused."""

UNREPEATABLE = frozenset({"isomorphic_strings", "knight_swap", "list_functions", "ransom_note", "word_ladder"})
"""Tasks whose entries depend on Python's hash seed, so that another process makes other ones. They can judge rows from files only."""

_SIZED = frozenset({"acre", "gsm_symbolic", "list_functions", "word_ladder"})
"""Tasks that prepare all their entries up front; theirs come in chunks, one seed each."""
_CHUNK = 1000


def names() -> list[str]:
    """Every task that can judge a text."""
    return sorted(set(_registry()) - EVALUATES_TEXT - {"composite"})


def check(task: str, params: Mapping[str, Any]) -> None:
    """Raises ConfigError: unknown task (with the nearest right one), one whose scorer runs text, or arguments that it does not take."""
    known = names()
    if task in EVALUATES_TEXT:
        raise ConfigError(f"task '{task}' cannot be used: its scorer runs the model's text as code", "choose another task")
    if task not in known:
        nearest = difflib.get_close_matches(task, known, n=1)
        raise ConfigError(
            f"unknown reasoning-gym task '{task}'" + (f", did you mean '{nearest[0]}'?" if nearest else ""), f"known: {', '.join(known)}"
        )
    if task in UNREPEATABLE:
        raise ConfigError(f"task '{task}' cannot be used: its entries differ from process to process", "choose another task")
    if reserved := {"seed", "size"} & set(params):
        raise ConfigError(
            f"params of task '{task}' set {sorted(reserved)}, which the source decides", "use data.source.seed and data.source.size"
        )
    try:
        _dataset(task, canonical(params), 0)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"params of task '{task}': {error}") from None


def canonical(params: Mapping[str, Any]) -> str:
    """One text for equal params."""
    return json.dumps(dict(params), sort_keys=True)


def entry(task: str, params: str, seed: int, index: int) -> dict[str, Any]:
    """The task's entry: `question`, `answer`, `metadata`.

    Args:
        params: as `canonical` writes them.
        seed: below `SEEDS`.
        index: from 0, no upper end.
    """
    if task not in _SIZED:
        return _dataset(task, params, seed)[index]
    chunk, within = divmod(index, _CHUNK)
    return _dataset(task, params, (seed + chunk * 7919) % SEEDS)[within]


def recipe(params: Mapping[str, Any], seed: int, index: int) -> str:
    """The metadata by which `judge` makes the entry again."""
    return json.dumps({"recipe": {"params": dict(params), "seed": seed, "index": index}}, sort_keys=True)


def judge(task: str, text: str, answer: str, metadata: Mapping[str, Any]) -> float:
    """The task's own scorer on a text, in [0, 1]; 1 means right, whatever is below is the scorer's partial credit.

    Args:
        text: what the model answered, and nothing around it.
        answer: used for rows from files, whose `metadata` is the entry's own; rows made here carry a recipe.

    Raises:
        DataError: no such task, one whose scorer runs text, or metadata that is not this task's.
    """
    if task not in names():
        raise DataError(f"no scorer for reasoning-gym task '{task}'", f"known: {', '.join(names())}")
    made = metadata.get("recipe")
    if made is None:
        params, seed = "{}", 0
        item = {"question": metadata.get("question", ""), "answer": answer, "metadata": dict(metadata)}
    else:
        params, seed = canonical(made["params"]), made["seed"]
        item = entry(task, params, seed, made["index"])
    scorer = _dataset(task, params, seed)
    try:
        value = float(scorer.score_answer(text, item))
    except Exception as error:  # these scorers parse whatever a model wrote; only the row's own data is worth an error
        _blame(scorer, item, task, error)
        return 0.0
    if not math.isfinite(value):
        return 0.0
    # Sums of letter credits round up to 1 for texts that merely start right.
    return 1.0 if value >= 1.0 else min(max(value, 0.0), 0.99)


def _blame(scorer: Any, item: dict[str, Any], task: str, error: Exception) -> None:
    try:
        scorer.score_answer(item["answer"], item)
    except Exception:
        raise DataError(f"metadata of the row does not fit task '{task}': {type(error).__name__}: {error}") from error


@lru_cache(maxsize=32)
def _dataset(task: str, params: str, seed: int) -> Any:
    make, config = _registry()[task]
    size = _CHUNK if task in _SIZED else SEEDS - 1
    settings = config(**json.loads(params), seed=seed, size=size)
    if hasattr(settings, "validate"):
        settings.validate()
    return make(settings)


@lru_cache(maxsize=1)
def _registry() -> dict[str, tuple[Any, Any]]:
    import reasoning_gym  # noqa: F401  (registers the tasks)
    from reasoning_gym.factory import DATASETS

    return dict(DATASETS)
