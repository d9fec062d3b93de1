"""Weak scaling of pretraining over gloo: as many tokens a rank whether there is one rank or several, one thread and one process each.

`efficiency`: the step of one rank over that of several. Some of what is missing is not communication: ranks on one machine share its
memory and caches. So a layout also runs with collectives that do nothing (its numbers are then of no use, its work is the same but for
the exchange); `communication` is the share of the step that goes away with them, waiting for the slower rank included. ZeRO 3, which
checks what it gets, and split experts cannot do without their exchange and have no such figure. Optimiser steps of random tokens; rounds
alternate, medians over all steps.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DEFAULTS: dict[str, Any] = {
    "ranks": 2,
    "tokens": 2048,
    "sequence": 256,
    "width": 256,
    "layers": 4,
    "experts": 16,
    "steps": 6,
    "rounds": 3,
    "layouts": ["zero 0", "zero 1", "zero 2", "zero 3", "experts split"],
}
MUTABLE = ("zero 0", "zero 1", "zero 2")
NOTHING_DONE = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "barrier",
)


def run(ranks: int, layouts: list[str], rounds: int, **size: Any) -> dict[str, Any]:
    """Figures by layout. `tokens`: of each rank and step."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for layout in layouts:
            kinds = [("alone", 1, False), ("together", ranks, False)]
            if layout in MUTABLE:
                kinds.append(("without exchange", ranks, True))
            for kind, world, mute in kinds:
                seconds.setdefault((layout, kind), []).extend(_group(size | {"layout": layout, "world": world, "mute": mute}))
    rows = []
    for layout in layouts:
        alone, together = (statistics.median(seconds[layout, kind]) for kind in ("alone", "together"))
        row = {"layout": layout, "alone_s": alone, "together_s": together, "efficiency": alone / together}
        row |= {"tokens_a_second": ranks * size["tokens"] / together, "communication": None}
        if quiet := seconds.get((layout, "without exchange")):
            row |= {"without_exchange_s": statistics.median(quiet), "communication": 1 - statistics.median(quiet) / together}
        rows.append(row)
    return {"ranks": ranks, "size": size, "rows": rows}


def table(figures: dict[str, Any]) -> list[list[Any]]:
    names = ("layout", "alone_s", "together_s", "without_exchange_s", "efficiency", "communication", "tokens_a_second")
    heads = [name.replace("_", " ") for name in names]
    return [heads, *(["-" if row.get(name) is None else row[name] for name in names] for row in figures["rows"])]


def _group(size: dict[str, Any]) -> list[float]:
    """Seconds of each step of the first of so many ranks."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size["world"]), "LOCAL_SIZE": str(size["world"])}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "tests.bench.weak_scaling", json.dumps(size)]
    ranks = []
    for rank in range(size["world"]):
        own = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT))
    try:
        told = [rank.communicate(timeout=600) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()  # one that waits for another that failed
    if any(rank.returncode for rank in ranks):
        raise RuntimeError("\n".join(err[-2000:] for _, err in told))
    return json.loads(told[0][0].splitlines()[-1])


class _Done:
    """The handle of an exchange that has nothing to do."""

    def wait(self, *_: Any) -> None:
        return None

    def is_completed(self) -> bool:
        return True


def _mute() -> None:
    """From here on collectives leave their buffers as they are."""
    from torch import distributed as dist

    for name in NOTHING_DONE:
        setattr(dist, name, lambda *_, **__: _Done())


def _rank(layout: str, world: int, mute: bool, tokens: int, sequence: int, steps: int, **sizes: int) -> list[float]:
    import numpy as np

    from raysys.config.pretraining import PretrainMoeConfig
    from raysys.training.pretrain_spec import PretrainSpec, Sequences
    from raysys.training.pretrainer import Pretrainer

    split = layout == "experts split" and world > 1
    stage = 1 if layout == "experts split" else int(layout.split()[1])
    width, experts = sizes["width"], sizes["experts"]
    model = {"width": width, "layers": sizes["layers"], "heads": width // 64, "kv_heads": max(1, width // 128), "head_dim": 64}
    model |= {"vocabulary": 4096, "experts": experts, "top_k": 4, "expert_width": width}
    config = PretrainMoeConfig.model_validate(
        {
            "model": model,
            "data": {"sources": {"all": {"path": "x"}}, "tokenizer": "none", "sequence": sequence},
            "batch": world * tokens // sequence,
            "steps": 1000,
            "optimiser": {"warmup_steps": 1, "learning_rate": 1e-5},
            "trainer": {"ranks": world, "zero_stage": stage, "expert_parallel": world if split else 1, "threads": 1},
        }
    )
    rank = Pretrainer(PretrainSpec(config, 4096, None, "cpu", "float32"))
    rng = np.random.default_rng(rank.rank)
    lengths = np.full(tokens // sequence, sequence)
    seconds = []
    for step in range(steps + 2):
        part = Sequences(rng.integers(4096, size=tokens), lengths)
        if mute and step == 1:
            _mute()
        began = time.perf_counter()
        rank.step([part])
        if step > 1:  # the first ones meet, and make their buffers
            seconds.append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    found = _rank(**json.loads(sys.argv[1]))
    print(json.dumps(found), flush=True)
    os._exit(0)  # the other rank may have left already
