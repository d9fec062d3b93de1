"""Where two runs part, told from their metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raysys.compare import differences
from raysys.errors import ConfigError


def run(folder: Path, *losses: float, torn: str = "") -> Path:
    folder.mkdir()
    lines = [json.dumps({"step": step, "loss": loss, "seconds": {"train": 1.0 + len(folder.name)}}) for step, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + f"\n{torn}")
    return folder


def test_the_first_metric_that_differs_is_told_and_times_are_not(tmp_path: Path) -> None:
    calm, hit = run(tmp_path / "calm", 1.0, 0.5), run(tmp_path / "hit", 1.0, 0.50001)
    assert list(differences(calm, calm)) == [] == list(differences(calm, hit, tolerance=1e-4))
    assert list(differences(calm, hit)) == ["step 1: loss is 0.5 in the one, 0.50001 in the other"]


def test_a_line_that_a_kill_has_torn_is_a_step_that_is_not_there(tmp_path: Path) -> None:
    calm, hit = run(tmp_path / "calm", 1.0, 0.5), run(tmp_path / "hit", 1.0, torn='{"step": 1, "lo')
    assert list(differences(calm, hit)) == [f"step 1: only in {calm}"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither runs nor recordings"):
        list(differences(tmp_path, tmp_path))
