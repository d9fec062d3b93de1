"""Buckets of weights, from whole models and from ZeRO-3's parts."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from transformers import AutoModelForCausalLM

from raysys.batch import UNDER_WAY
from raysys.memory import FOLDER, PREFIX
from raysys.training.weights import bucketed
from tests.training import work
from tests.training.work import spec


def gather(rank, ranks, port, *, of, max_bytes):
    made = work.worker(of, rank, ranks, port)
    manifest, count = made.bucket_plan(max_bytes)
    parts = [parameter.numel() for parameter in made.engine.names.values()]
    buckets, placed = [made.gather_bucket(index) for index in range(count)], []
    for index in [*range(count), *range(count)]:  # twice: the second time into memory that is there already
        bucket = made.gather_bucket(index, in_place=True)
        placed.append(bucket and (bucket, Path(bucket.path).read_bytes(), len(list(FOLDER.glob(f"{PREFIX}{os.getpid()}-*")))))
    made.withdraw_buckets()
    assert not list(FOLDER.glob(f"{PREFIX}{os.getpid()}-*"))
    return manifest, buckets, parts, placed


@pytest.mark.parametrize("name", ["untied", "tied"])
@pytest.mark.parametrize(("stage", "dtype"), [(1, "float32"), (3, "float32"), (3, "bfloat16")])
def test_buckets_hold_the_state_dict(pair, models, name, stage, dtype):
    of = spec(models[name], zero_stage=stage, dtype=dtype)
    (manifest, buckets, parts, placed), (_, nothing, _, nowhere) = pair(gather, of=of, max_bytes=10_000)
    assert set(nothing) == set(nowhere) == {None}
    for bucket, (there, memory, files) in zip([*buckets, *buckets], placed, strict=True):
        assert memory[: len(bucket.data)] == bucket.data.tobytes() and not len(there.data) and files <= UNDER_WAY
        assert (there.names, there.offsets, there.digests) == (bucket.names, bucket.offsets, bucket.digests)
    assert len({there.path for there, *_ in placed}) == UNDER_WAY
    if stage == 3:
        assert 0 in parts, "nothing is partitioned"
    want = AutoModelForCausalLM.from_pretrained(models[name], dtype=getattr(torch, dtype)).state_dict()
    assert "lm_head.weight" in want and manifest == {key: (tuple(tensor.shape), dtype) for key, tensor in want.items()}
    got = {}
    for bucket in buckets:
        assert len(bucket.data) <= 10_000 or len(bucket.names) == 1
        got |= work.unpack(bucket)
        for key, start, digest in zip(bucket.names, bucket.offsets, bucket.digests, strict=True):
            raw = want[key].contiguous().flatten().view(torch.uint8).numpy()
            assert digest == blake3(raw.tobytes()).hexdigest()
            assert np.array_equal(bucket.data[start : start + len(raw)], raw)
    assert list(got) == list(want)
    assert all(np.array_equal(got[key], tensor.float().numpy()) for key, tensor in want.items())


def test_buckets_are_bounded_and_keep_the_order():
    sizes = {"a": 100, "b": 28, "c": 65, "d": 1000, "e": 1}
    assert bucketed(sizes, 256) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert bucketed(sizes, 10**6) == [list("abcde")]
    with pytest.raises(ValueError, match="max_bytes"):
        bucketed(sizes, 0)
