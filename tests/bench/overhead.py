"""Time of a step that is neither generation, scoring nor training, with models of about 30 million parameters.

`gopd-step` with larger models: weight push (transfer, fingerprints, the engine's repacking, parity probe), records and all the rest.
"""

from __future__ import annotations

from typing import Any

from tests.bench import gopd_step

SIZES = {"hidden_size": 512, "layers": 8, "heads": 8, "kv_heads": 8, "head_dim": 64, "ffn_size": 1728, "initializer_range": 0.04}
DEFAULTS: dict[str, Any] = {"steps": 8, "skip": 2, "batch": 256, "max_age": 0, "model": SIZES}


def run(steps: int, skip: int, batch: int, max_age: int, model: dict[str, Any]) -> dict[str, Any]:
    """As `gopd_step.run`, with the number of parameters."""
    figures = gopd_step.run(steps, skip, 1.0, [f"batch={batch}", f"max_age={max_age}", "checkpoint_every=1000000"], model)
    width, ffn, layers = model["hidden_size"], model["ffn_size"], model["layers"]
    heads = (2 * model["heads"] + 2 * model["kv_heads"]) * model["head_dim"]
    return figures | {"parameters": layers * (width * heads + 3 * width * ffn)}


def table(figures: dict[str, Any]) -> list[list[Any]]:
    return [*gopd_step.table(figures), ["parameters of the layers", figures["parameters"]]]
