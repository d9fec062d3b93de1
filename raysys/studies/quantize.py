"""Studies of `jobs/quantize.py`. Papers: arXiv 2603.17354 (NSDS), 2602.02546 (D2Quant)."""

from __future__ import annotations

from typing import Any

from raysys.studies.ablation import Asks, Study
from raysys.studies.measures import Column, Seen, number

METHODS = ("rtn", "gptq", "gptaq", "d2quant")
ALLOCATIONS = ("nsds", "first_half", "last_half", "random")
PLAIN: dict[str, Any] = {
    "group_size": 128,
    "d2quant.dual_scale": True,
    "d2quant.correction": None,
    "rotation": False,
}


def _cells() -> dict[str, dict[str, Any]]:
    """Methods at 2 and 3 bits everywhere, at 3 bits on average by each allocation, and D2Quant without one of its parts."""
    found: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        for bits in (2, 3):
            found[f"{method}-{bits}"] = PLAIN | {"method": method, "bits": bits, "allocation": "uniform"}
        for allocation in ALLOCATIONS:
            found[f"{method}-3-{allocation}"] = PLAIN | {"method": method, "bits": 3, "allocation": allocation}
    two = found["d2quant-2"]
    return found | {
        "d2quant-2-no-dsq": two | {"d2quant.dual_scale": False},
        "d2quant-2-dac": two | {"d2quant.correction": True},
        "d2quant-2-rotated": two | {"rotation": True},
        "d2quant-2-group-64": two | {"group_size": 64},
    }


def _of(seen: Seen, label: str, name: str) -> float | None:
    """A measure of one of the models that a run evaluates; of two in which corrections are left out or in, of the likelier one."""
    found = [one["measures"] for one in seen.evaluations if one["label"].startswith(label)]
    return number(min(found, key=lambda one: one.get("perplexity", 0.0)).get(name)) if found else None


SENSITIVITY = Study(
    title="Bits: how many, where, and by which method",
    cells=_cells(),
    columns=(
        Column("bits per weight", lambda seen: _of(seen, "quantised", "bits_per_weight"), share=False, digits=3),
        Column("perplexity", lambda seen: _of(seen, "quantised", "perplexity"), share=False, digits=4),
        Column("perplexity in full", lambda seen: _of(seen, "full precision", "perplexity"), share=False, digits=4),
        Column("accuracy", lambda seen: _of(seen, "quantised", "accuracy")),
        Column("accuracy in full", lambda seen: _of(seen, "full precision", "accuracy")),
        Column("megabytes", lambda seen: _of(seen, "quantised", "megabytes"), share=False),
        Column("error of states", lambda seen: seen.mean("error_after", 1), share=False, digits=4),
    ),
    told=("error_after",),
    pareto=("bits per weight", "perplexity"),
    asks=lambda config: Asks(gpus=1, cores=config.threads),
    shares="shared",
)

STUDIES = {"sensitivity": SENSITIVITY}
