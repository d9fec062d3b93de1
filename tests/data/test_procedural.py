"""Procedural rows: splits do not overlap, batches are balanced, the cursor resumes exactly, targets satisfy their verifier."""

from __future__ import annotations

from collections import Counter

import pytest

from raysys.config.parts import Data
from raysys.data.stream import PromptStream
from raysys.data.text import Decoder
from raysys.errors import ConfigError, DataError
from raysys.scoring.verifiers import score

ADD = {"task": "chain_sum", "params": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}, "style": "scratchpad"}
REV = {"task": "spell_backward", "params": {"min_word_len": 3, "max_word_len": 6}, "style": "scratchpad"}


def data(split: str = "train", size: int | None = None, add: int = 7, rev: int = 1) -> Data:
    return Data.model_validate({"source": {"split": split, "size": size, "domains": {"add": ADD | {"weight": add}, "rev": REV | {"weight": rev}}}})


def stream(tiny: str, supervised: bool = False, seed: int = 0, **kwargs) -> PromptStream:
    return PromptStream(data(**kwargs), tiny, seed, 16, 14, supervised)


def test_every_batch_has_the_weights_shares(tiny: str) -> None:
    rows = stream(tiny)
    for _ in range(3):
        assert Counter(rows.take(128).strings("domain")) == {"add": 112, "rev": 16}


def test_targets_are_right_by_their_own_verifier_and_others_are_not(tiny: str) -> None:
    batch = stream(tiny, supervised=True, add=1).take(64)
    decoder = Decoder(tiny)
    prompts = decoder.texts(batch.ragged("prompt_ids").rows())
    targets = decoder.texts(batch.ragged("response_ids").rows())
    judged = zip(batch.strings("verifier"), targets, batch.strings("answer"), batch.strings("metadata"), strict=True)
    assert [score(*row) for row in judged] == [1.0] * 64
    for domain, prompt, target in zip(batch.strings("domain"), prompts, targets, strict=True):
        if domain == "add":
            digits, value = target.split(">")
            assert digits == value[::-1] and eval_sum(prompt) == int(value)
        else:
            assert prompt == target[::-1] + "<"
    assert score("scratchpad:chain_sum", "71>18", "17", "") < 1


def eval_sum(prompt: str) -> int:
    text = prompt.removesuffix("=")
    at = max(text.rfind("+"), text.rfind("-"))
    left, right = int(text[:at]), int(text[at + 1 :])
    return left + right if text[at] == "+" else left - right


def test_splits_share_no_task(tiny: str) -> None:
    seen = {split: set(Decoder(tiny).texts(stream(tiny, split=split, add=1).take(600).ragged("prompt_ids").rows())) for split in ("train", "choose", "report")}
    assert not seen["train"] & seen["choose"] and not seen["train"] & seen["report"] and not seen["choose"] & seen["report"]
    assert len(seen["choose"]) == len(seen["report"]) == 600, "evaluation splits give each task once"


@pytest.mark.parametrize("split", ["train", "choose"])
def test_the_cursor_resumes_exactly(tiny: str, split: str) -> None:
    straight = stream(tiny, split=split)
    straight.take(37)
    state = straight.state()
    expected = straight.take(50).table
    resumed = stream(tiny, split=split)
    resumed.restore(state)
    assert resumed.take(50).table.equals(expected)


def test_training_tasks_follow_the_seed_and_evaluation_tasks_do_not(tiny: str) -> None:
    assert not stream(tiny, seed=0).take(20).table.equals(stream(tiny, seed=1).take(20).table)
    assert stream(tiny, seed=0, split="report").take(20).table.equals(stream(tiny, seed=1, split="report").take(20).table)


def test_a_sized_source_repeats_with_new_ids(tiny: str) -> None:
    batch = stream(tiny, size=5, add=1, rev=0).take(10)
    ids, answers = batch.strings("prompt_id"), batch.strings("answer")
    assert answers[:5] == answers[5:] and len(set(ids)) == 10


def test_bad_sources_are_refused(tiny: str) -> None:
    with pytest.raises(ConfigError, match="task 'nonsense'"):
        PromptStream(Data.model_validate({"source": {"domains": {"a": {"task": "nonsense"}}}}), tiny, 0, 16, 14)
    with pytest.raises(DataError, match="max_prompt_tokens is 3"):
        PromptStream(data(), tiny, 0, 3, 14).take(4)


def test_repeat_numbers_the_samples(tiny: str) -> None:
    twice = stream(tiny).take(2).repeat(2)
    first, second = twice.strings("prompt_id")[0], twice.strings("prompt_id")[2]
    assert twice.ids == [f"{first}/0", f"{first}/1", f"{second}/0", f"{second}/1"]
