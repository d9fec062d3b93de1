"""What becomes of a shard's answers: which are kept, what is counted, and the row that training reads.

An answer is left out when it was cut off at the limit, when it says nothing, or, with `keep=correct`, when its verifier gives it less
than 1. All are judged and counted, so the share of right ones is the teacher's accuracy at these settings.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from raysys.data.rows import Prompt, Row
from raysys.errors import CheckpointError, ConfigError, DataError, InfrastructureError, NumericsError, RaysysError

SHOWN = 2
"""Answers of each domain that a shard's record quotes for the report."""


@dataclass(frozen=True)
class Answer:
    """One response of the teacher.

    Attributes:
        ids: as sampled, the end token included.
        text: of these, without special tokens.
        ended: false when it was cut off at the limit.
        score: the verifier's, in [0, 1]; None where nothing judges.
    """

    row: Row
    sample: int
    ids: list[int]
    text: str
    ended: bool
    score: float | None

    @property
    def right(self) -> bool:
        return self.score is not None and self.score >= 1


@dataclass
class Record:
    """A shard's account.

    Attributes:
        counts: by domain: prompts, samples, kept, cut_off, empty, wrong (left out by keep=correct), judged, correct, tokens (sampled).
        seen, bad: usable and unusable rows, and unusable ones.
        reasons, examples: of the unusable ones; see `raysys.data.rows.BadRows`.
        texts: some answers for people.
        rate: response tokens a second that the shard's engine sampled while it had the shard.
        waited: seconds until the engine was up, for all shards but an engine's first about 0.
        seconds: from then until it was published.
        size: bytes of the file; 0 without one, when nothing was kept.
    """

    shard: str
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    seen: int = 0
    bad: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    texts: list[dict[str, Any]] = field(default_factory=list)
    rate: float = 0.0
    waited: float = 0.0
    seconds: float = 0.0
    size: int = 0

    def total(self, name: str) -> int:
        """A count over all domains."""
        return sum(counts.get(name, 0) for counts in self.counts.values())


def sift(answers: Sequence[Answer], keep: str, record: Record, decode: Callable[[Row], str]) -> list[Answer]:
    """The answers to keep, in order; counts all of them in `record`.

    Args:
        keep: `all` or `correct`.
        decode: a row's prompt as text for people.
    """
    kept: list[Answer] = []
    counts: dict[str, Counter[str]] = {}
    for answer in answers:
        count = counts.setdefault(answer.row.domain, Counter())
        count.update(prompts=answer.sample == 0, samples=1, tokens=len(answer.ids))
        count.update(judged=answer.score is not None, correct=answer.right)
        fault = _fault(answer, keep)
        if fault:
            count[fault] += 1
        else:
            count["kept"] += 1
            kept.append(answer)
            if count["kept"] <= SHOWN:
                shown = {"domain": answer.row.domain, "prompt": decode(answer.row), "response": answer.text}
                record.texts.append(shown | {"answer": answer.row.answer, "score": answer.score})
    record.counts = {domain: {name: number for name, number in sorted(count.items()) if number} for domain, count in counts.items()}
    return kept


def _fault(answer: Answer, keep: str) -> str:
    if not answer.ended:
        return "cut_off"
    if not answer.text.strip():
        return "empty"
    return "wrong" if keep == "correct" and not answer.right else ""


def table(answers: Sequence[Answer], tokenizer: str) -> pa.Table:
    """The answers as rows that `data.path` reads: see `raysys.data.rows.parse`.

    Columns: id (`<prompt's id>/<sample>`), domain, prompt (text, or chat messages if any prompt of the shard is such), answer (the
    teacher's text), gold (the row's own answer, "" for none), verifier, metadata, score, response_ids, tokenizer (whose ids these are).

    Raises:
        DataError: chat messages that do not fit in one column.
    """
    rows = [answer.row for answer in answers]
    columns: dict[str, pa.Array] = {
        "id": pa.array([f"{answer.row.id}/{answer.sample}" for answer in answers], pa.string()),
        "domain": pa.array([row.domain for row in rows], pa.string()),
        "prompt": _prompts([row.prompt for row in rows]),
        "answer": pa.array([answer.text for answer in answers], pa.string()),
        "gold": pa.array([row.answer for row in rows], pa.string()),
        "verifier": pa.array([row.verifier for row in rows], pa.string()),
        "metadata": pa.array([row.metadata for row in rows], pa.string()),
        "score": pa.array([answer.score for answer in answers], pa.float32()),
        "response_ids": pa.array([answer.ids for answer in answers], pa.list_(pa.int32())),
        "tokenizer": pa.array([tokenizer] * len(answers), pa.string()),
    }
    return pa.table(columns)


def _prompts(prompts: Sequence[Prompt]) -> pa.Array:
    if all(isinstance(prompt, str) for prompt in prompts):
        return pa.array(prompts, pa.string())
    # Text is rendered as one user message, so it may as well be written as one.
    messages = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
    try:
        return pa.array(messages)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(
            f"the prompts' chat messages do not fit in a column: {error}", "give all messages the same keys and types"
        ) from None


def plain(prompt: Prompt) -> str:
    """A prompt as people read it: the text, or the last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))


def as_json(record: Record) -> Mapping[str, Any]:
    return dict(vars(record))


def told(result: Record | RaysysError) -> str:
    """A shard's account, or why there is none, as text that crosses to the driver: see `heard`."""
    if isinstance(result, Record):
        return json.dumps({"record": as_json(result)})
    return json.dumps({"error": type(result).__name__, "message": result.message, "remedy": result.remedy})


def heard(text: str) -> Record | RaysysError:
    """What `told` made; of a kind of error that needs more than its words, the kind that it is one of."""
    facts = json.loads(text)
    if "record" in facts:
        return Record(**facts["record"])
    plain_kinds = {kind.__name__: kind for kind in (CheckpointError, ConfigError, DataError, NumericsError)}
    kind = plain_kinds.get(facts["error"], InfrastructureError)
    return kind(facts["message"], facts["remedy"])
