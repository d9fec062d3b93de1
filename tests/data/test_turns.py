"""Episodes as data: what of a transcript is learnt, and that the tokens are those an episode would have."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from raysys.config.parts import Data
from raysys.data.rows import BadRow, Part, parse
from raysys.data.stream import PromptStream
from raysys.data.text import Decoder
from raysys.head import Head

TURNS = [{"generated": "ab", "observation": "[cd]"}, {"generated": "e", "observation": ""}]


def read(record: dict) -> object:
    return parse(record, where="w", row_id="1", default_verifier="", context_field=None)


def test_a_record_with_turns_is_taught_piece_by_piece() -> None:
    row = read({"prompt": "q", "answer": "gold", "opening": "<", "turns": TURNS})
    assert row.parts == (Part("<", False), Part("ab", True), Part("[cd]", False), Part("e", True))
    assert row.target == "<ab[cd]e" and row.answer == "gold"


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "`turns` has the wrong type: list"),
        ("abc", "`turns` has the wrong type: text"),
        (["abc"], "`turns` has the wrong type: list"),
        ([{"observation": "x"}], "no `generated`"),
        ([{"generated": 3}], "`generated` has the wrong type: int"),
        ([{"generated": "a", "observation": 3}], "`observation` has the wrong type: int"),
    ],
)
def test_malformed_turns_are_bad_rows(turns: object, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        read({"prompt": "q", "turns": turns})


def test_of_a_file_only_what_was_generated_is_trained_on(tiny: str, tmp_path: Path, ray_head: Head) -> None:
    import ray

    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "q", "opening": "<", "turns": TURNS}, {"prompt": "q", "answer": "xyz"}]
    path.write_text("".join(json.dumps(rows[number % 2]) + "\n" for number in range(8)))
    ray.init(address=ray_head.gcs, log_to_driver=False)
    try:
        stream = PromptStream(Data(path=str(path), shuffle=False), tiny, 0, 8, 16, supervised=True)
        batch = stream.take(3)
        stream.close()
    finally:
        ray.shutdown()
    assert Decoder(tiny).texts(batch.ragged("response_ids").rows()) == ["<ab[cd]e", "xyz", "<ab[cd]e"]
    assert [row.tolist() for row in batch.ragged("runs").rows()] == [[-1, 0, 0, -1, -1, -1, -1, 1], [0] * 4, [-1, 0, 0, -1, -1, -1, -1, 1]]
    assert batch.trained.tolist() == [3, 4, 3]
    assert np.array_equal(batch.lengths("runs"), batch.lengths("response_ids"))
