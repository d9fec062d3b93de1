"""A study's folder as one page: the table of `study.json`, and each cell's curves as the mean of its seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from raysys.files import read_json_lines, write_atomically
from raysys.report import charts, quantising
from raysys.report.masking import masked


def render_study(folder: Path) -> Path:
    """Writes `report.html` from `study.json`, `about.json` and what the runs have written so far. Returns the page's path."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    study = masked(json.loads((folder / "study.json").read_text(encoding="utf-8")))
    told = {title for cell in study["cells"] for title, value in (cell["mean"] or {}).items() if value is not None}
    study["columns"] = [one for one in study["columns"] if not told or one["title"] in told]  # not those that no run could measure
    about = masked(json.loads((folder / "about.json").read_text(encoding="utf-8"))) if (folder / "about.json").is_file() else {}
    pages = Environment(loader=PackageLoader("raysys.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    curves = {cell["cell"]: mean_of_seeds([_steps(folder / run["name"]) for run in cell["runs"]]) for cell in study["cells"]}
    text = pages.get_template("study.html.j2").render(
        name=folder.name,
        about=about,
        study=study,
        summary=_summary(study),
        cells=[_cell(cell, study["columns"], folder) for cell in study["cells"]],
        curves=[(title, Markup(html)) for title, html in charts.overlay({name: steps for name, steps in curves.items() if steps})],
        pareto=Markup(pareto(study)),
        asked=any(run["steps_asked"] for cell in study["cells"] for run in cell["runs"]),
        maps=Markup(quantising.maps(_maps(study, folder))),
        css=Markup((Path(__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")),
        plotly=Markup(charts.script()),
    )
    write_atomically(folder / "report.html", text)
    return folder / "report.html"


def mean_of_seeds(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One record a step with the mean of each number over the runs that got there and have it."""
    steps: dict[int, dict[str, list[float]]] = {}
    for records in runs:
        for record in records:
            at = steps.setdefault(record["step"], {})
            for name, value in record.items():
                if isinstance(value, (int, float)) and name != "step":
                    at.setdefault(name, []).append(value)
    return [{"step": step} | {name: statistics.fmean(values) for name, values in steps[step].items()} for step in sorted(steps)]


def _summary(study: Mapping[str, Any]) -> str:
    runs = [run for cell in study["cells"] for run in cell["runs"]]
    counts = {status: sum(run["status"] == status for run in runs) for status in ("done", "collapsed", "failed")}
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    return f"{len(study['cells'])} cells with {len(study['seeds'])} seeds: {told or 'none has ended yet'}."


def _cell(cell: Mapping[str, Any], columns: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    rows = [
        run | {"shown": _shown(run["values"], columns), "link": f"{run['name']}/report.html" if _has_report(folder, run) else ""}
        for run in cell["runs"]
    ]
    steps = cell["mean"].get("steps")
    return dict(cell) | {
        "shown": _shown(cell["mean"], columns),
        "spread": _spread(cell, columns),
        "runs": rows,
        "steps": "–" if steps is None else f"{steps:.0f}",
        "set": ", ".join(f"{key}={json.dumps(value)}" for key, value in cell["set"].items()),
    }


def _spread(cell: Mapping[str, Any], columns: Sequence[Mapping[str, Any]]) -> list[str]:
    """Smallest and largest of a cell's seeds, by column; "" where they are shown alike, or there is one."""
    found = []
    for column in columns:
        ends = cell.get("spread", {}).get(column["title"], (None, None))
        low, high = (_shown({column["title"]: end}, [column])[0] for end in ends)
        found.append("" if low == high else f"{low} – {high}")
    return found


def _maps(study: Mapping[str, Any], folder: Path) -> dict[str, list[int]]:
    """Bits by layer of each cell's first seed that has them."""
    found = {}
    for cell in study["cells"]:
        paths = [path for run in cell["runs"] if (path := folder / run["name"] / "layer_map.json").is_file()]
        if paths:
            found[cell["cell"]] = json.loads(paths[0].read_text(encoding="utf-8"))["bits"]
    return found


def _has_report(folder: Path, run: Mapping[str, Any]) -> bool:
    return (folder / run["name"] / "report.html").is_file()


def _shown(values: Mapping[str, float | None], columns: Sequence[Mapping[str, Any]]) -> list[str]:
    found = [(values.get(column["title"]), column) for column in columns]
    return ["–" if value is None else f"{value:.1%}" if of["share"] else f"{value:.{of.get('digits', 2)}f}" for value, of in found]


def pareto(study: Mapping[str, Any]) -> str:
    """Cells by the means of the two columns that the study names; "" where it names none."""
    if not study.get("pareto"):
        return ""
    titles = study["pareto"]
    return charts.pareto([(*(cell["mean"].get(title) for title in titles), cell["cell"]) for cell in study["cells"]], titles)


def _steps(folder: Path) -> list[dict[str, Any]]:
    return [record for _, record in read_json_lines(folder / "metrics.jsonl")]
