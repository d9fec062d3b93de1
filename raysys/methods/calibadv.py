"""CalibAdv: calibrated advantages for search agents trained with GRPO. Paper: arXiv 2604.18235.

Legend: B rollouts, T response tokens, S search steps, K runs; g a question's group; run s of a rollout its s-th generation, all of whose
tokens share one advantage; the last run holds the answer, earlier ones a search each.

    A_i   = (R_i - mean_g) / (std_g + 1e-6)                                    GRPO, std over n - 1; a group of one: mean 0, std 1
    A_is  = A_i (1 - c_s)  where A_i < 0 and step s has a correctness c_s      soft penalty, search runs
    A_i,answer = lambda N_g / P_g A_i  where A_i > 0                           rebalance, answer runs
    P_g, N_g: sums of A > 0 and of |A|, A < 0, over the tokens of g's answer runs; if either is 0, those tokens get 0

Equal rewards give exactly 0: in lower precision their rounding error over 1e-6 would be an advantage. Since advantages of a group sum to 0,
rebalancing with lambda = 1 does nothing but take back what unequal lengths of answers do to a mean over tokens. The authors' knob
`target_ratio` is 1 / lambda.

The loss is `gopd.policy_loss` with dual_clip=inf; the authors' mean over micro-batches of their token means gives each micro-batch the same
weight. Texts and rewards are in `calibadv_text`, the correctness c in `calibadv_steps`, what to watch in `calibadv_metrics`.

float64 stays float64, lower precisions return float32; sums are float64. On a CPU results are the same bit for bit whatever the
order of rollouts, the names of groups and what else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raysys.methods.calibadv_steps import step_scores
from raysys.methods.calibadv_text import answer_f1, exact_match, format_valid
from raysys.methods.tensors import compute_dtype

__all__ = [
    "answer_f1",
    "calibrate",
    "exact_match",
    "format_valid",
    "group_advantage",
    "run_advantages",
    "run_lengths",
    "score_table",
    "step_scores",
]

EPSILON = 1e-6
BLOCK = 2**18
"""Tokens that temporaries of [B, T] hold at once: fresh memory for all of them costs more time than the arithmetic."""


def group_advantage(rewards: Tensor, groups: Tensor) -> Tensor:
    """Rewards normalised within their groups; without gradient.

    Args:
        rewards: [B], floating and finite.
        groups: [B] integers, any labels in any order.

    Returns:
        [B]; exactly 0 where a group of several has equal rewards, R / (1 + 1e-6) in a group of one.

    Raises:
        ValueError: shapes or dtypes do not fit, or a reward is not finite.
    """
    _check_rewards(rewards, groups)
    return _group_advantage(rewards.detach().double(), _numbered(groups)).to(compute_dtype(rewards))


def calibrate(
    rewards: Tensor,
    groups: Tensor,
    runs: Tensor,
    run_counts: Tensor,
    step_scores: Tensor | np.ndarray,
    rebalance: float | None = 1.0,
    soft_penalty: bool = True,
) -> Tensor:
    """The advantage of each token; without gradient.

    Args:
        rewards: [B], floating and finite.
        groups: [B] integers, any labels in any order.
        runs: [B, T] integers, the run of a token that the policy generated, -1 for all others.
        run_counts: [B] integers, how many runs a rollout has; the last one is its answer run, also if it has no token left or searches.
        step_scores: [B, S], the correctness of run s at s, in [0, 1], NaN where there is none; see `score_table`. What it holds for the
            answer run and beyond has no effect; search runs beyond S have none.
        rebalance: lambda; None leaves answer runs as they are.
        soft_penalty: without, `step_scores` has no effect.

    Returns:
        [B, T], 0 outside of runs.

    Raises:
        ValueError: shapes or dtypes do not fit, a reward is not finite, a run is not below its rollout's count, a score is out of range, or
            rebalance is not positive and finite.
    """
    lengths = run_lengths(runs, run_counts)
    table = run_advantages(rewards, groups, lengths, run_counts, step_scores, rebalance, soft_penalty)
    table = torch.cat([table.new_zeros(len(table), 1), table], 1)  # so that run -1 reads 0
    out = table.new_empty(runs.shape)
    for rows in row_blocks(runs):
        torch.gather(table[rows], 1, runs[rows].long() + 1, out=out[rows])
    return out


def run_advantages(
    rewards: Tensor,
    groups: Tensor,
    lengths: Tensor,
    run_counts: Tensor,
    step_scores: Tensor | np.ndarray,
    rebalance: float | None = 1.0,
    soft_penalty: bool = True,
) -> Tensor:
    """As `calibrate`, by run: [B, K], of no meaning from a rollout's run count on. `lengths` [B, K]: see `run_lengths`."""
    _check_rewards(rewards, groups)
    _check_integers("run_counts", run_counts, rewards.shape)
    _check_integers("lengths", lengths, (len(rewards), lengths.shape[-1]))
    if run_counts.numel() and int(run_counts.max()) > lengths.shape[1]:
        raise ValueError(f"lengths has {lengths.shape[1]} runs a rollout, run_counts up to {int(run_counts.max())}")
    if rebalance is not None and not (math.isfinite(rebalance) and rebalance > 0):
        raise ValueError(f"rebalance must be positive and finite, or None, got {rebalance}")
    scores = known_scores(step_scores, run_counts)
    dtype = compute_dtype(rewards, scores)
    group = _numbered(groups)
    plain = _group_advantage(rewards.detach().double(), group)
    table = plain[:, None].repeat(1, lengths.shape[1])
    if soft_penalty:
        keep = table.new_ones(table.shape)
        steps = min(scores.shape[1], keep.shape[1])
        keep[:, :steps] -= scores[:, :steps].nan_to_num(0.0)
        table = torch.where(table < 0, table * keep + 0.0, table)  # + 0.0 makes 0 of -0
    if rebalance is not None and table.numel():
        answer = (run_counts.long() - 1).clamp(min=0)[:, None]
        tokens = torch.where(run_counts > 0, lengths.gather(1, answer)[:, 0], 0)
        table.scatter_(1, answer, (plain * _answer_factor(plain, tokens, group, rebalance) + 0.0)[:, None])
    return table.to(dtype)


def run_lengths(runs: Tensor, run_counts: Tensor) -> Tensor:
    """How many tokens each run has.

    Args:
        runs: [B, T] integers, -1 outside of runs.
        run_counts: [B] integers.

    Returns:
        [B, K] int64; K is the largest run count.

    Raises:
        ValueError: shapes or dtypes do not fit, a count is negative, or a run is below -1 or not below its rollout's count.
    """
    if runs.dim() != 2:
        raise ValueError(f"runs must be [B, T], got shape {list(runs.shape)}")
    _check_integers("runs", runs, runs.shape)
    _check_integers("run_counts", run_counts, runs.shape[:1])
    if run_counts.numel() and int(run_counts.min()) < 0:
        raise ValueError(f"run_counts must be at least 0, got {int(run_counts.min())}")
    slots = int(run_counts.max()) + 1 if run_counts.numel() else 1
    lengths = torch.zeros(len(runs), slots, dtype=torch.int64, device=runs.device)
    for rows in row_blocks(runs):
        block = runs[rows].long()
        over = block.amax(1) >= run_counts[rows]
        if bool(over.any()) or int(block.min()) < -1:
            low, row = int(block.min()), int(over.nonzero()[0, 0]) if bool(over.any()) else 0
            told = f"got {low}" if low < -1 else f"row {rows.start + row} has run {int(block[row].max())} of {int(run_counts[rows][row])}"
            raise ValueError(f"runs must be -1 or below the rollout's run count, {told}")
        first = 1 + slots * torch.arange(len(block), device=runs.device)
        lengths[rows] = torch.bincount((block + first[:, None]).flatten(), minlength=len(block) * slots).view(-1, slots)
    return lengths[:, 1:]


def score_table(scores: Sequence[Sequence[float] | None], steps: int | None = None) -> Tensor:
    """What `step_scores` says of each rollout as [B, S] float32, NaN where there is no score.

    Args:
        scores: one entry a rollout; those of several groups follow one another.
        steps: S; None takes the longest entry.

    Raises:
        ValueError: an entry has more than `steps` scores.
    """
    longest = max((len(entry) for entry in scores if entry is not None), default=0)
    if steps is not None and longest > steps:
        raise ValueError(f"scores must have at most steps={steps} entries a rollout, got {longest}")
    table = torch.full((len(scores), longest if steps is None else steps), torch.nan)
    for row, entry in enumerate(scores):
        if entry:
            table[row, : len(entry)] = torch.tensor(entry)
    return table


def known_scores(step_scores: Tensor | np.ndarray, run_counts: Tensor) -> Tensor:
    """The scores that count, [B, S]: NaN also for the answer run and beyond. Raises ValueError on a bad shape, dtype or range."""
    scores = torch.as_tensor(step_scores).detach()
    if scores.dim() != 2 or len(scores) != len(run_counts) or not scores.is_floating_point():
        raise ValueError(f"step_scores must be floating [{len(run_counts)}, S], got {scores.dtype} {list(scores.shape)}")
    searches = torch.arange(scores.shape[1], device=scores.device) < run_counts.long()[:, None] - 1
    scores = torch.where(searches, scores, torch.nan)
    wrong = (scores < 0) | (scores > 1)
    if bool(wrong.any()):
        raise ValueError(f"step_scores must lie in [0, 1] or be NaN, got {float(scores[wrong][0]):g}")
    return scores


def row_blocks(runs: Tensor) -> list[slice]:
    """Slices of rows of [B, T] that hold `BLOCK` tokens or fewer, one row at least; none if there are no tokens."""
    rows = max(1, BLOCK // max(1, runs.shape[1]))
    return [slice(start, min(start + rows, len(runs))) for start in range(0, len(runs), rows)] if runs.numel() else []


def _answer_factor(plain: Tensor, tokens: Tensor, group: Tensor, rebalance: float) -> Tensor:
    """[B], what the advantage of a rollout's answer run is multiplied by."""
    mass = plain * tokens
    positive, negative = (_segment_sum(part, group)[group] for part in (mass.clamp(min=0), (-mass).clamp(min=0)))
    both = (positive > 0) & (negative > 0)
    factor = rebalance * negative / torch.where(both, positive, 1.0)
    return torch.where(both, torch.where(plain > 0, factor, 1.0), 0.0)


def _group_advantage(rewards: Tensor, group: Tensor) -> Tensor:
    """Of float64 [B]; `group` as `_numbered` gives it."""
    size = torch.bincount(group)[group]
    gap = rewards - _segment_sum(rewards, group)[group] / size
    deviation = (_segment_sum(gap.square(), group)[group] / (size - 1).clamp(min=1)).sqrt()
    low, high = (torch.zeros_like(rewards).scatter_reduce_(0, group, rewards, by, include_self=False)[group] for by in ("amin", "amax"))
    several = torch.where(low == high, 0.0, gap / (deviation + EPSILON))
    return torch.where(size == 1, rewards / (1 + EPSILON), several)


def _numbered(groups: Tensor) -> Tensor:
    """Labels as numbers from 0 on."""
    return torch.unique(groups, return_inverse=True)[1]


def _segment_sum(values: Tensor, group: Tensor) -> Tensor:
    """Sums by group, [B] of which the first ones count. Summands go in by size, so that the order of rows does not show."""
    order = values.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    return torch.zeros_like(values).index_add_(0, group[order], values[order])


def _check_rewards(rewards: Tensor, groups: Tensor) -> None:
    if rewards.dim() != 1 or not rewards.is_floating_point():
        raise ValueError(f"rewards must be floating [B], got {rewards.dtype} {list(rewards.shape)}")
    _check_integers("groups", groups, rewards.shape)
    bad = ~rewards.isfinite()
    if bool(bad.any()):
        raise ValueError(f"rewards must be finite, got {float(rewards[bad][0])} at row {int(bad.nonzero()[0, 0])}")


def _check_integers(name: str, values: Tensor, shape: Sequence[int]) -> None:
    if values.dtype == torch.bool or values.is_floating_point() or values.is_complex():
        raise ValueError(f"{name} must be integers, got {values.dtype}")
    if list(values.shape) != list(shape):
        raise ValueError(f"{name} has shape {list(values.shape)}, expected {list(shape)}")
