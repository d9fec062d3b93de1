"""Episodes as the page shows them: by step, group and sample, each run of generated tokens in the colour of its advantage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FILE = "episodes.jsonl"
FULL = 1.5
"""An advantage of this size has the full colour."""


def told(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the template reads of `raysys.agent_transcripts`' records. All texts in it are data."""
    return [
        {
            "step": record["step"] + 1,
            "groups": [_group(group) for group in record["groups"]],
            "open": number == len(records) - 1,
        }
        for number, record in enumerate(records)
    ]


def _group(group: Mapping[str, Any]) -> dict[str, Any]:
    samples = [dict(sample) | {"segments": _segments(sample), "open": False} for sample in group["samples"]]
    if samples:  # the one that a reader learns most from: calibrated, else blamed, else any
        max(samples, key=_tells)["open"] = True
    return dict(group) | {"samples": samples}


def _tells(sample: Mapping[str, Any]) -> tuple[bool, bool]:
    runs = [segment for segment in sample["segments"] if segment["trained"]]
    return any(run["grpo"] and run["side"] == "bad" for run in runs), any(run["side"] == "bad" for run in runs)


def _segments(sample: Mapping[str, Any]) -> list[dict[str, Any]]:
    shown = []
    for number, segment in enumerate(sample["segments"]):
        if segment["run"] < 0:
            name = "opener" if number == 0 else "environment"
            shown.append({"trained": False, "name": name, "tokens": segment["tokens"], "text": segment["text"]})
            continue
        advantage, grpo = signed(segment["advantage"]), signed(segment["grpo"])
        shown.append(
            {
                "trained": True,
                "name": _name(segment),
                "tokens": segment["tokens"],
                "text": segment["text"],
                "advantage": advantage,
                "grpo": grpo if grpo != advantage else "",
                "side": "good" if segment["advantage"] > 0 else "bad" if segment["advantage"] < 0 else "none",
                "strength": strength(segment["advantage"]),
                "score": None if segment["score"] is None else f"{segment['score']:.2f}",
                "perplexity": None if segment["perplexity"] is None else f"{segment['perplexity']:,.2f}",
                "high": (segment["perplexity"] or 0.0) >= 50,
            }
        )
    return shown


def _name(segment: Mapping[str, Any]) -> str:
    if segment["action"] == "search":
        return f"search {segment['run'] + 1}" + ("" if segment["shown"] else ", not answered")
    return "answer" if segment["action"] == "answer" else "invalid action"


def signed(value: float) -> str:
    """With the sign that stands for both; what rounds to nothing has none."""
    text = f"{abs(value):.2f}"
    if float(text) == 0:
        return "0" if value == 0 else f"{'−' if value < 0 else '+'}{abs(value):.0e}"
    return ("−" if value < 0 else "+") + text


def strength(value: float) -> int:
    """Percent of colour, 0 of no advantage; a small one can still be seen."""
    return 0 if value == 0 else round(14 + 36 * min(1.0, abs(value) / FULL))
