"""Pictures of a quantised model by layer: bits as a strip, what they rest on beneath it, and what each layer lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raysys.report import charts

_STRIP = {2: "#c2434a", 3: "#e07b39", 4: "#3b6fd4", 5: "#5b8aa6", 6: "#2f9e6e", 7: "#8a7a3d", 8: "#1d3f86"}
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LINES: tuple[tuple[str, tuple[tuple[str, str, int], ...]], ...] = (
    ("Squared error of the hidden states, relative", (("error_before", "in front of the layer", 5), ("error_after", "behind it", 6))),
    ("Squared error of weights, relative", tuple((f"weight_error/{name}", name, place) for place, name in enumerate(_LINEARS))),
    (
        "Squared error of outputs on the calibration tokens, relative",
        tuple((f"output_error/{name}", name, place) for place, name in enumerate(_LINEARS)),
    ),
    ("Correction of the norm after attention, root mean square", (("correction", "", 2),)),
    (
        "Experts with fewer calibration tokens than inputs",
        (("experts_scarce", "all of them", 5), ("experts_rounded", "without any, rounded to nearest", 6)),
    ),
)


def pictures(layer_map: Mapping[str, Any] | None, records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(title, HTML) of a run that quantised; [] for other runs.

    Args:
        layer_map: what `layer_map.json` holds: `bits`, `allocation`, `scores`, and `series` by name, each of all layers.
        records: of `metrics.jsonl`, one a layer.
    """
    if not layer_map:
        return []
    average = sum(layer_map["bits"]) / len(layer_map["bits"])
    found = [(f"Bits by layer ({layer_map['allocation']}, {average:.3g} on average)", _strip(layer_map))]
    for title, lines in _LINES:
        drawn = [
            (label, [record["step"] for record in records], [record[key] for record in records], charts.COLORS[color % len(charts.COLORS)])
            for key, label, color in lines
            if records and all(isinstance(record.get(key), (int, float)) for record in records)
        ]
        if drawn:
            found.append((title, _by_layer(drawn)))
    return found


def summary(layer_map: Mapping[str, Any] | None, evaluations: Sequence[Mapping[str, Any]]) -> str:
    """One sentence; "" for other runs."""
    if not layer_map:
        return ""
    bits = layer_map["bits"]
    counts = ", ".join(f"{bits.count(width)} of {width} bits" for width in sorted(set(bits)))
    told = [f"{len(bits)} layers: {counts}"]
    for one in evaluations:
        if (value := one.get("measures", {}).get("perplexity")) is not None:
            told.append(f"perplexity {value:.4f} ({one['label']})")
    return "; ".join(told) + "."


def side_by_side(layer_maps: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Titles and pictures of several models by name: where each has its bits, and the scores of the first that has any."""
    found = []
    if html := maps({name: one["bits"] for name, one in layer_maps.items()}):
        found.append(("Bits by layer", html))
    scored = next((one for one in layer_maps.values() if one.get("scores")), None)
    if scored is not None:
        found.append((f"What they rest on ({scored['allocation']})", _strip(scored)))
    return found


def maps(bits: Mapping[str, Sequence[int]]) -> str:
    """Bits by layer of several models, those with the same ones in one row; "" where there are fewer than two rows."""
    import plotly.graph_objects as go

    rows: dict[tuple[int, ...], list[str]] = {}
    for name, layers in bits.items():
        rows.setdefault(tuple(layers), []).append(name)
    mixed = {layers: names for layers, names in rows.items() if len(set(layers)) > 1}
    if len(mixed) < 2:
        return ""
    widths = sorted({width for layers in mixed for width in layers})
    figure = go.Figure(
        go.Heatmap(
            z=[[widths.index(width) for width in layers] for layers in mixed],
            y=[", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "") for names in mixed.values()],
            text=[[str(width) for width in layers] for layers in mixed],
            texttemplate="%{text}",
            colorscale=_steps(widths),
            zmin=-0.5,
            zmax=len(widths) - 0.5,
            showscale=False,
            xgap=2,
            ygap=2,
            hovertemplate="%{y}, layer %{x}: %{text} bits<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(title_text="layer")
    return charts.html(figure, height=90 + 28 * len(mixed))


def _steps(widths: Sequence[int]) -> list[list[Any]]:
    """A colour scale with one step a width."""
    ends = [(number / len(widths), (number + 1) / len(widths)) for number in range(len(widths))]
    return [[place, _STRIP[width]] for width, both in zip(widths, ends, strict=True) for place in both]


def _strip(layer_map: Mapping[str, Any]) -> str:
    """The map: one row of bits, and under it a row for each component where there are any."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    bits, series = layer_map["bits"], dict(layer_map.get("series") or {})
    if layer_map.get("scores"):
        series = {"score": layer_map["scores"]} | series
    layers = list(range(len(bits)))
    rows = 2 if series else 1
    figure = make_subplots(rows=rows, cols=1, shared_xaxes=True, vertical_spacing=0.04, row_heights=[1, max(1, len(series))][:rows])
    widths = sorted(set(bits))
    figure.add_trace(
        go.Heatmap(
            z=[[widths.index(width) for width in bits]],
            x=layers,
            y=["bits"],
            colorscale=_steps(widths),
            zmin=-0.5,
            zmax=len(widths) - 0.5,
            text=[[str(width) for width in bits]],
            texttemplate="%{text}",
            showscale=False,
            xgap=2,
            hovertemplate="layer %{x}: %{text} bits<extra></extra>",
        ),
        row=1,
        col=1,
    )
    if series:
        figure.add_trace(
            go.Heatmap(
                z=[_ranks(values) for values in series.values()],
                x=layers,
                y=list(series),
                customdata=list(series.values()),
                colorscale=[[0, "#f3f1ea"], [0.5, "#7fa7e0"], [1, "#1d3f86"]],
                showscale=False,
                xgap=2,
                ygap=1,
                hovertemplate="layer %{x}, %{y}: %{customdata:.4g}<extra></extra>",
            ),
            row=2,
            col=1,
        )
        figure.update_yaxes(autorange="reversed", row=2, col=1)
    figure.update_xaxes(title_text="layer, darker: more sensitive" if series else "layer", row=rows, col=1)
    return charts.html(figure, height=120 + 22 * len(series), left=76)


def _ranks(values: Sequence[float]) -> list[float]:
    """Places from 0 to 1: what decides, and what colours can tell apart where values differ by powers of ten."""
    order = sorted(range(len(values)), key=lambda place: values[place])
    found = [0.0] * len(values)
    for rank, place in enumerate(order):
        found[place] = rank / max(1, len(values) - 1)
    return found


def _by_layer(lines: Sequence[tuple[str, list[int], list[float], str]]) -> str:
    import plotly.graph_objects as go

    figure = go.Figure()
    for label, x, y, color in lines:
        figure.add_scatter(x=x, y=y, name=label, mode="lines+markers", line={"color": color, "width": 1.5}, showlegend=len(lines) > 1)
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(rangemode="tozero", nticks=6)
    return charts.html(figure, height=260)


def pareto(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of a pipeline's table: perplexity by bits, with that of the model that most bits are spent on across; "" for other pipelines."""
    found = [(row["measures"], row["label"]) for row in rows if {"perplexity", "bits_per_weight"} <= row.get("measures", {}).keys()]
    points = sorted((one["bits_per_weight"], one["perplexity"], label) for one, label in found)
    return charts.pareto(points[:-1], ("bits per weight", "perplexity"), floor=points[-1][1:]) if len(points) > 3 else ""
