"""What a corpus file may hold, what is said of one that holds something else, and that its texts stay on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raysys.errors import ConfigError, DataError
from raysys.retrieval.corpus import Corpus
from raysys.retrieval.documents import from_contents, join_contents, split_contents, text_id
from tests.retrieval.conftest import ROWS, Writer


def test_documents_come_back_letter_by_letter_whatever_their_form(write: Writer) -> None:
    corpus = Corpus(write([*ROWS[:2], "", "  ", *ROWS[2:]]))
    assert len(corpus) == 5
    assert corpus.read([0]) == [("9", '"Paris"\nParis is the capital of France, on the Seine.')]
    assert corpus.read([3, 4]) == [
        ("4", '"São Tomé"\nSão Tomé is the capital of São Tomé and Príncipe.'),
        ("5", "a line without a title about volcanoes"),
    ]
    assert list(corpus.texts()) == [contents for _, contents in corpus.read(range(5))]


def test_rank_is_the_order_of_ids_as_text(write: Writer) -> None:
    assert Corpus(write(ROWS)).rank.tolist() == [4, 0, 1, 2, 3]  # of 9, 2, 30, 4, 5


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(write: Writer) -> None:
    path = write([b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode() + b"\r", json.dumps(ROWS[1]) + "\r"])
    assert [doc_id for doc_id, _ in Corpus(path).read([0, 1])] == ["9", "2"]


def test_an_id_that_occurs_twice_is_refused_with_both_lines(write: Writer) -> None:
    path = write([ROWS[0], "", ROWS[1], {"id": "9", "contents": "again"}, {"id": "2", "contents": "again"}])
    with pytest.raises(DataError, match=r"corpus\.jsonl: id '2' occurs on lines 3 and 5, and 1 more"):
        Corpus(path)
    assert not list(path.parent.glob("*.index/*")), "nothing half-made is left"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "invalid JSON: .* at column"),
        (b'{"id": "1", "contents": "\xff"}', "not UTF-8 at byte 25"),
        ("[1]", "not an object but list"),
        ('{"contents": "x"}', "no `id`"),
        ('{"id": true, "contents": "x"}', "no `id`"),
        ('{"id": "1", "contents": 3}', "`contents` is int, expected text"),
        ('{"id": "1", "title": "x", "text": ["y"]}', "`text` is list, expected text"),
        ('{"id": "1"}', "no text: expected `contents`, or `title` and `text`"),
        ('{"id": "1", "contents": " \\n"}', "no text"),
        ('{"id": "1", "contents": "\\ud800"}', "not valid Unicode"),
        ('{"id": "1", "contents": ' + "9" * 5000 + "}", "invalid JSON"),
        ("[" * 100_000, "invalid JSON"),
    ],
)
def test_a_malformed_row_is_named_with_file_and_line(write: Writer, line: str | bytes, reason: str) -> None:
    with pytest.raises(DataError, match=rf"1 rows of the corpus are malformed: .*corpus\.jsonl:2: {reason}"):
        Corpus(write([ROWS[0], line, ROWS[1]]))


def test_many_malformed_rows_are_one_error(write: Writer) -> None:
    with pytest.raises(DataError, match=r"7 rows .*jsonl:1: .*jsonl:5: [^:]* and 2 more"):
        Corpus(write(["[]"] * 7))


def test_what_is_no_corpus_is_said_before_anything_is_made(write: Writer, tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(ConfigError, match="is no file"):
            Corpus(path)
    with pytest.raises(ConfigError, match="holds no document"):
        Corpus(write([""]))


def test_a_corpus_that_is_rewritten_while_it_is_served_is_an_error_and_no_wrong_text(write: Writer) -> None:
    corpus = Corpus(write(ROWS))
    corpus.path.write_text("x" * 3000)
    with pytest.raises(DataError, match="was changed while it is served"):
        corpus.read([0])


def test_folders_of_another_corpus_are_refused_with_both_hashes_unless_rebuilt(write: Writer) -> None:
    before = Corpus(write(ROWS))
    path = write(ROWS[:3])
    with pytest.raises(ConfigError) as caught:
        Corpus(path)
    after = Corpus(path, rebuild=True)
    assert before.hash != after.hash and before.hash in str(caught.value) and after.hash in str(caught.value)
    assert len(Corpus(path)) == 3


def test_titles_are_taken_off_and_put_back() -> None:
    assert split_contents('"A "B" C"\nbody\nmore') == ('A "B" C', "body\nmore")
    assert split_contents("Title\nbody") == ("Title", "body")
    assert split_contents("only a body") == ("", "only a body")
    assert split_contents('"only a title"') == ("only a title", "")
    assert split_contents("") == ("", "")
    assert join_contents(*split_contents('"T"\nb')) == '"T"\nb'
    assert from_contents("x", None, 1.0).id == text_id("x") != text_id("x ")
