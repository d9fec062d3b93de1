"""Recordings: what is taken again is what was taken, and a difference is named down to the token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raysys.batch import Batch, Ragged
from raysys.errors import ConfigError, DataError
from raysys.rollout.recorded import Recorder, Replay, differences, first_difference
from tests.fakes import FakeSource, FakeTrainer


def test_a_replay_gives_what_was_recorded_and_says_when_it_ends(tmp_path: Path) -> None:
    trainer = FakeTrainer()
    source = FakeSource(trainer)
    recorder = Recorder(source, tmp_path)
    taken = []
    for _ in range(3):
        taken.append(recorder.take(4, 0))
        trainer.steps += 1
    replay = Replay(tmp_path)
    assert replay.take(4, 0).table.equals(taken[0].table)
    state = replay.state()
    assert [replay.take(4, 0).table.equals(one.table) for one in taken[1:]] == [True, True]
    with pytest.raises(DataError, match="ends before step 3"):
        replay.take(4, 0)
    replay.restore(state, None, 1)
    assert replay.take(4, 0).table.equals(taken[1].table)
    with pytest.raises(DataError, match="has 4 prompts, the run asks for 5"):
        replay.take(5, 0)
    with pytest.raises(ConfigError, match="holds no recorded samples"):
        Replay(tmp_path / "nothing")


def test_a_resumed_recording_goes_on_where_it_was(tmp_path: Path) -> None:
    trainer = FakeTrainer()
    whole = Recorder(FakeSource(trainer), tmp_path / "whole")
    for _ in range(4):
        whole.take(2, 0)
    broken = Recorder(FakeSource(trainer), tmp_path / "broken")
    broken.take(2, 0)
    state = broken.state()
    broken.take(2, 0)
    again = Recorder(FakeSource(trainer), tmp_path / "broken")
    again.restore(state, None, 1)
    for _ in range(3):
        again.take(2, 0)
    assert list(differences(tmp_path / "whole", tmp_path / "broken")) == []


def test_the_first_differing_sample_and_token_is_named(tmp_path: Path) -> None:
    before = Batch.from_columns(
        prompt_id=["a", "b"],
        sample=[0, 0],
        response_ids=Ragged.of([[1, 2], [3, 4, 5]], np.int32),
        rollout_logprobs=Ragged.of([[-1, -2], [-3, -4, -5]], np.float32),
    )
    moved = before.with_columns(rollout_logprobs=Ragged.of([[-1, -2], [-3, -4.5, -5]], np.float32))
    assert first_difference(before, before) == ""
    assert first_difference(before, moved) == "sample b/0, token 1: rollout_logprobs is -4.0 in the one, -4.5 in the other"
    assert first_difference(before, moved, tolerance=0.6) == ""
    longer = before.with_columns(response_ids=Ragged.of([[1, 2, 9], [3, 4, 5]], np.int32))
    assert first_difference(before, longer).startswith("sample a/0, token 2: response_ids ends in one")
    assert first_difference(before, before.take([1, 0])) == "row 0 is sample a/0 in the one and b/0 in the other"
    assert first_difference(before, before.take([0])) == "2 samples in the one, 1 in the other"
    for name, batch in (("one", before), ("two", moved)):
        (tmp_path / name).mkdir()
        batch.save(tmp_path / name / "step_00000000.arrow")
    assert [line.partition(":")[0] for line in differences(tmp_path / "one", tmp_path / "two")] == ["step_00000000"]
