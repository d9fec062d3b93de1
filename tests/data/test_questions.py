"""Readers of the published question sets, and what becomes of their contexts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raysys.data import questions
from raysys.data.questions import INSTRUCTION, Passage, Question, corpus_of, prompt_rows, read_questions, write_corpus
from raysys.data.rows import parse
from raysys.errors import CheckpointError, ConfigError, DataError
from raysys.retrieval.corpus import Corpus
from raysys.retrieval.documents import split_contents
from raysys.search_agent import accepted

HOTPOT = {
    "_id": "h1",
    "question": "Who built it",
    "answer": "Ann",
    "context": [["The Mill", ["It stands.", " It was built by Ann. "]], ["A\nHill", ["High."]]],
    "supporting_facts": [["The Mill", 1], ["The Mill", 0], ["A\nHill", 0]],
}
MUSIQUE = {
    "id": "2hop__1_2",
    "question": "Which river?",
    "answer": "Aare",
    "answer_aliases": ["Aar", "Aare", ""],
    "paragraphs": [
        {"idx": 0, "title": "Bern", "paragraph_text": "Bern lies on the Aare.", "is_supporting": True},
        {"idx": 1, "title": "Rome", "paragraph_text": "Rome does not.", "is_supporting": False},
    ],
    "answerable": True,
}
FLASHRAG = {"id": "test_0", "question": "How many?", "golden_answers": ["two", "2"], "metadata": {}}


def listed(path: Path, *records: Any, indent: int | None = None) -> Path:
    path.write_text(json.dumps(records, indent=indent), encoding="utf-8")
    return path


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_hotpotqa_and_2wiki(tmp_path: Path) -> None:
    file = listed(tmp_path / "dev.json", HOTPOT, {**HOTPOT, "_id": "h2", "type": "bridge", "evidences": [["a", "b", "c"]]})
    first, second = read_questions(file)
    assert first == Question(
        "h1", "Who built it", ("Ann",), (("The Mill", "It stands. It was built by Ann."), ("A Hill", "High.")), ("The Mill", "A Hill")
    )
    assert second.id == "h2" and list(read_questions(file, "2wiki")) == [first, second]


def test_musique_with_aliases_and_without_what_has_no_answer(tmp_path: Path) -> None:
    file = lines(tmp_path / "m.jsonl", MUSIQUE, {**MUSIQUE, "answerable": False})
    (one,) = read_questions(file)
    assert one.golds == ("Aare", "Aar") and one.supporting == ("Bern",) and one.contexts[1] == ("Rome", "Rome does not.")


def test_flashrag_with_and_without_contexts(tmp_path: Path) -> None:
    metadata = {"context": {"title": ["T"], "content": [["a.", "b."]]}, "supporting_facts": {"title": ["T"], "sent_id": [0]}}
    bare, full = read_questions(lines(tmp_path / "f.jsonl", FLASHRAG, {**FLASHRAG, "id": 7, "metadata": metadata}))
    assert bare == Question("test_0", "How many?", ("two", "2"))
    assert full == Question("7", "How many?", ("two", "2"), (("T", "a. b."),), ("T",))


def test_either_container_holds_either_kind(tmp_path: Path) -> None:
    assert [one.id for one in read_questions(lines(tmp_path / "h.jsonl", HOTPOT))] == ["h1"]
    assert [one.id for one in read_questions(listed(tmp_path / "m.json", MUSIQUE, indent=2))] == [MUSIQUE["id"]]
    marked = tmp_path / "bom.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf\n" + json.dumps(HOTPOT).encode() + b"\n\n")
    assert [one.id for one in read_questions(marked)] == ["h1"]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_a_list_is_the_same_wherever_chunks_cut_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    records = [
        {**HOTPOT, "_id": number, "level": [True, None, -1.5e-3], "question": 'é "q" \\ \u2028 ?' * number} for number in range(1, 9)
    ]
    file = listed(tmp_path / "list.json", *records, indent=1)
    monkeypatch.setattr(questions, "_CHUNK", chunk)
    assert [(one.id, one.question) for one in read_questions(file)] == [(str(one["_id"]), one["question"]) for one in records]


def test_a_list_is_not_held_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault at its end is met only after what stands before it was given out."""
    file = tmp_path / "list.json"
    file.write_text(json.dumps([HOTPOT] * 50)[:-20], encoding="utf-8")
    monkeypatch.setattr(questions, "_CHUNK", 256)
    found = read_questions(file)
    assert sum(1 for _ in zip(range(49), found, strict=False)) == 49
    with pytest.raises(DataError, match=r"list\.json\[49\]: invalid JSON"):
        next(found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": None}, "no `answer`"),
        ({"answer": "  "}, "`answer` is blank"),
        ({"answer": 3}, "`answer` is or holds int, expected text"),
        ({"question": ""}, "no `question`"),
        ({"question": "\ud800"}, "not valid Unicode"),
        ({"_id": None}, "no `_id`"),
        ({"context": "text"}, r"no `context` \(a list"),
        ({"context": [["T"]]}, "`context` 0 is not"),
        ({"context": [["T", [1]]]}, "`context 0` is or holds int"),
        ({"context": {"title": ["T"], "sentences": []}}, "lists of one length"),
        ({"supporting_facts": None}, "no `supporting_facts`"),
        ({"supporting_facts": [[]]}, "`supporting_facts` 0 is not"),
    ],
)
def test_what_is_missing_is_said_with_its_place(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    for file, place in (
        (listed(tmp_path / "h.json", HOTPOT, {**HOTPOT, **change}), r"h\.json\[1\]: "),
        (lines(tmp_path / "h.jsonl", HOTPOT, {**HOTPOT, **change}), r"h\.jsonl:2: "),
    ):
        with pytest.raises(DataError, match=place + f".*{said}") as raised:
            list(read_questions(file))
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no record"),
        ("[]", "holds no record"),
        ("{]\n", r":1: invalid JSON"),
        ("3\n", r":1: not an object but int"),
        ('{"a": 1}\n', "of no known form.*only a"),
        ('[{"a": }]', r"\[0\]: invalid JSON"),
        ("[1 2]", r"\[0\]: not an object"),
        (json.dumps([HOTPOT])[:-1], r"\[1\]: invalid JSON: the list is cut off"),
        (json.dumps([HOTPOT]) + "x", r"\[1\]: invalid JSON: text behind"),
        (json.dumps([HOTPOT])[:-1] + "{}]", r"\[1\]: invalid JSON: expected a comma"),
        ("[" * 100_000, r"\[0\]: invalid JSON"),
        (json.dumps({**MUSIQUE, "paragraphs": [3]}), "no `paragraphs`"),
        (json.dumps({**FLASHRAG, "golden_answers": []}), "no `golden_answers`"),
        (json.dumps({**FLASHRAG, "golden_answers": "two"}), "`golden_answers` is str"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "broken"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=said) as raised:
        list(read_questions(file))
    assert "\n" not in str(raised.value)


def test_bytes_that_are_not_text_and_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b'{"question": "\xe9"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        list(read_questions(tmp_path / "latin"))
    with pytest.raises(ConfigError, match="is no file"):
        read_questions(tmp_path / "absent")
    with pytest.raises(ConfigError, match="unknown kind"):
        read_questions(tmp_path / "latin", "squad")  # pyright: ignore[reportArgumentType]


def test_a_corpus_has_each_text_once_and_can_be_served(tmp_path: Path) -> None:
    odd = Question("q", "?", ("a",), (("", "No title.\nTwo lines."), ("Blank", " "), ('The "Mill"', "é"), ("The Mill", "Another text.")))
    asked = [*read_questions(listed(tmp_path / "h.json", HOTPOT, HOTPOT)), odd]
    passages = list(corpus_of(asked))
    assert [one.title for one in passages] == ["The Mill", "A Hill", "", 'The "Mill"', "The Mill"]
    assert len({one.id for one in passages}) == 5 and {one.id for one in corpus_of(asked[::-1])} == {one.id for one in passages}
    file = tmp_path / "corpus.jsonl"
    assert write_corpus(file, passages) == 5
    served = Corpus(file).read(range(5))
    assert served == [(one.id, f'"{one.title}"\n{one.body}') for one in passages]
    assert [split_contents(contents) for _, contents in served] == [(one.title, one.body) for one in passages]


def test_a_corpus_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "corpus.jsonl"
    write_corpus(file, [Passage("1", "T", "b")])
    before = file.read_bytes()

    def failing():
        yield Passage("2", "T", "b")
        raise DataError("a bad row")

    with pytest.raises(DataError, match="a bad row"):
        write_corpus(file, failing())
    with pytest.raises(DataError, match="no document"):
        write_corpus(file, [])
    assert file.read_bytes() == before and [one.name for one in tmp_path.iterdir()] == ["corpus.jsonl"]
    with pytest.raises(CheckpointError, match="could not be written"):
        write_corpus(tmp_path / "absent" / "corpus.jsonl", [Passage("1", "T", "b")])


def test_prompt_rows_are_rows_of_a_run() -> None:
    (row,) = prompt_rows([Question("q", "Who built it ", ("Ann", "Anna"))])
    assert row["prompt"] == [{"role": "user", "content": INSTRUCTION + "Question: Who built it?\n"}]
    read = parse(row, where="f:1", row_id="f:1", default_verifier="", context_field=None)
    assert (read.id, read.domain, read.metadata) == ("q", "", "") and accepted(read.answer, "q") == ["Ann", "Anna"]
    (bare,) = prompt_rows([Question("q", "Why?", ("a",))], instruction="")
    assert bare["prompt"][0]["content"] == "Why?"
