"""The report's pictures, as HTML fragments of plotly figures. They carry no text of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLORS = ("#3b6fd4", "#e07b39", "#2f9e6e", "#b4459c", "#8a7a3d", "#5b8aa6", "#c2434a")
PHASES = ("generate", "score", "train", "push", "record", "evaluate", "checkpoint", "other")
_TITLES = {
    "reward": "Reward",
    "reverse_kl": "Reverse KL to the teacher, nats a token",
    "loss": "Loss",
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
}
CURVES = tuple(_TITLES)


def curves(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(title, HTML) of each metric that the records have; per-domain parts (`reward/add`) join their whole."""
    return overlay({"": records})


def overlay(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[str, str]]:
    """As `curves`, with several runs in each picture. A single run shows its domains too."""
    pictures = []
    for name in CURVES:
        lines: list[tuple[str, list[int], list[float], str]] = []
        for number, (label, records) in enumerate(runs.items()):
            keys = [name]
            if len(runs) == 1:
                keys += sorted({key for record in records for key in record if key.startswith(f"{name}/")})
            for key in keys:
                points = [(record["step"] + 1, record[key]) for record in records if isinstance(record.get(key), (int, float))]
                if points:
                    shown = label or (key.partition("/")[2] or "all")
                    color = COLORS[(number if len(runs) > 1 else len(lines)) % len(COLORS)]  # a run keeps its colour in all pictures
                    lines.append((shown, [x for x, _ in points], [y for _, y in points], color))
        if lines:
            pictures.append((_TITLES[name], _lines(lines, len(runs) > 1, small=name in ("parity_gap", "learning_rate"))))
    return pictures


def _lines(lines: Sequence[tuple[str, list[int], list[float], str]], several: bool, small: bool) -> str:
    import plotly.graph_objects as go

    figure = go.Figure()
    for number, (label, x, y, color) in enumerate(lines):
        mode = "lines+markers" if len(x) < 3 else "lines"
        figure.add_scatter(
            x=x, y=y, name=label, mode=mode, line={"color": color, "width": 2 if number == 0 else 1.5}, showlegend=several or len(lines) > 1
        )
    figure.update_xaxes(title_text="step")
    figure.update_yaxes(tickformat=".0e" if small else None, rangemode="tozero" if small else "normal", nticks=6)
    return _html(figure, height=240)


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
    return _html(figure, height=320)


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
    return _html(figure, height=320)


def accuracy_by_step(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Held-out accuracy over the run, one line a domain; empty with fewer than three evaluations."""
    import plotly.graph_objects as go

    if len(evaluations) < 3:
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
    return _html(figure, height=320)


def script() -> str:
    """plotly.js itself, to be put into the page once (MIT licence)."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _html(figure: Any, height: int) -> str:
    figure.update_layout(
        height=height,
        margin={"l": 52, "r": 14, "t": 12, "b": 42},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12, "color": "#7a808a"},
        legend={"orientation": "h", "y": 1.12, "x": 0, "font": {"size": 11}},
        hovermode="x unified",
        template="none",
    )
    figure.update_xaxes(gridcolor="rgba(128,134,145,.14)", zeroline=False, title_standoff=6)
    figure.update_yaxes(gridcolor="rgba(128,134,145,.22)", zeroline=False)
    return figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True, "displayModeBar": False}
    )
