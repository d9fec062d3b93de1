"""CalibAdv's correctness of search steps: did a step find documents that the group's best rollouts were shown? Paper: arXiv 2604.18235.

Legend: D_s the documents shown at step s of a rollout, D_q the silver documents of its question.

    code    D_q: shown to those at the group's highest reward, of the valid rollouts with reward >= threshold
            c_s = |{d in D_s: d in D_q, not shown before in this rollout}| / |D_s|
            c_s = 0 where the step's thinking is like an earlier one's, or it shares more than `shared` documents with an earlier step
    paper   D_q: shown to any valid rollout with reward >= threshold;   c_s = |D_s and D_q| / |D_s|

"code" is what the authors' published settings run and the default here, "paper" the bare ratio that the paper states. Both measure
overlap with what succeeded, not use: a lucky answer makes silver of whatever was shown with it. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from rapidfuzz.distance import Levenshtein

Form = Literal["code", "paper"]


class _Step(NamedTuple):
    think: str
    documents: tuple[Hashable, ...]


class _Rollout(NamedTuple):
    valid: bool
    reward: float
    steps: list[_Step]


def step_scores(
    rollouts: Sequence[Mapping[str, Any]],
    *,
    threshold: float = 0.7,
    similarity: float = 0.5,
    shared: int = 1,
    form: Form = "code",
) -> list[list[float] | None]:
    """The correctness c of each search step of one question's rollouts, in [0, 1].

    Args:
        rollouts: the group; each with `valid` (bool), `reward`, and `steps`: in order, mappings with `think` (text) and `doc_ids` (what
            was shown, in any order; equal ids are the same document).
        threshold: least reward of a rollout whose documents are silver.
        similarity: above this share of unchanged words, 1 - distance / length of the longer, two thinkings are alike; "code" only.
        shared: most documents that a step may share with one earlier step; "code" only.
        form: see above.

    Returns:
        For each rollout a number a step, 0 for a step that was shown nothing; None for an invalid rollout, and for all where the group has
        no valid rollout at the threshold.

    Raises:
        ValueError: an option is out of range, a rollout lacks a key, or a reward is not finite.
    """
    _check_options(threshold, similarity, shared, form)
    group = [_read(rollout, index) for index, rollout in enumerate(rollouts)]
    best = _contributors(group, threshold, form)
    if not best:
        return [None] * len(group)
    silver = _shown(best)
    scores = _calibrated if form == "code" else _bare
    return [list(scores(rollout.steps, silver, similarity, shared)) if rollout.valid else None for rollout in group]


def silver_documents(rollouts: Sequence[Mapping[str, Any]], *, threshold: float = 0.7, form: Form = "code") -> set[Hashable]:
    """The silver documents of one question, none where no rollout counts; arguments and errors as `step_scores`."""
    _check_options(threshold, 0.0, 0, form)
    return _shown(_contributors([_read(rollout, index) for index, rollout in enumerate(rollouts)], threshold, form))


def _calibrated(steps: list[_Step], silver: set[Hashable], similarity: float, shared: int) -> Iterator[float]:
    seen: set[Hashable] = set()
    words: dict[int, list[str]] = {}

    def thinking(index: int) -> list[str]:
        if index not in words:
            words[index] = steps[index].think.split()
        return words[index]

    for index, step in enumerate(steps):
        shown = set(step.documents)
        hits = len((shown & silver) - seen)
        seen |= shown
        if hits and any(len(shown.intersection(earlier.documents)) > shared for earlier in steps[:index]):
            hits = 0
        # Last, since it costs the most.
        if hits and any(_alike(thinking(index), thinking(earlier), similarity) for earlier in range(index)):
            hits = 0
        yield hits / len(step.documents) if step.documents else 0.0


def _bare(steps: list[_Step], silver: set[Hashable], similarity: float, shared: int) -> Iterator[float]:
    for step in steps:
        shown = set(step.documents)
        yield len(shown & silver) / len(shown) if shown else 0.0


def _alike(a: list[str], b: list[str], similarity: float) -> bool:
    """Whether 1 - distance / longest > similarity, the distance being Levenshtein's over words; texts without words are like nothing."""
    longest = max(len(a), len(b))
    if not longest:
        return False
    most = longest - math.floor(similarity * longest)  # beyond it the answer is no, so the exact distance is not sought
    return 1 - Levenshtein.distance(a, b, score_cutoff=most) / longest > similarity


def _contributors(group: list[_Rollout], threshold: float, form: Form) -> list[_Rollout]:
    good = [rollout for rollout in group if rollout.valid and rollout.reward >= threshold]
    if form == "paper" or not good:
        return good
    top = max(rollout.reward for rollout in good)
    return [rollout for rollout in good if rollout.reward == top]


def _shown(rollouts: list[_Rollout]) -> set[Hashable]:
    return {document for rollout in rollouts for step in rollout.steps for document in step.documents}


def _read(rollout: Mapping[str, Any], index: int) -> _Rollout:
    where = f"rollouts[{index}]"
    valid, reward, steps = (_entry(rollout, key, where) for key in ("valid", "reward", "steps"))
    if not math.isfinite(reward):
        raise ValueError(f"{where}: reward must be finite, got {reward}")
    read = []
    for number, step in enumerate(steps):
        think, documents = (_entry(step, key, f"{where}.steps[{number}]") for key in ("think", "doc_ids"))
        if isinstance(documents, str):
            raise ValueError(f"{where}.steps[{number}]: doc_ids must be a list of ids, got the text {documents!r}")
        read.append(_Step(think, tuple(documents)))
    return _Rollout(bool(valid), float(reward), read)


def _entry(record: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in record:
        raise ValueError(f"{where} has no {key}; it has {', '.join(map(str, record)) or 'nothing'}")
    return record[key]


def _check_options(threshold: float, similarity: float, shared: int, form: Form) -> None:
    if not math.isfinite(threshold):
        raise ValueError(f"threshold must be finite, got {threshold}")
    if not 0 <= similarity <= 1:
        raise ValueError(f"similarity must lie in [0, 1], got {similarity}")
    if isinstance(shared, bool) or not isinstance(shared, int) or shared < 0:
        raise ValueError(f"shared must be an integer of at least 0, got {shared}")
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {form!r}")
