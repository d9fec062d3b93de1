"""A study of one job: cells that set some keys, each with several seeds, each an ordinary run in a folder of its own.

What is done is read from the runs' folders and from nothing else, so a study that was killed goes on by the same command. Knows
neither Ray nor any job: which cells there are and what the table shows of them is data (`raysys.studies.search_agent`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raysys.config.base import read_yaml, set_key
from raysys.config.runs import Run
from raysys.errors import ConfigError
from raysys.ledger import differing_keys
from raysys.studies.measures import Column

OUTCOME = "outcome.json"
"""How a run's last trial ended; beside the run's own files."""
SETTLED = ("done", "collapsed")
"""States of runs that are not started again: a collapse is a result."""


@dataclass(frozen=True)
class Asks:
    """What a run keeps busy: so many GPUs, or where it takes none so many CPU cores."""

    gpus: int = 1
    cores: int = 1


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a job's `--study NAME` runs.

    Args:
        title: of the report.
        cells: name to the keys that it sets, dotted, on top of the config.
        columns: of the table.
        told: metrics of a step that are shown while the study runs.
        pareto: titles of two columns whose values, both better when smaller, are drawn against each other.
        asks: what a run with this config keeps busy, which says how many run at once.
        shares: key of a folder in which runs keep for each other what all of them would find out; where the config leaves it null, it is
            one in the study's folder. Files and not Ray's objects: each run is a driver of its own, and a study that was killed goes on
            with them.
    """

    title: str
    cells: Mapping[str, Mapping[str, Any]]
    columns: Sequence[Column]
    told: Sequence[str] = ("loss",)
    pareto: tuple[str, str] | None = None
    asks: Callable[[Any], Asks] = lambda config: Asks()
    shares: str | None = None


@dataclass(frozen=True)
class Planned:
    """One cell with one seed, ready to run. `config` is validated and has its `run_dir`."""

    cell: str
    seed: int
    config: Run

    @property
    def name(self) -> str:
        return f"{self.cell}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        return Path(str(self.config.run_dir))

    @property
    def steps(self) -> int:
        return int(getattr(self.config, "steps", 0))

    @property
    def digest(self) -> str:
        """Of all keys, placement too: a run that collapsed is worth another try with the alarm off."""
        return hashlib.sha256(self.config.to_yaml().encode()).hexdigest()[:12]

    def state(self) -> tuple[str, str]:
        """`done`, `collapsed` or `failed` with the reason; `begun` or `to run`."""
        finished, outcome = _json(self.folder / "ledger" / "finished.json"), _json(self.folder / OUTCOME)
        if finished and finished["steps_asked"] >= self.steps:
            return "done", ""
        if outcome and outcome["status"] == "failed":
            return "failed", outcome["reason"]
        if outcome and outcome["status"] == "collapsed" and outcome["config"] == self.digest:
            return "collapsed", outcome["reason"]
        return ("begun" if (self.folder / "config.yaml").is_file() else "to run"), ""

    @property
    def settled(self) -> bool:
        return self.state()[0] in SETTLED


@dataclass(frozen=True)
class Plan:
    """A study with every run resolved. `folder` holds theirs; of `chosen` cells runs are started, the table has all."""

    job: str
    name: str
    study: Study
    config: Run
    folder: Path
    runs: list[Planned] = field(default_factory=list)
    chosen: Sequence[str] = ()

    @property
    def left(self) -> list[Planned]:
        """The runs to start, in order."""
        return [one for one in self.runs if one.cell in self.chosen and not one.settled]

    @property
    def settled(self) -> int:
        """Runs that are."""
        return sum(one.settled for one in self.runs)

    @property
    def seeds(self) -> list[int]:
        return sorted({one.seed for one in self.runs})


def plan(
    job: str,
    name: str,
    studies: Mapping[str, Study],
    kind: type[Run],
    path: Path,
    overrides: Sequence[str],
    seeds: str,
    runs: Path,
    cells: str | None = None,
) -> Plan:
    """Resolves and validates all runs, one seed's after another's so that a part of a study compares all cells; touches no file.

    Args:
        job, name: of the study; `studies` are those that the job has.
        kind, path, overrides: the config that the cells change. Its `name` or `run_dir` is the study's.
        seeds: whole numbers with commas between.
        runs: the folder that holds all runs, absolute.
        cells: names with commas between, of those to start; None: all.

    Raises:
        ConfigError: no such study, or cell; bad seeds; a key that the study varies itself; a cell's config, with the cell's name; a
            folder that holds a run with another identity.
    """
    study = studies.get(name)
    if study is None:
        raise ConfigError(f"there is no study '{name}'", f"studies of {job}: {', '.join(studies)}")
    values = read_yaml(path)
    own = {"seed"} | {key for cell in study.cells.values() for key in cell}
    for override in overrides:
        key = override.partition("=")[0]
        if key in own:
            raise ConfigError(f"{override}: {key} is what the study varies", "give --seeds" if key == "seed" else "leave it out")
        set_key(values, override)
    base = kind.parse(values, source=str(path))
    folder = Path(base.run_dir).absolute() if base.run_dir else runs / (base.name or f"{job}-{name}")
    planned = [_planned(cell, seed, study, kind, path, overrides, folder) for seed in read_seeds(seeds) for cell in study.cells]
    return Plan(job, name, study, base, folder, planned, _chosen(study, cells))


def _chosen(study: Study, cells: str | None) -> list[str]:
    wanted = list(study.cells) if cells is None else [part.strip() for part in cells.split(",")]
    if unknown := [name for name in wanted if name not in study.cells]:
        raise ConfigError(f"--cells={cells}: there is no cell '{unknown[0]}'", f"there are {', '.join(study.cells)}")
    return wanted


def _planned(cell: str, seed: int, study: Study, kind: type[Run], path: Path, overrides: Iterable[str], folder: Path) -> Planned:
    values = read_yaml(path)
    place = folder / f"{cell}-seed{seed}"
    keys = {**study.cells[cell], "seed": seed, "name": f"{folder.name}-{place.name}", "run_dir": str(place)}
    if study.shares is not None and values.get(study.shares) is None:
        values[study.shares] = str(folder / "shared")
    for override in (*overrides, *(f"{key}={json.dumps(value)}" for key, value in keys.items())):
        set_key(values, override)
    planned = Planned(cell, seed, kind.parse(values, source=f"cell {cell}"))
    _check_folder(planned, kind)
    return planned


def _check_folder(planned: Planned, kind: type[Run]) -> None:
    there = planned.folder / "config.yaml"
    if not there.is_file():
        return
    changed = differing_keys(kind.load(there).identity(), planned.config.identity())
    if changed:
        raise ConfigError(
            f"{planned.name}: {planned.folder} belongs to a run with another identity: {'; '.join(changed)}",
            "choose another name=, or set these keys back",
        )


def read_seeds(text: str) -> list[int]:
    """`0,1,2` as numbers. Raises ConfigError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise ConfigError(f"--seeds={text} is no list of different whole numbers", "write e.g. --seeds 0,1,2")
    return [int(part) for part in parts]


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
