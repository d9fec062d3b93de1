"""A run's folder as one page that needs no server and no network: tables, curves, samples, and how to run it again."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from raysys.files import read_json_lines
from raysys.report import charts, quantising, transcripts
from raysys.report.masking import masked

_SIDE_BY_SIDE = 4
"""Models that fit beside one another as columns."""


def render_report(run_dir: str | Path) -> Path:
    """Writes `report.html` from what lies in `run_dir`; whatever is missing is left out.

    Text of models and configs is escaped; secrets are masked (`raysys.report.masking`).

    Returns:
        The page's path.
    """
    folder = Path(run_dir)
    about = masked(_json(folder / "about.json") or {})
    stages = _json(folder / "stages.json")
    page = _pipeline(folder, stages) if isinstance(stages, list) else _run(folder)
    config = masked(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))) if (folder / "config.yaml").is_file() else None
    text = _template().render(
        name=folder.name,
        about=about,
        command=about.get("command", ""),
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else "",
        css=Markup((Path(__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")),
        plotly=Markup(charts.script()),
        **page,
    )
    path = folder / "report.html"
    draft = path.with_name(".report.html.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
    return path


def _run(folder: Path) -> dict[str, Any]:
    records, evaluations = _lines(folder / "metrics.jsonl"), _lines(folder / "evaluation.jsonl")
    layers = _json(folder / "layer_map.json")
    ends = _ends(evaluations)
    return {
        "summary": _generated(records) or quantising.summary(layers, evaluations) or _summary(records, ends),
        "facts": _facts(records),
        "domains": sorted({name for one in ends for name in one["domains"]}),
        "table": [{"label": one["label"], "domains": one["domains"]} for one in ends],
        "measures": _measures(ends),
        "pareto": "",
        "split": ends[0].get("split") if ends else None,
        "accuracy": Markup(charts.accuracy([(one["label"], one["domains"]) for one in ends])) if ends else "",
        "accuracy_by_step": Markup(charts.accuracy_by_step(evaluations)),
        "episodes": [(title, Markup(html)) for title, html in charts.episodes(records)],
        "routers": [(title, Markup(html)) for title, html in charts.routers(_lines(folder / "routers.jsonl"))],
        "layers": [(title, Markup(html)) for title, html in quantising.pictures(layers, records)],
        "curves": [(title, Markup(html)) for title, html in charts.curves(records)],
        "seconds": Markup(charts.seconds(records)),
        "samples": _paired_samples(_lines(folder / "samples.jsonl")),
        "transcripts": transcripts.told(_lines(folder / transcripts.FILE)),
        "counts": _counts(records),
        "stages": [],
    }


def _pipeline(folder: Path, stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    compared = _json(folder / "comparison.json") or {}
    rows = compared.get("rows", [])
    shown, runs, samples, maps = [], {}, [], {}
    for stage in stages:
        run = Path(stage["run_dir"])
        run = run if run.is_absolute() else folder / run
        shown.append(masked(stage) | {"link": f"../{run.name}/report.html" if (run / "report.html").is_file() else ""})
        if (
            stage["job"] not in ("sft", "evaluate", "generate", "local_text")
            and (records := _lines(run / "metrics.jsonl"))
            and stage["status"] != "same"
        ):
            runs[stage["name"]] = records
            samples = _paired_samples(_lines(run / "samples.jsonl"))
        if layer_map := _json(run / "layer_map.json"):
            maps[stage["name"]] = layer_map
    return {
        "summary": _comparison_summary(rows, compared.get("columns", []), runs),
        "facts": [("stages", str(len(stages))), ("time in stages", f"{sum(stage['seconds'] for stage in stages):.0f} s")],
        "domains": compared.get("columns", []),
        "table": rows,
        "measures": _measures(rows),
        "pareto": Markup(quantising.pareto(rows)),
        "split": compared.get("split"),
        "accuracy": Markup(charts.accuracy([(row["label"], row["domains"]) for row in rows])) if rows else "",
        "accuracy_by_step": "",
        "episodes": [],
        "routers": [],
        "layers": [(title, Markup(html)) for title, html in quantising.side_by_side(maps)],
        "curves": [(title, Markup(html)) for title, html in charts.overlay(runs)] if runs else [],
        "seconds": Markup(charts.seconds(list(runs.values())[-1])) if runs and not maps else "",
        "samples": samples,
        "transcripts": [],
        "counts": {},
        "stages": shown,
    }


def _measures(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[str, float | None]]]:
    """What evaluations measure besides accuracy: by measure, each row's label and value; of many models by label, each measure's."""
    names = dict.fromkeys(name for row in rows for name in row.get("measures", {}))
    if len(rows) > max(_SIDE_BY_SIDE, len(names)) and names:
        return {row["label"]: [(name.replace("_", " "), row.get("measures", {}).get(name)) for name in names] for row in rows}
    return {name.replace("_", " "): [(row["label"], row.get("measures", {}).get(name)) for row in rows] for name in names}


def _ends(evaluations: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The evaluations that the table shows: of a run its first and last, of a list of models all."""
    if len({one["step"] for one in evaluations}) <= 1:
        return list(evaluations)
    return [evaluations[0], evaluations[-1]]


def _summary(records: Sequence[Mapping[str, Any]], ends: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    if not records and ends:
        return f"{len(ends)} model{'' if len(ends) == 1 else 's'} evaluated."
    if len({one["step"] for one in ends}) == 2:
        for name in sorted(ends[0]["domains"]):
            before, after = (one["domains"].get(name, {}).get("mean", float("nan")) for one in ends)
            parts.append(f"{name} accuracy {before:.1%} to {after:.1%}")
    if records and isinstance(records[0].get("reverse_kl"), float):
        parts.append(f"reverse KL {records[0]['reverse_kl']:.2f} to {records[-1]['reverse_kl']:.2f} nats a token")
    elif charts.of_pretraining(records):
        parts += _pretraining_summary(records)
    elif charts.of_episodes(records):
        parts += _episodes_summary(records)
    elif records and isinstance(records[0].get("nll"), float):
        parts.append(f"NLL {records[0]['nll']:.2f} to {records[-1]['nll']:.2f} nats a token")
    return ", ".join(parts) + f", in {len(records)} steps." if parts else f"{len(records)} steps."


def _pretraining_summary(records: Sequence[Mapping[str, Any]]) -> list[str]:
    parts = [f"loss {records[0]['loss']:.2f} to {records[-1]['loss']:.2f} nats a token"]
    for name, text in (("validation_loss", "held-out {:.3f}"), ("alignment", "lambda {:.2f}"), ("max_violation", "MaxVio {:.2f}")):
        found = [record[name] for record in records if isinstance(record.get(name), float)]
        parts += [text.format(found[-1])] if found else []
    if rates := [record["tokens_per_second"] / record["ranks"] for record in records if record.get("ranks")]:
        parts.append(f"{statistics.median(rates):,.0f} tokens/s a rank")
    if shares := [record["mfu"] for record in records if record.get("mfu")]:
        parts.append(f"MFU {statistics.median(shares):.0%}")
    return parts


def _episodes_summary(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """From the first steps to the last: a single step's questions may be easy ones."""
    few = max(1, min(5, len(records) // 4))
    parts = []
    for name, text in (
        ("reward", "F1 {:.2f} to {:.2f}"),
        ("exact_match", "exact match {:.0%} to {:.0%}"),
        ("searches", "searches {:.1f} to {:.1f}"),
    ):
        ends = [[one[name] for one in part if isinstance(one.get(name), float)] for part in (records[:few], records[-few:])]
        if all(ends):
            parts.append(text.format(*(sum(values) / len(values) for values in ends)))
    return parts


def _counts(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Of runs that write data: what became of the answers, by domain."""
    totals: dict[str, Counter[str]] = {}
    for record in records:
        for domain, counts in (record.get("counts") or {}).items():
            totals.setdefault(domain or "no tag", Counter()).update(counts)
    return {domain: dict(totals[domain]) for domain in sorted(totals)}


def _generated(records: Sequence[Mapping[str, Any]]) -> str:
    counts = _counts(records).values()
    if not counts:
        return ""
    kept, samples = (sum(count.get(name, 0) for count in counts) for name in ("kept", "samples"))
    return f"{kept:,} of {samples:,} answers kept, in {len(records)} shards."


def _comparison_summary(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], runs: Mapping[str, Any]) -> str:
    if not rows or not columns:
        told = [f"{name}: {', '.join(_pretraining_summary(records))}" for name, records in runs.items() if charts.of_pretraining(records)]
        return "; ".join(told) + "." if told else "No stage has been evaluated yet."
    # A specialist is best on average and useless elsewhere: what counts is the domain a model is worst at.
    best = max(rows, key=lambda row: min(row["domains"].get(name, {}).get("mean", 0.0) for name in columns))
    means = ", ".join(f"{name} {best['domains'][name]['mean']:.1%}" for name in columns if name in best["domains"])
    return f"Best in its weakest domain: {best['label']} ({means})."


def _facts(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    totals = sorted(record["seconds"]["total"] for record in records if (record.get("seconds") or {}).get("total"))
    facts = [("steps", str(len(records)))] if records else []
    if totals:
        facts += [("median step", f"{totals[len(totals) // 2]:.2f} s"), ("all steps", f"{sum(totals):.0f} s")]
    gaps = [record["parity_gap"] for record in records if isinstance(record.get("parity_gap"), float)]
    if gaps:
        facts.append(("largest parity gap", f"{max(gaps):.1e}"))
    if records and records[-1].get("fingerprint"):
        facts.append(("final weights", str(records[-1]["fingerprint"])[:12]))
    return facts


def _paired_samples(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first evaluation's examples beside the last one's, by prompt; a list of models shows each one's."""
    if not samples:
        return []
    steps = sorted(sample["step"] for sample in samples)
    ends = [sample for sample in samples if sample["step"] in (steps[0], steps[-1])]  # a run that was extended has an "after" in between
    chosen = list(dict.fromkeys(sample["label"] for sample in ends))
    prompts = list(dict.fromkeys((sample["domain"], sample["prompt"]) for sample in ends if sample["label"] == chosen[0]))
    found = {(sample["label"], sample["domain"], sample["prompt"]): sample for sample in ends}
    return [
        {
            "domain": domain,
            "prompt": prompt,
            "answer": found[chosen[0], domain, prompt]["answer"],
            "responses": [found[label, domain, prompt] for label in chosen if (label, domain, prompt) in found],
        }
        for domain, prompt in prompts
    ]


def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(loader=PackageLoader("raysys.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True).get_template(
        "report.html.j2"
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _lines(path: Path) -> list[dict[str, Any]]:
    return [record for _, record in read_json_lines(path)]
