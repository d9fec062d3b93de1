"""An export as stock transformers with compressed-tensors loads it, held against what its codes stand for. Holds a whole model."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from raysys.compression import experts
from raysys.compression.shards import ABOUT
from raysys.errors import CheckpointError

_NOISE = {torch.float32: 1e-4}
"""Share of the largest logit by which two ways to compute it may differ; in half precision more."""
_HALF_NOISE = 0.05


def unreadable(export: Path) -> str | None:
    """Why the packages that are installed cannot load it; None: they can."""
    bits = set(json.loads((export / ABOUT).read_text(encoding="utf-8"))["bits"])
    config = json.loads((export / "config.json").read_text(encoding="utf-8"))
    if experts.count(config) and len(bits) > 1:
        return "transformers takes experts of one width only"
    try:
        helpers: Any = importlib.import_module("compressed_tensors.compressors.pack_quantized.helpers")
    except ImportError:
        return "compressed-tensors is not installed, or keeps its packing elsewhere"
    one = torch.zeros(1, 32, dtype=torch.int8)
    if other := sorted(width for width in bits if helpers.pack_to_int32(one, width).shape[1] != width):
        return f"this compressed-tensors unpacks {', '.join(map(str, other))} bits in another layout than vLLM and 0.18"
    return None


@torch.no_grad()
def largest_difference(export: Path, plain: Path) -> float:
    """Of logits on 32 drawn tokens, over the largest of them, between the export and a plain copy of what its codes stand for.

    Raises:
        CheckpointError: transformers does not load the export, or computes something else with it.
    """
    wanted = _logits(plain)
    try:
        given = _logits(export)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"transformers does not load {export}: {told}", "set check_export=false to go on without") from None
    gap = float((given.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp_min(1e-30))
    if not gap <= _NOISE.get(wanted.dtype, _HALF_NOISE):
        raise CheckpointError(
            f"transformers computes something else with {export}: logits differ by {gap:.2g} of the largest",
            "set check_export=false to go on without, and use dequantised/ (keep_dequantised=true)",
        )
    return gap


@torch.no_grad()
def log_probs(folder: Path, ids: list[int]) -> list[float]:
    """Of ids[1:], each given what precedes it, as transformers computes them in bfloat16 with a plain copy."""
    model = _model(folder, dtype=torch.bfloat16)
    rows = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return rows.gather(1, torch.tensor(ids[1:]).unsqueeze(1))[:, 0].tolist()


def _logits(folder: Path) -> Tensor:
    model = _model(folder)
    ids = torch.randint(model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids, use_cache=False).logits


def _model(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with contextlib.redirect_stderr(io.StringIO()):  # bars of progress
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()
