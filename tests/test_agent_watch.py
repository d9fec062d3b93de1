"""What a step of episodes says of itself, and when it is an alarm."""

from __future__ import annotations

from typing import Any

import pytest

from raysys.agent_watch import Watched, facts, seen
from raysys.batch import Batch
from raysys.errors import NumericsError
from raysys.search_agent import judged
from raysys.training.calibrated import CalibAdvObjective
from tests.test_search_agent import RIGHT, batch, play


def step() -> Batch:
    """One question: two right, one wrong, one that never acted."""
    made = batch(play(*RIGHT), play(*RIGHT), play(RIGHT[0], "so.</think> <answer> Rome </answer>"), play("I do not know"))
    return judged(made.with_columns(rollout_logprobs=[[-0.5] * n for n in made.lengths("response_ids")]))


def test_facts() -> None:
    told = facts(CalibAdvObjective(), step())
    assert (told["exact_match"], told["valid"], told["answered"], told["invalid_action"]) == (0.5, 0.75, 0.75, 0.25)
    assert told["searches"] == 0.75 and told["turns"] == 1.75 and told["high_ppl"] == 0.25 and 0 < told["loss_tokens"] < 1
    assert told["answer_mass_ratio_after"] == pytest.approx(1.0, abs=1e-5), "rebalanced"
    # The wrong one was shown what the right ones were shown: its search is not punished.
    assert told["score_1"] == 1.0 and told["softened_of_negative"] == 1.0
    assert told["silver_size"] == 3.0 and told["silver_empty"] == 0.0


class Kept:
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)


def test_a_collapse_ends_the_run_after_its_record() -> None:
    kept = Kept()
    watched = Watched(CalibAdvObjective(), kept)
    for number in range(10):
        watched.write({"step": number, "reward": 0.6, "entropy": 1.0, "high_ppl": 0.0})
    for number in range(10, 19):
        watched.write({"step": number, "reward": 0.1, "entropy": 1.0, "high_ppl": 0.0})
    with pytest.raises(NumericsError, match=r"training has collapsed: F1 is below .*stop_on_collapse"):
        watched.write({"step": 19, "reward": 0.1, "entropy": 1.0, "high_ppl": 0.0})
    assert len(kept.records) == 20
    # A resumed run sees the same, from its records.
    with pytest.raises(NumericsError, match="collapsed"):
        Watched(CalibAdvObjective(), Kept(), kept.records[:19]).write({"step": 19, "reward": 0.1})
    Watched(CalibAdvObjective(), Kept(), kept.records[:19], alarm=False).write({"step": 19, "reward": 0.1})


def test_a_step_that_is_trained_again_counts_once() -> None:
    watched = Watched(CalibAdvObjective(), Kept())
    for number in [*range(8), *range(4, 8), *range(4, 9)]:
        watched.write({"step": number, "reward": 0.6 if number < 1 else 0.1})


def test_a_model_that_never_could_write_has_not_collapsed() -> None:
    assert all("high_ppl" not in one for one in seen([{"high_ppl": 0.9}, {"high_ppl": 0.5}]))
    assert [one.get("high_ppl") for one in seen([{"high_ppl": 0.9}, {"high_ppl": 0.05}, {"high_ppl": 0.15}])] == [None, 0.05, 0.1]


def test_entropy_that_only_scatters_is_no_collapse_and_one_that_rises_is() -> None:
    """A step of few episodes may well have half as much again as the first; the mean over some steps may not."""
    scattered = [0.2 + 0.15 * (number % 3 == 2) for number in range(40)]
    for values, told in ((scattered, None), ([0.2] * 20 + [0.45] * 10, "entropy is 0.35 at step 23, above 1.5 times the first, 0.2")):
        watched = Watched(CalibAdvObjective(), Kept())
        try:
            for number, entropy in enumerate(values):
                watched.write({"step": number, "reward": 0.5, "entropy": entropy})
            assert told is None
        except NumericsError as error:
            assert told is not None and told in str(error)


def test_advantages_go_through() -> None:
    kept = Kept()
    watched = Watched(CalibAdvObjective(), kept)
    made = watched.advantages(step())
    assert made.ragged("advantages").values.any()
    watched.write({"step": 0, "reward": 0.5})
    assert kept.records[0]["searches"] == 0.75
