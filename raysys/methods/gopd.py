"""G-OPD and ExOPD: on-policy distillation with a reward scale and a free reference. Paper: arXiv 2602.12125.

Legend: B rows, R response tokens (right padded), m the mask of real ones; log-probs in nats of the sampled tokens only.

    A_t = (lp_T - lp_S) + (lambda - 1) (lp_T - lp_R)                      Eqs. 11, 13, 14 as ascent, discount 0
    r_t = exp(clamp(lp_S - lp_old, -20, 20))
    l_t = max(-A r, -A clip(r, 1 - low, 1 + high));  A < 0: min(l_t, -c A)       clipped surrogate with dual clip c
    w_t = min(exp(clamp(lp_old - lp_roll, -20, 20)), cap) m_t                    truncated importance weight
    L   = sum_t m_t w_t l_t / sum_t m_t

Gradients reach lp_S of the ratio and nothing else. With one optimiser step a batch, lp_old is lp_S without gradient: then
r = 1 and clipping is inert. Advantages are neither normalised nor clamped: that would move the fixed point.

float64 stays float64, lower precisions compute in float32. Masked positions may hold anything, inf and NaN included.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from raysys.methods.tensors import check_shapes, compute_dtype, real_mask

Aggregation = Literal["token", "sequence_token_mean", "sequence_token_sum"]
AGGREGATIONS: tuple[Aggregation, ...] = ("token", "sequence_token_mean", "sequence_token_sum")
LOG_RATIO_BOUND = 20.0


def advantage(student: Tensor, teacher: Tensor, reference: Tensor | None = None, reward_scale: float = 1.0) -> Tensor:
    """Per-token advantage in nats, without gradient.

    Args:
        student, teacher, reference: log-probs [B, R] of the sampled tokens; `student` is the trainer's own, not the engine's.
            What `reference` holds has no effect at scale 1, nor what `teacher` holds at scale 0.
        reward_scale: lambda; 1 is on-policy distillation, above 1 extrapolates beyond the teacher.

    Returns:
        [B, R]; where an input holds inf or NaN so may the result: `policy_loss` masks it.

    Raises:
        ValueError: shapes differ, reward_scale is negative or not finite, or it is not 1 and there is no reference.
    """
    _check_number("reward_scale", reward_scale, low=0.0)
    check_shapes("student", student, teacher=teacher, reference=reference)
    if reward_scale != 1 and reference is None:
        raise ValueError(f"reference is needed for reward_scale={reward_scale:g}: without one this would be plain distillation")
    dtype = compute_dtype(student, teacher, reference)
    student, teacher = student.detach().to(dtype), teacher.detach().to(dtype)
    if reward_scale == 1 or reference is None:
        return teacher - student
    reference = reference.detach().to(dtype)
    if reward_scale == 0:
        return reference - student
    return (teacher - student) + (reward_scale - 1) * (teacher - reference)


def importance_weights(trainer: Tensor, rollout: Tensor, mask: Tensor, cap: float = 5.0) -> Tensor:
    """Truncated importance weight of each token, engine against trainer; without gradient, not renormalised.

    Args:
        trainer, rollout: log-probs [B, R] of the sampled tokens by the trainer before the step, and by the engine that drew them.
        mask: [B, R], bool or 0/1.
        cap: largest weight.

    Returns:
        [B, R], 0 on masked positions.

    Raises:
        ValueError: shapes differ, the mask holds something else than 0 and 1, or cap is not positive.
    """
    _check_number("cap", cap, low=0.0, above=True, infinite=True)
    check_shapes("trainer", trainer, rollout=rollout)
    real = real_mask(mask, "trainer", trainer)
    dtype = compute_dtype(trainer, rollout)
    gap = torch.where(real, trainer.detach().to(dtype) - rollout.detach().to(dtype), 0.0)
    return torch.where(real, gap.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp().clamp(max=cap), 0.0)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
    aggregation: Aggregation = "token",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate, to be minimised.

    Args:
        logprobs: [B, R] of the sampled tokens under the student, with gradient; the only argument that gets one.
        old_logprobs: [B, R] of the student before the step; `logprobs.detach()` when the step has one mini-batch.
        advantages: [B, R] from `advantage`.
        mask: [B, R], bool or 0/1.
        weights: [B, R] from `importance_weights`, multiplied in after clipping; they do not enter the denominator.
        clip_low, clip_high: the ratio counts between 1 - clip_low and 1 + clip_high.
        dual_clip: bound of the ratio for negative advantages, above 1.
        aggregation: "token": mean over tokens; "sequence_token_mean": mean over rows of each row's token mean;
            "sequence_token_sum": mean over rows of each row's token sum. Rows without tokens do not count as rows. No
            tokens at all: 0.

    Returns:
        The loss (0-d), and detached 0-d token means: `clip_fraction_high` (A > 0 and r above the range),
        `clip_fraction_low` (A < 0 and r below it), `dual_clip_fraction` (A < 0 and r above dual_clip),
        `approx_kl` (lp_old - lp_S, of the clamped log-ratio).

    Raises:
        ValueError: shapes differ, the mask holds something else than 0 and 1, a clip is out of range, or the aggregation is unknown.
    """
    _check_number("clip_low", clip_low, low=0.0, infinite=True)
    _check_number("clip_high", clip_high, low=0.0, infinite=True)
    _check_number("dual_clip", dual_clip, low=1.0, above=True, infinite=True)
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")
    check_shapes("logprobs", logprobs, old_logprobs=old_logprobs, advantages=advantages, weights=weights)
    real = real_mask(mask, "logprobs", logprobs)
    dtype = compute_dtype(logprobs, old_logprobs, advantages, weights)

    def kept(values: Tensor) -> Tensor:
        return torch.where(real, values.to(dtype), 0.0)

    gain = kept(advantages.detach())
    log_ratio = (kept(logprobs) - kept(old_logprobs.detach())).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio = log_ratio.exp()
    losses = torch.maximum(-gain * ratio, -gain * ratio.clamp(1 - clip_low, 1 + clip_high))
    losses = torch.where(gain < 0, torch.minimum(losses, -gain * dual_clip), losses)
    if weights is not None:
        losses = losses * kept(weights.detach())
    return _aggregate(losses, real, aggregation), _metrics(log_ratio.detach(), gain, real, clip_low, clip_high, dual_clip)


def _aggregate(losses: Tensor, real: Tensor, aggregation: Aggregation) -> Tensor:
    """`losses` [B, R], 0 where masked."""
    if aggregation == "token":
        return losses.sum() / real.sum().clamp(min=1)
    lengths = real.sum(1)
    rows = losses.sum(1)
    if aggregation == "sequence_token_mean":
        rows = rows / lengths.clamp(min=1)
    return rows.sum() / (lengths > 0).sum().clamp(min=1)


def _metrics(log_ratio: Tensor, gain: Tensor, real: Tensor, clip_low: float, clip_high: float, dual_clip: float) -> dict[str, Tensor]:
    ratio, tokens = log_ratio.exp(), real.sum().clamp(min=1)

    def share(values: Tensor) -> Tensor:
        return torch.where(real, values, 0).to(log_ratio.dtype).sum() / tokens

    return {
        "clip_fraction_high": share((gain > 0) & (ratio > 1 + clip_high)),
        "clip_fraction_low": share((gain < 0) & (ratio < 1 - clip_low)),
        "dual_clip_fraction": share((gain < 0) & (ratio > dual_clip)),
        "approx_kl": share(-log_ratio),
    }


def _check_number(name: str, value: float, *, low: float, above: bool = False, infinite: bool = False) -> None:
    fits = value > low if above else value >= low
    if not fits or (math.isinf(value) and not infinite):
        bound = f"{'above' if above else 'at least'} {low:g}"
        raise ValueError(f"{name} must be {bound}{'' if infinite else ' and finite'}, got {value}")
