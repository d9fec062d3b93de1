"""Steps on one rank and two, under every ZeRO stage, against a plain PyTorch loop."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Lfm2Config, Lfm2ForCausalLM

from raysys.batch import Batch
from raysys.errors import NumericsError
from raysys.methods import gopd
from raysys.training.objectives import GopdObjective, SftObjective
from tests.training import work
from tests.training.work import RATE, episodes, gopd_batch, merged, spec, train

BATCHES = [gopd_batch(seed=seed) for seed in range(3)]
EPSILON, CLIP = 1e-4, 0.05


def row_logprobs(model, batch: Batch) -> list[torch.Tensor]:
    """Each row alone, through the model's own logits."""
    found = []
    for prompt, response in zip(batch.ragged("prompt_ids").rows(), batch.ragged("response_ids").rows(), strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        table = torch.log_softmax(model(ids[None]).logits[0, len(prompt) - 1 : len(ids) - 1], -1)
        found.append(table.gather(1, ids[len(prompt) :, None])[:, 0])
    return found


def plain_loop(folder: str, batches: list[Batch], aggregation: str = "token", updates: int = 1, rate=lambda step: RATE):
    """The same steps without DeepSpeed, micro-batches or padding. Returns losses, gradient norms and weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, eps=EPSILON, weight_decay=0.01)
    losses, norms = [], []
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate(step)
        with torch.no_grad():
            old = row_logprobs(model, batch)
        for first in range(updates):
            rows = np.arange(first, len(batch), updates)
            terms = [
                row_terms(lp, old[row] if updates > 1 else lp.detach(), batch, row)
                for row, lp in zip(rows, row_logprobs(model, batch.take(rows)))
            ]
            terms = [term for term in terms if len(term)]
            rows_terms = {"token": [torch.cat(terms)], "sequence_token_mean": terms, "sequence_token_sum": terms}[aggregation]
            loss = torch.stack([term.sum() if aggregation == "sequence_token_sum" else term.mean() for term in rows_terms]).mean()
            optimizer.zero_grad()
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
            optimizer.step()
            losses.append(loss.item())
    return losses, norms, {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def row_terms(logprobs, base, batch: Batch, row: int):
    teacher, reference, rollout = (
        torch.from_numpy(batch.ragged(f"{name}_logprobs")[row].copy()) for name in ("teacher", "reference", "rollout")
    )
    gain = 1.25 * teacher - 0.25 * reference - base
    ratio = (logprobs - base).exp()
    loss = torch.maximum(-gain * ratio, -gain * ratio.clamp(0.8, 1.2))
    loss = torch.where(gain < 0, torch.minimum(loss, -3 * gain), loss)
    terms = (base - rollout).exp().clamp(max=5.0) * loss
    return terms[torch.from_numpy(batch.ragged("runs")[row] >= 0)] if "runs" in batch else terms


def assert_same_weights(mine, theirs, tolerance=1e-5):
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_allclose(mine[name], tensor, rtol=0, atol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def plain(models):
    return {name: plain_loop(folder, BATCHES) for name, folder in models.items()}


@pytest.mark.parametrize("ranks", ["solo", "pair"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_three_steps_equal_the_plain_loop(request, models, plain, ranks, stage):
    for name in ("untied", "tied") if stage == 3 or ranks == "solo" else ("untied",):
        results = request.getfixturevalue(ranks)(train, of=spec(models[name], zero_stage=stage), batches=BATCHES)
        losses, norms, weights = plain[name]
        assert min(norms) > CLIP, "clipping is not exercised"
        for step in range(3):
            metrics = merged(results, step)
            assert metrics["loss"] == pytest.approx(losses[step], abs=1e-5)
            assert metrics["grad_norm"] == pytest.approx(norms[step], rel=1e-5)
            assert metrics["tokens"] == BATCHES[step].lengths("response_ids").sum()
        assert_same_weights(results[0][1], weights)


def test_the_start_is_not_the_end(models, plain):
    start = AutoModelForCausalLM.from_pretrained(models["untied"], dtype=torch.float32).state_dict()
    assert min(np.abs(plain["untied"][2][name] - tensor.numpy()).max() for name, tensor in start.items()) > 2e-5


@pytest.mark.parametrize("aggregation", ["token", "sequence_token_mean", "sequence_token_sum"])
def test_the_micro_batch_split_changes_nothing(solo, pair, models, aggregation):
    objective = GopdObjective(reward_scale=1.25, aggregation=aggregation)
    losses, _, weights = plain_loop(models["untied"], BATCHES[:2], aggregation)
    for ranks, tokens in ((solo, 10**6), (solo, 1), (pair, 30)):
        results = ranks(train, of=spec(models["untied"], objective, zero_stage=1, micro_batch_tokens=tokens), batches=BATCHES[:2])
        assert merged(results, 1)["loss"] == pytest.approx(losses[1], abs=1e-5)
        assert_same_weights(results[0][1], weights)


@pytest.mark.parametrize("aggregation", gopd.AGGREGATIONS)
def test_what_an_environment_said_is_read_and_not_trained_on(solo, pair, models, aggregation):
    played, objective = [episodes(batch) for batch in BATCHES[:2]], GopdObjective(reward_scale=1.25, aggregation=aggregation)
    losses, _, weights = plain_loop(models["untied"], played, aggregation)
    for ranks, tokens in ((solo, 10**6), (pair, 30)):
        results = ranks(train, of=spec(models["untied"], objective, zero_stage=1, micro_batch_tokens=tokens), batches=played)
        metrics = merged(results, 1)
        assert metrics["loss"] == pytest.approx(losses[1], abs=1e-5) and metrics["tokens"] == played[1].trained.sum()
        assert_same_weights(results[0][1], weights)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory) -> str:
    """A model with a convolution across tokens, which cannot be told of rows."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 98}
    kinds = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    config = Lfm2Config(**sizes, **kinds, bos_token_id=1, eos_token_id=2, dtype="float32")
    folder = tmp_path_factory.mktemp("hybrid")
    Lfm2ForCausalLM(config).float().save_pretrained(folder)
    return str(folder)


def test_a_model_that_cannot_pack_is_padded_and_trains_all_the_same(solo, pair, hybrid):
    losses, _, weights = plain_loop(hybrid, BATCHES[:2])
    for ranks, tokens in ((solo, 10**6), (pair, 30)):
        results = ranks(train, of=spec(hybrid, zero_stage=1, micro_batch_tokens=tokens), batches=BATCHES[:2])
        assert merged(results, 1)["loss"] == pytest.approx(losses[1], abs=1e-5)
        assert_same_weights(results[0][1], weights)


def test_several_updates_a_batch_use_old_log_probs(solo, pair, models):
    losses, norms, weights = plain_loop(models["untied"], BATCHES[:2], updates=3)
    for ranks, stage in ((solo, 0), (pair, 3)):
        results = ranks(train, of=spec(models["untied"], mini_batches=3, zero_stage=stage), batches=BATCHES[:2])
        metrics = merged(results)
        assert metrics["loss"] == pytest.approx(np.mean(losses[3:]), abs=1e-5)
        assert metrics["grad_norm"] == pytest.approx(np.mean(norms[3:]), rel=1e-4)
        assert_same_weights(results[0][1], weights)


def test_fewer_rows_than_ranks(solo, pair, models):
    tiny = [BATCHES[0].take([0])]
    alone, both = (ranks(train, of=spec(models["untied"], zero_stage=3), batches=tiny) for ranks in (solo, pair))
    assert merged(both)["loss"] == pytest.approx(merged(alone)["loss"], abs=1e-6)
    assert_same_weights(both[0][1], alone[0][1], 1e-6)


def test_metrics_are_token_means_of_the_whole_batch(pair, models):
    batch = BATCHES[0]
    metrics = merged(pair(train, of=spec(models["untied"], zero_stage=1), batches=[batch]))
    with torch.no_grad():
        student = row_logprobs(AutoModelForCausalLM.from_pretrained(models["untied"], dtype=torch.float32), batch)
    gaps = [(lp.numpy() - teacher) for lp, teacher in zip(student, batch.ragged("teacher_logprobs").rows(), strict=True)]
    assert metrics["reverse_kl"] == pytest.approx(np.concatenate(gaps).mean(), abs=1e-5)
    rev = [gap for gap, domain in zip(gaps, batch.strings("domain"), strict=True) if domain == "rev"]
    assert metrics["reverse_kl/rev"] == pytest.approx(np.concatenate(rev).mean(), abs=1e-5)
    rollout = batch.ragged("rollout_logprobs").rows()
    weights = gopd.importance_weights(
        *(torch.tensor(np.concatenate(rows))[None] for rows in (student, rollout)), torch.ones(1, sum(map(len, student)))
    )
    assert metrics["importance_mean"] == pytest.approx(weights.mean().item(), rel=1e-5)
    assert metrics["importance_max"] == pytest.approx(weights.max().item(), rel=1e-5)
    assert 0 < metrics["entropy"] <= math.log(98)


def test_supervised_steps_lower_the_loss(solo, models):
    results = solo(
        train, of=spec(models["tied"], SftObjective(), rate=1e-2, zero_stage=0, clip=1.0, warmup_steps=2), batches=BATCHES[:1] * 8
    )
    losses = [merged(results, step)["nll"] for step in range(8)]
    assert losses[-1] < losses[0] - 0.5
    assert [merged(results, step)["learning_rate"] for step in range(3)] == pytest.approx([5e-3, 1e-2, 1e-2])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_keeps_float32_masters(solo, models, plain, stage):
    results = solo(train, of=spec(models["untied"], dtype="bfloat16", zero_stage=stage), batches=BATCHES)
    assert merged(results)["loss"] == pytest.approx(plain["untied"][0][-1], rel=0.05)
    # Without masters a change of 1e-3 a step would be lost on most weights: bfloat16 has 8 bits.
    assert_same_weights(results[0][1], plain["untied"][2], 8e-3)


def test_activation_checkpointing_changes_nothing(pair, models, plain):
    results = pair(train, of=spec(models["untied"], zero_stage=3, activation_checkpointing=True), batches=BATCHES)
    assert_same_weights(results[0][1], plain["untied"][2])


def train_on_nan(rank, ranks, port, *, of, bad):
    made = work.worker(of, rank, ranks, port)
    before = work.weights(made)
    try:
        made.step(bad, work.shares(of, bad, rank, ranks))
    except NumericsError as error:
        message = str(error)
    return message, all(np.array_equal(tensor, before[name]) for name, tensor in work.weights(made).items())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_loss_that_is_not_finite_stops_all_ranks_before_the_update(pair, models, stage):
    good = BATCHES[0]
    broken = copy.deepcopy(good.ragged("teacher_logprobs").rows())
    broken[4] = broken[4] * np.nan
    bad = good.with_columns(teacher_logprobs=[row.tolist() for row in broken])
    results = pair(train_on_nan, of=spec(models["untied"], zero_stage=stage), bad=bad)
    for message, intact in results:
        assert "step 0" in message and "p4@0/0" in message and "nan" in message
        assert intact


def overflow(rank, ranks, port, *, of, batch, which):
    made = work.worker(of, rank, ranks, port)
    before = work.weights(made)
    if rank == ranks - 1:
        list(made.engine.names.values())[which].register_hook(lambda gradient: gradient * float("inf"))
    try:
        made.step(batch, work.shares(of, batch, rank, ranks))
    except NumericsError as error:
        return str(error), all(np.array_equal(tensor, before[name]) for name, tensor in work.weights(made).items())


@pytest.mark.parametrize("which", [0, -1], ids=["first parameter", "last parameter"])
@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (1, "bfloat16"), (3, "bfloat16")]
)
def test_one_gradient_of_one_rank_that_is_not_finite_stops_all_and_changes_nothing(pair, models, stage, dtype, which):
    results = pair(overflow, of=spec(models["untied"], zero_stage=stage, dtype=dtype), batch=BATCHES[0], which=which)
    for rank, (message, intact) in enumerate(results):
        assert "step 0" in message and f"rank {rank} had p" in message and "gradient norm is not" in message
        assert intact


def read_logprobs(rank, ranks, port, *, of, batch, probe):
    made = work.worker(of, rank, ranks, port)
    share = work.shares(of, batch, rank, ranks)[0]
    return share.rows, made.logprobs(batch, share).rows(), made.probe_logprobs(probe)


def test_log_probs_and_probe_equal_transformers(pair, models):
    batch, probe = BATCHES[1], [5, 9, 13, 40, 97]
    results = pair(read_logprobs, of=spec(models["tied"], zero_stage=3), batch=batch, probe=probe)
    model = AutoModelForCausalLM.from_pretrained(models["tied"], dtype=torch.float32)
    with torch.no_grad():
        want = row_logprobs(model, batch)
        table = torch.log_softmax(model(torch.tensor([probe])).logits[0, :-1], -1)
    for rows, found, probed in results:
        np.testing.assert_allclose(probed, table.gather(1, torch.tensor(probe[1:])[:, None])[:, 0], rtol=0, atol=1e-5)
        for row, values in zip(rows, found, strict=True):
            np.testing.assert_allclose(values, want[row], rtol=0, atol=1e-5)
