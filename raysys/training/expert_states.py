"""Weights and optimiser states by name, whole, whatever ranks, ZeRO stage and expert parallelism hold them.

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
from raysys.training.parameter_groups import states_of
from raysys.training.weights import gathered

WEIGHT = "weight"

Moments = Callable[[str], Sequence[str]]
"""A parameter's name to the optimiser's states of its shape."""


def adamw_moments(name: str) -> tuple[str, ...]:
    """AdamW's, whatever the parameter."""
    return states_of("adamw")


def whole_states(engine: Any, moments: Moments = adamw_moments) -> Iterator[tuple[str, str, Tensor | None]]:
    """(parameter, `weight` or a moment, tensor) one after another: float32 masters where these are wider than the weights. Collective.

    Args:
        engine: DeepSpeed's, around a module that holds a `MoeDecoder` and tells its `expert_group`, after at least one optimiser step.
        moments: see `Moments`.

    Yields:
        Tensors on the CPU on rank 0, None elsewhere. At most one stack is whole at a time.
    """
    link(engine)
    first = dist.get_rank() == 0
    keys = dict.fromkeys(key for name, _ in engine.module.named_parameters() for key in moments(name))
    for key in (WEIGHT, *keys):
        for name, tensor in whole_tensors(engine.module, partial(_whole, engine, moments, key)):
            yield name, key, tensor.detach().to("cpu", copy=True) if first and tensor is not None else None


def load_states(
    engine: Any, read: Callable[[str, str], Tensor], updates: int, idle_step: Callable[[], None], moments: Moments = adamw_moments
) -> None:
    """Puts whole tensors, as `whole_states` named them, back to where they are held. Collective.

    Args:
        read: (parameter, `weight` or moment) to tensor, on every rank. Called for one after another, so that few are in memory at a time.
        updates: optimiser steps that made the states.
        idle_step: an optimiser step whose gradient is zero.

    Raises:
        ValueError: a tensor is of another shape.
    """
    _prime(engine, idle_step)
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            for key in (WEIGHT, *moments(name)):
                _put(engine, key, parameter, own_part(engine.module, name, read(name, key)).to(parameter.device))
    for state in engine.optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"].fill_(updates)


def _whole(engine: Any, moments: Moments, key: str, name: str, parameter: nn.Parameter) -> Tensor | None:
    """This rank's experts, or all of a dense parameter: put together from the pieces of those that have the same."""
    if key != WEIGHT and key not in moments(name):
        return None
    if key == WEIGHT:
        return master(engine, parameter)
    if engine.zero_optimization_stage() == 0:
        return engine.optimizer.state[parameter][key]
    found = safe_get_full_optimizer_state(parameter, key)
    assert found is not None, f"DeepSpeed has no {key} of a parameter that it trains"
    return found


def master(engine: Any, parameter: nn.Parameter) -> Tensor:
    """A parameter's weights as the optimiser moves them, put together from those that hold them. Collective."""
    if engine.zero_optimization_stage() == 0:
        return parameter.detach()
    found = safe_get_full_fp32_param(parameter)
    assert found is not None, "DeepSpeed has no weights of a parameter that it trains"
    return found


def put_weight(engine: Any, parameter: nn.Parameter, value: Tensor) -> None:
    """Makes a parameter's weights others, the optimiser's master of them too. Collective; `value` is the same on all that hold them."""
    _put(engine, WEIGHT, parameter, value)


def _put(engine: Any, key: str, parameter: nn.Parameter, value: Tensor) -> None:
    if engine.zero_optimization_stage() == 0:
        (parameter if key == WEIGHT else engine.optimizer.state[parameter][key]).copy_(value)
    elif key == WEIGHT:
        with gathered(engine, [parameter], writing=True):
            parameter.copy_(value)
        safe_set_full_fp32_param(parameter, value.float())
    else:
        safe_set_full_optimizer_state(parameter, value.float(), key)


def link(engine: Any) -> None:
    """ZeRO 1 and 2 tie the optimiser's states to parameters after the first group's first step, when the others have none yet (0.19)."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _prime(engine: Any, idle_step: Callable[[], None]) -> None:
    """Makes the optimiser's states exist: a step without gradient at rate 0."""
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    idle_step()
    for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    link(engine)
