"""Experts that are split over ranks, as DeepSpeed is to be told of them. Imports DeepSpeed: for actors only.

Of W ranks, E consecutive ones are an expert group: they hold every layer's experts between them. An expert's W / E holders, one of each
group, are its data-parallel group: DeepSpeed reduces its gradient, and at ZeRO 1 and 2 splits its optimiser state, over these alone.

    group = expert_group(E)
    model = mark(MoeDecoder(shape, expert_group=group).initialise(seed))
    optimizer = AdamW(split_groups(groups of parameters))
    engine = deepspeed.initialize(model=model, optimizer=optimizer, ...)

Scale. Each rank back-propagates its part of the step's loss times W. DeepSpeed divides the sum over an expert's holders by W, not by W / E
(0.19: `_reduce_expert_gradients` at stage 0, `average_tensor` at 1 and 2), and an owner's gradient already is that of its whole group
(`raysys.models.expert_parallel`): the update is that of one rank, with no factor for E. Norms: ZeRO adds up squares over all ranks, each
expert's once; at stage 0, where parameters' gradients are clipped as they are, `clip_gradients` does.

DeepSpeed's own checkpoints know its own expert layers only, and would keep the experts of one rank of these: they are refused, and
`raysys.training.expert_states` writes name-keyed ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import set_z3_leaf_modules
from torch import distributed as dist
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from raysys.errors import CheckpointError
from raysys.models.expert_parallel import ExpertGroup, stacks
from raysys.models.moe import Mixture, MoeDecoder


def expert_group(expert_parallel: int) -> ExpertGroup | None:
    """This rank's group, of so many ranks; None for 1. Collective; DeepSpeed's `init_distributed` came before.

    What does not fit together is refused by `raysys.config.parallel.check_parallel`, before anything starts.
    """
    if expert_parallel == 1:
        return None
    if _name(expert_parallel) not in deepspeed_groups._get_expert_parallel_group_dict():
        deepspeed_groups._create_expert_and_data_parallel(expert_parallel)
    return ExpertGroup(deepspeed_groups._get_expert_parallel_group(_name(expert_parallel)))


def mark(model: MoeDecoder) -> MoeDecoder:
    """Says on the stacks of experts which group they are reduced in, and tells DeepSpeed that there are any. Before `initialize`.

    Without an expert group the `Mixture`s become leaf modules of ZeRO 3, which would otherwise gather their parts in the order in which a
    rank's tokens need them.
    """
    if model.expert_group is None:
        set_z3_leaf_modules(model, [Mixture])
        return model
    for parameter in stacks(model).values():
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.group_name = _name(model.expert_group.size)  # type: ignore[attr-defined]
    model.add_module("experts_mark", _Mark(model.shape.experts))
    return model


def split_groups(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """An optimiser's groups of parameters with marked experts in groups of their own, of the same settings. Without any, as they are.

    DeepSpeed finds the ranks of such a group by its `name`; what `name` a group had before, all its parts keep as `label`.
    """
    found = []
    for group in groups:
        parameters = list(group["params"])
        settings = group | ({"label": group["name"]} if "name" in group else {})
        dense = [one for one in parameters if getattr(one, "allreduce", True)]
        if dense:
            found.append(settings | {"params": dense})
        for name in dict.fromkeys(one.group_name for one in parameters if not getattr(one, "allreduce", True)):
            mine = [one for one in parameters if getattr(one, "group_name", None) == name]
            found.append(settings | {"params": mine, "moe": True, "name": name})
    return found


def clip_gradients(model: MoeDecoder, most: float) -> float:
    """Stage 0: brings the gradients of the whole model, experts of all ranks included, to a norm of at most `most`. Collective.

    Returns:
        The norm before, the same on all ranks. If it is not finite, gradients are as they were.
    """
    split = {id(parameter) for parameter in stacks(model).values()} if model.expert_group is not None else set()
    parameters = [one for one in model.parameters() if one.grad is not None]
    here, everywhere = (
        [one.grad for one in parameters if one.grad is not None and (id(one) in split) == inside] for inside in (True, False)
    )
    device = parameters[0].device
    square = get_total_norm(here).to(device).double().square()
    if model.expert_group is not None:
        dist.all_reduce(square, group=model.expert_group.handle)
    norm = (square + get_total_norm(everywhere).to(device).double().square()).sqrt()
    if torch.isfinite(norm):
        clip_grads_with_norm_(parameters, most, norm)
    return float(norm)


class _Mark(MoE):
    """Only a layer of this class makes DeepSpeed look for experts at all. It has no weights and computes nothing."""

    def __init__(self, experts: int):
        nn.Module.__init__(self)
        self.num_experts = experts

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The groups exist."""

    @property
    def expert_group_name(self) -> NoReturn:
        """What DeepSpeed asks first when it saves or loads an expert layer."""
        raise CheckpointError("DeepSpeed's checkpoints would keep one rank's experts only", "use raysys.training.expert_states")


def _name(size: int) -> str:
    return f"ep_size_{size}"
