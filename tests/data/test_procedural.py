"""Procedural rows: splits do not overlap, batches are balanced, the cursor resumes exactly, targets satisfy their verifier."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest

from raysys import tasks
from raysys.config.parts import Data
from raysys.data import procedural
from raysys.data.procedural import pattern, split_of
from raysys.data.stream import PromptStream
from raysys.data.text import Decoder
from raysys.errors import CheckpointError, ConfigError, DataError
from raysys.scoring.verifiers import score

ADD = {"task": "chain_sum", "params": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}, "style": "scratchpad"}
REV = {"task": "spell_backward", "params": {"min_word_len": 3, "max_word_len": 6}, "style": "scratchpad"}


def data(split: str = "train", size: int | None = None, add: int = 7, rev: int = 1, **more) -> Data:
    domains = {"add": ADD | {"weight": add}, "rev": REV | {"weight": rev}}
    return Data.model_validate({"source": {"split": split, "size": size, "domains": domains}} | more)


def stream(tiny: str, supervised: bool = False, seed: int = 0, **kwargs) -> PromptStream:
    return PromptStream(data(**kwargs), tiny, seed, 16, 14, supervised)


def prompts(tiny: str, rows: PromptStream, count: int) -> list[str]:
    return Decoder(tiny).texts(rows.take(count).ragged("prompt_ids").rows())


def test_every_batch_has_the_weights_shares(tiny: str) -> None:
    rows = stream(tiny)
    rows.take(3)
    for _ in range(3):
        assert Counter(rows.take(128).strings("domain")) == {"add": 112, "rev": 16}
    assert Counter(stream(tiny, add=1).take(512).strings("domain")) == {"add": 256, "rev": 256}
    assert set(stream(tiny, add=0).take(9).strings("domain")) == {"rev"}


def test_a_pattern_is_short_and_even() -> None:
    assert pattern({"a": 112, "b": 16}).count("a") == 7 and len(pattern({"a": 112, "b": 16})) == 8
    assert pattern({"a": 2, "b": 2, "c": 2}) == ["a", "b", "c"]
    mixed = pattern({"a": 5, "b": 3})
    for start in range(8):
        window = [mixed[(start + step) % 8] for step in range(4)]
        assert window.count("a") in (2, 3)


def test_targets_are_right_by_their_own_verifier(tiny: str) -> None:
    batch = stream(tiny, supervised=True, add=1).take(64)
    decoder = Decoder(tiny)
    asked = decoder.texts(batch.ragged("prompt_ids").rows())
    targets = decoder.texts(batch.ragged("response_ids").rows())
    judged = zip(batch.strings("verifier"), targets, batch.strings("answer"), batch.strings("metadata"), strict=True)
    assert [score(*row) for row in judged] == [1.0] * 64
    assert all(row[-1] == 2 for row in batch.ragged("response_ids").rows()), "the end token is taught"
    for domain, prompt, target in zip(batch.strings("domain"), asked, targets, strict=True):
        if domain == "add":
            digits, value = target.split(">")
            assert digits == value[::-1] and total(prompt) == int(value)
        else:
            assert prompt == target[::-1] + "<"
    assert any(target.endswith("->-" + target[: target.find("-")][::-1]) for target in targets if "-" in target), "minus signs reverse too"


def test_other_rows_targets_are_wrong(tiny: str) -> None:
    batch = stream(tiny, supervised=True, add=1).take(64)
    targets = Decoder(tiny).texts(batch.ragged("response_ids").rows())
    for shift in (1, 2):
        moved = zip(batch.strings("verifier"), targets[shift:], batch.strings("answer"), batch.strings("metadata"))
        assert sum(score(*row) == 1 for row in moved) <= 2


def total(prompt: str) -> int:
    text = prompt.removesuffix("=")
    at = max(text.rfind("+"), text.rfind("-"))
    left, right = int(text[:at]), int(text[at + 1 :])
    return left + right if text[at] == "+" else left - right


def test_splits_share_no_task(tiny: str) -> None:
    seen = {split: set(prompts(tiny, stream(tiny, split=split, add=1), 600)) for split in ("train", "choose", "report")}
    assert not seen["train"] & seen["choose"] and not seen["train"] & seen["report"] and not seen["choose"] & seen["report"]
    assert len(seen["choose"]) == len(seen["report"]) == 600, "held-out splits give each task once"


def test_a_split_belongs_to_the_question_alone() -> None:
    assert split_of("Spell  Neon") == split_of("spell neon")
    shares = Counter(split_of(f"question {number}") for number in range(5000))
    assert abs(shares["train"] / 5000 - 0.8) < 0.03 and abs(shares["report"] / 5000 - 0.1) < 0.02


@pytest.mark.parametrize("kwargs", [{}, {"split": "choose"}, {"size": 20}, {"size": 20, "split": "report"}])
def test_the_cursor_resumes_exactly(tiny: str, kwargs: dict) -> None:
    straight = stream(tiny, supervised=True, **kwargs)
    straight.take(37)
    state = json.loads(json.dumps(straight.state()))
    expected = straight.take(50).table
    resumed = stream(tiny, supervised=True, **kwargs)
    resumed.take(11)
    resumed.restore(state)
    assert resumed.take(50).table.equals(expected)
    assert resumed.state() == straight.state()


def test_how_rows_are_taken_does_not_change_them(tiny: str) -> None:
    whole, parts = stream(tiny), stream(tiny)
    pieces = [parts.take(count).table.to_pylist() for count in (1, 30, 9)]
    assert [row for piece in pieces for row in piece] == whole.take(40).table.to_pylist()


def test_a_cursor_of_other_data_is_refused(tiny: str) -> None:
    with pytest.raises(CheckpointError, match="domains"):
        stream(tiny).restore(stream(tiny, add=0).state())
    with pytest.raises(CheckpointError, match="file"):
        stream(tiny).restore({"kind": "file"})


def test_other_processes_make_the_same_rows(tiny: str) -> None:
    """Scorers run elsewhere and make the entry again: neither Python's hash seed nor anything else of the process may matter."""
    code = (
        "from tests.data.test_procedural import *; import sys;"
        "sys.stdout.write(repr(stream(sys.argv[1], supervised=True).take(24).table.to_pylist()));"
        "sys.stdout.write(str('torch' in sys.modules or 'ray' in sys.modules))"
    )
    command = [sys.executable, "-c", code, tiny]
    done = [subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}).stdout for seed in "12"]
    assert done[0] == done[1] == repr(stream(tiny, supervised=True).take(24).table.to_pylist()) + "False"


def test_training_tasks_follow_the_seed_and_held_out_ones_do_not(tiny: str) -> None:
    assert not stream(tiny, seed=0).take(20).table.equals(stream(tiny, seed=1).take(20).table)
    assert stream(tiny, seed=0, split="report").take(20).table.equals(stream(tiny, seed=1, split="report").take(20).table)


def test_a_sized_source_repeats_in_a_new_order_with_new_ids(tiny: str) -> None:
    batch = stream(tiny, size=9, add=1, rev=0).take(27)
    ids, answers = batch.strings("prompt_id"), batch.strings("answer")
    assert sorted(answers[:9]) == sorted(answers[9:18]) and len({tuple(answers[start : start + 9]) for start in (0, 9, 18)}) == 3
    assert len(set(ids)) == 27 and {name.split("@")[0] for name in ids[:9]} == {name.split("@")[0] for name in ids[18:]}
    kept = stream(tiny, size=9, add=1, rev=0, shuffle=False).take(18).strings("answer")
    assert kept[:9] == kept[9:]


def test_plain_style_asks_the_tasks_own_question(tiny: str) -> None:
    plain = {"source": {"domains": {"word": {"task": "spell_backward", "params": REV["params"]}}}}
    batch = PromptStream(Data.model_validate(plain), tiny, 0, 100, 14, True).take(3)
    for text in Decoder(tiny).texts(batch.ragged("prompt_ids").rows()):
        assert text.startswith("Spell this word backward")
    assert batch.strings("verifier") == ["reasoning_gym:spell_backward"] * 3


def test_the_teacher_may_read_the_answer(tiny: str) -> None:
    known = data(rev=0, context_field="target", context_template="{context}|{prompt}")
    batch = PromptStream(known, tiny, 0, 16, 14).take(4)
    decoder = Decoder(tiny)
    theirs, own = (decoder.texts(batch.ragged(name).rows()) for name in ("teacher_prompt_ids", "prompt_ids"))
    assert [text.split("|")[1] for text in theirs] == own
    assert [text.split("|")[0].split(">")[1] for text in theirs] == batch.strings("answer")


def test_bad_sources_are_refused(tiny: str) -> None:
    def source(**task) -> Data:
        return Data.model_validate({"source": {"domains": {"a": task}}})

    for task, message in (
        ({"task": "chain_sums"}, "did you mean 'chain_sum'"),
        ({"task": "chain_sum", "params": {"min_term": 2}}, "domains.a: params of task 'chain_sum'.*min_term"),
        ({"task": "chain_sum", "params": {"min_terms": 5, "max_terms": 2}}, "max_terms"),
        ({"task": "chain_sum", "params": {"seed": 2}}, "seed"),
        ({"task": "sudoku", "style": "scratchpad"}, "no scratchpad style"),
        ({"task": "countdown"}, "runs the model's text as code"),
        ({"task": "word_ladder"}, "differ from process to process"),
        ({"task": "chain_sum", "weight": 0}, "weight above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            PromptStream(source(**task), tiny, 0, 16, 14)
    with pytest.raises(DataError, match=r"unusable.*domain add, row 0: prompt too long: 6 tokens, max_prompt_tokens is 3"):
        PromptStream(data(), tiny, 0, 3, 14).take(4)
    one = {"min_terms": 1, "max_terms": 1, "min_digits": 1, "max_digits": 1}
    with pytest.raises(DataError, match="no further question of 'chain_sum' for split 'report'"):
        PromptStream(
            Data.model_validate({"source": {"split": "report", "domains": {"a": {"task": "chain_sum", "params": one}}}}), tiny, 0, 200, 14
        ).take(30)


@pytest.mark.parametrize(("size", "share"), [(20, 0.01), (20, 1.0), (None, 1.0)])
def test_a_domain_of_which_nothing_fits_is_named(tiny: str, size: int | None, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procedural, "PATIENCE", 300)
    rows = PromptStream(data(size=size, add=1, rev=1, max_bad_share=share), tiny, 0, 5, 14)  # sums have six characters
    with pytest.raises(DataError, match=r"no row of domain add is usable, the last one: domain add, row \d+: prompt too long: 6 tokens"):
        rows.take(8)


def test_rows_that_do_not_fit_are_left_out_and_counted(tiny: str) -> None:
    mixed = data(add=1, rev=1, max_bad_share=0.9)
    rows = PromptStream(mixed, tiny, 0, 6, 14)
    batch = rows.take(100)
    assert Counter(batch.strings("domain")) == {"add": 50, "rev": 50}, "the shares stay exact"
    assert max(batch.lengths("prompt_ids")) == 6 and rows.report().bad > 20
    assert "prompt too long" in rows.report().lines()[0]


def test_every_task_is_made_without_making_all_of_it() -> None:
    """Some tasks prepare as many entries as their `size` says; asking for a late one must stay cheap."""
    for task in ("list_functions", "gsm_symbolic", "acre"):
        assert tasks.entry(task, "{}", 1, 123_456)["question"]
