"""The record that crosses actors: columns keep their rows, ragged columns their lengths."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from raysys.batch import Batch, Ragged

ROWS = [[1, 2, 3], [], [4], [5, 6]]


def sample() -> Batch:
    return Batch.from_columns(prompt_id=["a", "a", "b", "c"], sample=[0, 1, 0, 0], prompt_ids=Ragged.of(ROWS, np.int32))


def test_ids_join_prompt_and_sample() -> None:
    assert sample().ids == ["a/0", "a/1", "b/0", "c/0"]


def test_ragged_columns_survive_slices_takes_concat_and_pickle() -> None:
    batch = sample()
    assert [list(row) for row in batch.slice(1, 3).ragged("prompt_ids").rows()] == ROWS[1:]
    assert [list(row) for row in batch.take([3, 0]).ragged("prompt_ids").rows()] == [ROWS[3], ROWS[0]]
    both = pickle.loads(pickle.dumps(Batch.concat([batch.slice(2, 2), batch])))
    assert [list(row) for row in both.ragged("prompt_ids").rows()] == ROWS[2:] + ROWS


def test_padding_marks_only_real_tokens() -> None:
    values, mask = sample().ragged("prompt_ids").padded(fill=-1)
    assert values.tolist() == [[1, 2, 3], [-1, -1, -1], [4, -1, -1], [5, 6, -1]]
    assert mask.sum(axis=1).tolist() == [3, 0, 1, 2]


def test_wrong_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="wrongs"):
        Batch.from_columns(prompt_id=["a"], wrongs=[1])
    with pytest.raises(ValueError, match="reward has 2 rows, the batch has 4"):
        sample().with_columns(reward=[1.0, 2.0])
