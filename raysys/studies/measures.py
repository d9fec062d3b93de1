"""What a run's folder says of it, as numbers of a table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raysys.files import read_json_lines


@dataclass(frozen=True)
class Seen:
    """A run's records so far, by step and by evaluation."""

    steps: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, folder: Path) -> Seen:
        return cls(*([record for _, record in read_json_lines(folder / f"{name}.jsonl")] for name in ("metrics", "evaluation")))

    def evaluation(self, when: Literal["before", "after"]) -> Mapping[str, Any] | None:
        """The one before the first step, or the newest after it: a run that collapsed has none at its end."""
        found = [one for one in self.evaluations if (one["step"] == 0) == (when == "before")]
        return found[-1] if found else None

    def held_out(self, name: str, when: Literal["before", "after"] = "after") -> float | None:
        """One of an evaluation's measures."""
        return number((self.evaluation(when) or {}).get("measures", {}).get(name))

    def mean(self, name: str, last: int | None = None) -> float | None:
        """Of a metric over the steps that have it, or the last of these."""
        found = [value for one in self.steps if (value := number(one.get(name))) is not None]
        return statistics.fmean(found[-last:] if last else found) if found else None


@dataclass(frozen=True)
class Column:
    """Of a study's table. A `share` is shown in percent, others with so many digits; None is a value that a run does not have (yet)."""

    title: str
    of: Callable[[Seen], float | None]
    share: bool = True
    digits: int = 2


def number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
