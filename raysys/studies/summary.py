"""A study's table: `study.json`, the same as text, and the page. Means are over the seeds that are done or collapsed."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from raysys.files import write_json
from raysys.studies.ablation import SETTLED, Plan, Planned
from raysys.studies.measures import Seen

log = logging.getLogger("raysys")
FILE = "study.json"


def summarize(plan: Plan) -> dict[str, Any]:
    """What `study.json` holds."""
    rows = [(one, _row(one, plan)) for one in plan.runs]
    cells = []
    for cell, keys in plan.study.cells.items():
        runs = [row for one, row in rows if one.cell == cell]
        settled = [row for row in runs if row["status"] in SETTLED]
        collapsed = sum(row["status"] == "collapsed" for row in runs)
        cells.append(
            {"cell": cell, "set": dict(keys), "settled": len(settled), "collapsed": collapsed, "mean": _means(settled), "runs": runs}
        )
    columns = [{"title": column.title, "share": column.share} for column in plan.study.columns]
    return {"study": plan.name, "job": plan.job, "title": plan.study.title, "seeds": plan.seeds, "columns": columns, "cells": cells}


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


def table(summary: Mapping[str, Any]) -> str:
    """A row with the mean of each cell, its seeds below."""
    lines = [["", *(column["title"] for column in summary["columns"]), "steps", ""]]
    for cell in summary["cells"]:
        mean, seeds = cell["mean"], len(cell["runs"])
        state = f"{cell['settled']} of {seeds} seeds" + (f", {cell['collapsed']} collapsed" if cell["collapsed"] else "")
        lines.append([cell["cell"], *_shown(summary, mean), f"{mean['steps']:.0f}" if mean["steps"] is not None else "-", state])
        for run in cell["runs"]:
            state = run["status"] + (f": {run['reason']}" if run["reason"] else "")
            lines.append([f"  seed {run['seed']}", *_shown(summary, run["values"]), f"{run['steps']}/{run['steps_asked']}", state])
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]) - 1)]
    return "\n".join("  ".join([*(text.ljust(width) for text, width in zip(line, widths)), line[-1]]).rstrip() for line in lines)


def _shown(summary: Mapping[str, Any], values: Mapping[str, float | None]) -> list[str]:
    found = [(values.get(column["title"]), column["share"]) for column in summary["columns"]]
    return ["-" if value is None else f"{value:.1%}" if share else f"{value:.2f}" for value, share in found]


def publish(plan: Plan) -> dict[str, Any]:
    """Writes `study.json` and `report.html`; a page that cannot be drawn stops no study."""
    from raysys.report.study import render_study

    summary = summarize(plan)
    write_json(plan.folder / FILE, summary)
    try:
        render_study(plan.folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the study's report could not be written: %s: %s", type(error).__name__, error)
    return summary
