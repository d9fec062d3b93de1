"""What goes over HTTP, both ways and in both of the styles that search agents are written for.

Search-R1's: `{"queries", "topk", "return_scores"}`, answered by `{"result": [[{"document": {"id", "contents"}, "score"}]]}`.
The retrieve-and-rerank server's: `{"queries", "topk_retrieval", "topk_rerank", "return_scores", "not_sort"}`, where `document`
is the text itself. Without `return_scores` the inner items are bare documents in either. A request that has `topk` is of the
first style, whatever else it has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raysys.retrieval.documents import Document, Found, from_contents, join_contents, utf8


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for."""

    queries: int = 4096
    query_chars: int = 8192
    topk: int = 100
    candidates: int = 200
    body_bytes: int = 32 << 20


@dataclass(frozen=True)
class Request:
    queries: list[str]
    topk: int | None
    candidates: int | None
    rerank: bool
    scores: bool
    strings: bool


class BadRequest(Exception):
    """A request that is not answered. `status`: the HTTP code."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


class BadAnswer(Exception):
    """An answer that is none."""


def read_request(body: bytes, limits: Limits, strings: bool = False) -> Request:
    """A request's body as a request. `strings`: answer the first style with bare texts too. Raises BadRequest."""
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(400, f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(payload, dict):
        raise BadRequest(422, 'the body must be an object, e.g. {"queries": ["..."], "topk": 3, "return_scores": true}')
    topk, shown = _count(payload, "topk", limits.topk), _count(payload, "topk_rerank", limits.topk)
    candidates = _count(payload, "topk_retrieval", limits.candidates)
    second = topk is None and (shown is not None or candidates is not None)
    return Request(
        queries=_queries(payload.get("queries"), limits),
        topk=shown if topk is None else topk,
        candidates=candidates,
        rerank=not _flag(payload, "not_sort"),
        scores=_flag(payload, "return_scores"),
        strings=strings or second,
    )


def _queries(value: Any, limits: Limits) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(query, str) for query in value):
        raise BadRequest(422, "`queries` must be a list of texts")
    if len(value) > limits.queries:
        raise BadRequest(413, f"`queries` has {len(value)} texts, more than the {limits.queries} that one request may have")
    for number, query in enumerate(value):
        if len(query) > limits.query_chars:
            raise BadRequest(413, f"`queries[{number}]` has {len(query)} characters, more than the {limits.query_chars} allowed")
    return value


def _count(payload: Mapping[str, Any], key: str, most: int) -> int | None:
    value = payload.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise BadRequest(422, f"`{key}` must be a whole number from 1 to {most}, found {ascii(value)[:50]}")
    return value


def _flag(payload: Mapping[str, Any], key: str) -> bool:
    value = payload.get(key)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(422, f"`{key}` must be true or false, found {ascii(value)[:50]}")
    return bool(value)


def write_answer(found: Sequence[Sequence[Found]], request: Request) -> bytes:
    def item(each: Found) -> Any:
        document: Any = each.contents if request.strings else {"id": each.id, "contents": each.contents}
        return {"document": document, "score": each.score} if request.scores else document

    return json.dumps({"result": [[item(each) for each in list_] for list_ in found]}, ensure_ascii=False).encode()


def write_request(queries: Sequence[str], topk: int, candidates: int, rerank: bool = True) -> bytes:
    """A request that either server understands."""
    return json.dumps(
        {
            "queries": list(queries),
            "topk": topk,
            "topk_retrieval": candidates,
            "topk_rerank": topk,
            "return_scores": True,
            "not_sort": not rerank,
        }
    ).encode()


def read_answer(body: bytes, count: int) -> list[list[Document]]:
    """The documents of each of `count` queries, in any of the shapes. Raises BadAnswer, saying what came instead."""
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError):
        raise BadAnswer(f"{'an HTML page' if body.lstrip()[:1] == b'<' else 'no JSON'}: {_shown(body)}") from None
    lists = payload.get("result") if isinstance(payload, dict) else None
    if not isinstance(lists, list) or not all(isinstance(each, list) for each in lists):
        raise BadAnswer(f"JSON without lists in `result`: {_shown(body)}")
    if len(lists) != count:
        raise BadAnswer(f"{len(lists)} lists for {count} queries")
    return [[_read_document(item) for item in each] for each in lists]


def _read_document(item: Any) -> Document:
    score = math.nan
    document = item
    if isinstance(item, dict) and "document" in item:
        document, score = item["document"], item.get("score")
        if score is None:
            score = math.nan
        if not isinstance(score, (int, float)) or isinstance(score, bool):
            raise BadAnswer(f"a document with the score {utf8(str(score)[:50])}")
    if isinstance(document, str):
        return from_contents(document, None, float(score))
    if isinstance(document, dict):
        contents = document.get("contents")
        if contents is None and isinstance(document.get("text"), str):
            contents = join_contents(str(document.get("title") or ""), document["text"])
        if isinstance(contents, str):
            doc_id = document.get("id")
            return from_contents(contents, None if doc_id is None else str(doc_id), float(score))
    raise BadAnswer(f"a document that is neither text nor an object with `contents`: {utf8(str(document)[:100])}")


def _shown(body: bytes) -> str:
    return " ".join(body[:400].decode("utf-8", "replace").split())[:100] or "an empty body"
