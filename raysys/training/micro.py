"""A micro-batch between the student's log-probs, flat and token by token, and an objective's loss.

Legend: n response tokens, B rows, R response tokens of the longest, K ids asked for at each token: the response's own and an objective's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from raysys.training.objectives import Micro, Objective, Outputs
from raysys.training.rows import Inputs


@dataclass(frozen=True)
class MicroBatch:
    """What the student is asked for, and what its answers are worth.

    Args:
        old_logprobs: [n] from before the step's first update; None when there is only one.
    """

    objective: Objective
    inputs: Inputs
    micro: Micro
    old_logprobs: Tensor | None

    @property
    def queries(self) -> Tensor | None:
        """[n, K]; None where only the response's own ids are asked for."""
        asked = [self._flat[name].long() for name in self.objective.asks]
        return torch.stack([self.inputs.responses, *asked], 1) if asked else None

    @property
    def separable(self) -> bool:
        """Whether the loss is a mean over tokens, so that some of them are a micro-batch, too."""
        return self.objective.weighting == "token"

    def outputs(self, logprobs: Tensor, entropy: Tensor) -> Outputs:
        """The student's answers [n] or [n, K], and entropies [n], as objectives read them."""
        columns = logprobs[:, None] if logprobs.dim() == 1 else logprobs
        own, *asked = (self.inputs.padded(column) for column in columns.unbind(1))
        old = None if self.old_logprobs is None else self.inputs.padded(self.old_logprobs)
        return Outputs(own, self.inputs.padded(entropy), self.inputs.mask, old, dict(zip(self.objective.asks, asked, strict=True)))

    def slope(self, tokens: slice, logprobs: Tensor, entropy: Tensor) -> Tensor:
        """Derivative of the micro-batch's loss by the log-probs [m, K] of some of its tokens; see `raysys.methods.logprobs.surrogate`.

        They are a micro-batch of one row, which weighs by its share of the tokens.
        """
        with torch.enable_grad():
            leaf = logprobs.detach().requires_grad_()
            own, *asked = (column[None] for column in leaf.unbind(1))
            old = None if self.old_logprobs is None else self.old_logprobs[tokens][None]
            everything = torch.ones_like(own, dtype=torch.bool)
            outputs = Outputs(own, entropy[None], everything, old, dict(zip(self.objective.asks, asked, strict=True)))
            columns = {name: column[tokens][None] for name, column in self._flat.items()}
            loss, _ = self.objective.loss(outputs, Micro(columns, ("",)))
            return torch.autograd.grad(loss, leaf)[0] * (len(leaf) / len(self.inputs.responses))

    @cached_property
    def _flat(self) -> dict[str, Tensor]:
        return {name: column[self.inputs.mask] for name, column in self.micro.columns.items()}
