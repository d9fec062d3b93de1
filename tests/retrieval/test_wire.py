"""Both request styles, both answer shapes, and what is neither."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from raysys.retrieval.documents import Document, Found, text_id
from raysys.retrieval.wire import BadAnswer, BadRequest, Limits, read_answer, read_request, write_answer, write_request

LIMITS = Limits(queries=3, query_chars=10, topk=5)
FOUND = [[Found("7", '"T"\nb', 1.5)], []]


def asked(**payload: Any):
    return read_request(json.dumps({"queries": ["q"], **payload}).encode(), LIMITS)


def test_the_first_style() -> None:
    request = asked(topk=4, return_scores=True)
    assert (request.topk, request.candidates, request.rerank, request.strings) == (4, None, True, False)
    assert json.loads(write_answer(FOUND, request)) == {"result": [[{"document": {"id": "7", "contents": '"T"\nb'}, "score": 1.5}], []]}
    assert json.loads(write_answer(FOUND, asked())) == {"result": [[{"id": "7", "contents": '"T"\nb'}], []]}


def test_the_second_style() -> None:
    request = asked(topk_retrieval=5, topk_rerank=2, return_scores=True, not_sort=True)
    assert (request.topk, request.candidates, request.rerank, request.strings) == (2, 5, False, True)
    assert json.loads(write_answer(FOUND, request)) == {"result": [[{"document": '"T"\nb', "score": 1.5}], []]}
    assert json.loads(write_answer(FOUND, asked(topk_rerank=2))) == {"result": [['"T"\nb'], []]}


def test_a_flag_of_the_server_asks_for_texts() -> None:
    assert read_request(b'{"queries": []}', LIMITS, strings=True).strings


def test_our_own_request_is_of_both_styles_and_is_answered_in_the_first() -> None:
    request = read_request(write_request(["q"], 3, 5), LIMITS)
    assert (request.topk, request.candidates, request.rerank, request.scores, request.strings) == (3, 5, True, True, False)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"<html>", 400, "not JSON"),
        (b"\xff", 400, "not JSON"),
        (b"[]", 422, "must be an object"),
        (b"{}", 422, "`queries` must be a list of texts"),
        (b'{"queries": "q"}', 422, "`queries` must be a list of texts"),
        (b'{"queries": [1]}', 422, "`queries` must be a list of texts"),
        (b'{"queries": ["", "", "", ""]}', 413, "4 texts, more than the 3"),
        (b'{"queries": ["", "12345678901"]}', 413, r"`queries\[1\]` has 11 characters, more than the 10"),
        (b'{"queries": [], "topk": 6}', 422, "`topk` must be a whole number from 1 to 5, found 6"),
        (b'{"queries": [], "topk": 0}', 422, "`topk`"),
        (b'{"queries": [], "topk": true}', 422, "`topk`"),
        (b'{"queries": [], "topk_rerank": 1.5}', 422, "`topk_rerank`"),
        (b'{"queries": [], "topk_retrieval": "20"}', 422, "`topk_retrieval`"),
        (b'{"queries": [], "topk": "\\ud800"}', 422, r"found '\\ud800'"),
        (b'{"queries": [], "not_sort": "\\ud800"}', 422, r"found '\\ud800'"),
        (b'{"queries": [], "return_scores": 1}', 422, "`return_scores` must be true or false"),
    ],
)
def test_bad_requests_get_a_code_and_a_sentence(body: bytes, status: int, message: str) -> None:
    with pytest.raises(BadRequest, match=message) as caught:
        read_request(body, LIMITS)
    assert caught.value.status == status
    assert caught.value.message.encode()


@pytest.mark.parametrize(
    "item",
    [
        {"document": {"id": "7", "contents": '"T"\nb'}, "score": 1.5},
        {"document": {"id": 7, "title": "T", "text": "b"}, "score": 1.5},
    ],
)
def test_answers_with_ids(item: Any) -> None:
    assert read_answer(json.dumps({"result": [[item], []]}).encode(), 2) == [[Document("7", "T", "b", 1.5)], []]


@pytest.mark.parametrize(
    "item", [{"document": '"T"\nb', "score": 2}, '"T"\nb', {"contents": '"T"\nb'}, {"document": {"contents": '"T"\nb'}}]
)
def test_answers_without_ids_are_known_by_their_exact_text(item: Any) -> None:
    document = read_answer(json.dumps({"result": [[item]]}).encode(), 1)[0][0]
    assert (document.id, document.title, document.body) == (text_id('"T"\nb'), "T", "b")
    assert document.score == 2 or math.isnan(document.score)


@pytest.mark.parametrize("item", [{"document": {"id": "a\ud800", "contents": '"T\ud800"\nb\udfff'}}, '"T\ud800"\nb\udfff'])
def test_half_a_surrogate_pair_goes_no_further(item: Any) -> None:
    """Arrow would refuse the whole batch of samples that one such document is in."""
    ((document,),) = read_answer(json.dumps({"result": [[item]]}).encode(), 1)
    assert (document.title, document.body) == ("T?", "b?") and document.id in ("a?", text_id('"T\ud800"\nb\udfff'))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"result": [[{"document": "x", "score": "\\ud800"}], []]}', "the score ?"),
        (b" <!doctype html><title>502</title>", "an HTML page: <!doctype html>"),
        (b"", "no JSON: an empty body"),
        (b"{}", "without lists in `result`"),
        (b"[[]]", "without lists in `result`"),
        (b'{"result": [{}]}', "without lists in `result`"),
        (b'{"result": [[]]}', "1 lists for 2 queries"),
        (b'{"result": [[], [], []]}', "3 lists for 2 queries"),
        (b'{"result": [[3], []]}', "neither text nor an object"),
        (b'{"result": [[{"document": null}], []]}', "neither text nor an object"),
        (b'{"result": [[{"document": "x", "score": "high"}], []]}', "the score high"),
    ],
)
def test_what_is_no_answer_is_described(body: bytes, message: str) -> None:
    with pytest.raises(BadAnswer, match=message) as caught:
        read_answer(body, 2)
    assert str(caught.value).encode()
