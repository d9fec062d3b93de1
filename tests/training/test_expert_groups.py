"""Experts split over ranks under DeepSpeed: steps, norms and saved states are those of one rank, whatever the ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysys.config.parallel import check_parallel
from raysys.errors import ConfigError
from raysys.models.routing import Routing
from tests.training import expert_work, pretraining
from tests.training.expert_work import CLIP, SHAPE, plain, train
from tests.training.ranks import Ranks

ROUTINGS = {"mpi": Routing(), "plain": Routing(mpi=False), "detached": Routing(detach_expert=True)}


@pytest.fixture(scope="module")
def wanted() -> dict[str, dict[str, Any]]:
    return {name: plain(replace(SHAPE, routing=routing)) for name, routing in ROUTINGS.items()}


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    ranks = Ranks(4, ["deepspeed", "raysys.training.engine", "tests.training.expert_work"])
    yield ranks
    ranks.close()


def assert_same_run(results: list[dict[str, Any]], wanted: dict[str, Any], tolerance: float = 1e-5) -> None:
    assert max(wanted["norms"]) > 1.5 * CLIP, "clipping is active"
    np.testing.assert_allclose(np.sum([one["losses"] for one in results], axis=0), wanted["losses"], rtol=tolerance)
    for one in results:
        np.testing.assert_allclose(one["norms"], wanted["norms"], rtol=2 * tolerance)
    assert results[0]["weights"].keys() == wanted["weights"].keys()
    for name, tensor in wanted["weights"].items():
        np.testing.assert_allclose(results[0]["weights"][name], tensor, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(("stage", "routing"), [(0, "mpi"), (1, "detached"), (2, "plain"), (2, "mpi")])
def test_steps_of_split_experts_are_those_of_one_rank(pair: Ranks, wanted: dict[str, Any], stage: int, routing: str) -> None:
    results = pair(train, expert_parallel=2, stage=stage, routing=ROUTINGS[routing], checkpointing=routing == "plain")
    assert_same_run(results, wanted[routing])


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_groups_of_two(four: Ranks, wanted: dict[str, Any], stage: int) -> None:
    assert_same_run(four(train, expert_parallel=2, stage=stage, routing=ROUTINGS["mpi"]), wanted["mpi"])


def test_matrices_cut_between_an_expert_s_holders_move_whole(four: Ranks, solo: Ranks) -> None:
    # Of 3 layers with 3 stacks of 3 experts on each rank, the half that each of two holders moves ends within the 14th matrix.
    same: dict[str, Any] = {"optimiser": {"kind": "muonh"}, "accumulation": 1, "model": {"layers": 3, "experts": 6}}
    whole = solo(pretraining.trained, of=pretraining.config(**same))[0]
    found = four(pretraining.trained, of=pretraining.config(**same, trainer={"ranks": 4, "zero_stage": 1, "expert_parallel": 2}))[0]
    assert [one["loss"] for one in found[0]] == pytest.approx([one["loss"] for one in whole[0]], rel=1e-5)
    for name, tensor in whole[2].items():
        np.testing.assert_allclose(found[2][name], tensor, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("stage", [1, 2])
def test_bfloat16_keeps_masters_of_split_experts(pair: Ranks, wanted: dict[str, Any], stage: int) -> None:
    results = pair(train, expert_parallel=2, stage=stage, routing=ROUTINGS["plain"], dtype="bfloat16")
    np.testing.assert_allclose(np.sum([one["losses"] for one in results], axis=0), wanted["plain"]["losses"], rtol=0.02)
    for one in results:
        np.testing.assert_allclose(one["norms"], wanted["plain"]["norms"], rtol=0.1)
    for name, tensor in wanted["plain"]["weights"].items():
        mine = results[0]["weights"][name]
        np.testing.assert_allclose(mine, tensor, rtol=0, atol=0.01, err_msg=name)
        if mine.ndim > 1:
            assert (mine != torch.from_numpy(mine).bfloat16().float().numpy()).mean() > 0.5, "these are the masters"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_stage_3_without_split_experts(pair: Ranks, wanted: dict[str, Any], checkpointing: bool) -> None:
    assert_same_run(pair(train, expert_parallel=1, stage=3, routing=ROUTINGS["mpi"], checkpointing=checkpointing), wanted["mpi"])


def test_states_do_not_depend_on_what_holds_them(pair: Ranks, solo: Ranks, wanted: dict[str, Any], tmp_path: Path) -> None:
    routing = ROUTINGS["mpi"]
    first = pair(train, expert_parallel=2, stage=2, routing=routing, steps=(0, 1), save=tmp_path / "split")
    assert len(first[0]["states"]) == 3 * len(wanted["mpi"]["weights"]) and not first[1]["states"]
    source = tmp_path / "split"
    for ranks, split, stage in ((solo, 1, 0), (pair, 2, 1), (pair, 1, 3)):
        again = ranks(train, expert_parallel=split, stage=stage, routing=routing, steps=(2,), load=source, save=tmp_path / "whole")
        for name, tensor in first[0]["states"].items():
            np.testing.assert_array_equal(again[0]["loaded"][name], tensor, err_msg=f"{name}, {split} {stage}")
        for name, tensor in wanted["mpi"]["weights"].items():
            np.testing.assert_allclose(again[0]["weights"][name], tensor, rtol=0, atol=1e-5, err_msg=f"{name}, {split} {stage}")
    back = pair(train, expert_parallel=2, stage=2, routing=routing, steps=(), load=tmp_path / "whole")
    for name, tensor in again[0]["states"].items():
        np.testing.assert_array_equal(back[0]["loaded"][name], tensor, err_msg=name)


def test_norms_count_every_expert_once(pair: Ranks) -> None:
    count = sum(tensor.size for tensor in plain(SHAPE)["weights"].values())
    results = pair(expert_work.norms_of, value=0.5)
    for norm, clipped in results:
        assert norm == pytest.approx(0.5 * count**0.5, rel=1e-6)
        np.testing.assert_allclose(clipped, 1 / count**0.5, rtol=1e-4)
    for norm, clipped in pair(expert_work.norms_of, value=float("inf")):
        assert norm == float("inf") and np.isinf(clipped).all()


def test_deepspeed_s_own_checkpoint_is_refused(pair: Ranks, tmp_path: Path) -> None:
    for told in pair(expert_work.native_save, folder=tmp_path):
        assert told.startswith("DeepSpeed's checkpoints would keep one rank's experts only (use raysys.training.expert_states")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((3, 2, 4, 8), "expert_parallel=2 does not go with zero_stage=3.*zero_stage to 0, 1 or 2"),
        ((2, 4, 6, 8), "ranks=6 cannot be split into groups of expert_parallel=4"),
        ((1, 4, 4, 6), "experts=6 cannot be split evenly over expert_parallel=4"),
        ((1, 0, 4, 8), "expert_parallel=0 is no number of ranks"),
    ],
)
def test_what_does_not_go_together_is_refused(given: tuple[int, int, int, int], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_parallel(*given)
    check_parallel(3, 1, 3, 5)
    check_parallel(2, 4, 8, 64)
