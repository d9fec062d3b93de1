"""The report's pictures, as HTML fragments of plotly figures. They carry no text of a model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

COLORS = (
    *("#3b6fd4", "#e07b39", "#2f9e6e", "#b4459c", "#8a7a3d", "#5b8aa6", "#c2434a"),
    *("#6a4fb3", "#d9a521", "#d98cb3", "#1f6f78", "#7a4a32"),
)
PHASES = ("quantise", "data", "generate", "score", "train", "push", "record", "watch", "validate", "evaluate", "checkpoint", "other")
_TITLES = {
    "reward": "Reward",
    "exact_match": "Share of exact matches",
    "valid": "Share of valid format",
    "searches": "Searches an episode",
    "turns": "Turns an episode",
    "high_ppl": "Share of episodes of high perplexity or with an invalid action",
    "invalid_action": "Share of episodes with an invalid action",
    "mass_ratio_before": "Negative over positive advantage, before calibration",
    "mass_ratio_after": "Negative over positive advantage, as trained on",
    "answer_mass_ratio_before": "Negative over positive advantage of answers, before calibration",
    "answer_mass_ratio_after": "Negative over positive advantage of answers, as trained on",
    "score_mean": "Mean score of search steps",
    "softened_of_negative": "Share of punished search steps that were spared",
    "silver_empty": "Share of questions without silver documents",
    "silver_size": "Silver documents of a question that has some, median",
    "loss_tokens": "Share of response tokens trained on",
    "reverse_kl": "Reverse KL to the teacher, nats a token",
    "loss": "Loss",
    "validation_loss": "Held-out loss, nats a token",
    "alignment": "Alignment of routers with their experts (lambda)",
    "max_violation": "Load of the busiest expert above the mean, of a batch (MaxVio)",
    "max_violation_global": "Load of the busiest expert above the mean, between looks (MaxVio)",
    "balance_loss": "Balance loss, 1 where all experts are alike",
    "row_cosine": "Mean |cosine| between router rows",
    "z_loss": "Router z-loss",
    "nll": "Negative log-likelihood, nats a token",
    "response_tokens": "Response length, tokens",
    "entropy": "Entropy, nats a token",
    "forward_kl_data": "Forward KL estimate at the data's tokens, nats",
    "reverse_kl_draws": "Reverse KL estimate at the student's draws, nats",
    "sampled_other": "Share of draws that are not the data's token",
    "reinforced": "Share of tokens reinforced",
    "suppressed": "Share of draws suppressed",
    "expert_negative": "Share of data tokens with a negative weight",
    "k_min": "Smallest k",
    "age_max": "Staleness, weight versions",
    "parity_gap": "Parity gap, trainer against engine, nats",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "truncated": "Share of responses cut at the limit",
    "correct": "Share of right answers",
    "tokens_per_second": "Response tokens a second",
    "importance_mean": "Mean importance weight",
    "mfu": "Share of the devices' peak (MFU)",
}
CURVES = tuple(_TITLES)
_EPISODES: tuple[tuple[str, tuple[tuple[str, str, int, bool], ...]], ...] = (
    ("Answers", (("reward", "F1", 0, False), ("exact_match", "exact match", 1, False), ("valid", "valid format", 2, False))),
    ("Searches and turns, mean of an episode", (("searches", "searches", 0, False), ("turns", "turns", 1, False))),
    (
        "Decay, share of episodes",
        (
            ("high_ppl", "perplexity ≥ 50 or invalid", 6, False),
            ("invalid_action", "invalid action", 1, False),
            ("truncated", "cut off", 5, False),
        ),
    ),
    (
        "Negative over positive advantage, before and after calibration",
        (
            ("mass_ratio_before", "before", 0, True),
            ("mass_ratio_after", "after", 0, False),
            ("answer_mass_ratio_before", "answers before", 1, True),
            ("answer_mass_ratio_after", "answers after", 1, False),
        ),
    ),
    (
        "Search steps: score, and punished ones spared",
        (("score_mean", "mean score", 0, False), ("softened_of_negative", "share spared", 2, False)),
    ),
    (
        "Search steps by score, share",
        (
            ("score_0", "0", 6, False),
            ("score_1_3", "1/3", 1, False),
            ("score_2_3", "2/3", 5, False),
            ("score_1", "1", 2, False),
            ("score_other", "other", 4, False),
        ),
    ),
    ("Questions without silver documents, share", (("silver_empty", "", 6, False),)),
    ("Silver documents of the other questions, median", (("silver_size", "", 0, False),)),
    ("Response tokens trained on, share", (("loss_tokens", "", 0, False),)),
)
"""Pictures of a run of search episodes: title, and by line the metric, its label, its colour, and whether it is dashed."""


def of_episodes(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the records are of a run that searches and answers."""
    return any("exact_match" in record for record in records)


def of_pretraining(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the records are of a run that pretrains a mixture of experts."""
    return any("balance_loss" in record for record in records)


def of_quantising(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the records are of a quantisation, whose steps are layers: `raysys.report.quantising` draws those."""
    return any("layer_bits" in record for record in records)


def routers(looks: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(title, HTML) of what `routers.jsonl` tells by layer: alignment over the run, and the loads of experts at the end."""
    import plotly.graph_objects as go

    if not looks:
        return []
    layers = range(len(looks[0]["alignment"]))
    steps = [look["step"] + 1 for look in looks]
    lines = [(f"layer {n + 1}", steps, [look["alignment"][n] for look in looks], COLORS[n % len(COLORS)], n >= len(COLORS)) for n in layers]
    load = looks[-1]["load"]
    figure = go.Figure(
        go.Heatmap(
            z=load,
            x=[str(n + 1) for n in range(len(load[0]))],
            y=[f"layer {n + 1}" for n in layers],
            colorscale=[[0, "#f3f1ea"], [0.5, "#7fa7e0"], [1, "#1d3f86"]],
            zmin=0,
            colorbar={"thickness": 10, "outlinewidth": 0},
            hovertemplate="%{y}, expert %{x}: %{z:.2f} of the mean<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(title_text="expert")
    return [
        ("Alignment by layer (lambda)", _lines(lines, True, small=False)),
        ("Load of each expert since the look before, as a share of the mean", html(figure, height=240)),
    ]


def curves(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(title, HTML) of each metric that the records have; per-domain parts (`reward/add`) join their whole.

    What `episodes` draws is left out, but for a reward that has parts.
    """
    drawn = {name for _, lines in _EPISODES for name, *_ in lines} if of_episodes(records) else set()
    if any(key.startswith("reward/") for record in records for key in record):
        drawn.discard("reward")
    return overlay({"": records}, drawn)


def episodes(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(title, HTML) of what search episodes tell, what belongs together in one picture; [] for other runs."""
    pictures = []
    for title, told in _EPISODES if of_episodes(records) else ():
        lines = []
        for name, label, color, dashed in told:
            if points := _points(records, name):
                lines.append((label, *points, COLORS[color], dashed))
        shown = [line for line in lines if not (line[0] == "other" and not any(line[2]))]
        if shown:
            pictures.append((title, _lines(shown, False, small=False)))
    return pictures


def _points(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]] | None:
    """Steps, counted from 1, and values of the records that have a number there."""
    points = [(record["step"] + 1, record[key]) for record in records if isinstance(record.get(key), (int, float))]
    return ([x for x, _ in points], [y for _, y in points]) if points else None


def overlay(runs: Mapping[str, Sequence[Mapping[str, Any]]], without: Collection[str] = ()) -> list[tuple[str, str]]:
    """As `curves`, with several runs in each picture. A single run shows its domains too. `without`: metrics to leave out."""
    runs = {label: records for label, records in runs.items() if not of_quantising(records)}
    titles = _TITLES | ({"reward": "F1"} if any(of_episodes(records) for records in runs.values()) else {})
    if any(of_pretraining(records) for records in runs.values()):
        titles |= {"loss": "Loss, nats a token", "tokens_per_second": "Tokens a second"}
    pictures = []
    for name in (name for name in CURVES if name not in without):
        lines: list[tuple[str, list[int], list[float], str, bool]] = []
        for number, (label, records) in enumerate(runs.items()):
            keys = [name]
            if len(runs) == 1:
                keys += sorted({key for record in records for key in record if key.startswith(f"{name}/")})
            for key in keys:
                if points := _points(records, key):
                    shown = label or (key.partition("/")[2] or "all")
                    color = COLORS[(number if len(runs) > 1 else len(lines)) % len(COLORS)]  # a run keeps its colour in all pictures
                    lines.append((shown, *points, color, False))
        if lines:
            pictures.append((titles[name], _lines(lines, len(runs) > 1, small=name in ("parity_gap", "learning_rate"))))
    return pictures


def _lines(lines: Sequence[tuple[str, list[int], list[float], str, bool]], several: bool, small: bool) -> str:
    import plotly.graph_objects as go

    figure = go.Figure()
    for number, (label, x, y, color, dashed) in enumerate(lines):
        mode = "lines+markers" if len(x) < 3 else "lines"
        line = {"color": color, "width": 2 if number == 0 else 1.5, "dash": "dot" if dashed else "solid"}
        figure.add_scatter(x=x, y=y, name=label, mode=mode, line=line, showlegend=several or len(lines) > 1)
    figure.update_xaxes(title_text="step")
    figure.update_yaxes(tickformat=".0e" if small else None, rangemode="tozero" if small else "normal", nticks=6)
    return html(figure, height=240)


def seconds(records: Sequence[Mapping[str, Any]]) -> str:
    """Seconds a step by phase, stacked; empty without timings."""
    import plotly.graph_objects as go

    timed = [record for record in records if record.get("seconds")]
    if not timed:
        return ""
    figure = go.Figure()
    for number, phase in enumerate(PHASES):
        values = [record["seconds"].get(phase, 0.0) for record in timed]
        if max(values) > 0:
            color = COLORS[number % len(COLORS)] if phase != "other" else "#9aa0a8"
            figure.add_bar(x=[record["step"] + 1 for record in timed], y=values, name=phase, marker_color=color)
    figure.update_layout(barmode="stack", bargap=0.0 if len(timed) > 60 else 0.15)
    figure.update_xaxes(title_text="step")
    figure.update_yaxes(title_text="seconds")
    return html(figure, height=320)


def accuracy(rows: Sequence[tuple[str, Mapping[str, Mapping[str, float]]]]) -> str:
    """Bars by domain, one colour a row (label, domains), with 95 % intervals."""
    import plotly.graph_objects as go

    domains = sorted({name for _, found in rows for name in found})
    figure = go.Figure()
    for number, (label, found) in enumerate(rows):
        have = [name for name in domains if name in found]
        means = [found[name]["mean"] for name in have]
        figure.add_bar(
            x=have,
            y=means,
            name=label,
            marker_color=COLORS[number % len(COLORS)],
            marker_pattern_shape="" if number < len(COLORS) else "/",
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [found[name]["high"] - mean for name, mean in zip(have, means, strict=True)],
                "arrayminus": [mean - found[name]["low"] for name, mean in zip(have, means, strict=True)],
                "thickness": 1.2,
                "width": 4,
                "color": "#7a808a",
            },
        )
    figure.update_layout(barmode="group")
    figure.update_yaxes(range=[0, 1.03], tickformat=".0%")
    return html(figure, height=320)


def accuracy_by_step(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Held-out accuracy over the run, one line a domain; empty with evaluations at fewer than three steps."""
    import plotly.graph_objects as go

    if len({one["step"] for one in evaluations if one["domains"]}) < 3:
        return ""
    figure = go.Figure()
    for number, name in enumerate(sorted({name for one in evaluations for name in one["domains"]})):
        found = [(one["step"], one["domains"][name]) for one in evaluations if name in one["domains"]]
        x, color = [step for step, _ in found], COLORS[number % len(COLORS)]
        band = {"x": x + x[::-1], "y": [d["high"] for _, d in found] + [d["low"] for _, d in reversed(found)]}
        figure.add_scatter(**band, fill="toself", fillcolor=color, opacity=0.14, line={"width": 0}, hoverinfo="skip", showlegend=False)
        figure.add_scatter(x=x, y=[d["mean"] for _, d in found], name=name, mode="lines+markers", line={"color": color, "width": 2})
    figure.update_xaxes(title_text="step")
    figure.update_yaxes(range=[0, 1.03], tickformat=".0%")
    return html(figure, height=320)


def pareto(points: Sequence[tuple[float | None, float | None, str]], titles: Sequence[str], floor: tuple[float, str] | None = None) -> str:
    """(x, y, name), both better when smaller; what nothing beats in both is joined by a line. "" where fewer than two have both.

    Args:
        points: those whose names begin alike, up to the first hyphen or underscore, have one colour.
        titles: of the axes.
        floor: a y to compare with, and its name, drawn across.
    """
    import plotly.graph_objects as go

    whole = sorted((x, y, name) for x, y, name in points if x is not None and y is not None)
    if len(whole) < 2:
        return ""
    figure = go.Figure()
    y = [point[1] for point in whole]
    best = [point for number, point in enumerate(whole) if point[1] < min(y[:number], default=float("inf"))]
    line = {"color": "rgba(128,134,145,.6)", "shape": "hv", "dash": "dot"}
    figure.add_scatter(x=[point[0] for point in best], y=[point[1] for point in best], mode="lines", line=line, name="nothing is better")
    kinds = dict.fromkeys(re.split("[-_]", name)[0] for *_, name in whole)
    for kind, color in zip(kinds, itertools.cycle(COLORS)):
        x, y, names = zip(*[point for point in whole if re.split("[-_]", point[2])[0] == kind], strict=True)
        figure.add_scatter(x=x, y=y, text=names, mode="markers", marker={"size": 9, "color": color}, name=kind)
    if floor is not None:
        figure.add_hline(y=floor[0], line={"color": "#9aa0a8", "width": 1}, annotation_text=floor[1], annotation_position="top right")
    figure.update_xaxes(title_text=titles[0])
    figure.update_yaxes(title_text=titles[1])
    figure.update_traces(hovertemplate="%{text}: %{y:.4g}<extra></extra>", selector={"mode": "markers"})
    return html(figure, height=420)


def script() -> str:
    """plotly.js itself, to be put into the page once (MIT licence)."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def html(figure: Any, height: int, left: int = 52) -> str:
    """A figure in the pages' style, as a fragment; `left` pixels for the labels of its rows."""
    figure.update_layout(
        height=height,
        margin={"l": left, "r": 14, "t": 12, "b": 42},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12, "color": "#7a808a"},
        legend={"orientation": "h", "y": 1.03, "yanchor": "bottom", "x": 0, "font": {"size": 11}},
        hovermode="x unified",
        template="none",
    )
    figure.update_xaxes(gridcolor="rgba(128,134,145,.14)", zeroline=False, title_standoff=6)
    figure.update_yaxes(gridcolor="rgba(128,134,145,.22)", zeroline=False)
    return figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True, "displayModeBar": False}
    )
