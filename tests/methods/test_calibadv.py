"""Properties 1 to 8 and 15 of the method, by number, and `calibrate` against the pseudo-code, token by token.

Properties 9 to 11 are in test_calibadv_steps.py, 12 in test_calibadv_text.py; 13 and 14 are the environment's.
"""

from __future__ import annotations

import math
import random
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raysys.methods import calibadv
from raysys.methods.calibadv import calibrate, group_advantage, run_advantages, run_lengths, score_table
from raysys.methods.gopd import policy_loss

NAN = math.nan
LEVELS = [0.0, 0.0, 0.25, 1 / 3, 0.4, 2 / 3, 0.857, 1.0]


def batch(seed: int, groups: int = 4, size: int = 5, equal_lengths: bool = False, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Rollouts of up to four searches and an answer, in random order, with gaps of retrieved text and padding."""
    dice = random.Random(seed)
    labels = dice.sample(range(-50, 50), groups)
    rows, rewards, names, counts, scores = [], [], [], [], []
    for label in labels:
        for _ in range(size):
            searches = dice.randint(0, 4)
            row: list[int] = []
            for run in range(searches + 1):
                row += [run] * (3 if equal_lengths else dice.randint(1, 6)) + [-1] * dice.randint(0 if run == searches else 1, 3)
            rows.append(row)
            rewards.append(dice.choice(LEVELS))
            names.append(label)
            counts.append(searches + 1)
            scores.append(None if dice.random() < 0.3 else [dice.choice([0, 1 / 3, 2 / 3, 1, NAN]) for _ in range(searches)])
    order = dice.sample(range(len(rows)), len(rows))
    width = max(map(len, rows))
    return {
        "rewards": torch.tensor([rewards[i] for i in order], dtype=dtype),
        "groups": torch.tensor([names[i] for i in order]),
        "runs": torch.tensor([rows[i] + [-1] * (width - len(rows[i])) for i in order]),
        "run_counts": torch.tensor([counts[i] for i in order]),
        "step_scores": score_table([scores[i] for i in order], steps=4).to(dtype),
    }


def slow(given: dict[str, Any], rebalance: float | None = 1.0, soft_penalty: bool = True) -> list[list[float]]:
    """The method as its definition reads, a token at a time, in Python's own numbers."""
    rewards, groups, runs, counts, scores = (given[key].tolist() for key in ("rewards", "groups", "runs", "run_counts", "step_scores"))
    out = [[0.0] * len(row) for row in runs]
    for label in set(groups):
        members = [i for i, name in enumerate(groups) if name == label]
        values = [rewards[i] for i in members]
        mean, deviation = (statistics.fmean(values), statistics.stdev(values)) if len(values) > 1 else (0.0, 1.0)
        tie = len(values) > 1 and len(set(values)) == 1
        positive = negative = 0.0
        for i in members:
            plain = 0.0 if tie else (rewards[i] - mean) / (deviation + 1e-6)
            for t, run in enumerate(runs[i]):
                if run < 0:
                    continue
                value, answer = plain, run == counts[i] - 1
                if not answer and soft_penalty and value < 0 and run < len(scores[i]) and not math.isnan(scores[i][run]):
                    value *= 1 - scores[i][run]
                out[i][t] = value
                if answer:
                    positive, negative = positive + max(value, 0), negative + max(-value, 0)
        if rebalance is None:
            continue
        for i in members:
            for t, run in enumerate(runs[i]):
                if run == counts[i] - 1:
                    if positive == 0 or negative == 0:
                        out[i][t] = 0.0
                    elif out[i][t] > 0:
                        out[i][t] *= rebalance * negative / positive
    return out


def answers(given: dict[str, Any]) -> Tensor:
    return given["runs"] == given["run_counts"][:, None] - 1


def searches(given: dict[str, Any]) -> Tensor:
    return (given["runs"] >= 0) & ~answers(given)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    groups=st.integers(1, 5),
    size=st.integers(1, 6),
    rebalance=st.sampled_from([None, 0.5, 1.0, 1.5]),
    soft_penalty=st.booleans(),
)
def test_calibrate_is_the_definition(seed, groups, size, rebalance, soft_penalty):
    given = batch(seed, groups, size)
    found = calibrate(**given, rebalance=rebalance, soft_penalty=soft_penalty)
    want = torch.tensor(slow(given, rebalance, soft_penalty), dtype=torch.float64)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


def test_a_case_by_hand():
    """Rewards 1, 0, 0: mean 1/3, std sqrt(1/3). The second is softened by a third in its first step; answers of 1, 2 and 4 tokens."""
    runs = torch.tensor([[0, 0, -1, 1, -1, -1], [0, -1, 1, 1, -1, -1], [0, -1, 1, 1, 1, 1]])
    scores = torch.tensor([[0.5], [1 / 3], [NAN]], dtype=torch.float64)
    rewards = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    found = calibrate(rewards, torch.tensor([7, 7, 7]), runs, torch.tensor([2, 2, 2]), scores)
    unit = 1 / (math.sqrt(1 / 3) + 1e-6)
    up, down = 2 / 3 * unit, -1 / 3 * unit
    boosted = 6 * -down  # P = up, N = 6 |down|, so up N / P is N
    want = [[up, up, 0, boosted, 0, 0], [down * 2 / 3, 0, down, down, 0, 0], [down, 0, down, down, down, down]]
    torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 5, 8, 31])
def test_1_equal_rewards_give_exactly_nothing(dtype, size):
    for value in (0.0, 0.857, 2 / 3, 1.0, 1e6, -0.1):
        rewards = torch.full((size,), value, dtype=dtype)
        groups, runs, counts = torch.full((size,), 3), torch.tensor([[0, 0, -1, 1]] * size), torch.full((size,), 2)
        assert not group_advantage(rewards, groups).any()
        assert not calibrate(rewards, groups, runs, counts, torch.rand(size, 1), rebalance=None).any()
        assert not calibrate(rewards, groups, runs, counts, torch.rand(size, 1)).any()


def test_1_a_group_of_one_has_mean_0_and_deviation_1():
    found = group_advantage(torch.tensor([0.5, 0.0], dtype=torch.float64), torch.tensor([4, 9]))
    torch.testing.assert_close(found, torch.tensor([0.5 / (1 + 1e-6), 0.0], dtype=torch.float64), rtol=0, atol=1e-16)


def test_2_nothing_outside_of_runs():
    given = batch(0)
    assert not calibrate(**given)[given["runs"] < 0].any()
    assert calibrate(**given)[given["runs"] >= 0].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_3_without_scores_and_rebalancing_it_is_grpo_bit_for_bit(dtype):
    for seed in range(20):
        given = batch(seed, dtype=dtype)
        plain = group_advantage(given["rewards"], given["groups"])
        want = torch.where(given["runs"] >= 0, plain[:, None], 0.0)
        for scores in (torch.full((20, 4), NAN), torch.zeros(20, 4), torch.zeros(20, 0), np.zeros((20, 4), np.float32)):
            assert torch.equal(calibrate(**{**given, "step_scores": scores}, rebalance=None), want)
        assert torch.equal(calibrate(**given, rebalance=None, soft_penalty=False), want)


def test_4_softening_shrinks_negative_search_steps_and_nothing_else():
    for seed in range(20):
        given = batch(seed)
        plain, soft = calibrate(**given, rebalance=None, soft_penalty=False), calibrate(**given)
        steps = searches(given)
        assert ((soft[steps] <= 0) == (plain[steps] <= 0)).all() and (soft[steps & (plain < 0)] >= plain[steps & (plain < 0)]).all()
        assert torch.equal(soft[steps & (plain >= 0)], plain[steps & (plain >= 0)])
        ones = calibrate(**{**given, "step_scores": torch.ones(20, 4)})
        assert torch.equal(ones[steps & (plain < 0)], torch.zeros_like(ones[steps & (plain < 0)]))
        assert not torch.signbit(ones[steps & (plain < 0)]).any()


@pytest.mark.parametrize("rebalance", [0.5, 0.75, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_5_positive_answer_mass_is_lambda_times_the_negative(rebalance, dtype):
    seen = 0
    for seed in range(20):
        given = batch(seed, dtype=dtype)
        before, after = calibrate(**given, rebalance=None), calibrate(**given, rebalance=rebalance)
        for label in given["groups"].unique():
            chosen = answers(given) & (given["groups"] == label)[:, None]
            if not (before[chosen] > 0).any():
                assert not after[chosen].any()
                continue
            positive, negative = (part.clamp(min=0).double().sum() for part in (after[chosen], -after[chosen]))
            torch.testing.assert_close(positive, rebalance * negative, rtol=1e-6, atol=0)
            assert torch.equal(after[chosen & (before < 0)], before[chosen & (before < 0)])
            seen += 1
        assert torch.equal(after[searches(given)], before[searches(given)])
    assert seen > 40


def test_5_an_answer_without_tokens_left_leaves_its_group_one_sided():
    runs = torch.tensor([[0, 0, -1], [0, -1, 1]])
    found = calibrate(torch.tensor([1.0, 0.0]), torch.tensor([1, 1]), runs, torch.tensor([2, 2]), torch.full((2, 1), NAN))
    assert found[1, 2] == 0 and found[1, 0] < 0 < found[0, 0]
    nothing = calibrate(torch.tensor([1.0]), torch.tensor([1]), torch.tensor([[-1]]), torch.tensor([0]), torch.zeros(1, 0))
    assert torch.equal(nothing, torch.zeros(1, 1))


def test_6_equal_lengths_leave_nothing_to_rebalance():
    for seed in range(20):
        given = batch(seed, equal_lengths=True)
        torch.testing.assert_close(calibrate(**given, rebalance=1.0), calibrate(**given, rebalance=None), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_7_order_names_and_padding_do_not_show(dtype):
    for seed in range(20):
        given = batch(seed, dtype=dtype)
        found = calibrate(**given)
        order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(calibrate(**{key: value[order] for key, value in given.items()}), found[order])
        renamed = {**given, "groups": 10**12 - 17 * given["groups"]}
        assert torch.equal(calibrate(**renamed), found)
        wide = {**given, "runs": torch.nn.functional.pad(given["runs"], (0, 9), value=-1)}
        assert torch.equal(calibrate(**wide), torch.nn.functional.pad(found, (0, 9)))
        for row, runs in zip(found, given["runs"], strict=True):
            assert all(len(row[runs == run].unique()) == 1 for run in runs[runs >= 0].unique())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_7_and_8_groups_do_not_see_each_other(dtype):
    for seed in range(20):
        given = batch(seed, dtype=dtype)
        found = calibrate(**given)
        for label in given["groups"].unique():
            mine = given["groups"] == label
            assert torch.equal(calibrate(**{key: value[mine] for key, value in given.items()}), found[mine])


def test_11_invalid_rollouts_count_in_mean_and_deviation():
    rewards, groups = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64), torch.zeros(3, dtype=torch.int32)
    torch.testing.assert_close(group_advantage(rewards, groups), torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64) / (1 + 2e-6))


def test_15_lambda_is_one_over_the_authors_target_ratio():
    """Their knob is negative over positive mass after rebalancing: 2.0 there is 0.5 here."""
    given = batch(1)
    after = calibrate(**given, rebalance=0.5)
    for label in given["groups"].unique():
        chosen = after[answers(given) & (given["groups"] == label)[:, None]]
        if chosen.any():
            assert float(-chosen.clamp(max=0).sum() / chosen.clamp(min=0).sum()) == pytest.approx(2.0, rel=1e-12)


def test_scores_of_the_answer_run_and_beyond_have_no_effect():
    given = batch(2)
    beyond = torch.arange(5) >= given["run_counts"][:, None] - 1
    scores = torch.cat([given["step_scores"], torch.full((20, 1), NAN)], 1)
    for junk in (0.5, 1.0, -3.0, math.inf, NAN):
        noisy = torch.where(beyond, junk, scores)
        assert torch.equal(calibrate(**{**given, "step_scores": noisy}), calibrate(**given))


def test_integers_of_any_width_and_many_blocks(monkeypatch):
    given = batch(3)
    found = calibrate(**given)
    for kind in (torch.int8, torch.int16, torch.int32):
        narrow = {**given, "runs": given["runs"].to(kind), "run_counts": given["run_counts"].to(kind), "groups": given["groups"].to(kind)}
        assert torch.equal(calibrate(**narrow), found)
    monkeypatch.setattr(calibadv, "BLOCK", 3 * given["runs"].shape[1])
    assert torch.equal(calibrate(**given), found)
    assert calibrate(**{**given, "rewards": given["rewards"].float(), "step_scores": given["step_scores"].float()}).dtype == torch.float32


def test_no_rollouts_and_no_tokens():
    none = torch.zeros(0, dtype=torch.int64)
    assert calibrate(torch.zeros(0), none, torch.zeros(0, 7, dtype=torch.int64), none, torch.zeros(0, 2)).shape == (0, 7)
    two = torch.zeros(2, dtype=torch.int64)
    assert calibrate(torch.rand(2), two, torch.zeros(2, 0, dtype=torch.int64), two + 1, torch.zeros(2, 2)).shape == (2, 0)
    # No rollout has a run: everything is what the environment said, or padding.
    for rows in (1, 2, 5):
        none = torch.zeros(rows, dtype=torch.int64)
        found = calibrate(torch.rand(rows), none, torch.full((rows, 3), -1), none, torch.zeros(rows, 2))
        assert torch.equal(found, torch.zeros(rows, 3))
        assert run_lengths(torch.full((rows, 3), -1), none).shape == (rows, 0)


def test_run_lengths_and_the_table_of_scores():
    given = batch(4)
    lengths = run_lengths(given["runs"], given["run_counts"])
    assert torch.equal(lengths, torch.stack([(given["runs"] == run).sum(1) for run in range(int(given["run_counts"].max()))], 1))
    table = score_table([[0.5, 1.0], None, [], [0.25]])
    torch.testing.assert_close(table, torch.tensor([[0.5, 1.0], [NAN, NAN], [NAN, NAN], [0.25, NAN]]), equal_nan=True)
    assert score_table([None], steps=3).isnan().all() and score_table([]).shape == (0, 0)
    runs = run_advantages(given["rewards"], given["groups"], lengths, given["run_counts"], given["step_scores"])
    spread = runs.gather(1, given["runs"].clamp(min=0)) * (given["runs"] >= 0)
    assert torch.equal(spread, calibrate(**given))


def test_the_loss_is_that_of_gopd_without_dual_clip():
    """max(-A r, -A clip(r, 0.8, 1.2)), a token mean; for a large ratio and A < 0 it is not bounded."""
    old, advantages = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([[1.0, -1.0, 0.0], [2.0, -2.0, NAN]], dtype=torch.float64)
    logprobs = torch.tensor([[0.5, 3.0, 1.0], [-0.5, -0.5, NAN]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    loss, _ = policy_loss(logprobs, old, advantages, mask, dual_clip=math.inf)
    terms = [-1.2, math.exp(3.0), 0.0, -2 * math.exp(-0.5), 2 * 0.8]
    assert float(loss.detach()) == pytest.approx(sum(terms) / 5, rel=1e-12)
    loss.backward()
    want = torch.tensor([[0.0, math.exp(3.0), 0.0], [-2 * math.exp(-0.5), 0.0, 0.0]], dtype=torch.float64) / 5
    torch.testing.assert_close(logprobs.grad, want, rtol=1e-12, atol=0)


GOOD: dict[str, Any] = {
    "rewards": torch.tensor([1.0, 0.0]),
    "groups": torch.tensor([0, 0]),
    "runs": torch.tensor([[0, -1, 1], [0, 0, -1]]),
    "run_counts": torch.tensor([2, 1]),
    "step_scores": torch.tensor([[0.5], [NAN]]),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": torch.rand(2, 1)}, "rewards must be floating [B], got torch.float32 [2, 1]"),
        ({"rewards": torch.tensor([1, 0])}, "rewards must be floating [B], got torch.int64 [2]"),
        ({"rewards": torch.tensor([1.0, NAN])}, "rewards must be finite, got nan at row 1"),
        ({"groups": torch.tensor([0])}, "groups has shape [1], expected [2]"),
        ({"groups": torch.tensor([0.0, 0.0])}, "groups must be integers, got torch.float32"),
        ({"groups": torch.tensor([True, True])}, "groups must be integers, got torch.bool"),
        ({"runs": torch.tensor([0, 1])}, "runs must be [B, T], got shape [2]"),
        ({"runs": torch.rand(2, 3)}, "runs must be integers, got torch.float32"),
        ({"runs": torch.tensor([[0, -2, 1], [0, 0, -1]])}, "runs must be -1 or below the rollout's run count, got -2"),
        ({"runs": torch.tensor([[0, -1, 1], [0, 1, -1]])}, "row 1 has run 1 of 1"),
        ({"run_counts": torch.tensor([2])}, "run_counts has shape [1], expected [2]"),
        ({"run_counts": torch.tensor([2, -1])}, "run_counts must be at least 0, got -1"),
        ({"rewards": torch.rand(3), "groups": torch.zeros(3).long()}, "run_counts has shape [2], expected [3]"),
        ({"step_scores": torch.rand(1, 1)}, "step_scores must be floating [2, S], got torch.float32 [1, 1]"),
        ({"step_scores": torch.rand(2)}, "step_scores must be floating [2, S], got torch.float32 [2]"),
        ({"step_scores": torch.tensor([[1.5], [NAN]])}, "step_scores must lie in [0, 1] or be NaN, got 1.5"),
        ({"step_scores": torch.tensor([[-0.5], [NAN]])}, "step_scores must lie in [0, 1] or be NaN, got -0.5"),
        ({"rebalance": 0.0}, "rebalance must be positive and finite, or None, got 0.0"),
        ({"rebalance": -1.0}, "rebalance must be positive and finite, or None, got -1.0"),
        ({"rebalance": math.inf}, "rebalance must be positive and finite, or None, got inf"),
        ({"rebalance": NAN}, "rebalance must be positive and finite, or None, got nan"),
    ],
)
def test_bad_input_names_the_argument(change, message):
    calibrate(**GOOD)
    with pytest.raises(ValueError) as error:
        calibrate(**{**GOOD, **change})
    assert message in str(error.value)


def test_a_bad_table_or_lengths_are_named():
    with pytest.raises(ValueError, match="at most steps=1 entries a rollout, got 2"):
        score_table([[0.5, 0.5]], steps=1)
    with pytest.raises(ValueError, match="lengths has 1 runs a rollout, run_counts up to 2"):
        run_advantages(GOOD["rewards"], GOOD["groups"], torch.ones(2, 1).long(), GOOD["run_counts"], GOOD["step_scores"])
