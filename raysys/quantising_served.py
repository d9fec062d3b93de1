"""A finished file in vLLM: its engine's log-probs of a fixed sequence, held against those of what the codes stand for."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from raysys.assembly import Hardware
from raysys.config.parts import Rollout
from raysys.config.quantising import QuantizeConfig
from raysys.data.text import context_length
from raysys.errors import CheckpointError
from raysys.rollout.pool import RolloutPool
from raysys.rollout.spec import RolloutSpec
from raysys.runtime import get

log = logging.getLogger("raysys")

TOKENS = 32
ALLOWED = 0.25
"""Nats, in the mean: vLLM computes in bfloat16 with these kernels, and one unlikely token may differ by more."""


def unservable(export: Path, device: str, avx512: bool) -> str | None:
    """Why vLLM has no kernel for the file on this device; None: it has one.

    Args:
        export: the file's folder.
        device: "cpu" or "gpu".
        avx512: whether the CPU has these instructions.
    """
    if device == "gpu":
        return None
    config = json.loads((export / "config.json").read_text(encoding="utf-8"))
    groups = config["quantization_config"]["config_groups"].values()
    if any(group["weights"]["num_bits"] != 4 for group in groups):
        return "its CPU kernel has 4 bits only"
    if any(config.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return "its CPU kernel for packed experts needs AMX"
    return None if avx512 else "its CPU kernel needs AVX-512"


def serve(config: QuantizeConfig, folder: Path, hardware: Hardware, probe: Mapping[str, Any]) -> str:
    """Starts an engine on `export/` and says how far its log-probs are from the model's own.

    Args:
        folder: of the run.
        probe: `ids`, and `logprobs` of each but the first; or `reason`, why there is none.

    Raises:
        CheckpointError: the engine computes something else.
        RaysysError: it does not start.
    """
    if probe["reason"]:
        return f"export/ is not served by vLLM here: {probe['reason']}"
    export = folder / "export"
    spec = RolloutSpec(
        model=str(export),
        device=hardware.device,
        dtype="bfloat16",  # all that its CPU kernel computes in, whatever the file's own
        max_model_len=len(probe["ids"]) + 1,
        config=Rollout(threads=config.threads, enforce_eager=True),
        log_dir=str(folder / "logs"),
    )
    with RolloutPool(spec.config, spec, config.deadlines) as pool:
        pool.start()
        answer = pool.workers[0].handle.probe.remote(list(probe["ids"]))
        limit = config.deadlines.push
        found = get(answer, timeout=limit, actor="the engine", operation="probe", knob="deadlines.push")
    gaps = np.abs(np.asarray(found) - np.asarray(probe["logprobs"]))
    if not gaps.mean() <= ALLOWED:
        raise CheckpointError(
            f"vLLM computes something else with {export}: log-probs differ by {gaps.mean():.3g} nats in the mean, allowed: {ALLOWED:g}",
            "set check_export=false to go on without, and use dequantised/ (keep_dequantised=true)",
        )
    return f"export/ is served by vLLM; log-probs of what its codes stand for, to {gaps.mean():.2g} nats in the mean"


def probe_length(model: str) -> int:
    """Tokens of the sequence, as many as the model's window has room for with one more."""
    return min(TOKENS, (context_length(model) or TOKENS + 1) - 1)
