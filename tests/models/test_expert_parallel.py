"""Experts on two ranks, and on four in two groups, give what one rank gives: outputs, losses, gradients, files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from raysys.models.experts import mixture
from raysys.models.moe import MoeDecoder
from raysys.models.moe_files import export_moe
from raysys.models.routing import Routing, balance_loss, choose, z_loss
from tests.models import expert_ranks
from tests.models.expert_ranks import ROUTINGS, SHAPE, decoder, drawn, layer, only_rank
from tests.training.ranks import Ranks

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def assert_same(mine: np.ndarray, theirs: np.ndarray, dtype: torch.dtype, name: str = "") -> None:
    limit = TOLERANCE[dtype]
    np.testing.assert_allclose(mine, theirs, rtol=limit, atol=limit * max(1.0, float(np.abs(theirs).max(initial=0))), err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_a_layer_on_two_ranks_is_that_on_one(pair: Ranks, routing: str, dtype: torch.dtype) -> None:
    shape = replace(SHAPE, routing=ROUTINGS[routing])
    for tokens in ((6, 5), (9, 0)):
        whole = layer(shape=shape, dtype=dtype, tokens=tokens)
        parts = pair(layer, size=2, shape=shape, dtype=dtype, tokens=tokens)
        for name in ("out", "x"):
            assert_same(np.concatenate([part[name] for part in parts]), whole[name], dtype, name)
        assert_same(np.array(sum(part["loss"] for part in parts)), np.array(whole["loss"]), dtype, "loss")
        assert whole["grads"].keys() == {"router.weight", "experts.gate", "experts.up", "experts.down"}
        for name, grad in whole["grads"].items():
            assert_same(only_rank(parts, name), grad, dtype, name)
        if ROUTINGS[routing].mpi:  # the owner has all of it
            assert not parts[0]["grads"]["router.weight"][4:].any() and not parts[1]["grads"]["router.weight"][:4].any()


def test_ranks_that_get_nothing_and_that_have_nothing(pair: Ranks) -> None:
    shape = replace(SHAPE, routing=Routing(mpi=False), top_k=2)
    whole = layer(shape=shape, tokens=(4, 3), alike=True)
    parts = pair(layer, size=2, shape=shape, tokens=(4, 3), alike=True)
    assert (whole["load"] > 0).sum() == 2
    for name, grad in whole["grads"].items():
        assert_same(only_rank(parts, name), grad, torch.float64, name)
    empty = pair(layer, size=2, tokens=(0, 0))
    assert [part["loss"] for part in empty] == [0.0, 0.0]
    assert all(not grad.any() for part in empty for grad in part["grads"].values())
    assert all(len(part["grads"]) == 4 for part in empty), "a gradient of zeros, not none"
    single = pair(layer, size=2, shape=replace(shape, top_k=1), tokens=(1, 5), alike=True)
    assert sum(part["load"].sum() for part in single) == 2 * 6, "one of the two computes nothing"


@pytest.mark.parametrize(("routing", "checkpointing"), [("mpi", True), ("plain", False), ("detached", False)])
def test_a_decoder_on_two_ranks_is_that_on_one(pair: Ranks, routing: str, checkpointing: bool) -> None:
    shape = replace(SHAPE, routing=ROUTINGS[routing], tied=checkpointing)
    for dtype, lengths in ((torch.float64, ((7, 2), ())), (torch.float32, ((5, 3), (4, 1, 6)))):
        whole = decoder(shape=shape, dtype=dtype, lengths=lengths)
        parts = pair(decoder, size=2, shape=shape, dtype=dtype, lengths=lengths, checkpointing=checkpointing)
        assert_same(np.array(sum(part["loss"] for part in parts)), np.array(whole["loss"]), dtype, "loss")
        for name, grad in whole["grads"].items():
            assert_same(only_rank(parts, name), grad, dtype, name)


def test_whole_tensors_are_those_of_one_rank_and_load_back(pair: Ranks) -> None:
    first, second = pair(expert_ranks.states, size=2)
    assert first["same"] and second["same"]
    for name, parameter in MoeDecoder(SHAPE).initialise(5).named_parameters():
        np.testing.assert_array_equal(first["whole"][name], parameter.detach().numpy(), err_msg=name)
        assert (second["whole"][name] is None) == (".experts." in name)


def test_an_export_of_two_ranks_is_that_of_one(pair: Ranks, tmp_path: Path) -> None:
    assert pair(expert_ranks.export, size=2, folder=tmp_path / "two") == [True, True]
    export_moe(MoeDecoder(SHAPE).initialise(7), tmp_path / "one")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_export_that_fails_leaves_nobody_waiting(pair: Ranks, tmp_path: Path) -> None:
    assert pair(expert_ranks.export, size=2, folder=tmp_path, spoiled=True) == ["NotADirectoryError", "returned"]
    assert pair(expert_ranks.states, size=2)[1]["same"]


def test_what_cannot_be_split_is_refused(pair: Ranks) -> None:
    for told in pair(expert_ranks.refusals):
        assert told == [
            "7 experts cannot be split evenly over 2 ranks",
            "layers.0.mixture.experts.gate is [4, 12, 16], of which a rank would hold [2, 12, 16]; the model has [4, 12, 16]",
            "embedding.weight is [4, 16], of which a rank would hold [4, 16]; the model has [40, 16]",
            "7 experts cannot be split evenly over 2 ranks",
        ]


def test_choices_of_experts_elsewhere_add_nothing() -> None:
    x, weights, indices = drawn(0, 6, 8), drawn(1, 6, 3), torch.tensor([[0, 3, 1], [3, 3, 3], [2, 0, 3], [1, 2, 0], [3, 1, 3], [3, 3, 2]])
    experts = [drawn(2, 4, 5, 8), drawn(3, 4, 5, 8), drawn(4, 4, 8, 5)]
    found = []
    for given in (3, 4):  # three experts here, or all four with the last one's weight at zero
        ours = [one[:given].clone().requires_grad_() for one in experts]
        into, share = x.clone().requires_grad_(), weights.clone().requires_grad_()
        out = mixture(into, share * (indices < 3), indices, *ours, chosen=int((indices < given).sum()))
        (out * drawn(5, 6, 8)).sum().backward()
        found.append([out.detach(), into.grad, share.grad, *(one.grad[:3] for one in ours if one.grad is not None)])
    assert len(found[0]) == 6
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_parts_of_the_balance_loss_add_up_to_that_of_all_tokens(gate: str) -> None:
    logits, routing = drawn(0, 11, 6), Routing(gate=gate)  # type: ignore[arg-type]
    whole = logits.clone().requires_grad_()
    routed = choose(whole, 2, routing)
    (balance_loss(routed) + z_loss(routed)).backward()
    split = logits.clone().requires_grad_()
    parts = [choose(part, 2, routing) for part in split.split([4, 0, 7])]
    losses = [balance_loss(part, routed.load) + z_loss(part, 11) for part in parts]
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(sum(losses), balance_loss(routed) + z_loss(routed))
    torch.testing.assert_close(split.grad, whole.grad)
    alone = sum(balance_loss(part) * len(part.probs) / 11 for part in parts)
    assert abs(alone - balance_loss(routed)) > 1e-3, "the mean of their own is another loss"
    padded = choose(torch.cat([logits, torch.full((3, 6), 9.0)]), 2, routing)
    torch.testing.assert_close(balance_loss(padded.take(torch.arange(14) < 11)), balance_loss(routed).detach())
