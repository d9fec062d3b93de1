"""CalibAdv's texts: reward, format, actions. Paper: arXiv 2604.18235; the protocol is that of Search-R1, arXiv 2503.09516.

A response is rounds of thinking, a search and what it found, then thinking and an answer:

    (<think>..</think> <search>..</search> <information>..</information>)+ <think>..</think> <answer>..</answer>
    reward = F1(answer, golds) valid

Tags are lower case and exact. Every function here takes time linear in its text, whatever a collapsed policy wrote. No torch.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, cast

ROUND = ["<think>", "</think>", "<search>", "</search>", "<information>", "</information>"]
LAST = ["<think>", "</think>", "<answer>", "</answer>"]
TAG = re.compile("|".join(dict.fromkeys(ROUND + LAST)))
NOTICE = "My previous action is invalid."
"""What the environment's notice of an invalid action begins with; a text that holds it is never valid."""
PADDING = ("<|endoftext|>",)
END_MARKERS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>")

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalise(answer: str) -> str:
    """Lower case, ASCII punctuation deleted, whole words a, an, the out, single spaces; in this order."""
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_NO_PUNCTUATION)).split())


def answer_f1(prediction: str, golds: str | Sequence[str]) -> float:
    """The best F1 over `golds` of the multisets of normalised words, in [0, 1]; 0 where nothing is shared, also of empty with empty.

    Args:
        prediction: the answer alone, see `answer_of`.
        golds: accepted answers, at least one; a text is one answer.

    Raises:
        ValueError: there are no golds, or one of them is no text.
    """
    words = Counter(normalise(prediction).split())
    return max(_f1(words, Counter(normalise(gold).split())) for gold in _listed(golds))


def exact_match(prediction: str, golds: str | Sequence[str]) -> bool:
    """Whether the normalised prediction equals a normalised gold; empty equals empty. Raises as `answer_f1`."""
    return normalise(prediction) in {normalise(gold) for gold in _listed(golds)}


def covered_exact_match(prediction: str, golds: str | Sequence[str]) -> bool:
    """Whether a normalised gold is a substring of the normalised prediction; an empty gold always is. Raises as `answer_f1`."""
    found = normalise(prediction)
    return any(normalise(gold) in found for gold in _listed(golds))


def format_valid(text: str, padding: Iterable[str] = PADDING) -> bool:
    """Whether a response has the form above, with at least one search and nothing but whitespace between and after the tags.

    Whatever stands inside a pair may be empty, but holds no tag; so openings and closings match in number where this is true.

    Args:
        text: all of the response, what the environment put in included. Where the prompt ended in an injected `<think>`, the caller
            puts it in front.
        padding: texts of padding tokens, taken out first.

    Returns:
        False too where the notice of an invalid action or an end marker of a chat template is anywhere in the text.
    """
    for pad in padding:
        text = text.replace(pad, "")
    if any(mark in text for mark in (NOTICE, *END_MARKERS)):
        return False
    tags = TAG.findall(text)
    rounds = (len(tags) - len(LAST)) // len(ROUND)
    # Split at the tags, every other piece lies outside of a pair.
    return rounds >= 1 and tags == ROUND * rounds + LAST and not any(map(str.strip, TAG.split(text)[::2]))


def answer_of(text: str) -> str | None:
    """What the last closed `<answer>` pair holds, stripped; None without one. Pairs do not nest: an opening inside a pair is text."""
    found, end = None, 0
    while (pair := _pair(text, "answer", end)) is not None:
        found, end = pair
    return None if found is None else text[found:end].strip()


def reward(text: str, golds: str | Sequence[str], padding: Iterable[str] = PADDING) -> float:
    """F1 of the response's answer where the response is valid, else 0. Arguments and errors as `format_valid` and `answer_f1`."""
    accepted = _listed(golds)
    answer = answer_of(text)
    return answer_f1(answer, accepted) if answer is not None and format_valid(text, padding) else 0.0


class Action(NamedTuple):
    """What a generation asks of the environment."""

    kind: Literal["search", "answer"]
    text: str
    """The query or the answer, stripped; an empty query is a search."""


def cut(text: str) -> str:
    """A generation up to its first `</search>`; without one, up to its first `</answer>`; without either, all of it.

    A search after a closed answer is therefore kept, though `action` reads the answer.
    """
    for tag in ("</search>", "</answer>"):
        head, found, _ = text.partition(tag)
        if found:
            return head + found
    return text


def action(text: str) -> Action | None:
    """The first closed `<search>` or `<answer>` pair of a generation, by where it opens; None: the action is invalid."""
    found = [(pair, kind) for kind in ("search", "answer") if (pair := _pair(text, kind, 0)) is not None]
    if not found:
        return None
    (start, end), kind = min(found)
    return Action(cast(Literal["search", "answer"], kind), text[start:end].strip())


def escape_tags(document: str) -> str:
    """The document with its tags as `&lt;think&gt;`, so that none of the eight is in it. Applied twice it changes nothing more."""
    return TAG.sub(lambda tag: f"&lt;{tag[0][1:-1]}&gt;", document)


def _pair(text: str, name: str, start: int) -> tuple[int, int] | None:
    """Where the content of the first closed pair from `start` on begins and ends: the first opening, and the first closing after it."""
    opening = text.find(f"<{name}>", start)
    if opening < 0:
        return None
    begin = opening + len(name) + 2
    # If nothing closes the first opening, nothing closes a later one.
    end = text.find(f"</{name}>", begin)
    return None if end < 0 else (begin, end)


def _f1(prediction: Counter[str], gold: Counter[str]) -> float:
    shared = (prediction & gold).total()
    return 2 * shared / (prediction.total() + gold.total()) if shared else 0.0


def _listed(golds: str | Sequence[str]) -> list[str]:
    listed = [golds] if isinstance(golds, str) else list(golds)
    if not listed:
        raise ValueError("golds must hold at least one answer, got none")
    if wrong := [gold for gold in listed if not isinstance(gold, str)]:
        raise ValueError(f"golds must be texts, got {wrong[0]!r}")
    return listed
