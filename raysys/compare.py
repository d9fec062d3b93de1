"""Where two runs part: the first recorded sample and token, or the first step and metric."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raysys.errors import ConfigError
from raysys.files import read_json_lines

TIMES = ("seconds", "recovered")


def differences(before: Path, after: Path, tolerance: float = 0.0) -> Iterator[str]:
    """One line for each step that differs, the first thing in it that does. Metrics that only one run has are not compared.

    Args:
        before, after: folders of recorded samples (`rollout.record`), or run folders with `metrics.jsonl`.
        tolerance: largest difference that counts as none, relative for metrics, absolute for log-probs.

    Raises:
        ConfigError: they are neither.
    """
    if (before / "metrics.jsonl").is_file() and (after / "metrics.jsonl").is_file():
        yield from _metrics(before, after, tolerance)
    elif any(before.glob("step_*.arrow")):
        from raysys.rollout.recorded import differences as recorded

        yield from recorded(before, after, tolerance)
    else:
        raise ConfigError(f"{before} and {after} are neither runs nor recordings", "give two run folders, or two folders of rollout.record")


def _metrics(before: Path, after: Path, tolerance: float) -> Iterator[str]:
    first, second = (_records(folder) for folder in (before, after))
    for step in sorted(first.keys() | second.keys()):
        left, right = first.get(step), second.get(step)
        if left is None or right is None:
            yield f"step {step}: only in {before if right is None else after}"
            continue
        for key in sorted((left.keys() & right.keys()) - set(TIMES)):
            if not _same(left[key], right[key], tolerance):
                yield f"step {step}: {key} is {left[key]} in the one, {right[key]} in the other"
                break


def _same(left: Any, right: Any, tolerance: float) -> bool:
    if isinstance(left, float) and isinstance(right, float) and tolerance:
        return abs(left - right) <= tolerance * max(1.0, abs(left), abs(right))
    return left == right


def _records(folder: Path) -> dict[int, dict[str, Any]]:
    return {record["step"]: record for _, record in read_json_lines(folder / "metrics.jsonl")}
