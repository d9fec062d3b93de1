"""Muon, AdamH and MuonH for hidden matrices and AdamW for the rest, in one torch optimiser that also steps on ZeRO's flat parts.

Why not a library's. `torch.optim.Muon` takes matrices only, no stacks of experts and no flat parts. DeepSpeed 0.19.8's Muon takes both (its
iteration is batched), but orthogonalises before the gradient's norm is taken: what is clipped and reported is then the size of the update.
Its momentum is not cut as the weights are, and it knows neither the scale that gives its steps AdamW's size nor Hyperball. Here
everything number by number (momenta) stays in the flat parts, in the state of the flat tensor as AdamW's, and `raysys.training.partitions`
gives whole matrices to `raysys.methods.matrix_steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from raysys.errors import ConfigError
from raysys.methods.matrix_steps import hyperball_size, hyperball_step, orthogonal
from raysys.training.parameter_groups import scale, states_of
from raysys.training.partitions import Places, whole_places

AT_ONCE = 1 << 26
"""Numbers of matrices that are worked on together; what is made on the way takes a few times their memory."""


class MatrixOptimizer(torch.optim.AdamW):
    """AdamW for groups whose `rule` is adamw, else the rule's step for each matrix.

    Args:
        groups: as torch's, with `rule`, `momentum`, `newton_schulz_steps`, `fixed_norm` and `width_ratio`.
        learning_rate, betas, epsilon: of all groups.
    """

    def __init__(self, groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float], epsilon: float):
        super().__init__(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=True)
        self._places: dict[Tensor, Places] = {}

    def bind(self, places: Iterable[tuple[Tensor, Places]]) -> None:
        """Tells where in each flat tensor the matrices lie. See `raysys.training.optimisers.bind`."""
        self._places = dict(places)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every group."""
        groups, loss = self.param_groups, None
        try:  # DeepSpeed, too, steps group by group like this
            self.param_groups = [group for group in groups if group["rule"] == "adamw"]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["rule"] != "adamw":
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(group, parameter)
        return loss

    def _move(self, group: dict[str, Any], parameter: Tensor) -> None:
        where = self._places.get(parameter)
        if where is None:
            if parameter.dim() < 2:
                raise ConfigError("the optimiser does not know where its matrices lie", "call raysys.training.optimisers.bind(engine)")
            where = whole_places(parameter)
        flat, towards = parameter.view(-1), self._direction(group, parameter).view(-1)
        for block in where.blocks:
            size = block.rows * block.columns
            for first in range(0, block.count, most := max(1, AT_ONCE // size)):
                count = min(most, block.count - first)
                start = block.start + first * size
                shape = (count, block.rows, block.columns)
                weights = flat[start : start + count * size].view(shape)
                weights.copy_(_stepped(group, weights, towards[start : start + count * size].view(shape)))
        for cut, weight, direction in zip(where.cuts, where.whole(flat), where.whole(towards), strict=True):
            moved = _stepped(group, weight, direction).view(-1)
            flat[cut.start : cut.start + cut.length] = moved[cut.begin : cut.begin + cut.length]

    def _direction(self, group: dict[str, Any], parameter: Tensor) -> Tensor:
        """What the rule steps against, number by number: Nesterov's momentum, or Adam's quotient."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        momentum = group["rule"] in ("muon", "muonh")
        if not state:
            # torch asks every state of an AdamW for its step.
            state["step"] = torch.zeros((), device=parameter.device)
            for key in states_of(group["rule"]):
                state[key] = torch.zeros_like(parameter)
        state["step"] += 1
        if momentum:
            buffer = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            return gradient.lerp(buffer, group["momentum"])
        first, second = group["betas"]
        mean = state["exp_avg"].lerp_(gradient, 1 - first)
        square = state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        # The mean's own correction is a factor, and Hyperball sets the size; the square's counts beside epsilon.
        return mean / (square / (1 - second ** state["step"])).sqrt_().add_(group["eps"])


def _stepped(group: dict[str, Any], weights: Tensor, directions: Tensor) -> Tensor:
    """Matrices [..., r, c] after the step of a group's rule."""
    rule, (rows, columns) = group["rule"], weights.shape[-2:]
    if rule in ("muon", "muonh"):
        directions = orthogonal(directions, group["newton_schulz_steps"])
    rate = group["lr"] * scale(rule, rows, columns, group["width_ratio"])
    if rule == "muon":
        return weights * (1 - group["lr"] * group["weight_decay"]) - rate * directions
    return hyperball_step(weights, directions, rate, hyperball_size(rows) if group["fixed_norm"] else None)
