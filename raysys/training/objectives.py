"""What a step minimises: one small class a method, binding the record's columns to pure functions.

Objectives travel from the driver to the trainer's ranks, so they are small, and torch is imported only where tensors are at hand.

Legend: B rows of a micro-batch, R response tokens (right padded).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from raysys.batch import Batch, Ragged
from raysys.config.runs import GopdConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Outputs:
    """What the student says of a micro-batch's responses."""

    logprobs: Tensor
    """[B, R] of the response's own ids, with gradient; 0 where masked."""
    entropy: Tensor
    """[B, R] in nats, without gradient."""
    mask: Tensor
    """[B, R] bool, true on response tokens."""
    old_logprobs: Tensor | None
    """[B, R] from before the step's first update; None when there is only one."""
    asked: Mapping[str, Tensor] = field(default_factory=dict)
    """[B, R] of the ids in each column that the objective asks for, with gradient."""


@dataclass(frozen=True)
class Micro:
    """The record's columns for the same rows."""

    columns: Mapping[str, Tensor]
    """List columns as [B, R], 0 where masked."""
    domains: tuple[str, ...]


class Objective(Protocol):
    """How the loop and the trainer see a method."""

    @property
    def columns(self) -> tuple[str, ...]:
        """List columns of the record that `loss` reads, one value a response token."""
        ...

    @property
    def asks(self) -> tuple[str, ...]:
        """Columns of ids, one a response token, whose log-probs the student gives besides those of the response's own."""
        ...

    @property
    def weighting(self) -> Literal["token", "sequence"]:
        """What the loss is a mean over; micro-batches weigh by their share of it."""
        ...

    def queries(self, trainer: Any, batch: Batch) -> Iterator[tuple[np.ndarray, Ragged]] | None:
        """Ids to score in place of the sampled ones: some consecutive rows at a time, K a response token; None for the sampled ones."""
        ...

    def advantages(self, batch: Batch) -> Batch:
        """Whole groups gain what needs them whole, before rows are dealt out to ranks."""
        ...

    def loss(self, outputs: Outputs, micro: Micro) -> tuple[Tensor, dict[str, Tensor | tuple[Tensor, Tensor]]]:
        """The mean loss of a micro-batch, and metrics: a 0-d token mean, an extreme (name ends in `_max` or `_min`), or (sum, count)."""
        ...


@dataclass(frozen=True)
class GopdObjective:
    """G-OPD and ExOPD. Paper: arXiv 2602.12125; the maths is in `raysys.methods.gopd`."""

    reward_scale: float = 1.0
    importance_cap: float = 5.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0
    aggregation: Literal["token", "sequence_token_mean", "sequence_token_sum"] = "token"
    asks: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: GopdConfig) -> GopdObjective:
        return cls(
            reward_scale=config.reward_scale,
            importance_cap=config.importance_cap,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            aggregation=config.aggregation,
        )

    @property
    def columns(self) -> tuple[str, ...]:
        reference = () if self.reward_scale == 1 else ("reference_logprobs",)
        return ("rollout_logprobs", "teacher_logprobs", *reference)

    @property
    def weighting(self) -> Literal["token", "sequence"]:
        return "token" if self.aggregation == "token" else "sequence"

    def queries(self, trainer: Any, batch: Batch) -> None:
        return None

    def advantages(self, batch: Batch) -> Batch:
        """Nothing: the student term of the advantage comes from the step's own forward pass."""
        return batch

    def loss(self, outputs: Outputs, micro: Micro) -> tuple[Tensor, dict[str, Tensor | tuple[Tensor, Tensor]]]:
        """Metrics: `reverse_kl` (token mean of log p_student - log p_teacher on the sampled tokens; also by domain),
        `advantage_mean` and `advantage_abs_max`, `importance_mean` and `importance_max`, and those of the policy loss."""
        from raysys.methods.gopd import advantage, importance_weights, policy_loss

        mask, teacher = outputs.mask, micro.columns["teacher_logprobs"]
        base = outputs.logprobs.detach() if outputs.old_logprobs is None else outputs.old_logprobs
        gain = advantage(base, teacher, micro.columns.get("reference_logprobs"), self.reward_scale)
        weights = importance_weights(base, micro.columns["rollout_logprobs"], mask, self.importance_cap)
        loss, metrics = policy_loss(
            outputs.logprobs, base, gain, mask, weights, self.clip_low, self.clip_high, self.dual_clip, self.aggregation
        )
        tokens = mask.sum()
        gap = ((outputs.logprobs.detach() - teacher) * mask).sum(1)
        of_token = {
            "reverse_kl": (gap.sum(), tokens),
            "advantage_mean": ((gain * mask).sum(), tokens),
            "advantage_abs_max": (gain * mask).abs().max(),
            "importance_mean": (weights.sum(), tokens),
            "importance_max": weights.max(),
        }
        return loss, {**metrics, **of_token, **by_domain("reverse_kl", gap, mask.sum(1), micro.domains)}


@dataclass(frozen=True)
class SftObjective:
    """Supervised fine-tuning: the negative log-likelihood of the response tokens, in nats, mean over tokens."""

    columns: tuple[str, ...] = ()
    asks: tuple[str, ...] = ()
    weighting: Literal["token", "sequence"] = "token"

    def queries(self, trainer: Any, batch: Batch) -> None:
        return None

    def advantages(self, batch: Batch) -> Batch:
        return batch

    def loss(self, outputs: Outputs, micro: Micro) -> tuple[Tensor, dict[str, Tensor | tuple[Tensor, Tensor]]]:
        """Metrics: `nll`, also by domain."""
        mask = outputs.mask
        rows = -(outputs.logprobs * mask).sum(1)
        loss = rows.sum() / mask.sum().clamp(min=1)
        return loss, {"nll": loss.detach(), **by_domain("nll", rows.detach(), mask.sum(1), micro.domains)}


def by_domain(name: str, sums: Tensor, counts: Tensor, domains: tuple[str, ...]) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    """`name/domain` as (sum, count) over the rows of each domain. `sums`, `counts`: [B]."""
    tags = sorted({domain for domain in domains if domain})
    metrics: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
    for tag in tags:
        rows = [row for row, domain in enumerate(domains) if domain == tag]
        metrics[f"{name}/{tag}"] = (sums[rows].sum(), counts[rows].sum())
    return metrics
