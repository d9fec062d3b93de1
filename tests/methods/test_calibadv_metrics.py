"""What training is watched by: masses and shares by hand, perplexity by run, and each reason of the alarm."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from raysys.methods.calibadv import calibrate
from raysys.methods.calibadv_metrics import calibration_metrics, collapse, high_ppl, run_perplexity

NAN = math.nan
UNIT = 1 / (math.sqrt(1 / 3) + 1e-6)
THREE: dict[str, Any] = {
    "rewards": torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64),
    "groups": torch.tensor([7, 7, 7]),
    "runs": torch.tensor([[0, 0, -1, 1, -1, -1], [0, -1, 1, 1, -1, -1], [0, -1, 1, 1, 1, 1]]),
    "run_counts": torch.tensor([2, 2, 2]),
    "step_scores": torch.tensor([[1.0], [1 / 3], [NAN]], dtype=torch.float64),
}


def test_metrics_by_hand():
    """Advantages 2, -1, -1 in units of 1/3 over the deviation; searches of 2, 1, 1 tokens, answers of 1, 2, 4."""
    found = calibration_metrics(**THREE, silver_sizes=[0, 6, 9, 7])
    third = UNIT / 3
    want = {
        "positive_mass_before": 6 * third,
        "negative_mass_before": 8 * third,
        "mass_ratio_before": 8 / 6,
        "positive_mass_after": (4 + 6) * third,
        "negative_mass_after": (8 - 1 / 3) * third,
        "mass_ratio_after": (8 - 1 / 3) / 10,
        "answer_positive_mass_before": 2 * third,
        "answer_negative_mass_before": 6 * third,
        "answer_mass_ratio_before": 3.0,
        "answer_positive_mass_after": 6 * third,
        "answer_negative_mass_after": 6 * third,
        "answer_mass_ratio_after": 1.0,
        "softened_of_negative": 1 / 2,
        "softened_of_all": 1 / 3,
        "score_0": 0.0,
        "score_1_3": 0.5,
        "score_2_3": 0.0,
        "score_1": 0.5,
        "score_other": 0.0,
        "score_mean": 2 / 3,
        "silver_empty": 0.25,
        "silver_size": 7.0,
    }
    assert found == pytest.approx(want, rel=1e-12)
    assert all(type(value) is float for value in found.values())


def test_masses_are_sums_of_the_tokens():
    dice = torch.Generator().manual_seed(0)
    rewards, groups = torch.rand(12, generator=dice), torch.arange(12) % 3
    runs = torch.randint(-1, 4, (12, 50), generator=dice)
    scores = torch.rand(12, 3, generator=dice)
    counts = torch.full((12,), 4)
    found = calibration_metrics(rewards, groups, runs, counts, scores)
    for when, change in (("before", {"rebalance": None, "soft_penalty": False}), ("after", {})):
        tokens = calibrate(rewards, groups, runs, counts, scores, **change).double()
        for place, chosen in (("", tokens), ("answer_", tokens[runs == 3])):
            assert found[f"{place}positive_mass_{when}"] == pytest.approx(float(chosen.clamp(min=0).sum()), rel=1e-6)
            assert found[f"{place}negative_mass_{when}"] == pytest.approx(float(-chosen.clamp(max=0).sum()), rel=1e-6)
    assert found["score_other"] > 0.9 and found["softened_of_negative"] == 1.0 and "silver_size" not in found


def test_a_batch_without_signs_or_scores_has_no_ratios():
    ties = {**THREE, "rewards": torch.full((3,), 0.5), "step_scores": torch.zeros(3, 0)}
    found = calibration_metrics(**ties, silver_sizes=[0])
    assert found["positive_mass_after"] == found["negative_mass_after"] == 0.0 and found["silver_empty"] == 1.0
    names = ("mass_ratio_before", "answer_mass_ratio_after", "softened_of_negative", "score_1", "score_mean", "silver_size")
    assert all(math.isnan(found[name]) for name in names)
    assert calibration_metrics(**THREE, soft_penalty=False)["softened_of_negative"] == 0.0


def test_perplexity_of_runs():
    runs, counts = torch.tensor([[0, 0, -1, 1], [0, -1, -1, -1]]), torch.tensor([2, 3])
    logprobs = torch.tensor([[-1.0, -3.0, NAN, -5.0], [-math.inf, NAN, math.inf, NAN]], dtype=torch.float64)
    want = torch.tensor([[math.exp(2.0), math.exp(5.0), NAN], [math.inf, NAN, NAN]], dtype=torch.float64)
    torch.testing.assert_close(run_perplexity(logprobs, runs, counts), want, equal_nan=True)
    with pytest.raises(ValueError, match="logprobs must not be NaN in a run, got one at row 0"):
        run_perplexity(logprobs.roll(1, 1), runs, counts)
    with pytest.raises(ValueError, match=r"logprobs must be floating \[2, 4\], got torch.float64 \[2, 3\]"):
        run_perplexity(logprobs[:, :3], runs, counts)


def test_high_perplexity_counts_any_run_of_either_model_and_invalid_actions():
    perplexity = torch.tensor([[1.0, 49.9], [50.0, NAN], [2.0, NAN], [NAN, NAN]])
    invalid = torch.tensor([False, False, False, True])
    assert high_ppl(perplexity, invalid) == 0.5
    assert high_ppl(perplexity, invalid, reference=torch.tensor([[1.0, 1.0], [1.0, NAN], [math.inf, NAN], [NAN, NAN]])) == 0.75
    assert high_ppl(perplexity, invalid, limit=50.5) == 0.25
    assert math.isnan(high_ppl(torch.zeros(0, 2), torch.zeros(0, dtype=torch.bool)))
    for call, message in (
        (lambda: high_ppl(perplexity, invalid[:1]), "invalid must be bool [4], got torch.bool [1]"),
        (lambda: high_ppl(perplexity, torch.zeros(4)), "invalid must be bool [4], got torch.float32 [4]"),
        (lambda: high_ppl(perplexity, invalid, perplexity[:, :1]), "must be [B, K] alike, got [4, 2] and [4, 1]"),
        (lambda: high_ppl(perplexity, invalid, limit=NAN), "limit must be a number, got nan"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)


def test_a_negative_silver_size_is_named():
    with pytest.raises(ValueError, match="silver_sizes must be at least 0, got -1"):
        calibration_metrics(**THREE, silver_sizes=[2, -1])


def test_alarm_on_f1_below_half_of_its_maximum_for_ten_steps():
    rise = [{"f1": value} for value in (0.2, 0.6, 0.4)]
    assert collapse(rise + [{"f1": 0.29}] * 9) is None
    assert collapse(rise + [{"f1": 0.29}] * 10) == "F1 is below 0.5 of its maximum 0.6 for 10 steps, at step 13"
    assert collapse(rise + [{"f1": 0.3}] * 30) is None
    assert collapse(rise + [{"f1": 0.29}] * 9 + [{"f1": 0.31}] + [{"f1": 0.29}] * 9) is None
    assert collapse([{"f1": 0.0}] * 40) is None
    assert collapse(rise + [{"f1": 0.29}] * 3, f1_steps=3) is not None


def test_alarm_on_perplexity_and_entropy():
    assert collapse([{"high_ppl": 0.2}]) is None
    assert collapse([{"high_ppl": 0.25}]) == "25.0% of rollouts have a high perplexity at step 1, above 20%"
    assert collapse([{"high_ppl": 0.9}, {"high_ppl": 0.1}]) is None
    start, high = [{"entropy": 1.0}], [{"entropy": 1.51}]
    assert collapse(start + high * 19) is None
    assert collapse(start + high * 20) == "entropy is 1.51 at step 21, above 1.5 times the first, 1"
    assert collapse(start + [{"entropy": 1.5}] * 30) is None


def test_alarm_on_what_is_no_number_and_none_on_what_is_missing():
    assert collapse([]) is None and collapse([{}] * 40) is None
    assert collapse([{"f1": 0.5}, {"f1": NAN}]) == "f1 is nan at step 2"
    assert collapse([{"entropy": math.inf}]) == "entropy is inf at step 1"
