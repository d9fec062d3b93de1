"""Dealing rows out, the learning rate, and adding metrics up: plain numpy, no processes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from raysys.models.microbatch import pack_rows
from raysys.training.schedule import learning_rate
from raysys.training.spec import Tally
from raysys.training.split import balance, split

rng = np.random.default_rng(1)
PROMPTS, RESPONSES = rng.integers(1, 9, 50), rng.integers(0, 12, 50)


@pytest.mark.parametrize(("ranks", "mini_batches"), [(1, 1), (2, 1), (3, 4)])
def test_every_row_with_a_response_is_trained_once_and_counted(ranks, mini_batches):
    steps = split(PROMPTS, RESPONSES, ranks=ranks, mini_batches=mini_batches, budget=100)
    assert [len(step) for step in steps] == [ranks] * mini_batches
    assert sorted(np.concatenate([share.rows for step in steps for share in step]).tolist()) == np.flatnonzero(RESPONSES).tolist()
    for step in steps:
        rows = np.concatenate([share.rows for share in step])
        assert {share.tokens for share in step} == {int(RESPONSES[rows].sum())}
        assert {share.sequences for share in step} == {len(rows)}
        assert len({share.micro_batches for share in step}) == 1


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("budget", [1, 19, 40, 1000])
def test_no_rank_needs_more_passes_than_all_make(budget, padded):
    for step in split(PROMPTS, RESPONSES, ranks=3, mini_batches=2, budget=budget, padded=padded):
        needed = [len(pack_rows((PROMPTS + RESPONSES)[share.rows], budget, padded)) for share in step]
        assert {share.micro_batches for share in step} == {max(needed)}


def test_ranks_get_even_loads():
    tokens = PROMPTS + RESPONSES
    loads = [tokens[rows].sum() for rows in balance(tokens, 3)]
    assert max(loads) - min(loads) <= tokens.max()
    assert [rows.tolist() for rows in balance(np.array([7, 7]), 4)] == [[0], [1], [], []]


def test_schedules_by_hand():
    def rates(schedule, warmup):
        return [learning_rate(2.0, step, 6, schedule, warmup) for step in range(6)]

    assert rates("constant", 4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert rates("linear", 2) == pytest.approx([1.0, 2.0, 2.0, 1.5, 1.0, 0.5])
    assert rates("cosine", 2) == pytest.approx([1.0, 2.0, 2.0, 1 + np.cos(np.pi / 4), 1.0, 1 + np.cos(3 * np.pi / 4)])
    assert learning_rate(2.0, 9, 6, "cosine", 0) == 0.0


def test_warm_up_stable_decay_by_hand():
    rates = [learning_rate(2.0, step, 10, "wsd", 2, 0.1, decay_share=0.4) for step in range(12)]
    assert rates == pytest.approx([1.0, *[2.0] * 6, 1.55, 1.1, 0.65, 0.2, 0.2])
    assert learning_rate(2.0, 5, 10, "wsd", 0, decay_share=1.0) == learning_rate(2.0, 5, 10, "linear", 0)
    assert [learning_rate(2.0, step, 10, "wsd", 9, decay_share=0.5) for step in (8, 9)] == pytest.approx([2.0, 0.4])


def test_metrics_of_ranks_add_up_by_their_counts():
    first, second = Tally(common={"grad_norm": 3.0}), Tally(common={"grad_norm": 3.0})
    first.add("kl", 6.0, 3)
    second.add("kl", 2.0, 1)
    second.add("kl/rev", 2.0, 1)
    first.part("loss", 0.25)
    second.part("loss", 0.5)
    first.extreme("weight_max", -2.0)
    second.extreme("weight_max", -1.0)
    assert first.merge(second).metrics() == {"loss": 0.75, "kl": 2.0, "kl/rev": 2.0, "weight_max": -1.0, "grad_norm": 3.0}


def test_the_driver_side_imports_no_engine():
    code = "import sys, raysys.training.group; sys.exit(bool({'torch', 'vllm', 'transformers', 'deepspeed'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
