"""Weights and optimiser states of a mixture of experts by name, whole, whatever ranks, ZeRO stage and expert parallelism hold them.

Imports DeepSpeed: for actors only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state, safe_set_full_fp32_param, safe_set_full_optimizer_state
from torch import Tensor, nn
from torch import distributed as dist

from raysys.models.expert_parallel import own_part, whole_tensors
from raysys.models.moe import MoeDecoder, next_token_loss
from raysys.models.packing import Packing
from raysys.training.weights import gathered

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")


def whole_states(engine: Any, moments: Sequence[str] = MOMENTS) -> Iterator[tuple[str, str, Tensor | None]]:
    """(parameter, `weight` or a moment, tensor) one after another: float32 masters where these are wider than the weights. Collective.

    Args:
        engine: DeepSpeed's, around a `MoeDecoder`, after at least one optimiser step.
        moments: the optimiser's states of a parameter's shape.

    Yields:
        Tensors on the CPU on rank 0, None elsewhere. At most one stack is whole at a time.
    """
    _link(engine)
    first = dist.get_rank() == 0
    for key in (WEIGHT, *moments):
        for name, tensor in whole_tensors(engine.module, partial(_whole, engine, key)):
            yield name, key, tensor.detach().to("cpu", copy=True) if first and tensor is not None else None


def load_states(engine: Any, read: Callable[[str, str], Tensor], updates: int, moments: Sequence[str] = MOMENTS) -> None:
    """Puts whole tensors, as `whole_states` named them, back to where they are held. Collective.

    Args:
        read: (parameter, `weight` or moment) to tensor, on every rank. Called for one after another, so that few are in memory at a time.
        updates: optimiser steps that made the states.

    Raises:
        ValueError: a tensor is of another shape.
    """
    _prime(engine)
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            for key in (WEIGHT, *moments):
                _put(engine, key, parameter, own_part(engine.module, name, read(name, key)).to(parameter.device))
    for state in engine.optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"].fill_(updates)


def _whole(engine: Any, key: str, parameter: nn.Parameter) -> Tensor:
    """This rank's experts, or all of a dense parameter: put together from the pieces of those that have the same."""
    if engine.zero_optimization_stage() == 0:
        return parameter.detach() if key == WEIGHT else engine.optimizer.state[parameter][key]
    found = safe_get_full_fp32_param(parameter) if key == WEIGHT else safe_get_full_optimizer_state(parameter, key)
    assert found is not None, f"DeepSpeed has no {key} of a parameter that it trains"
    return found


def _put(engine: Any, key: str, parameter: nn.Parameter, value: Tensor) -> None:
    if engine.zero_optimization_stage() == 0:
        (parameter if key == WEIGHT else engine.optimizer.state[parameter][key]).copy_(value)
    elif key == WEIGHT:
        with gathered(engine, [parameter], writing=True):
            parameter.copy_(value)
        safe_set_full_fp32_param(parameter, value.float())
    else:
        safe_set_full_optimizer_state(parameter, value.float(), key)


def _link(engine: Any) -> None:
    """ZeRO 1 and 2 tie states to parameters after the first step of the optimiser's first group, when the others have none yet (0.19)."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _prime(engine: Any) -> None:
    """Makes the optimiser's states exist: a step without gradient at rate 0."""
    model: MoeDecoder = engine.module
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    device = next(model.parameters()).device
    engine.set_gradient_accumulation_boundary(True)
    loss, _, _ = next_token_loss(engine, torch.zeros(2, dtype=torch.long, device=device), Packing([2], device))
    engine.backward(loss * 0.0, scale_wrt_gas=False)
    engine.step()
    for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    _link(engine)
