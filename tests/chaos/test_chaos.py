"""A few kills of every storm; `bash tests/run.sh chaos` makes many more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.chaos.storm import fake_run


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_under_fire_loses_nothing_and_trains_nothing_twice(ray_head: Any, tmp_path: Path) -> None:
    assert len(fake_run(ray_head, tmp_path, seed=1, kills=4, steps=30, case=(2, "in_order"))) == 4
