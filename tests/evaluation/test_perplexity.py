"""Perplexity: fixed windows, the token mean, and what must not change it."""

from __future__ import annotations

import math

import pytest
import torch

from raysys.evaluation import perplexity
from raysys.evaluation.perplexity import Perplexity, cut, window_nll


def test_windows_do_not_overlap_and_the_end_is_left_out() -> None:
    assert cut(list(range(11)), 3) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert cut(list(range(11)), 3, windows=2) == [[0, 1, 2], [3, 4, 5]]
    for ids, length, told in ((range(2), 3, "2 tokens make no window of 3"), (range(5), 1, "at least 2")):
        with pytest.raises(ValueError, match=told):
            cut(list(ids), length)


def test_by_hand() -> None:
    """Three tokens; the first is not predicted. p = 1/2 for the second, 1/8 for the third: the mean is ln 4."""
    logits = torch.tensor([[0.0, 0.0, -1e9], [0.0, math.log(7.0), -1e9], [9.0, 0.0, 0.0]], dtype=torch.float64)
    nll, count = window_nll(logits, torch.tensor([1, 0, 0]))
    assert count == 2 and nll == pytest.approx(math.log(2) + math.log(8))
    mean = Perplexity()
    mean.add(nll, count)
    assert mean.value == pytest.approx(4.0)


def test_uniform_logits_give_the_vocabulary() -> None:
    mean = Perplexity()
    for length in (5, 9):
        mean.add(*window_nll(torch.zeros(length, 17), torch.arange(length)))
    assert mean.tokens == 12 and mean.value == pytest.approx(17.0)


def test_the_mean_is_over_tokens_not_windows() -> None:
    one, two = Perplexity(), Perplexity()
    one.add(3.0, 1)
    one.add(1.0, 3)
    two.add(4.0, 4)
    assert one == two and one.mean == 1.0


def test_chunks_change_nothing_and_a_prompt_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(40, 7, dtype=torch.float64), torch.randint(7, (40,))
    whole = window_nll(logits, ids)
    monkeypatch.setattr(perplexity, "CHUNK", 6)
    assert window_nll(logits, ids) == (pytest.approx(whole[0]), 39)
    parts = [window_nll(logits[:11], ids[:11]), window_nll(logits, ids, start=11)]
    assert sum(part[0] for part in parts) == pytest.approx(whole[0]) and [part[1] for part in parts] == [10, 29]
    assert window_nll(logits, ids, start=40) == (0.0, 0)


def test_wrong_arguments_are_named() -> None:
    for logits, ids, start, told in (
        (torch.zeros(3, 4), torch.zeros(2, dtype=torch.long), 1, r"\[3, 4\] and \[2\]"),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.long), 0, "at least 1"),
    ):
        with pytest.raises(ValueError, match=told):
            window_nll(logits, ids, start)
    with pytest.raises(ValueError, match="no token"):
        _ = Perplexity().value
    assert Perplexity(1e6, 1).value == math.inf
