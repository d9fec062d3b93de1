"""CalibAdv as an objective: columns of episodes to advantages of tokens, and a loss that is the clipped surrogate of them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from raysys.batch import Batch, Ragged
from raysys.errors import DataError
from raysys.methods import calibadv, gopd
from raysys.training.calibrated import CalibAdvObjective
from raysys.training.micro import MicroBatch
from raysys.training.objectives import Objective
from raysys.training.rows import Rows


def turn(documents: list[str] | None, think: str, **more) -> dict:
    return {"think": think, **({} if documents is None else {"doc_ids": documents}), **more}


EPISODES = [
    # One question: right after two searches, wrong after a good and a repeated one, garbled.
    ("q0", 1.0, [turn(["a", "b"], "look for the city"), turn(["c", "d"], "now its river"), turn(None, "done", valid=True)]),
    ("q0", 0.0, [turn(["a", "c"], "the town is"), turn(["a", "c"], "once more then"), turn(None, "a guess", valid=True)]),
    ("q0", 0.0, [turn(["a", "c"], "the town is"), turn(None, "nothing")]),
    # Another: all wrong, so equal.
    ("q1", 0.0, [turn(["x"], "hm"), turn(None, "no", valid=True)]),
    ("q1", 0.0, [turn(["y"], "hm"), turn(None, "no", valid=True)]),
]
LENGTHS = [[3, 2, 4], [2, 2, 3], [4, 1], [2, 2], [1, 5]]


def batch(order: list[int] | None = None) -> Batch:
    rows = list(range(len(EPISODES))) if order is None else order
    rng = np.random.default_rng(0)
    runs = [[token for run, size in enumerate(LENGTHS[row]) for token in [run] * size + [-1] * 2][:-2] for row in rows]
    return Batch.from_columns(
        prompt_id=[EPISODES[row][0] for row in rows],
        sample=rows,
        domain=[""] * len(rows),
        prompt_ids=[[5, 6]] * len(rows),
        response_ids=[rng.integers(3, 90, len(one)).tolist() for one in runs],
        runs=runs,
        rollout_logprobs=[(-rng.random(len(one))).tolist() for one in runs],
        episode=[json.dumps({"turns": EPISODES[row][2]}) for row in rows],
        reward=[EPISODES[row][1] for row in rows],
    )


def test_advantages_are_those_of_the_maths() -> None:
    made = CalibAdvObjective().advantages(batch())
    runs, got = made.ragged("runs"), made.ragged("advantages")
    plain = calibadv.group_advantage(torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3, dtype=torch.long)).tolist()
    for row in range(3):
        assert not got[row][runs[row] == -1].any()
    # The second rollout's first search found silver documents only: c = 1, so nothing is left; the repeated one gets no credit.
    assert not got[1][runs[1] == 0].any() and np.allclose(got[1][runs[1] == 1], plain[1])
    # The third is invalid: its search keeps the plain value, though it was shown the same documents.
    assert np.allclose(got[2][runs[2] == 0], plain[2])
    assert np.allclose(got[0][runs[0] == 0], plain[0])
    answers = [got[row][runs[row] == len(LENGTHS[row]) - 1] for row in range(3)]
    assert answers[0].sum() == pytest.approx(-answers[1].sum() - answers[2].sum(), rel=1e-5), "positive and negative are of one size"
    assert not got[3].any() and not got[4].any()


def test_the_bare_form_is_grpo() -> None:
    made = CalibAdvObjective(soft_penalty=False, rebalance=None).advantages(batch())
    runs, got = made.ragged("runs"), made.ragged("advantages")
    plain = calibadv.group_advantage(torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3, dtype=torch.long)).numpy()
    for row in range(3):
        assert np.array_equal(got[row], np.where(runs[row] >= 0, plain[row], 0))


def test_the_order_of_rows_does_not_matter() -> None:
    order = [3, 0, 4, 2, 1]
    straight, mixed = CalibAdvObjective().advantages(batch()), CalibAdvObjective().advantages(batch(order))
    for place, row in enumerate(order):
        assert np.array_equal(mixed.ragged("advantages")[place], straight.ragged("advantages")[row])


def test_the_loss_is_the_clipped_surrogate_over_generated_tokens() -> None:
    objective: Objective = CalibAdvObjective(importance_cap=1.5)
    ready = objective.advantages(batch())
    rows, pick = Rows(ready, objective.columns, 98, torch.device("cpu")), np.arange(5)
    inputs = rows.inputs(pick)
    n = len(inputs.responses)
    assert n == sum(map(sum, LENGTHS))
    old = -2 * torch.rand(n, generator=torch.Generator().manual_seed(0))
    micro = MicroBatch(objective, inputs, rows.micro(pick), old)
    leaf = (old + 0.3 * torch.randn(n, generator=torch.Generator().manual_seed(1))).requires_grad_()
    loss, metrics = objective.loss(micro.outputs(leaf, torch.zeros(n)), micro.micro)
    kept = ready.ragged("runs").values >= 0
    gain, rollout = (torch.from_numpy(ready.ragged(name).values[kept]) for name in ("advantages", "rollout_logprobs"))
    ratio = (leaf - old).exp()
    weights = gopd.importance_weights(old[None], rollout[None], torch.ones(1, n, dtype=torch.bool), 1.5)[0]
    want = (weights * torch.maximum(-gain * ratio, -gain * ratio.clamp(0.8, 1.2))).mean()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    (through,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(micro.slope(slice(None), leaf.detach()[:, None], torch.zeros(n))[:, 0], through, rtol=1e-5, atol=1e-8)
    assert metrics["dual_clip_fraction"] == 0 and math.isfinite(float(metrics["advantage_abs_max"]))


def test_rows_that_are_no_episodes_are_refused() -> None:
    with pytest.raises(DataError, match="the batch has no column runs"):
        CalibAdvObjective().advantages(Batch(batch().table.drop_columns(["runs"])))


def test_2_what_the_environment_said_has_no_part_but_by_its_documents() -> None:
    rows = batch()
    ids, runs = rows.ragged("response_ids"), rows.ragged("runs")
    other = rows.with_columns(response_ids=Ragged(np.where(runs.values < 0, 96, ids.values).astype(np.int32), ids.offsets))
    plain, changed = (CalibAdvObjective().advantages(one).ragged("advantages").values for one in (rows, other))
    assert np.array_equal(plain, changed) and not plain[runs.values < 0].any()


@pytest.mark.parametrize("form", ["code", "paper"])
def test_a_reward_of_the_threshold_makes_its_documents_silver(form) -> None:
    """F1 of 7 words of 10 and 10 is 0.7; as float32, which the record holds, that is 0.69999999."""
    rows = batch().with_columns(reward=[0.7, 0.0, 0.0, 0.0, 0.0])
    objective = CalibAdvObjective(form=form)
    assert objective.silver_sizes(rows) == [4, 0]
    assert objective.given(rows)["step_scores"][1, 0] == 1.0
    assert objective.silver_sizes(rows.with_columns(reward=[0.6999, 0.0, 0.0, 0.0, 0.0])) == [0, 0]


def test_an_episode_without_generations_has_no_part() -> None:
    nothing = (
        batch()
        .slice(0, 3)
        .with_columns(
            runs=Ragged.of([[], [0], [0]], np.int32),
            response_ids=Ragged.of([[], [4], [4]], np.int32),
            episode=[json.dumps({"turns": []}), *[json.dumps({"turns": [turn(None, "x", valid=True)]})] * 2],
        )
    )
    made = CalibAdvObjective().advantages(nothing).ragged("advantages")
    assert [len(made[row]) for row in range(3)] == [0, 1, 1] and np.isfinite(made.values).all()
