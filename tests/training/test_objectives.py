"""Objectives against the formulas they bind, and rows as the tensors they read."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from raysys.batch import Batch, Ragged
from raysys.config.runs import GopdConfig
from raysys.errors import DataError
from raysys.methods import gopd
from raysys.report.charts import CURVES
from raysys.training.objectives import GopdObjective, Outputs, SftObjective
from raysys.training.rows import Rows
from raysys.training.split import split
from tests.training.work import episodes, gopd_batch

CPU = torch.device("cpu")
PICK = np.array([0, 2, 3, 7])


def outputs(rows: Rows, old: bool = False) -> Outputs:
    inputs, generator = rows.inputs(PICK), torch.Generator().manual_seed(0)
    flat = -4 * torch.rand(int(inputs.response_lengths.sum()), generator=generator)
    before = inputs.padded(flat + 0.3 * torch.randn(flat.shape, generator=generator)) if old else None
    return Outputs(inputs.padded(flat).requires_grad_(), inputs.padded(flat), inputs.mask, before)


@pytest.mark.parametrize("old", [False, True], ids=["one update", "several updates"])
def test_gopd_is_its_formulas_on_the_columns(old):
    objective = GopdObjective(reward_scale=1.25, importance_cap=2.0, aggregation="sequence_token_mean")
    assert objective.weighting == "sequence"
    rows = Rows(gopd_batch(), objective.columns, 98, CPU)
    given, micro = outputs(rows, old), rows.micro(PICK)
    loss, metrics = objective.loss(given, micro)

    teacher, reference, rollout = (micro.columns[f"{name}_logprobs"] for name in ("teacher", "reference", "rollout"))
    base = given.old_logprobs if old else given.logprobs.detach()
    gain = gopd.advantage(base, teacher, reference, 1.25)
    weights = gopd.importance_weights(base, rollout, given.mask, 2.0)
    want, _ = gopd.policy_loss(given.logprobs, base, gain, given.mask, weights, aggregation="sequence_token_mean")
    assert loss.item() == want.item()
    gap = (given.logprobs - teacher)[given.mask]
    assert metrics["reverse_kl"][0] / metrics["reverse_kl"][1] == pytest.approx(gap.mean().item())
    assert metrics["advantage_abs_max"] == gain[given.mask].abs().max()
    assert metrics["advantage_mean"][0] / metrics["advantage_mean"][1] == pytest.approx(gain[given.mask].mean().item(), rel=1e-5)
    assert metrics["importance_mean"][0] == weights.sum()
    assert {"reverse_kl", "importance_mean"} <= metrics.keys() & set(CURVES), "the report draws them"
    assert metrics["importance_max"] == weights.max() <= 2.0
    parts = [metrics["reverse_kl/add"], metrics["reverse_kl/rev"]]
    assert sum(part[0] for part in parts) == pytest.approx(metrics["reverse_kl"][0].item(), rel=1e-5)
    assert sum(part[1] for part in parts) == given.mask.sum()


def test_plain_distillation_reads_no_reference():
    assert "reference_logprobs" not in GopdObjective(reward_scale=1.0).columns
    assert "reference_logprobs" in GopdObjective(reward_scale=0.0).columns
    config = GopdConfig.load(None, ["student=s", "teachers.default=t", "data.path=d", "clip_low=0.1", "aggregation=sequence_token_sum"])
    assert GopdObjective.of(config) == GopdObjective(clip_low=0.1, aggregation="sequence_token_sum")
    assert len(pickle.dumps(GopdObjective())) < 1000


def test_sft_is_the_mean_negative_log_likelihood():
    rows = Rows(gopd_batch(), (), 98, CPU)
    given = outputs(rows)
    loss, metrics = SftObjective().loss(given, rows.micro(PICK))
    assert loss.item() == pytest.approx(-given.logprobs[given.mask].mean().item())
    assert metrics["nll"] == loss
    (gradient,) = torch.autograd.grad(loss, given.logprobs)
    assert torch.equal(gradient, -given.mask.float() / given.mask.sum())


def test_the_model_reads_rows_packed_and_objectives_read_them_padded():
    batch = gopd_batch()
    rows = Rows(batch, ("teacher_logprobs",), 98, CPU)
    inputs, micro = rows.inputs(PICK), rows.micro(PICK)
    prompts, responses, teacher = (batch.ragged(name) for name in ("prompt_ids", "response_ids", "teacher_logprobs"))
    assert inputs.input_ids.tolist() == np.concatenate([part[row] for row in PICK for part in (prompts, responses)]).tolist()
    assert inputs.prompt_lengths.tolist() == [len(prompts[row]) for row in PICK]
    assert inputs.response_lengths.tolist() == [len(responses[row]) for row in PICK]
    for index, row in enumerate(PICK):
        assert micro.columns["teacher_logprobs"][index][inputs.mask[index]].tolist() == teacher[row].tolist()
        assert not micro.columns["teacher_logprobs"][index][~inputs.mask[index]].any()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt_ids": Ragged.of([[1]] * 12 + [[]], np.int32)}, "p12@0/0 has an empty prompt"),
        ({"prompt_ids": Ragged.of([[1]] * 12 + [[98]], np.int32)}, "token id 98"),
        ({"teacher_logprobs": Ragged.of([[0.5]] * 13, np.float32)}, "p0@0/0 has 1 values of teacher_logprobs for"),
    ],
)
def test_bad_rows_are_named(columns, message):
    with pytest.raises(DataError, match=message):
        Rows(gopd_batch(**columns), ("teacher_logprobs",), 98, CPU)


def test_a_missing_column_is_named():
    batch = gopd_batch()
    with pytest.raises(DataError, match="no column reference_logprobs"):
        Rows(Batch(batch.table.drop_columns(["reference_logprobs"])), GopdObjective(reward_scale=2.0).columns, 98, CPU)


def test_of_an_episode_only_what_was_generated_is_asked_for_and_counts():
    batch = episodes(gopd_batch())
    rows = Rows(batch, ("teacher_logprobs",), 98, CPU)
    inputs, micro = rows.inputs(PICK), rows.micro(PICK)
    runs, responses, told = (batch.ragged(name) for name in ("runs", "response_ids", "teacher_logprobs"))
    kept = [runs[row] >= 0 for row in PICK]
    assert rows.trained[PICK].tolist() == [int(keep.sum()) for keep in kept] == batch.trained[PICK].tolist() and rows.trained[3] == 0
    assert inputs.responses.tolist() == np.concatenate([responses[row][keep] for row, keep in zip(PICK, kept, strict=True)]).tolist()
    want = np.concatenate([told[row][keep] for row, keep in zip(PICK, kept, strict=True)])
    assert torch.equal(micro.columns["teacher_logprobs"][inputs.mask], torch.from_numpy(want))
    assert inputs.response_lengths.tolist() == [len(responses[row]) for row in PICK], "the model reads all of them"
    parts = split(batch.lengths("prompt_ids"), batch.lengths("response_ids"), ranks=2, mini_batches=1, budget=40, trained=batch.trained)
    assert parts[0][0].tokens == rows.trained.sum() and 3 not in np.concatenate([part.rows for part in parts[0]])


def test_runs_of_another_length_name_the_row():
    batch = gopd_batch()
    wrong = Ragged.of([np.zeros(n + (row == 2)) for row, n in enumerate(batch.lengths("response_ids"))], np.int32)
    with pytest.raises(DataError, match=r"p2@0/0 has .* values of runs for .* response tokens"):
        Rows(batch.with_columns(runs=wrong), (), 98, CPU)
