"""Weights and optimiser state by the parameters' names, whatever ranks and ZeRO stage hold them: what goes on under another layout.

DeepSpeed's converter to universal checkpoints asks for AdamW's two moments of every group, which Muon's do not have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from raysys.errors import CheckpointError, ConfigError
from raysys.training.partitions import Fragment, fragments_of

WEIGHT = "fp32"
"""Key of a parameter's float32 weights; the others are those of the optimiser's state."""


@torch.no_grad()
def named_states(engine: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each trainable parameter's name, float32 weights and optimiser state, whole, on every rank, in the model's order.

    One parameter at a time is whole. Collective: all ranks go through all of them. A new engine's state is empty until its first step.

    Raises:
        ConfigError: the engine is at ZeRO stage 3, where DeepSpeed's universal checkpoint serves.
    """
    held = _held(engine)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if held is None:
            yield name, {WEIGHT: parameter.detach().float(), **engine.optimizer.state.get(parameter, {})}
            continue
        index, fragment = held[name]
        flat, state = _flat(engine, index)
        peers = engine.optimizer.real_dp_process_group[index]
        found = {}
        for key, value in ({WEIGHT: flat} | state).items():
            if value.dim() == 0:
                found[key] = value.clone()
                continue
            whole = torch.zeros(parameter.numel(), dtype=value.dtype, device=value.device)
            if fragment is not None:
                whole[_inside(fragment)] = value[_stretch(fragment)]
            dist.all_reduce(whole, group=peers)  # the others' parts are zeros here: nothing is rounded
            found[key] = whole.view(parameter.shape)
        yield name, found


@torch.no_grad()
def put_named_states(engine: Any, states: Iterable[tuple[str, Mapping[str, Tensor]]]) -> None:
    """Makes an engine, new or not, go on from what `named_states` gave. Collective.

    Raises:
        CheckpointError: a parameter is missing, unknown or of another shape.
        ConfigError: see `named_states`.
    """
    held, left = _held(engine), {name: one for name, one in engine.module.named_parameters() if one.requires_grad}
    for name, values in states:
        parameter = left.pop(name, None)
        if parameter is None or values[WEIGHT].shape != parameter.shape:
            raise CheckpointError(f"{name} {list(values[WEIGHT].shape)} of the checkpoint fits no parameter", "it is of another model")
        if held is None:
            parameter.copy_(values[WEIGHT])
            _put(engine.optimizer.state[parameter], parameter, values, slice(None), slice(None))
            continue
        index, fragment = held[name]
        flat, state = _flat(engine, index)
        here, there = (slice(0, 0), slice(0, 0)) if fragment is None else (_stretch(fragment), _inside(fragment))
        flat[here] = values[WEIGHT].reshape(-1)[there].to(flat)
        _put(state, flat, {key: value.reshape(-1) if value.dim() else value for key, value in values.items()}, here, there)
    if left:
        raise CheckpointError(f"the checkpoint has no {next(iter(left))}", "it is of another model")
    if held is not None:
        engine.optimizer.update_lp_params()


def _put(state: dict[str, Any], like: Tensor, values: Mapping[str, Tensor], here: slice, there: slice) -> None:
    for key, value in values.items():
        if key == WEIGHT:
            continue
        if key not in state:
            state[key] = torch.zeros_like(like) if value.dim() else torch.zeros((), dtype=value.dtype, device=like.device)
        if value.dim():
            state[key][here] = value[there].to(state[key])
        else:
            state[key].copy_(value)


def _held(engine: Any) -> dict[str, tuple[int, Fragment | None]] | None:
    """Of each trainable parameter, its group and what this rank holds of it; None at stage 0, where everything is whole."""
    stage = engine.zero_optimization_stage()
    if stage > 2:
        raise ConfigError("states by name are not made at ZeRO stage 3", "set zero_stage to 0, 1 or 2, or use a universal checkpoint")
    if stage == 0:
        return None
    zero = engine.optimizer
    groups = zero.bf16_groups if hasattr(zero, "bf16_groups") else zero.bit16_groups
    names = {one: name for name, one in engine.module.named_parameters()}
    mine = {fragment.name: fragment for held in fragments_of(engine) for fragment in held}
    return {names[one]: (index, mine.get(names[one])) for index, group in enumerate(groups) for one in group}


def _flat(engine: Any, index: int) -> tuple[Tensor, dict[str, Any]]:
    """The flat float32 part of a group on this rank, and its optimiser state."""
    flat = engine.optimizer.param_groups[index]["params"][0]
    return flat, engine.optimizer.optimizer.state[flat]


def _stretch(fragment: Fragment) -> slice:
    return slice(fragment.start, fragment.start + fragment.length)


def _inside(fragment: Fragment) -> slice:
    return slice(fragment.begin, fragment.begin + fragment.length)
