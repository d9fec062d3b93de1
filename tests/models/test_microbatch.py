from __future__ import annotations

import numpy as np
import pytest

from raysys.models.microbatch import pack_rows


def test_every_row_once_within_the_budget():
    rng = np.random.default_rng(0)
    for budget in (1, 17, 64, 1000):
        lengths = rng.integers(0, 60, size=101)
        packs = pack_rows(lengths, budget)
        assert sorted(np.concatenate(packs).tolist()) == list(range(101))
        for pack in packs:
            assert len(pack) == 1 or len(pack) * lengths[pack].max() <= budget
        again = pack_rows(lengths.tolist(), budget)
        assert all(np.array_equal(a, b) for a, b in zip(packs, again, strict=True))


def test_worked_case():
    packs = pack_rows([3, 10, 2, 25, 3], budget=20)
    assert [pack.tolist() for pack in packs] == [[3], [0, 1], [2, 4]]


def test_nothing_and_nonsense():
    assert pack_rows([], 10) == []
    with pytest.raises(ValueError, match="budget must be positive, got 0"):
        pack_rows([1], 0)
    with pytest.raises(ValueError, match="smallest -1"):
        pack_rows([1, -1], 5)
