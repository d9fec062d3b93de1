from __future__ import annotations

import numpy as np
import pytest

from raysys.models.microbatch import pack_rows, response_positions


@pytest.mark.parametrize("padded", [False, True])
def test_every_row_once_within_the_budget(padded):
    rng = np.random.default_rng(0)
    for budget in (1, 17, 64, 1000):
        lengths = rng.integers(0, 60, size=101)
        packs = pack_rows(lengths, budget, padded)
        assert sorted(np.concatenate(packs).tolist()) == list(range(101))
        for pack in packs:
            assert pack.tolist() == sorted(pack)
            assert len(pack) == 1 or (len(pack) * lengths[pack].max() if padded else lengths[pack].sum()) <= budget
        again = pack_rows(lengths.tolist(), budget, padded)
        assert all(np.array_equal(a, b) for a, b in zip(packs, again, strict=True))


def test_packs_are_full_and_never_more_than_padded_ones():
    rng = np.random.default_rng(1)
    for budget in (500, 2000):
        lengths = np.clip(np.exp(rng.normal(4.8, 0.9, size=200)).astype(np.int64), 8, 500)
        packs = pack_rows(lengths, budget)
        assert len(packs) <= len(pack_rows(lengths, budget, padded=True))
        assert len(packs) <= 11 / 9 * np.ceil(lengths.sum() / budget) + 1


def test_worked_cases():
    lengths = [3, 10, 2, 25, 3]
    assert [pack.tolist() for pack in pack_rows(lengths, budget=20)] == [[3], [0, 1, 2, 4]]
    assert [pack.tolist() for pack in pack_rows(lengths, budget=15)] == [[3], [0, 1, 2], [4]]
    assert [pack.tolist() for pack in pack_rows(lengths, budget=20, padded=True)] == [[3], [0, 1], [2, 4]]


def test_nothing_and_nonsense():
    assert pack_rows([], 10) == []
    with pytest.raises(ValueError, match="budget must be positive, got 0"):
        pack_rows([1], 0)
    with pytest.raises(ValueError, match="smallest -1"):
        pack_rows([1, -1], 5)


def test_response_positions_by_hand():
    assert response_positions(np.array([2, 1, 1]), np.array([2, 0, 1])).tolist() == [2, 3, 6]
