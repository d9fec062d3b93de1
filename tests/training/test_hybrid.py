"""HPD as an objective: draws, queries and steps on one rank and two against `raysys.methods.hpd` on a model's own logits."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from raysys.batch import Batch, Ragged
from raysys.config.runs import HpdConfig
from raysys.methods import hpd
from raysys.report.charts import CURVES
from raysys.training.hybrid import PARTS, HpdObjective, uniforms
from raysys.training.objectives import SftObjective
from tests.training import work
from tests.training.work import RATE, gopd_batch, merged, spec, train

BATCH = gopd_batch(seed=4)
EPISODES = BATCH.with_columns(
    runs=Ragged.of([[-1 if place % 3 == 1 else place // 3 for place in range(n)] for n in BATCH.lengths("response_ids")], np.int32)
)


class Drawer:
    """A trainer that draws what it was told."""

    def __init__(self, draws: Ragged):
        self.draws = dict(zip(BATCH.ids, draws.rows(), strict=True))

    def draw(self, batch: Batch) -> Ragged:
        return Ragged.of([self.draws[name] for name in batch.ids], np.int32)


def asked(objective: HpdObjective, draws: Ragged, batch: Batch = BATCH) -> Ragged | None:
    """The queries of all rows together."""
    parts = objective.queries(Drawer(draws), batch)
    if parts is None:
        return None
    parts = list(parts)
    assert np.concatenate([rows for rows, _ in parts]).tolist() == list(range(len(BATCH))) and len(parts) == PARTS
    return Ragged.of([ids for _, part in parts for ids in part.rows()], np.int32)


def tables(folder: str, batch: Batch) -> list[torch.Tensor]:
    """Each row alone: logits [n, V] at the positions that predict its response."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for prompt, response in zip(batch.ragged("prompt_ids").rows(), batch.ragged("response_ids").rows(), strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        found.append(model(ids[None]).logits[0, len(prompt) - 1 : len(ids) - 1])
    return found


def scored(batch: Batch, queries: Ragged, teacher: list[torch.Tensor]) -> Batch:
    """What the scorers add."""
    told = []
    for ids, table in zip(queries.rows(), teacher, strict=True):
        told.append(torch.log_softmax(table.detach(), -1).gather(1, torch.from_numpy(ids.reshape(-1, 2).astype(np.int64))).numpy().ravel())
    return batch.with_columns(teacher_logprobs=Ragged.of(told, np.float32), query_ids=queries)


def draw(rank: int, ranks: int, port: int, *, of, batch: Batch) -> list[tuple[int, list[int]]]:
    """This rank's rows and their draws."""
    made = work.worker(of, rank, ranks, port)
    (share,) = work.shares(of, batch, rank, ranks)
    return [(int(row), ids.tolist()) for row, ids in zip(share.rows, made.draw(batch, share).rows(), strict=True)]


def assembled(parts: list[list[tuple[int, list[int]]]], rows: int) -> Ragged:
    found = dict(pair for part in parts for pair in part)
    return Ragged.of([found.get(row, []) for row in range(rows)], np.int32)


@pytest.fixture(scope="module")
def drawn(solo, models) -> Ragged:
    return assembled(solo(draw, of=spec(models["untied"], HpdObjective()), batch=BATCH), len(BATCH))


def test_draws_invert_the_students_distribution_at_numbers_of_their_own(drawn: Ragged, models) -> None:
    numbers = uniforms(BATCH.ids, BATCH.lengths("response_ids"), 0)
    for ids, row, table in zip(drawn.rows(), numbers, tables(models["untied"], BATCH), strict=True):
        mass = torch.softmax(table.detach().double(), -1).cumsum(-1).numpy()
        assert len(ids) == len(row)
        for chosen, number, steps in zip(ids, row, mass, strict=True):
            assert steps[chosen] > number - 1e-5 and (chosen == 0 or steps[chosen - 1] <= number + 1e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_draws_do_not_depend_on_ranks_micro_batches_or_company(drawn: Ragged, pair, solo, models, stage: int) -> None:
    other = assembled(
        pair(draw, of=spec(models["untied"], HpdObjective(), zero_stage=stage, micro_batch_tokens=20), batch=BATCH), len(BATCH)
    )
    assert np.array_equal(other.values, drawn.values)
    some = BATCH.take([9, 2, 5])
    part = assembled(solo(draw, of=spec(models["untied"], HpdObjective()), batch=some), 3)
    assert [ids.tolist() for ids in part.rows()] == [drawn[row].tolist() for row in (9, 2, 5)]


def test_uniforms_follow_seed_and_sample() -> None:
    first, second = uniforms(["a@0/0", "a@1/0"], np.array([5, 5]), 3)
    assert not np.array_equal(first, second) and ((first >= 0) & (first < 1)).all()
    assert np.array_equal(uniforms(["a@0/0"], np.array([9]), 3)[0][:5], first)
    assert not np.array_equal(uniforms(["a@0/0"], np.array([5]), 4)[0], first)


def test_queries_are_data_token_and_draw_and_come_back_as_columns(drawn: Ragged, models) -> None:
    objective = HpdObjective()
    queries = asked(objective, drawn)
    data = BATCH.ragged("response_ids")
    assert queries is not None and queries[3].reshape(-1, 2).tolist() == [list(two) for two in zip(data[3].tolist(), drawn[3].tolist())]
    batch = objective.advantages(scored(BATCH, queries, tables(models["tied"], BATCH)))
    assert np.array_equal(batch.ragged("draw_ids").values, drawn.values)
    told = batch.ragged("teacher_logprobs")[3], batch.ragged("teacher_draw_logprobs")[3]
    table = torch.log_softmax(tables(models["tied"], BATCH)[3].detach(), -1).numpy()
    for ids, values in zip((data[3], drawn[3]), told, strict=True):
        np.testing.assert_allclose(values, table[np.arange(len(ids)), ids], atol=1e-6)


def direct(models, draws: Ragged, kind: str, trained: np.ndarray | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss from logits and the gradients of all weights, without micro-batches. `trained`: which response tokens count."""
    model = AutoModelForCausalLM.from_pretrained(models["untied"], dtype=torch.float32)
    teacher, rows = tables(models["tied"], BATCH), []
    for prompt, response in zip(BATCH.ragged("prompt_ids").rows(), BATCH.ragged("response_ids").rows(), strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        rows.append(model(ids[None]).logits[0, len(prompt) - 1 : len(ids) - 1])
    student, data = torch.cat(rows)[None], torch.from_numpy(BATCH.ragged("response_ids").values.astype(np.int64))[None]
    drawn, whole = torch.from_numpy(draws.values.astype(np.int64))[None], torch.ones_like(data, dtype=torch.bool)
    whole = whole if trained is None else torch.from_numpy(trained)[None]
    if kind == "hpd":
        loss, _ = hpd.loss(student, torch.cat(teacher)[None].detach(), data, whole, drawn)
    else:
        lq, lp = (torch.log_softmax(x, -1).gather(-1, data[..., None])[..., 0] for x in (student, torch.cat(teacher)[None].detach()))
        loss, _ = hpd.token_loss(lq, lp, lq, lp, whole, whole, kind)  # type: ignore[arg-type]
    loss.backward()
    return float(loss.detach()), {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}


@pytest.mark.parametrize(
    ("kind", "ranks", "stage"), [("hpd", 1, 0), ("hpd", 2, 3), ("jsd", 2, 1), ("rkld", 1, 1), ("seqkd", 1, 0), ("sft", 1, 0)]
)
def test_a_step_is_the_loss_on_the_logits(drawn: Ragged, solo, pair, models, kind: str, ranks: int, stage: int) -> None:
    objective = HpdObjective(kind=kind)  # type: ignore[arg-type]
    of = spec(models["untied"], objective, zero_stage=stage, micro_batch_tokens=20)
    queries = asked(objective, drawn)
    teacher = tables(models["tied"], BATCH)
    if queries is None:
        plain = [
            torch.log_softmax(t.detach(), -1)[torch.arange(len(t)), ids.astype(np.int64)]
            for t, ids in zip(teacher, BATCH.ragged("response_ids").rows())
        ]
        batch = BATCH.with_columns(teacher_logprobs=Ragged.of([p.numpy() for p in plain], np.float32))
    else:
        batch = scored(BATCH, queries, teacher)
    results = (solo if ranks == 1 else pair)(train, of=of, batches=[objective.advantages(batch)])
    told, (want, grads) = merged(results), direct(models, drawn, kind)
    assert told["loss"] == pytest.approx(want, abs=2e-6)
    norm = torch.sqrt(sum((grad**2).sum() for grad in grads.values()))  # type: ignore[arg-type]
    assert told["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    before = AutoModelForCausalLM.from_pretrained(models["untied"], dtype=torch.float32)
    scale = min(1.0, of.config.clip / (float(norm) + 1e-6))
    for name, tensor in before.named_parameters():  # AdamW's first step: the gradient over its own size and epsilon
        grad = grads[name] * scale
        stepped = tensor.detach() * (1 - RATE * 0.01) - RATE * grad / (grad.abs() + 1e-4)
        np.testing.assert_allclose(results[0][1][name], stepped.numpy(), rtol=0, atol=2e-5, err_msg=name)


def test_of_an_episode_what_was_generated_is_drawn_and_learned(solo, models) -> None:
    objective, generated = HpdObjective(), EPISODES.ragged("runs").values >= 0
    of = spec(models["untied"], objective, zero_stage=0, micro_batch_tokens=20)
    drawn = assembled(solo(draw, of=of, batch=EPISODES), len(EPISODES))
    queries = asked(objective, drawn, EPISODES)
    assert queries is not None and 0 < len(drawn.values) == generated.sum() < len(generated)
    pairs = queries.values.reshape(-1, 2)
    assert np.array_equal(pairs[generated, 1], drawn.values) and np.array_equal(pairs[~generated, 0], pairs[~generated, 1])
    numbers = np.concatenate(uniforms(EPISODES.ids, EPISODES.trained, 0))
    mass = torch.softmax(torch.cat(tables(models["untied"], EPISODES)).detach().double(), -1).cumsum(-1).numpy()[generated]
    for chosen, number, steps in zip(drawn.values, numbers, mass, strict=True):
        assert steps[chosen] > number - 1e-5 and (chosen == 0 or steps[chosen - 1] <= number + 1e-5)
    batch = objective.advantages(scored(EPISODES, queries, tables(models["tied"], EPISODES)))
    told = merged(solo(train, of=of, batches=[batch]))
    want, grads = direct(models, batch.ragged("draw_ids"), "hpd", generated)
    assert told["loss"] == pytest.approx(want, abs=2e-6)
    assert told["grad_norm"] == pytest.approx(float(torch.sqrt(sum((grad**2).sum() for grad in grads.values()))), rel=1e-4)  # type: ignore[arg-type]


def test_sft_is_the_sft_objective_with_another_name(solo, models) -> None:
    plain, same = (merged(solo(train, of=spec(models["tied"], one), batches=[BATCH])) for one in (SftObjective(), HpdObjective(kind="sft")))
    assert plain == pytest.approx(same, rel=1e-6)


def test_metrics_of_a_step_are_those_of_the_whole_batch(drawn: Ragged, pair, models) -> None:
    objective = HpdObjective()
    batch = objective.advantages(scored(BATCH, asked(objective, drawn), tables(models["tied"], BATCH)))  # type: ignore[arg-type]
    told = merged(pair(train, of=spec(models["untied"], objective, micro_batch_tokens=20), batches=[batch]))
    student, teacher = (torch.cat(tables(models[name], BATCH)).detach()[None] for name in ("untied", "tied"))
    data, draws = (torch.from_numpy(x.astype(np.int64))[None] for x in (BATCH.ragged("response_ids").values, drawn.values))
    _, want = hpd.loss(student, teacher, data, torch.ones_like(data, dtype=torch.bool), draws)
    assert {*want, "teacher_doubts", "nll/add", "nll/rev"} <= told.keys()
    for name, value in want.items():
        assert told[name] == pytest.approx(float(value), abs=1e-5), name
    assert {"forward_kl_data", "reverse_kl_draws", "k_min", "suppressed"} <= set(CURVES), "the report draws them"


def test_what_each_kind_reads_and_asks() -> None:
    config = HpdConfig.load(None, ["student=s", "teachers.default=t", "data.path=d", "use_reinforce=false"])
    objective = HpdObjective.of(config)
    assert objective == HpdObjective(use_reinforce=False) and pickle.loads(pickle.dumps(objective)) == objective
    assert objective.draws and objective.asks == ("draw_ids",) and "teacher_draw_logprobs" in objective.columns
    for kind in ("seqkd", "rkld", "jsd"):
        other = HpdObjective(kind=kind)  # type: ignore[arg-type]
        assert other.queries(None, BATCH) is None and other.asks == () and other.columns == ("response_ids", "teacher_logprobs")
    assert HpdObjective(kind="sft").columns == ("response_ids",)
    assert HpdObjective(use_student_sample=False).queries(None, BATCH) is None
