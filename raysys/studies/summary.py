"""A study's table: `study.json`, the same as text, and the page. Means are over the seeds that are done or collapsed."""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raysys.errors import CheckpointError
from raysys.files import write_json
from raysys.studies.ablation import SETTLED, Plan, Planned
from raysys.studies.measures import Seen

log = logging.getLogger("raysys")
FILE, PARQUET = "study.json", "study.parquet"


def summarize(plan: Plan) -> dict[str, Any]:
    """What `study.json` holds."""
    rows = [(one, _row(one, plan)) for one in plan.runs]
    cells = []
    for cell, keys in plan.study.cells.items():
        runs = [row for one, row in rows if one.cell == cell]
        settled = [row for row in runs if row["status"] in SETTLED]
        collapsed = sum(row["status"] == "collapsed" for row in runs)
        cells.append(
            {"cell": cell, "set": dict(keys), "settled": len(settled), "collapsed": collapsed, "mean": _means(settled)}
            | {"spread": _spread(settled), "runs": runs}
        )
    columns = [{"title": column.title, "share": column.share, "digits": column.digits} for column in plan.study.columns]
    about = {"study": plan.name, "job": plan.job, "title": plan.study.title, "seeds": plan.seeds}
    return about | {"columns": columns, "cells": cells, "pareto": list(plan.study.pareto) if plan.study.pareto else None}


def _row(one: Planned, plan: Plan) -> dict[str, Any]:
    seen, (status, reason) = Seen.of(one.folder), one.state()
    after = seen.evaluation("after")
    return {
        "seed": one.seed,
        "name": one.name,
        "status": status,
        "reason": reason,
        "steps": len({record["step"] for record in seen.steps}),
        "steps_asked": one.steps,
        "evaluated_at": after["step"] if after else None,
        "values": {column.title: column.of(seen) for column in plan.study.columns},
    }


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Of each value and of `steps`, over the rows that have it."""
    titles = [*rows[0]["values"]] if rows else []
    found = {title: [value for row in rows if (value := row["values"][title]) is not None] for title in titles}
    found |= {"steps": [row["steps"] for row in rows]}
    return {title: statistics.fmean(values) if values else None for title, values in found.items()}


def _spread(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Smallest and largest of each value, over the rows that have it."""
    titles = [*rows[0]["values"]] if rows else []
    found = {title: [value for row in rows if (value := row["values"][title]) is not None] for title in titles}
    return {title: [min(values), max(values)] for title, values in found.items() if values}


def table(summary: Mapping[str, Any], seeds: bool = True) -> str:
    """A row with the mean of each cell, its seeds below; without `seeds` the means that there are so far."""
    lines = [["", *(column["title"] for column in summary["columns"]), "steps", ""]]
    for cell in summary["cells"]:
        if not seeds and not cell["settled"]:
            continue
        mean = cell["mean"]
        state = f"{cell['settled']} of {len(cell['runs'])} seeds" + (f", {cell['collapsed']} collapsed" if cell["collapsed"] else "")
        lines.append([cell["cell"], *_shown(summary, mean), f"{mean['steps']:.0f}" if mean["steps"] is not None else "-", state])
        for run in cell["runs"] if seeds else ():
            state = run["status"] + (f": {run['reason']}" if run["reason"] else "")
            lines.append([f"  seed {run['seed']}", *_shown(summary, run["values"]), _steps(run), state])
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]) - 1)]
    return "\n".join("  ".join([*(text.ljust(width) for text, width in zip(line, widths)), line[-1]]).rstrip() for line in lines)


def _steps(run: Mapping[str, Any]) -> str:
    """A job whose config asks for no steps makes as many as it has layers, or rows."""
    return f"{run['steps']}/{run['steps_asked']}" if run["steps_asked"] else str(run["steps"])


def _shown(summary: Mapping[str, Any], values: Mapping[str, float | None]) -> list[str]:
    found = [(values.get(column["title"]), column) for column in summary["columns"]]
    return ["-" if value is None else f"{value:.1%}" if of["share"] else f"{value:.{of['digits']}f}" for value, of in found]


def parquet(summary: Mapping[str, Any], path: Path) -> None:
    """One row a run: cell, seed, status, and a column for each of the table's; null where a run has no value (yet)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    runs = [(cell["cell"], run) for cell in summary["cells"] for run in cell["runs"]]
    columns: dict[str, Any] = {"cell": pa.array([cell for cell, _ in runs], pa.string())}
    columns |= {name: pa.array([run[name] for _, run in runs]) for name in ("seed", "status")}
    for column in summary["columns"]:
        columns[column["title"]] = pa.array([run["values"][column["title"]] for _, run in runs], pa.float64())
    with tempfile.TemporaryDirectory(dir=path.parent) as draft:
        pq.write_table(pa.table(columns), Path(draft) / path.name)
        os.replace(Path(draft) / path.name, path)


def publish(plan: Plan) -> dict[str, Any]:
    """Writes `study.json`, `study.parquet` and `report.html`; a page that cannot be drawn stops no study."""
    from jinja2 import TemplateError

    from raysys.report.study import render_study

    summary = summarize(plan)
    write_json(plan.folder / FILE, summary)
    parquet(summary, plan.folder / PARQUET)
    try:
        render_study(plan.folder)
    except (OSError, CheckpointError, ValueError, KeyError, TypeError, TemplateError) as error:
        log.warning("the study's report could not be written: %s: %s", type(error).__name__, error)
    return summary
