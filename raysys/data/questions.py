"""Question sets with several hops, in the forms they are published in, and the corpus that their contexts make.

| kind | container | fields |
|---|---|---|
| hotpotqa | JSON list | `_id`, `question`, `answer`, `context`: [[title, [sentences]]], `supporting_facts`: [[title, number]] |
| 2wiki | JSON list | the same |
| musique | JSONL | `id`, `question`, `answer`, `answer_aliases`, `paragraphs`: [{`title`, `paragraph_text`, `is_supporting`}] |
| flashrag | JSONL | `id`, `question`, `golden_answers`, `metadata`, whose `context` and `supporting_facts` are taken where they are there |

Either container is read for each kind, and neither is ever in memory as a whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, TextIO, cast

from raysys.errors import ConfigError, DataError
from raysys.files import writing

Kind = Literal["auto", "hotpotqa", "2wiki", "musique", "flashrag"]

INSTRUCTION = """\
Work out the answer to the question below, with a search engine at hand. Start with <think> ... </think>, and think in these tags \
again each time that you have read something new. To look something up, write <search> your query </search>; what was found is then \
shown to you between <information> and </information>. You may do this as many times as you want. Once you know enough, write the \
answer alone, as short as it can be, like this: <answer> Oslo </answer>.
"""
"""What a prompt says before its question; our wording of Search-R1's protocol (arXiv 2503.09516)."""
_CHUNK, _NEAR_END = 1 << 20, 16
"""A literal, number or escape that a chunk cuts in two is shorter than the latter."""


@dataclass(frozen=True)
class Question:
    """A question with the texts that it came with.

    Attributes:
        golds: accepted answers, at least one, the main one first.
        contexts: (title, body) of each passage, those that mislead included.
        supporting: titles of the passages that the answer follows from, each once.
    """

    id: str
    question: str
    golds: tuple[str, ...]
    contexts: tuple[tuple[str, str], ...] = ()
    supporting: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Passage:
    """A document of a corpus."""

    id: str
    title: str
    body: str


def read_questions(path: str | Path, kind: Kind = "auto") -> Iterator[Question]:
    """The questions of a file, one by one, in its order. Questions that MuSiQue marks as unanswerable are passed over.

    Args:
        path: a JSON list, or JSONL (blank lines are ignored).
        kind: the form of the records; `auto` decides by the first one.

    Raises:
        ConfigError: no such file, or an unknown kind.
        DataError: a record is malformed: `file:line` or `file[index]`, from 0, and what is wrong with it; a file without records.
    """
    path = Path(path)
    if kind != "auto" and kind not in _READERS:
        raise ConfigError(f"unknown kind of questions {kind!r}", f"one of auto, {', '.join(_READERS)}")
    if not path.is_file():
        raise ConfigError(f"question file {path} is no file", "check its path")
    return _questions(path, kind)


def corpus_of(questions: Iterable[Question]) -> Iterator[Passage]:
    """The contexts of all questions, each title and body once, in order of first appearance.

    Ids are hashes of title and body, so a passage has the same id whatever questions it is met with. Passages without a body are
    left out.
    """
    seen: set[str] = set()
    for question in questions:
        for title, body in question.contexts:
            name = blake2b(f"{title}\n{body}".encode(), digest_size=10).hexdigest()
            if body.strip() and name not in seen:
                seen.add(name)
                yield Passage(name, title, body)


def write_corpus(path: str | Path, documents: Iterable[Passage]) -> int:
    """Writes a corpus as the search service reads it, whole or not at all; returns the number of documents.

    Raises:
        DataError: there is no document; the file stays as it was.
        CheckpointError: the disk is full, or the folder is missing.
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.draft")
    count = 0
    try:
        with writing(path):
            with open(draft, "w", encoding="utf-8") as file:
                for one in documents:
                    count += 1
                    # Also without a title, so that the first line of a body is not taken for one.
                    line = {"id": one.id, "contents": f'"{one.title}"\n{one.body}'}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            if not count:
                raise DataError(f"no document for {path}", "the questions come without contexts; use a corpus of its own")
            os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return count


def prompt_rows(questions: Iterable[Question], instruction: str = INSTRUCTION, messages: bool = True) -> Iterator[dict[str, Any]]:
    """Rows for a run's `data.path`; `answer` is the JSON list of golds.

    Args:
        questions: to ask.
        instruction: what is said before the question; "" for the bare question.
        messages: prompts are chats of one message; else texts, for models without a chat template.
    """
    for one in questions:
        asked = chat(one.question, instruction)
        yield {
            "id": one.id,
            "prompt": asked if messages else asked[0]["content"],
            "domain": "",
            "answer": json.dumps(one.golds, ensure_ascii=False),
            "metadata": "",
        }


def chat(question: str, instruction: str = INSTRUCTION) -> list[dict[str, str]]:
    """The question as a chat of one message, with a question mark; see `prompt_rows`."""
    asked = question.strip()
    asked += "" if asked.endswith("?") else "?"
    return [{"role": "user", "content": f"{instruction}Question: {asked}\n" if instruction else asked}]


class _Malformed(ValueError):
    """Why a record is no question."""


def _questions(path: Path, kind: str) -> Iterator[Question]:
    read: Callable[[Mapping[str, Any]], Question | None] | None = _READERS.get(kind)
    where = ""
    for where, record in _records(path):
        try:
            if not isinstance(record, dict):
                raise _Malformed(f"not an object but {type(record).__name__}")
            read = read or _READERS[_kind_of(record)]
            found = read(record)
        except _Malformed as reason:
            raise DataError(f"{where}: {reason}", "correct or remove the record") from None
        if found is not None:
            yield found
    if not where:
        raise DataError(f"{path} holds no record", "check the file")


def _kind_of(record: Mapping[str, Any]) -> str:
    for kind, mark in (("flashrag", "golden_answers"), ("musique", "paragraphs"), ("hotpotqa", "context")):
        if mark in record:
            return kind
    raise _Malformed(f"of no known form: no `context`, `paragraphs` or `golden_answers`, only {', '.join(map(str, record))[:200]}")


def _hotpot(record: Mapping[str, Any]) -> Question:
    return Question(
        id=_id(record, "_id" if "_id" in record else "id"),
        question=_text(record, "question"),
        golds=(_text(record, "answer"),),
        contexts=_contexts(record.get("context")),
        supporting=_supporting(record.get("supporting_facts")),
    )


def _musique(record: Mapping[str, Any]) -> Question | None:
    if record.get("answerable") is False:
        return None
    paragraphs = record.get("paragraphs")
    if not isinstance(paragraphs, list) or not all(isinstance(one, dict) for one in paragraphs):
        raise _Malformed("no `paragraphs` (a list of objects)")
    titles = [_one_line(_text(one, "title", empty=True)) for one in paragraphs]
    supporting = [title for title, one in zip(titles, paragraphs, strict=True) if one.get("is_supporting") is True]
    return Question(
        id=_id(record, "id"),
        question=_text(record, "question"),
        golds=_golds([_text(record, "answer"), *_texts(record.get("answer_aliases", []), "answer_aliases")]),
        contexts=tuple(zip(titles, (_text(one, "paragraph_text", empty=True) for one in paragraphs), strict=True)),
        supporting=tuple(dict.fromkeys(supporting)),
    )


def _flashrag(record: Mapping[str, Any]) -> Question:
    golds = _golds(_texts(record.get("golden_answers"), "golden_answers"))
    if not golds:
        raise _Malformed("no `golden_answers` (a list with a text at least)")
    metadata = record.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    return Question(
        id=_id(record, "id"),
        question=_text(record, "question"),
        golds=golds,
        contexts=_contexts(metadata["context"]) if metadata.get("context") else (),
        supporting=_supporting(metadata["supporting_facts"]) if metadata.get("supporting_facts") else (),
    )


_READERS = {"hotpotqa": _hotpot, "2wiki": _hotpot, "musique": _musique, "flashrag": _flashrag}


def _contexts(value: Any) -> tuple[tuple[str, str], ...]:
    """Of [[title, [sentences]]], or of columns: {title: [..], sentences or content: [[..]]}."""
    pairs = value
    if isinstance(value, dict):
        pairs = _columns(value, "title", "sentences" if "sentences" in value else "content", "context")
    if not isinstance(pairs, list):
        raise _Malformed("no `context` (a list of [title, [sentences]])")
    found = []
    for place, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[0], str):
            raise _Malformed(f"`context` {place} is not [title, [sentences]]")
        sentences = _texts(pair[1], f"context {place}")
        found.append((_one_line(pair[0]), " ".join(filter(None, map(str.strip, sentences)))))
    return tuple(found)


def _supporting(value: Any) -> tuple[str, ...]:
    facts = _columns(value, "title", "sent_id", "supporting_facts") if isinstance(value, dict) else value
    if not isinstance(facts, list):
        raise _Malformed("no `supporting_facts` (a list of [title, number])")
    for place, fact in enumerate(facts):
        if not isinstance(fact, (list, tuple)) or not fact or not isinstance(fact[0], str):
            raise _Malformed(f"`supporting_facts` {place} is not [title, number]")
    return tuple(dict.fromkeys(_one_line(fact[0]) for fact in facts))


def _columns(value: Mapping[str, Any], first: str, second: str, name: str) -> list[tuple[Any, Any]]:
    left, right = value.get(first), value.get(second)
    if not isinstance(left, list) or not isinstance(right, list) or len(left) != len(right):
        raise _Malformed(f"`{name}` lacks `{first}` and `{second}` as lists of one length")
    return list(zip(left, right, strict=True))


def _golds(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for text in texts if text.strip()))


def _id(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(record, key)


def _text(record: Mapping[str, Any], key: str, empty: bool = False) -> str:
    value = record.get(key)
    if value is None or (value == "" and not empty):
        raise _Malformed(f"no `{key}`")
    (text,) = _texts([value], key)
    if not empty and not text.strip():
        raise _Malformed(f"`{key}` is blank")
    return text


def _texts(value: Any, key: str) -> list[str]:
    if not isinstance(value, list):
        raise _Malformed(
            f"no `{key}` (a list of texts)" if value is None else f"`{key}` is {type(value).__name__}, expected a list of texts"
        )
    for one in value:
        if not isinstance(one, str):
            raise _Malformed(f"`{key}` is or holds {type(one).__name__}, expected text")
        try:
            one.encode("utf-8")
        except UnicodeEncodeError:
            raise _Malformed(f"`{key}` is not valid Unicode (half a surrogate pair)") from None
    return cast(list[str], value)


def _one_line(title: str) -> str:
    """A corpus has a title on a line of its own."""
    return " ".join(title.split())


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each record stands, and the record. Raises DataError."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            start = file.read(1)
            while start.isspace():
                start = file.read(1)
            listed = start == "["
            if not listed:
                file.seek(0)
            yield from _array(file, str(path)) if listed else _lines(file, str(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error.reason} near byte {error.start} of a block", "write the file again as UTF-8") from None


def _lines(file: TextIO, path: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, 1):
        line = line.removeprefix("\ufeff")
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets nested without end
            raise DataError(f"{path}:{number}: invalid JSON: {_first_line(error)}", "correct or remove the line") from None
        yield f"{path}:{number}", record


def _array(file: TextIO, path: str) -> Iterator[tuple[str, Any]]:
    """Items of a list whose bracket has been read; a chunk and an item are in memory at a time."""
    text = _Text(file)
    index = 0
    mark = text.next()
    while mark != "]":
        if index:
            if mark != ",":
                raise DataError(
                    f"{path}[{index}]: invalid JSON: {'the list is cut off' if not mark else 'expected a comma'}", "correct the file"
                )
            text.at += 1
            text.next()
        try:
            record = text.item()
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}[{index}]: invalid JSON: {_first_line(error)}", "correct the file") from None
        yield f"{path}[{index}]", record
        index += 1
        mark = text.next()
    text.at += 1
    if text.next():
        raise DataError(f"{path}[{index}]: invalid JSON: text behind the end of the list", "correct the file")


class _Text:
    """What of a file is being decoded."""

    def __init__(self, file: TextIO):
        self._file, self._held, self._ended = file, "", False
        self._decoder = json.JSONDecoder()
        self.at = 0

    def next(self) -> str:
        """The next character that is not blank, which is where this then stands; "" at the end."""
        while True:
            while self.at < len(self._held):
                if self._held[self.at] not in " \t\r\n":
                    return self._held[self.at]
                self.at += 1
            if not self._more():
                return ""

    def item(self) -> Any:
        """The value that begins here. Raises ValueError, RecursionError."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._held, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._held) - _NEAR_END
                if not cut or not self._more():
                    raise
                continue
            if end == len(self._held) and self._more():
                continue  # a number may go on
            self.at = end
            return value

    def _more(self) -> bool:
        """Reads at least as much again as is held, so that the time stays linear for items of any size."""
        if self._ended:
            return False
        self._held = self._held[self.at :]
        self.at = 0
        piece = self._file.read(max(_CHUNK, len(self._held)))
        self._ended = not piece
        self._held += piece
        return bool(piece)


def _first_line(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return (str(error).strip() or type(error).__name__).splitlines()[0][:100]
