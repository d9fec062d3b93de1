"""Plans and layouts of a weight push."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import torch

from raysys.buckets import Layout, Placed, Plan, digest, fingerprint

TENSORS: dict[str, Any] = {"a": ((3,), "float32", 12), "b": ((2, 2), "bfloat16", 8), "c": ((), "float32", 4)}


def test_a_layout_says_where_each_tensor_lies_and_what_lies_between():
    layout = Layout.of(TENSORS)
    assert (layout.offsets, layout.sizes, layout.nbytes) == ((0, 64, 128), (12, 8, 4), 132)
    assert layout.gaps().tolist() == [*range(12, 64), *range(72, 128)]
    assert Layout.of({"a": ((3,), "float32", 12)}).gaps().tolist() == []
    data = np.zeros(layout.nbytes, np.uint8)
    data[:12].view(np.float32)[:] = 1, 2, 3
    data[64:72].view(np.uint16)[:] = np.float32(5).view(np.uint32) >> 16
    a, b, c = layout.tensors(torch.from_numpy(data))
    assert torch.equal(a, torch.tensor([1.0, 2, 3])) and torch.equal(b, torch.full((2, 2), 5, dtype=torch.bfloat16)) and c == 0
    assert layout.digests(data) == [digest(data[start : start + size]) for start, size in ((0, 12), (64, 8), (128, 4))]


def test_a_plan_is_its_text_and_its_mark_knows_every_part_of_it():
    plan = Plan.of([Layout.of(TENSORS), Layout.of({"d": ((1,), "float32", 4)})])
    assert plan.layouts() == (Layout.of(TENSORS), Layout.of({"d": ((1,), "float32", 4)}))
    assert plan.manifest() == {"a": ((3,), "float32"), "b": ((2, 2), "bfloat16"), "c": ((), "float32"), "d": ((1,), "float32")}
    others = [TENSORS | {"a": ((3, 1), "float32", 12)}, TENSORS | {"b": ((2, 2), "float16", 8)}, {"z": TENSORS["a"]}]
    marks = [plan.mark, *(Plan.of([Layout.of(one)]).mark for one in [TENSORS, *others, dict(reversed(TENSORS.items()))])]
    assert len(set(marks)) == len(marks)


def test_what_a_bucket_costs_to_send_does_not_grow_with_its_tensors():
    few, many = (Plan.of([Layout.of({f"layer.{i}.weight": ((4,), "float32", 16) for i in range(count)})]) for count in (10, 10_000))
    small, large = (len(pickle.dumps(Placed(plan.mark, 0, digest(b""), "/dev/shm/x"))) for plan in (few, many))
    assert small == large < 400
    assert fingerprint(few.mark, ["x"]) != fingerprint(many.mark, ["x"]) != fingerprint(many.mark, ["y"])
