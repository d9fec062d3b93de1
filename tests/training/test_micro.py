"""The derivative of a micro-batch's loss, some tokens at a time, against autograd through the whole of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raysys.batch import Ragged
from raysys.training.hybrid import HpdObjective
from raysys.training.micro import MicroBatch
from raysys.training.objectives import GopdObjective, Objective, SftObjective
from raysys.training.rows import Rows
from tests.training.work import gopd_batch

PICK = np.array([0, 2, 3, 7])
OBJECTIVES: list[Objective] = [
    SftObjective(),
    GopdObjective(reward_scale=1.25, importance_cap=1.1, clip_low=0.01, clip_high=0.01),
    HpdObjective(),
    HpdObjective(use_student_sample=False),
    HpdObjective(kind="jsd"),
]


def micro_batch(objective: Objective, old: bool = False) -> MicroBatch:
    batch, generator = gopd_batch(), np.random.default_rng(1)
    responses = batch.ragged("response_ids")
    draws = np.where(generator.random(len(responses.values)) < 0.5, responses.values, generator.integers(3, 90, len(responses.values)))
    told = Ragged((-4 * generator.random(len(draws))).astype(np.float32), responses.offsets)
    batch = batch.with_columns(draw_ids=Ragged(draws.astype(np.int32), responses.offsets), teacher_draw_logprobs=told)
    rows = Rows(batch, objective.columns, 98, torch.device("cpu"))
    inputs = rows.inputs(PICK)
    before = -4 * torch.rand(len(inputs.responses), generator=torch.Generator().manual_seed(2)) if old else None
    return MicroBatch(objective, inputs, rows.micro(PICK), before)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("old", [False, True], ids=["one update", "several updates"])
@pytest.mark.parametrize("size", [1, 5, 10**6])
def test_parts_have_the_slope_of_the_whole(objective, old, size):
    micro = micro_batch(objective, old)
    n, queries = len(micro.inputs.responses), micro.queries
    shape = (n, 1 if queries is None else queries.shape[1])
    near = 0.0 if micro.old_logprobs is None else micro.old_logprobs[:, None]
    leaf = (near - 0.05 * torch.rand(shape, generator=torch.Generator().manual_seed(3))).requires_grad_()
    entropy = torch.rand(n)
    loss, _ = objective.loss(micro.outputs(leaf, entropy), micro.micro)
    (want,) = torch.autograd.grad(loss, leaf)
    assert want.abs().sum() > 0 and micro.separable
    pieces = [slice(start, min(start + size, n)) for start in range(0, n, size)]
    got = torch.cat([micro.slope(piece, leaf.detach()[piece], entropy[piece]) for piece in pieces])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)


def test_a_mean_over_sequences_has_no_parts():
    assert not micro_batch(GopdObjective(aggregation="sequence_token_mean")).separable


def test_what_is_asked_for():
    assert micro_batch(SftObjective()).queries is None
    asked = micro_batch(HpdObjective())
    assert asked.queries is not None
    assert torch.equal(asked.queries[:, 0], asked.inputs.responses)
    assert torch.equal(asked.inputs.padded(asked.queries[:, 1]), asked.micro.columns["draw_ids"].long())
