"""Experts split over ranks: each holds N / E of every layer; tokens travel to those that hold their experts, what is made of them back.

A token goes once to each rank that holds any of its experts, with its routing weights, and one weighted sum comes back: at most min(K, E)
rows each way, none dropped. Rows of the MPI router are made where their experts are and gathered.

    y_t = sum over ranks r of  sum_{k: expert of k on r} w_tk f_k(x_t)

Gradients. Let L_r be what rank r back-propagates, L = sum_r L_r over all ranks of the run. After backward a rank holds

    dense parameters and the router's R:  dL_r / dp, but rows of an MPI router: the sum over its expert group, on the expert's owner, else 0
    experts:                              the sum over its expert group

so in both cases the sum over all ranks that hold a parameter is dL / dp. R is whole on every rank, a data-parallel parameter like any dense
one: [N, D] is small, and it is the same with a plain router and an MPI one. What averages over W ranks (DeepSpeed: over all for dense
parameters, and for experts the sum over the W / E ranks that hold them, divided by W too) is given W L_r by its caller, with and without.

Everything here is collective in its group: all ranks make the same calls in the same order, forward and backward, however few tokens they
have. One without any still has to make them.

Legend: T tokens of this rank, N experts, K of them a token, D width, d expert width, E ranks of the group, S rows that leave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from raysys.models.experts import Experts, mixture


class ExpertGroup:
    """The ranks that hold every layer's experts between them, expert i on rank i // (N / E).

    Args:
        handle: of torch.distributed, which runs already; None: all ranks.
    """

    def __init__(self, handle: dist.ProcessGroup | None = None):
        self.handle = handle
        self.rank, self.size = dist.get_rank(handle), dist.get_world_size(handle)

    def held(self, experts: int) -> int:
        """How many of them each rank holds. Raises ValueError where they cannot be split evenly."""
        if experts % self.size:
            raise ValueError(f"{experts} experts cannot be split evenly over {self.size} ranks")
        return experts // self.size

    def part(self, whole: Tensor) -> Tensor:
        """This rank's experts of [N, ...], a view [N / E, ...]."""
        count = self.held(len(whole))
        return whole.narrow(0, self.rank * count, count)

    @torch.no_grad()
    def whole(self, part: Tensor) -> Tensor | None:
        """[N, ...] on the group's first rank, None elsewhere, of [N / E, ...] on each. No gradient passes."""
        found = part.new_empty(self.size * len(part), *part.shape[1:]) if self.rank == 0 else None
        pieces = None if found is None else list(found.chunk(self.size))
        dist.gather(part.detach().contiguous(), pieces, group=self.handle, group_dst=0)
        return found

    def gathered(self, part: Tensor) -> Tensor:
        """[N, ...] on every rank, of [N / E, ...] on each; gradients of all ranks come back to the owner and are added up."""
        return _Gathered.apply(part, self)  # type: ignore[return-value]

    def mixture(self, x: Tensor, weights: Tensor, indices: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """`raysys.models.experts.mixture` of experts on all ranks of the group.

        Args:
            x: [T, D]; T may differ by rank, and be 0.
            weights, indices: [T, K], of all N experts.
            gate, up: [N / E, d, D]; down: [N / E, D, d]: this rank's.
        """
        held = len(gate)
        owners = indices // held
        needed = torch.zeros(len(x), self.size, dtype=torch.bool, device=x.device).scatter_(1, owners, True)
        ranks, tokens = needed.T.nonzero(as_tuple=True)  # [S] each, by rank, then by token
        here = owners.index_select(0, tokens) == ranks.unsqueeze(1)
        slots = torch.where(here, indices.index_select(0, tokens) % held, held)
        shares = weights.index_select(0, tokens) * here
        leaving = torch.stack([needed.sum(0), owners.flatten().bincount(minlength=self.size)], dim=1)  # [E, 2] rows and choices
        arriving = torch.empty_like(leaving)
        dist.all_to_all_single(arriving, leaving, group=self.handle)
        (sends, _), (takes, choices) = torch.stack([leaving.T, arriving.T]).tolist()

        def sent(rows: Tensor) -> Tensor:
            return _Exchanged.apply(rows, sends, takes, self.handle)  # type: ignore[return-value]

        made = mixture(sent(x.index_select(0, tokens)), sent(shares), sent(slots), gate, up, down, sum(choices))
        returned: Tensor = _Exchanged.apply(made, takes, sends, self.handle)  # type: ignore[assignment]
        return torch.zeros_like(x).index_add(0, tokens, returned)


class _Exchanged(torch.autograd.Function):
    """Rows to the ranks they go to, in the order of ranks; gradients go the way back. Sizes: rows of each rank."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sends: list[int], takes: list[int], handle: Any) -> Tensor:
        ctx.sizes, ctx.handle = (sends, takes), handle
        return _exchange(rows, sends, takes, handle)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        sends, takes = ctx.sizes
        return _exchange(grads[0], takes, sends, ctx.handle), None, None, None


class _Gathered(torch.autograd.Function):
    """All ranks' parts one after another. Backward sends each rank the gradients of its part; they are added in the order of ranks."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ExpertGroup) -> Tensor:
        ctx.group = group
        whole = part.new_empty(group.size * len(part), *part.shape[1:])
        dist.all_gather(list(whole.chunk(group.size)), part.contiguous(), group=group.handle)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        group, (grad,) = ctx.group, grads
        sizes = [len(grad) // group.size] * group.size
        return _exchange(grad, sizes, sizes, group.handle).unflatten(0, (group.size, -1)).sum(dim=0), None


def _exchange(rows: Tensor, sends: list[int], takes: list[int], handle: Any) -> Tensor:
    found = rows.new_empty(sum(takes), *rows.shape[1:])
    dist.all_to_all_single(found, rows.contiguous(), takes, sends, group=handle)
    return found


def summed(load: Tensor, handle: dist.ProcessGroup | None = None) -> Tensor:
    """The sum over ranks, without gradient: of loads [..., N], for `raysys.models.routing.balance_loss`. None: over all ranks."""
    total = load.detach().clone()
    dist.all_reduce(total, group=handle)
    return total


def stacks(model: nn.Module) -> dict[str, nn.Parameter]:
    """The stacks of experts by name, as this rank holds them."""
    parts = ((prefix, module) for prefix, module in model.named_modules() if isinstance(module, Experts))
    return {f"{prefix}.{name}": parameter for prefix, module in parts for name, parameter in module.named_parameters()}


def _itself(name: str, parameter: nn.Parameter) -> Tensor:
    return parameter.detach()


def whole_tensors(model: nn.Module, of: Callable[[str, nn.Parameter], Tensor | None] = _itself) -> Iterator[tuple[str, Tensor | None]]:
    """Names and whole tensors of a model, whatever the number of ranks that hold its experts. Collective; one stack is whole at a time.

    Args:
        of: what to take of a parameter by its name, of its shape: itself, or a state of its optimiser. None, on all ranks: left out.

    Yields:
        On other ranks than the first of each group None for stacks.
    """
    group: ExpertGroup | None = model.expert_group  # type: ignore[assignment]
    split = stacks(model) if group is not None else {}
    for name, parameter in model.named_parameters():
        tensor = of(name, parameter)
        if tensor is None:
            continue
        yield name, group.whole(tensor) if group is not None and name in split else tensor


def own_part(model: nn.Module, name: str, whole: Tensor) -> Tensor:
    """What this rank holds of a parameter's whole tensor; a view. Raises ValueError where the shape is another."""
    group: ExpertGroup | None = getattr(model, "expert_group", None)
    mine = group.part(whole) if group is not None and name in stacks(model) else whole
    parameter = model.get_parameter(name)
    wanted = getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO 3 the parameter itself is in pieces
    if mine.shape != wanted:
        raise ValueError(f"{name} is {list(whole.shape)}, of which a rank would hold {list(mine.shape)}; the model has {list(wanted)}")
    return mine


@torch.no_grad()
def load_whole(model: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Copies in what this rank holds of each whole tensor that `read` gives by name, one at a time. Raises ValueError: see `own_part`."""
    for name, parameter in model.named_parameters():
        parameter.copy_(own_part(model, name, read(name)))
