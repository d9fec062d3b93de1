"""One row on its way in: what a record must hold, and the account of those that do not."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raysys.errors import DataError

SHOWN = 20
"""Bad rows that a report names; all are counted."""
ENOUGH = 1000
"""Rows that must have been seen before their bad share ends a run in the middle of an epoch."""

Prompt = str | list[dict[str, Any]]
"""Text, or chat messages as the tokenizer's template takes them."""


@dataclass(frozen=True)
class Part:
    """A piece of an episode, generated in one go, or put there by the environment."""

    text: str
    generated: bool


@dataclass(frozen=True)
class Row:
    """A usable record. `where` is how a person finds it: file and line, or domain and index."""

    id: str
    where: str
    prompt: Prompt
    domain: str = ""
    answer: str = ""
    target: str = ""
    """What a supervised run teaches: the answer, or the answer with its scratchpad."""
    verifier: str = ""
    metadata: str = ""
    context: str | None = None
    """What the teacher reads in addition (context distillation)."""
    response_ids: list[int] | None = None
    """The target as the token ids that a model sampled, its end token included."""
    tokenizer: str = ""
    """Whose ids these are, as `raysys.data.text.identity` says it."""
    parts: tuple[Part, ...] = ()
    """The target piece by piece, where it is an episode: only what was generated is learnt, and it has no end token."""


class BadRow(Exception):
    """Why a record is not usable; counted and reported, not raised across actors."""


@dataclass
class BadRows:
    """How many rows were seen, how many were unusable and why. Rows are counted in their first epoch only."""

    max_share: float
    seen: int = 0
    bad: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    key: str = "data.max_bad_share"

    def good(self, rows: int = 1) -> None:
        self.seen += rows

    def add(self, where: str, reason: str) -> None:
        self.seen += 1
        self.bad += 1
        self.reasons[reason.partition(":")[0]] += 1
        if len(self.examples) < SHOWN:
            self.examples.append(f"{where}: {reason}")

    def check(self, complete: bool = False) -> None:
        """Raises DataError when too many rows are bad. `complete`: all rows have been seen, however few."""
        if self.bad > self.max_share * self.seen and (complete or self.seen >= ENOUGH):
            raise DataError(
                f"{self.bad} of {self.seen} rows are unusable, more than {self.key}={self.max_share:g}: " + "; ".join(self.examples[:5]),
                f"correct the rows, or raise {self.key}",
            )

    def lines(self) -> list[str]:
        """For people: one line of counts and one for each row that is named; nothing when all rows are good."""
        if not self.bad:
            return []
        reasons = ", ".join(f"{count} x {reason}" for reason, count in self.reasons.most_common())
        more = [f"  and {self.bad - len(self.examples)} more"] if self.bad > len(self.examples) else []
        return [f"{self.bad} of {self.seen} data rows were unusable: {reasons}", *(f"  {line}" for line in self.examples), *more]

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen, "bad": self.bad, "reasons": dict(self.reasons), "examples": list(self.examples)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.seen, self.bad = state["seen"], state["bad"]
        self.reasons, self.examples = Counter(state["reasons"]), list(state["examples"])

    def absorb(self, state: Mapping[str, Any]) -> None:
        """Counts what others have counted."""
        self.seen, self.bad = self.seen + state["seen"], self.bad + state["bad"]
        self.reasons.update(state["reasons"])
        self.examples += state["examples"][: SHOWN - len(self.examples)]


def parse(record: Any, *, where: str, row_id: str, default_verifier: str, context_field: str | None) -> Row:
    """A record of a file as a row.

    Args:
        record: what the file holds: `prompt`, and optionally `id`, `domain`, `answer`, `verifier`, `metadata`. What supervised runs teach
            is `answer`, or `response` where there is one; a conversation in `messages` whose last one is the assistant's is a prompt and
            its response in one. Of an episode `turns`, a list of {`generated`, `observation`}, of which only the former is taught, and
            `opening`, what the environment says first. Where a model wrote the answers, as `jobs/generate.py` has it: `answer` is its
            text, `response_ids` and `tokenizer` the tokens of that. `gold`, even if empty, or `answer` beside a `response`, is what
            verifiers compare with.
        row_id: used when the record has no id.
        context_field: the column that the teacher reads in addition; a record without it is bad.

    Raises:
        BadRow: what is missing or of the wrong type.
    """
    if not isinstance(record, Mapping):
        raise BadRow(f"not an object: found {_kind(record)}")
    record = _split(record)
    parts = _parts(record)
    if parts:
        record = {**record, "answer": "".join(part.text for part in parts), "gold": record.get("gold", record.get("answer") or "")}
    target = _text(record, "answer", scalars=True)
    answer = target if record.get("gold") is None else _text(record, "gold", scalars=True)
    own = _text(record, "id", scalars=True)
    context = None if context_field is None else _text(record, context_field)
    if context_field is not None and not context:
        raise BadRow(f"no `{context_field}`, which data.context_field asks for")
    return Row(
        id=own or row_id,
        where=where,
        prompt=_prompt(record.get("prompt")),
        domain=_text(record, "domain"),
        answer=answer,
        target=target,
        verifier=_text(record, "verifier") or (default_verifier if answer else ""),
        metadata=_metadata(record.get("metadata")),
        context=context,
        response_ids=_ids(record.get("response_ids")),
        tokenizer=_text(record, "tokenizer"),
        parts=parts,
    )


def _parts(record: Mapping[str, Any]) -> tuple[Part, ...]:
    """The pieces of `opening` and `turns` that are not empty."""
    turns = record.get("turns")
    if turns is None:
        return ()
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise BadRow(f"`turns` has the wrong type: {_kind(turns)}, expected a list of objects with `generated` and `observation`")
    parts = [Part(_text(record, "opening"), generated=False)]
    for turn in turns:
        made = _text(turn, "generated")
        if not made:
            raise BadRow("no `generated` in one of the `turns`")
        parts += [Part(made, generated=True), Part(_text(turn, "observation"), generated=False)]
    return tuple(part for part in parts if part.text)


def _split(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record with `prompt` and `answer` in place of `messages` and `response`."""
    messages = record.get("messages")
    if messages is not None and record.get("prompt") is None:
        if not isinstance(messages, list) or not messages:
            raise BadRow(f"`messages` has the wrong type: {_kind(messages)}, expected a list of chat messages")
        last = messages[-1]
        if not isinstance(last, Mapping) or last.get("role") != "assistant":
            return {**record, "prompt": messages}
        record = {**record, "prompt": messages[:-1], "response": last.get("content")}
    if record.get("response") is None:
        return record
    return {**record, "answer": record["response"], "gold": record.get("gold", record.get("answer") or "")}


def _prompt(value: Any) -> Prompt:
    if value is None or value == "" or value == []:
        raise BadRow("no `prompt`")
    if isinstance(value, str):
        return _encodable("prompt", value)
    if not isinstance(value, list):
        raise BadRow(f"`prompt` has the wrong type: {_kind(value)}, expected text or a list of chat messages")
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise BadRow(f"`prompt` has the wrong type: message {number} needs `role` and `content` as text")
        _encodable("prompt", message["content"])
        messages.append({key: part for key, part in message.items() if part is not None})
    return messages


def _text(record: Mapping[str, Any], key: str, scalars: bool = False) -> str:
    value = record.get(key)
    if value is None:
        return ""
    if isinstance(value, str):
        return _encodable(key, value)
    if scalars and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise BadRow(f"`{key}` has the wrong type: {_kind(value)}, expected text")


def _ids(value: Any) -> list[int] | None:
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(type(one) is int and one >= 0 for one in value):
        raise BadRow(f"`response_ids` has the wrong type: {_kind(value)}, expected a list of token ids")
    return value


def _metadata(value: Any) -> str:
    if value is None or value == "":
        return ""
    if isinstance(value, str):
        try:
            loaded = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow("`metadata` is not JSON") from None
        if not isinstance(loaded, dict):
            raise BadRow(f"`metadata` has the wrong type: {_kind(loaded)}, expected an object")
        return _encodable("metadata", value)
    if not isinstance(value, Mapping):
        raise BadRow(f"`metadata` has the wrong type: {_kind(value)}, expected an object")
    return json.dumps(value, default=str)


def _encodable(key: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"`{key}` is not valid Unicode (half a surrogate pair)") from None
    return text


def _kind(value: Any) -> str:
    return {"dict": "object", "list": "list", "str": "text", "NoneType": "null"}.get(type(value).__name__, type(value).__name__)
