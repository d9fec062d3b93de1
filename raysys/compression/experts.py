"""Experts of a mixture as linears of their layer: their names, and the stacks in which transformers 5 and some files hold them.

Legend: E experts, D width, d expert width.

    apart    mlp.experts.e.gate_proj.weight, .up_proj.weight [d, D], .down_proj.weight [D, d]     what is published and what is exported
    stacked  mlp.experts.gate_up_proj [E, 2 d, D], gate first, and mlp.experts.down_proj [E, D, d]
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raysys.errors import ConfigError

FAMILIES = ("qwen3_moe",)
"""Values of `model_type` whose layers are such mixtures."""
ROUTER = "mlp.gate"
"""Reads the norm after attention as experts do; it is never quantised."""
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
_ONE = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj")


def count(config: Mapping[str, Any]) -> int:
    """Experts of each layer; 0 of a dense model."""
    if config.get("model_type") not in FAMILIES:
        return 0
    return int(config.get("num_experts") or config.get("num_local_experts") or 0)


def linears(experts: int) -> tuple[str, ...]:
    """Names of the experts' linears, relative to a layer, one expert after another."""
    return tuple(f"mlp.experts.{expert}.{part}_proj" for expert in range(experts) for part in ("gate", "up", "down"))


def part_of(linear: str) -> tuple[int, str] | None:
    """Expert and part ("gate", "up", "down") of a linear's name; None: it is no expert's."""
    found = _ONE.fullmatch(linear)
    return None if found is None else (int(found[1]), found[2])


def pooled(linear: str) -> str:
    """The name that an expert's linear would have in a dense layer ("mlp.up_proj"); others keep theirs."""
    return linear if (part := part_of(linear)) is None else f"mlp.{part[1]}_proj"


def stacked_shapes(experts: int, width: int, inner: int) -> dict[str, tuple[int, int, int]]:
    return {GATE_UP: (experts, 2 * inner, width), DOWN: (experts, width, inner)}


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors with stacks, if it has any, as views of single experts."""
    found = {name: tensor for name, tensor in tensors.items() if name not in (GATE_UP, DOWN)}
    if GATE_UP in tensors:
        for expert, both in enumerate(tensors[GATE_UP]):
            gate, up = both.chunk(2)
            found |= {f"mlp.experts.{expert}.gate_proj.weight": gate, f"mlp.experts.{expert}.up_proj.weight": up}
    if DOWN in tensors:
        found |= {f"mlp.experts.{expert}.down_proj.weight": down for expert, down in enumerate(tensors[DOWN])}
    return found


def stacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other way round, copies: what a mixture's module in transformers 5 is filled with."""
    found = dict(tensors)
    experts = sum(1 for name in tensors if (part := part_of(name.removesuffix(".weight"))) and part[1] == "down")
    if not experts:
        return found
    rows = [found.pop(f"mlp.experts.{expert}.{part}_proj.weight") for expert in range(experts) for part in ("gate", "up")]
    down = [found.pop(f"mlp.experts.{expert}.down_proj.weight") for expert in range(experts)]
    return found | {GATE_UP: torch.cat(rows).unflatten(0, (experts, -1)), DOWN: torch.stack(down)}


def check(config: Mapping[str, Any], names: Mapping[str, Any]) -> None:
    """Raises ConfigError: the layer with these tensors has experts, but not as the families above have them."""
    family = config.get("model_type") or "model of no named type"
    if family not in FAMILIES:
        if any("experts" in name for name in names):
            raise ConfigError(
                f"{family} is a mixture of experts whose layers are not known", f"give a {' or '.join(FAMILIES)} or a dense model as model"
            )
        return
    if config.get("mlp_only_layers") or (config.get("decoder_sparse_step") or 1) != 1:
        raise ConfigError(
            f"this {family} has dense layers among its mixtures (mlp_only_layers, decoder_sparse_step), which are not quantised yet",
            "give a model all of whose layers are mixtures, or a dense one",
        )
    for key, found in (("num_experts", count(config)), ("moe_intermediate_size", config.get("moe_intermediate_size"))):
        if not isinstance(found, int) or found < 1:
            raise ConfigError(f"the config of this {family} has no {key}", "copy its config.json again")
