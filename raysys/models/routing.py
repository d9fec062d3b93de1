"""How a mixture of experts chooses: the router with or without MPI, its losses, and what is watched of it.

Legend: T tokens, N experts, K of them a token, D width, d expert width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from raysys.methods.mpi import Matrix, effective_router, input_matrix, overwrite_, powered
from raysys.models.expert_parallel import ExpertGroup


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Settings of a router. The defaults are those of MPI (arXiv 2606.12397); `mpi=False` is a plain linear router.

    Attributes:
        mpi: rows are those of `raysys.methods.mpi.effective_router`.
        mode: functional computes rows in each forward pass; inplace scores with the parameter, which whoever trains overwrites with its
            rows once a step (`Router.overwrite_`).
        scale: the paper's C'; every row has norm C' / sqrt(N).
        iterations: power steps; 0 leaves only the normalisation.
        retract: without, rows keep the size that the power step gives them.
        matrix: the experts' matrix that rows follow.
        detach_expert: routing sends no gradient into the experts.
        gate: of the logits.
        normalise_first: probabilities over all experts, then the largest; without, over the chosen ones only.
        renormalise: the weights of a token sum to 1.
    """

    mpi: bool = True
    mode: Literal["functional", "inplace"] = "functional"
    scale: float = 4.0
    iterations: int = 1
    retract: bool = True
    matrix: Matrix = "gate"
    detach_expert: bool = False
    gate: Literal["softmax", "sigmoid"] = "softmax"
    normalise_first: bool = True
    renormalise: bool = False

    @property
    def overwritten(self) -> bool:
        """Whether the parameter is to be overwritten once a step."""
        return self.mpi and self.mode == "inplace"


@dataclass(frozen=True)
class Routed:
    """What a router decided for [T] tokens. `weights`, `indices`: [T, K]; `logits`, `probs`: [T, N] float32 or float64."""

    weights: Tensor
    indices: Tensor
    logits: Tensor
    probs: Tensor

    @property
    def load(self) -> Tensor:
        """Tokens of each expert, [N]."""
        return self.indices.flatten().bincount(minlength=self.probs.shape[1])

    def take(self, tokens: Tensor) -> Routed:
        """Of some tokens only, by their numbers or a mask [T]: those that are no padding."""
        return Routed(self.weights[tokens], self.indices[tokens], self.logits[tokens], self.probs[tokens])


class Router(nn.Module):
    """Scores tokens. Its parameter [N, D] is stored as a plain router's; what it scores with is `rows`.

    Args:
        group: that holds the experts; None: they are all here. The parameter is whole on each of its ranks.
    """

    def __init__(self, experts: int, top_k: int, width: int, routing: Routing, group: ExpertGroup | None = None):
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k must be 1 to the number of experts {experts}, got {top_k}")
        self.top_k, self.routing, self.group = top_k, routing, group
        self.weight = nn.Parameter(torch.empty(experts, width))

    def rows(self, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """The rows that score, [N, D], of the experts' matrices [N, d, D], [N, d, D] and [N, D, d]; with a group of those that are here."""
        how = self.routing
        if not how.mpi or how.overwritten:
            return self.weight
        matrix = input_matrix(how.matrix, gate, up, down)
        mine = self.weight if self.group is None else self.group.part(self.weight)
        if how.retract:
            rows = effective_router(mine, matrix, how.scale / math.sqrt(len(self.weight)), how.iterations, how.detach_expert)
        else:
            rows = powered(mine, matrix, how.iterations, how.detach_expert, sized=False)
        return rows if self.group is None else self.group.gathered(rows)

    @torch.no_grad()
    def overwrite_(self, weight: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """The in-place mode's step, once for each of the optimiser's: `weight` [N, D], the parameter or its master, becomes its rows."""
        how = self.routing
        mine = weight if self.group is None else self.group.part(weight)
        overwrite_(mine, input_matrix(how.matrix, gate, up, down), how.scale / math.sqrt(len(weight)), how.iterations)
        return weight if self.group is None else weight.copy_(self.group.gathered(mine))

    def forward(self, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Routed:
        """x: [T, D]."""
        with torch.autocast(x.device.type, enabled=False):
            rows = self.rows(gate, up, down)
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            return choose(x.to(dtype) @ rows.to(dtype).T, self.top_k, self.routing)


def choose(logits: Tensor, top_k: int, routing: Routing) -> Routed:
    """Probabilities and the chosen experts of [T, N] logits; ties go to the expert with the lower number on CPU."""
    if routing.gate == "sigmoid":
        probs = logits.sigmoid()
    else:
        probs = logits.softmax(dim=-1)
    if routing.normalise_first or routing.gate == "sigmoid":
        weights, indices = probs.topk(top_k, dim=-1)
    else:
        chosen, indices = logits.topk(top_k, dim=-1)
        weights = chosen.softmax(dim=-1)
    if routing.renormalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routed(weights, indices, logits, probs)


def balance_loss(routed: Routed, load: Tensor | None = None) -> Tensor:
    """N sum_i f_i P_i: 1 where all experts get the same share of tokens and of probability. A scalar.

    f: share of the T K choices, without gradient; P: mean probability, of the softmax or of sigmoids brought to sum 1.

    Args:
        load: [N] choices of more tokens than these, of all ranks or micro-batches (`raysys.models.expert_parallel.summed`): then this
            is their part of the loss of all, and the parts' sum is that loss, with its gradient. It is not linear in tokens: the mean
            of losses of their own would be another. None: of these.
    """
    n, top_k = routed.probs.shape[1], routed.indices.shape[1]
    load = (routed.load if load is None else load).detach()
    choices = load.sum().clamp(min=1).to(routed.probs.dtype)
    probs = routed.probs / routed.probs.sum(dim=-1, keepdim=True)
    return n * (load.to(probs.dtype) / choices * (probs.sum(dim=0) / (choices / top_k))).sum()


def z_loss(routed: Routed, tokens: int | Tensor | None = None) -> Tensor:
    """Mean of the squared log-partition of the logits, a scalar: keeps them small. With `tokens`, a number, their part of the mean over so
    many."""
    tokens = max(1, len(routed.logits)) if tokens is None else tokens
    return routed.logits.logsumexp(dim=-1).square().sum() / tokens
