"""Buckets of weights, from whole models and from ZeRO-3's parts."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from torch import Tensor
from transformers import AutoModelForCausalLM

from raysys.buckets import UNDER_WAY, Bucket, Packed, Placed
from raysys.memory import FOLDER, PREFIX
from raysys.training.weights import Packer, Whole, bucketed
from tests.training import work
from tests.training.work import spec


def gather(rank, ranks, port, *, of, max_bytes):
    made = work.worker(of, rank, ranks, port)
    plan = made.bucket_plan(max_bytes)
    count = len(plan.layouts())
    parts = [parameter.numel() for parameter in made.engine.names.values()]
    buckets, placed = [copy.deepcopy(made.gather_bucket(index)) for index in range(count)], []
    for index in [*range(count), *range(count)]:  # twice: the second time into memory that is there already
        bucket = made.gather_bucket(index, in_place=True)
        placed.append(bucket and (bucket, Path(bucket.path).read_bytes(), len(list(FOLDER.glob(f"{PREFIX}{os.getpid()}-*")))))
    made.withdraw_buckets()
    assert not list(FOLDER.glob(f"{PREFIX}{os.getpid()}-*"))
    return plan, buckets, parts, placed


@pytest.mark.parametrize("name", ["untied", "tied"])
@pytest.mark.parametrize(("stage", "dtype"), [(1, "float32"), (3, "float32"), (3, "bfloat16")])
def test_buckets_hold_the_state_dict(pair, models, name, stage, dtype):
    of = spec(models[name], zero_stage=stage, dtype=dtype)
    (plan, buckets, parts, placed), (same, nothing, _, nowhere) = pair(gather, of=of, max_bytes=10_000)
    assert same == plan, "each rank speaks of its buckets by its own plan"
    assert set(nothing) == set(nowhere) == {None}
    for bucket, (there, memory, files) in zip([*buckets, *buckets], placed, strict=True):
        assert memory[: len(bucket.data)] == bucket.data.tobytes() and type(there) is Placed and files <= UNDER_WAY
        assert (there.plan, there.index, there.digest) == (bucket.plan, bucket.index, bucket.digest)
    assert len({there.path for there, *_ in placed}) == UNDER_WAY
    if stage == 3:
        assert 0 in parts, "nothing is partitioned"
    want = AutoModelForCausalLM.from_pretrained(models[name], dtype=getattr(torch, dtype)).state_dict()
    assert "lm_head.weight" in want and plan.manifest() == {key: (tuple(tensor.shape), dtype) for key, tensor in want.items()}
    got = {}
    for bucket, layout in zip(buckets, plan.layouts(), strict=True):
        assert len(bucket.data) <= 10_000 or len(layout.names) == 1
        assert bucket.digest == blake3(bucket.data.tobytes()).hexdigest()
        got |= work.unpack(bucket, layout)
        for key, start, digest in zip(layout.names, layout.offsets, layout.digests(bucket.data), strict=True):
            raw = want[key].contiguous().flatten().view(torch.uint8).numpy()
            assert digest == blake3(raw.tobytes()).hexdigest()
            assert np.array_equal(bucket.data[start : start + len(raw)], raw)
    assert list(got) == list(want)
    assert all(np.array_equal(got[key], tensor.float().numpy()) for key, tensor in want.items())


class Odd:
    """Weights of which most leave a gap before the next."""

    def __init__(self) -> None:
        self.state = {f"w{size}": torch.rand(size) for size in (16, 5, 33, 3, 7, 50, 1, 20)}
        self.state |= {"half": torch.rand(3, 7).to(torch.bfloat16), "one": torch.rand(()), "two": torch.rand(2)}

    def state_dict(self, keep_vars: bool) -> dict[str, Tensor]:
        return self.state


def test_what_lies_between_tensors_is_nothing_and_a_digest_says_whether_any_has_changed():
    """Buckets of different layouts use the same memory one after another, and leave nothing there that another's digest would see."""
    odd = Odd()
    packer = Packer(Whole(odd), 256)
    layouts = packer.plan.layouts()
    assert len(layouts) > 2 * UNDER_WAY and any(len(layout.gaps()) for layout in layouts)
    try:
        found = []
        for _ in range(2):
            for index, layout in enumerate(layouts):
                packed, placed = packer.gather(index), packer.gather(index, in_place=True)
                assert isinstance(packed, Packed) and isinstance(placed, Placed)
                assert placed.digest == packed.digest == packer.offer(index, Taker).digest == packer.send(index, Taker)  # type: ignore[union-attr]
                assert Path(placed.path).read_bytes()[: layout.nbytes] == packed.data.tobytes()
                found.append(packed.digest)
        assert found[: len(layouts)] == found[len(layouts) :] and len(set(found)) == len(layouts)
        before = [packer.digests(index) for index in range(len(layouts))]
        odd.state["half"][2, 6] += 1
        changed = [
            (layout.names[at], packer.gather(index).digest != found[index])  # type: ignore[union-attr]
            for index, layout in enumerate(layouts)
            for at, now in enumerate(packer.digests(index))
            if now != before[index][at]
        ]
        assert changed == [("half", True)]
    finally:
        packer.close()


class Taker:
    """A sender that takes all it is given."""

    @staticmethod
    def offer(bucket: Bucket, packed: Tensor) -> Bucket:
        return bucket

    @staticmethod
    def send(tensors: Iterable[tuple[str, Tensor]]) -> None:
        assert all(len(name) and tensor.is_contiguous() for name, tensor in tensors)


def test_buckets_are_bounded_and_keep_the_order():
    sizes = {"a": 100, "b": 28, "c": 65, "d": 1000, "e": 1}
    assert bucketed(sizes, 256) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert bucketed(sizes, 10**6) == [list("abcde")]
    with pytest.raises(ValueError, match="max_bytes"):
        bucketed(sizes, 0)
