"""The optimiser of a pretraining run, from its config to a DeepSpeed engine's.

    optimizer = make_optimizer(model, config)              # before deepspeed.initialize; scales matrices under Hyperball
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=...)[0]
    bind(engine, config)                                   # once, on every rank, before the first step
    engine.load_checkpoint(...)                            # before or after bind
    for each step:
        set_rate(engine, rate_of(config, step, steps))     # one rate for all groups: what differs is inside
        engine.backward(...); engine.step()

DeepSpeed's config needs `zero_allow_untested_optimizer: true` and `gradient_clipping: config.clip`; at stage 0 in float32 it clips without
looking at NaN (see `raysys.training.engine`). ZeRO stages 0, 1 and 2 give the same numbers to rounding, and AdamW takes stage 3 too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from raysys.config.optimising import Optimiser
from raysys.errors import ConfigError
from raysys.methods.matrix_steps import hyperball_size, norms
from raysys.training.expert_groups import split_groups
from raysys.training.matrix_optimizer import MatrixOptimizer
from raysys.training.parameter_groups import ParameterGroup, parameter_groups
from raysys.training.partitions import flat_places
from raysys.training.schedule import learning_rate


def make_optimizer(model: nn.Module, config: Optimiser) -> torch.optim.Optimizer:
    """The optimiser of a `raysys.models.moe.MoeDecoder` with initialised or loaded weights.

    AdamW is torch's own. With adamh and muonh and `matrix_norm=sqrt_out` the hidden matrices of `model` are scaled to their norm here.

    Raises:
        ConfigError: a parameter belongs to no group, or a matrix that Hyperball shall keep at its norm has none.
    """
    groups = parameter_groups(model, config)
    if config.hyperball:
        _to_norm(groups, fixed=config.matrix_norm == "sqrt_out")
    if not config.whole_matrices:
        plain = split_groups([_torch_group(group) | {"rule": "adamw"} for group in groups])
        return torch.optim.AdamW(plain, lr=config.learning_rate, betas=config.betas, eps=config.epsilon, fused=True)
    settings = {
        "momentum": config.momentum,
        "newton_schulz_steps": config.newton_schulz_steps,
        "fixed_norm": config.matrix_norm == "sqrt_out",
    }
    extended = [_torch_group(group) | settings | {"rule": group.rule, "width_ratio": group.width_ratio} for group in groups]
    return MatrixOptimizer(split_groups(extended), config.learning_rate, config.betas, config.epsilon)


def _torch_group(group: ParameterGroup) -> dict[str, Any]:
    return {"params": list(group.parameters.values()), "name": group.name, "weight_decay": group.weight_decay}


@torch.no_grad()
def _to_norm(groups: list[ParameterGroup], fixed: bool) -> None:
    for group in groups:
        if group.rule == "adamw":
            continue
        for name, parameter in group.parameters.items():
            sizes = norms(parameter)
            if not bool(((sizes > 0) & sizes.isfinite()).all()):
                raise ConfigError(f"{name} has a matrix of norm 0 or not finite, which Hyperball cannot keep at its norm", "initialise it")
            if fixed:
                parameter.mul_((hyperball_size(parameter.shape[-2]) / sizes).to(parameter.dtype))


def bind(engine: Any, config: Optimiser) -> None:
    """Tells the optimiser inside a DeepSpeed engine where ZeRO put its matrices. Collective; nothing to do for AdamW.

    Raises:
        ConfigError: this kind cannot work at the engine's ZeRO stage or with an offloaded optimiser.
    """
    stage = engine.zero_optimization_stage()
    try:
        config.check_placement(stage, bool(engine.zero_use_cpu_optimizer()))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.whole_matrices and stage > 0:
        engine.optimizer.optimizer.bind(flat_places(engine))


def set_rate(engine: Any, rate: float) -> None:
    """The learning rate of the next step, for all groups."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def rate_of(config: Optimiser, step: int, steps: int) -> float:
    """The learning rate of step `step` (0 is the first) of `steps`."""
    return learning_rate(config.learning_rate, step, steps, config.schedule, config.warmup_steps, config.min_lr_rate, config.decay_share)
