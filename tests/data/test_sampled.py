"""Rows whose answers a model wrote: trained on as the tokens that it sampled, where these mean the same."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from raysys.config.parts import Data
from raysys.data.preflight import preflight
from raysys.data.rows import BadRow, Row, parse
from raysys.data.text import Decoder, Encoded, Encoder, identity, load_tokenizer


def encoder(tiny: str, supervised: bool = True) -> Encoder:
    return Encoder(tiny, max_prompt_tokens=16, max_response_tokens=6, supervised=supervised)


def taught(one: Encoder, ids: list[int] | None, tokenizer: str, target: str = "42") -> list[int] | str | None:
    (found,) = one.encode([Row(id="x", where="", prompt="4=", target=target, response_ids=ids, tokenizer=tokenizer)])
    return found.response if isinstance(found, Encoded) else str(found)


def test_the_tokens_that_were_sampled_are_the_ones_that_are_learned(tiny: str) -> None:
    one = encoder(tiny)
    assert Decoder(tiny).identity == one.identity
    text = taught(one, None, "")
    assert isinstance(text, list) and text[-1] == 2
    # No text encodes to a padding token; only who has the ids can learn it.
    assert taught(one, [7, 0, 7, 2], one.identity) == [7, 0, 7, 2]
    assert taught(one, [7, 0, 7, 2], one.identity, target="") == [7, 0, 7, 2]
    assert taught(one, [7, 0, 7, 2], "another") == text, "ids of another tokenizer mean something else"
    assert taught(one, [7, 0, 7, 2], "") == text, "nobody says whose ids these are"
    assert taught(encoder(tiny, supervised=False), [7, 2], one.identity) is None
    assert "answer too long: 7 tokens" in str(taught(one, [7] * 7, one.identity))
    assert "holds 98, the tokenizer has 98 tokens" in str(taught(one, [98, 2], one.identity))


def test_what_ids_must_be() -> None:
    for value in ("7", [1.5], [-1], [True], {"a": 1}):
        with pytest.raises(BadRow, match="`response_ids` has the wrong type"):
            parse({"prompt": "a", "response_ids": value}, where="", row_id="", default_verifier="", context_field=None)


def test_the_tokenizers_identity_is_its_tokens_and_its_end(tiny: str) -> None:
    tokenizer = load_tokenizer(tiny)
    before = identity(tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    assert identity(tokenizer) == before
    tokenizer.eos_token = "<bos>"
    other = identity(tokenizer)
    tokenizer.add_tokens(["<think>"])
    assert len({before, other, identity(tokenizer)}) == 3


@pytest.mark.parametrize("supervised", [True, False])
def test_preflight_tells_of_ids_that_cannot_be_taken(tiny: str, tmp_path: Path, supervised: bool, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": f"{number}=", "answer": "4", "response_ids": [9, 2], "tokenizer": ("x", encoder(tiny).identity)[number % 2]}
        for number in range(6)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level(logging.WARNING):
        preflight(Data(path=str(path)), tiny, max_prompt_tokens=16, max_response_tokens=14, supervised=supervised)
    assert ("3 of 6 rows have response_ids of another tokenizer" in caplog.text) == supervised


def parsed(record: dict[str, object]) -> Row:
    return parse(record, where="f:1", row_id="f:1", default_verifier="exact", context_field=None)


def test_a_conversation_or_a_response_is_a_prompt_and_what_to_learn() -> None:
    asked, said = [{"role": "user", "content": "4="}], {"role": "assistant", "content": "four"}
    row = parsed({"messages": [*asked, said], "answer": "4"})
    assert (row.prompt, row.target, row.answer) == (asked, "four", "4")
    row = parsed({"prompt": "4=", "response": "four", "answer": "4"})
    assert (row.prompt, row.target, row.answer, row.verifier) == ("4=", "four", "4", "exact")
    row = parsed({"prompt": "4=", "response": "four"})
    assert (row.target, row.answer, row.verifier) == ("four", "", ""), "a response is nothing to judge others by"
    row = parsed({"messages": asked})
    assert (row.prompt, row.target) == (asked, "")
    for messages, reason in (("hello", "`messages` has the wrong type"), ([said], "no `prompt`"), ([*asked, {"role": "assistant"}], "")):
        if reason:
            with pytest.raises(BadRow, match=reason):
                parsed({"messages": messages})
        else:
            assert parsed({"messages": messages}).target == ""
