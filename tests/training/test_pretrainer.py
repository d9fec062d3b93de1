"""A pretraining rank: its loss by hand, and the same whatever ranks, ZeRO stages and empty shares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysys.config.corpora import Corpus, Source
from raysys.data.local_text import train_tokenizer
from raysys.data.token_cache import TokenCache
from raysys.data.tokenise import tokenise_all
from raysys.plan import gradient_bytes
from tests.training import pretraining
from tests.training.ranks import Ranks


def alike(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    (metrics, watched, tensors), (metrics2, watched2, tensors2) = one, other
    for before, after in zip(metrics, metrics2, strict=True):
        assert before == pytest.approx(after, rel=tolerance, abs=tolerance)
    for name in ("alignment", "row_cosine", "max_violation_global", "validation"):
        assert watched[name] == pytest.approx(watched2[name], rel=1e-4)
    assert tensors.keys() == tensors2.keys()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(tensor, tensors2[name], atol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def alone(solo: Ranks) -> Any:
    return solo(pretraining.trained, of=pretraining.config())[0]


def test_the_first_loss_is_that_of_the_formula(alone: Any) -> None:
    from raysys.models.moe import MoeDecoder, shape_for
    from raysys.models.packing import Packing

    of = pretraining.config()
    model = MoeDecoder(shape_for(of.model, of.router, pretraining.VOCABULARY, 24)).initialise(of.seed).double()
    nll = count = 0.0
    balances, zs = [], []
    for part in pretraining.shares(0, 2, 0, 1):
        states, routed = model(torch.from_numpy(part.ids), Packing(part.lengths, "cpu"))
        logp = torch.nn.functional.linear(states, model.head.weight).log_softmax(-1)
        start = 0
        for length in part.lengths:
            for place in range(start + 1, start + length):
                nll, count = nll - logp[place - 1, part.ids[place]].item(), count + 1
            start += length
        for layer in routed:
            share = torch.zeros(4, dtype=torch.float64)
            for row in layer.indices.tolist():
                share[row] += 1 / layer.indices.numel()
            balances.append((4 * (share * layer.probs.mean(0)).sum()).item())
            zs.append(layer.logits.exp().sum(-1).log().square().mean().item())
    metrics = alone[0][0]
    assert metrics["loss"] == pytest.approx(nll / count, rel=1e-5)
    assert metrics["balance_loss"] == pytest.approx(np.mean(balances), rel=1e-5)
    assert metrics["z_loss"] == pytest.approx(np.mean(zs), rel=1e-5)
    assert metrics["tokens"] == 4 * 24 - 7


def test_what_is_shown_again_is_learned(solo: Ranks) -> None:
    of = pretraining.config(optimiser={"learning_rate": 1e-2, "schedule": "constant"}, steps=30)
    metrics = solo(pretraining.trained, of=of, steps=30, same=True)[0][0]
    assert metrics[-1]["loss"] < 0.6 * metrics[0]["loss"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_are_one(alone: Any, pair: Ranks, stage: int) -> None:
    for found in pair(pretraining.trained, of=pretraining.config(trainer={"ranks": 2, "zero_stage": stage})):
        alike(alone, found)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_rank_without_sequences_changes_nothing(alone: Any, pair: Ranks, stage: int) -> None:
    for found in pair(pretraining.trained, of=pretraining.config(trainer={"ranks": 2, "zero_stage": stage}), empty=True):
        alike(alone, found)


@pytest.mark.parametrize(
    ("kind", "stage"), [("adamw", 0), ("adamw", 1), ("adamw", 2), ("muonh", 0), ("muonh", 1), ("adamh", 2), ("muon", 2)]
)
def test_experts_split_over_two_ranks_are_whole_ones(alone: Any, solo: Ranks, pair: Ranks, kind: str, stage: int) -> None:
    whole = alone if kind == "adamw" else solo(pretraining.trained, of=pretraining.config(optimiser={"kind": kind}))[0]
    of = pretraining.config(trainer={"ranks": 2, "zero_stage": stage, "expert_parallel": 2}, optimiser={"kind": kind})
    found = pair(pretraining.trained, of=of)
    alike(whole, found[0])
    assert found[0][0] == found[1][0]


@pytest.fixture(scope="module")
def overwritten(solo: Ranks) -> Any:
    return solo(pretraining.overwritten_by_hand, of=pretraining.config(router={"mode": "inplace"}))[0]


def test_a_router_in_place_is_a_plain_one_that_is_overwritten_after_each_step(alone: Any, overwritten: Any, solo: Ranks) -> None:
    for stage in (0, 1, 2):
        alike(overwritten, solo(pretraining.trained, of=pretraining.config(router={"mode": "inplace"}, trainer={"zero_stage": stage}))[0])
    assert overwritten[0][0]["loss"] == pytest.approx(alone[0][0]["loss"], rel=1e-5), "the same rows at first"
    assert overwritten[0][2]["loss"] != pytest.approx(alone[0][2]["loss"], rel=1e-5)


@pytest.mark.parametrize("trainer", [{"zero_stage": 0}, {"zero_stage": 2}, {"zero_stage": 1, "expert_parallel": 2}])
def test_a_router_in_place_on_two_ranks_is_that_on_one(overwritten: Any, pair: Ranks, trainer: dict[str, int]) -> None:
    of = pretraining.config(router={"mode": "inplace"}, trainer={"ranks": 2} | trainer)
    alike(overwritten, pair(pretraining.trained, of=of)[0])


def test_masters_of_a_router_in_place_are_overwritten_in_float32(pair: Ranks) -> None:
    of = pretraining.config(router={"mode": "inplace"}, trainer={"ranks": 2, "zero_stage": 1})
    for found in pair(pretraining.overwritten_masters, of=of):
        assert found == [(True, True)] * 2


@pytest.mark.parametrize(("stage", "kind"), [(0, "adamw"), (1, "adamw"), (2, "adamw"), (3, "adamw"), (2, "muonh")])
def test_gradients_take_what_the_plan_says(pair: Ranks, stage: int, kind: str) -> None:
    of = pretraining.config(trainer={"ranks": 2, "zero_stage": stage}, optimiser={"kind": kind})
    for held, parameters in pair(pretraining.gradients, of=of):
        planned = gradient_bytes(max(stage, 1), True, parameters, parameters / 2, False) - (8 * parameters if stage > 1 else 0)
        assert held == pytest.approx(planned, rel=0.02), "but for what fills parts up to whole numbers"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    folder = tmp_path_factory.mktemp("held out")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"document {number} " * 9}) + "\n" for number in range(80)))
    train_tokenizer([folder / "text.jsonl"], 300, folder / "tokenizer")
    source = Source(path=str(folder / "text.jsonl"))
    data = Corpus(sources={"a": source}, tokenizer=str(folder / "tokenizer"), sequence=pretraining.SEQUENCE, held_out_share=0.3)
    cache = TokenCache(data, str(folder / "tokens"), 0, lambda work, units, tasks: (one for one in tokenise_all(work, units)))
    cache.wait(60)
    return cache


def test_the_held_out_loss_is_of_as_many_sequences_as_asked_whatever_shares_them(solo: Ranks, pair: Ranks, cache: TokenCache) -> None:
    def measured(ranks: Ranks, passes: list[list[int]], **values: Any) -> float:
        of = pretraining.config(validation={"sequences": 7}, **values)
        found = ranks(pretraining.held_out, of=of, cache=cache.path, plan=cache.plan.name)
        assert [sizes for _, sizes in found] == passes and len({loss for loss, _ in found}) == 1
        return found[0][0]

    whole = measured(solo, [[2, 2, 2, 1]])
    halves = [[1, 1, 1, 0], [1, 1, 1, 1]]
    others = [measured(solo, [[7]], batch=512, accumulation=1), measured(solo, [[3, 3, 1]], batch=3, accumulation=1)]
    others += [measured(pair, halves, trainer={"ranks": 2, "zero_stage": stage}) for stage in (1, 3)]
    others.append(measured(pair, halves, trainer={"ranks": 2, "expert_parallel": 2}))
    assert others == pytest.approx([whole] * len(others), rel=1e-6)


@pytest.mark.parametrize(
    ("optimiser", "mode"),
    [
        ({"kind": "adamw"}, "functional"),
        ({"kind": "muonh"}, "functional"),
        ({}, "inplace"),
        ({"kind": "muonh", "matrix_norm": "initial"}, "inplace"),
    ],
)
def test_saved_and_loaded_goes_on_bit_by_bit(solo: Ranks, tmp_path: Path, optimiser: Any, mode: str) -> None:
    of = pretraining.config(optimiser=optimiser, router={"mode": mode})
    whole = solo(pretraining.trained, of=of)[0]
    first = solo(pretraining.trained, of=of, steps=1, folder=str(tmp_path / "one"))[0]
    rest = solo(pretraining.trained, of=of, steps=2, load=str(tmp_path / "one"))[0]
    assert first[0] + rest[0] == whole[0]
    for name, tensor in rest[2].items():
        np.testing.assert_array_equal(tensor, whole[2][name])


@pytest.mark.parametrize(
    ("trainer", "optimiser"),
    [
        ({"zero_stage": 1}, {}),
        ({"zero_stage": 0}, {}),
        ({"zero_stage": 3}, {}),
        ({"zero_stage": 2, "expert_parallel": 2}, {}),
        ({"zero_stage": 1}, {"kind": "muonh"}),
        ({"zero_stage": 1, "expert_parallel": 2}, {"kind": "muonh"}),
        ({"zero_stage": 0, "expert_parallel": 2}, {"kind": "adamh"}),
    ],
)
def test_two_ranks_go_on_as_one(solo: Ranks, pair: Ranks, tmp_path: Path, trainer: Any, optimiser: Any) -> None:
    one = pretraining.config(optimiser=optimiser)
    whole = solo(pretraining.trained, of=one)[0]
    two = pretraining.config(trainer={"ranks": 2} | trainer, optimiser=optimiser)
    pair(pretraining.trained, of=two, steps=1, folder=str(tmp_path / "two"))
    rest = solo(pretraining.trained, of=one, steps=2, load=str(tmp_path / "two"))[0]
    assert [each["loss"] for each in rest[0]] == pytest.approx([each["loss"] for each in whole[0][1:]], rel=1e-5)
    for name, tensor in rest[2].items():
        np.testing.assert_allclose(tensor, whole[2][name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("before", "stage"),
    [
        ({}, 1),
        ({"zero_stage": 0}, 0),
        ({"ranks": 2, "zero_stage": 0}, 0),
        ({"ranks": 2, "zero_stage": 1}, 1),
        ({"ranks": 2, "zero_stage": 3}, 2),
    ],
)
def test_whole_experts_go_on_split(alone: Any, solo: Ranks, pair: Ranks, tmp_path: Path, before: Any, stage: int) -> None:
    ranks = pair if before.get("ranks") == 2 else solo
    ranks(pretraining.trained, of=pretraining.config(trainer=before), steps=1, folder=str(tmp_path / "whole"))
    of = pretraining.config(trainer={"ranks": 2, "zero_stage": stage, "expert_parallel": 2})
    rest = pair(pretraining.trained, of=of, steps=2, load=str(tmp_path / "whole"))[0]
    alike((alone[0][1:], *alone[1:]), rest)
