"""A few kills of every storm; `bash tests/run.sh chaos` makes many more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.chaos.storm import fake_run


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "case"), [(1, (0, "first_ready")), (2, (2, "first_ready"))], ids=["synchronous", "asynchronous"])
def test_a_run_under_fire_loses_nothing_and_trains_nothing_twice(ray_head: Any, tmp_path: Path, seed: int, case: tuple[int, str]) -> None:
    assert len(fake_run(ray_head, tmp_path, seed, kills=3, steps=30, case=case)) == 3
