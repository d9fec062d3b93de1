"""What CalibAdv's training is watched by: advantage mass, correctness of steps, perplexity, and an alarm. Paper: arXiv 2604.18235.

Legend: B rollouts, T response tokens, S search steps, K runs. Collapse shows in this order: negative over positive mass drifts up, entropy
rises and then drops, perplexity jumps, text decays, F1 falls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from raysys.methods.calibadv import known_scores, row_blocks, run_advantages, run_lengths
from raysys.methods.tensors import compute_dtype

LEVELS = {"0": 0.0, "1_3": 1 / 3, "2_3": 2 / 3, "1": 1.0}
"""Scores of a step that was shown three documents, in the names of metrics."""


def calibration_metrics(
    rewards: Tensor,
    groups: Tensor,
    runs: Tensor,
    run_counts: Tensor,
    step_scores: Tensor | np.ndarray,
    rebalance: float | None = 1.0,
    soft_penalty: bool = True,
    silver_sizes: Sequence[int] | None = None,
) -> dict[str, float]:
    """What `calibrate` does with these arguments, in numbers. A share of nothing is NaN.

    Args:
        silver_sizes: how many silver documents each group has.

    Returns:
        `positive_mass_*`, `negative_mass_*`: sums of A > 0 and of |A|, A < 0, over tokens; `mass_ratio_*`: negative over positive. Each
        ends in `before` (plain GRPO) or `after`, and is there over all tokens and, with `answer_` in front, over those of answer runs.
        `score_0`, `score_1_3`, `score_2_3`, `score_1`, `score_other`: shares of the scores of search steps; `score_mean`.
        `softened_of_negative`, `softened_of_all`: search steps whose negative advantage shrank, over those of negative advantage and over
        all. With silver_sizes, `silver_empty`: share of groups without, and `silver_size`: median of the others.

    Raises:
        ValueError: as `calibrate`; a silver size is negative.
    """
    lengths = run_lengths(runs, run_counts)
    before = run_advantages(rewards, groups, lengths, run_counts, step_scores, rebalance=None, soft_penalty=False).double()
    after = run_advantages(rewards, groups, lengths, run_counts, step_scores, rebalance, soft_penalty).double()
    slots, counts = torch.arange(lengths.shape[1], device=lengths.device), run_counts.long()[:, None]
    metrics: dict[str, float] = {}
    for place, tokens in (("", lengths), ("answer_", torch.where(slots == counts - 1, lengths, 0))):
        for when, table in (("before", before), ("after", after)):
            positive, negative = (float((part.clamp(min=0) * tokens).sum()) for part in (table, -table))
            metrics |= {f"{place}positive_mass_{when}": positive, f"{place}negative_mass_{when}": negative}
            metrics[f"{place}mass_ratio_{when}"] = _share(negative, positive)
    searches = slots < counts - 1
    shrunk, negative_steps = searches & (before < 0) & (after > before), searches & (before < 0)
    metrics["softened_of_negative"] = _share(int(shrunk.sum()), int(negative_steps.sum()))
    metrics["softened_of_all"] = _share(int(shrunk.sum()), int(searches.sum()))
    return metrics | _of_scores(known_scores(step_scores, run_counts)) | ({} if silver_sizes is None else _of_silver(silver_sizes))


def run_perplexity(logprobs: Tensor, runs: Tensor, run_counts: Tensor) -> Tensor:
    """Perplexity of each run, exp of the mean of -log p over its tokens.

    Args:
        logprobs: [B, T] in nats of the tokens as sampled; what it holds outside of runs has no effect.
        runs, run_counts: as in `calibrate`.

    Returns:
        [B, K], NaN for a run without tokens; without gradient.

    Raises:
        ValueError: shapes or dtypes do not fit, runs are out of range, or the log-prob of a token in a run is NaN.
    """
    lengths = run_lengths(runs, run_counts)
    if logprobs.shape != runs.shape or not logprobs.is_floating_point():
        raise ValueError(f"logprobs must be floating {list(runs.shape)}, got {logprobs.dtype} {list(logprobs.shape)}")
    sums = torch.zeros(len(lengths), lengths.shape[1] + 1, dtype=torch.float64, device=logprobs.device)
    for rows in row_blocks(runs):
        block = runs[rows].long()
        known = torch.where(block < 0, 0.0, logprobs[rows].detach().double())
        sums[rows] = sums[rows].scatter_add(1, block + 1, known)
    bad = sums.isnan().any(1)
    if bool(bad.any()):
        raise ValueError(f"logprobs must not be NaN in a run, got one at row {int(bad.nonzero()[0, 0])}")
    return (-sums[:, 1:] / lengths).exp().to(compute_dtype(logprobs))


def high_ppl(perplexity: Tensor, invalid: Tensor, reference: Tensor | None = None, limit: float = 50.0) -> float:
    """Share of rollouts with a run of perplexity `limit` or more, or with an invalid action; NaN of no rollouts.

    Args:
        perplexity: [B, K] from `run_perplexity` under the policy, NaN for runs that are not there.
        invalid: [B] bool, rollouts that got the notice of an invalid action.
        reference: [B, K] under the reference; a run counts where either is high.

    Raises:
        ValueError: shapes or dtypes do not fit, or the limit is not a number.
    """
    if math.isnan(limit):
        raise ValueError(f"limit must be a number, got {limit}")
    if perplexity.dim() != 2 or (reference is not None and reference.shape != perplexity.shape):
        shapes = [list(one.shape) for one in (perplexity, reference) if one is not None]
        raise ValueError(f"perplexity and reference must be [B, K] alike, got {' and '.join(map(str, shapes))}")
    if invalid.dtype != torch.bool or invalid.shape != perplexity.shape[:1]:
        raise ValueError(f"invalid must be bool [{len(perplexity)}], got {invalid.dtype} {list(invalid.shape)}")
    high = invalid | (perplexity >= limit).any(1)
    if reference is not None:
        high = high | (reference >= limit).any(1)
    return _share(int(high.sum()), len(high))


def collapse(
    history: Sequence[Mapping[str, float]],
    *,
    f1_share: float = 0.5,
    f1_steps: int = 10,
    high_ppl_limit: float = 0.2,
    entropy_growth: float = 1.5,
    entropy_after: int = 20,
) -> str | None:
    """Why training has collapsed by its last step, or None. The thresholds are this project's, not the paper's.

    Args:
        history: one mapping a step from step 1 on, with any of `f1` (mean over rollouts), `high_ppl` (share) and `entropy` (nats).
            What is missing raises no alarm; what is there but not finite does.
        f1_share, f1_steps: F1 below this share of its running maximum for so many steps on end.
        high_ppl_limit: `high_ppl` above it at the last step.
        entropy_growth, entropy_after: entropy at the last step above so many times the first there is, after so many steps.
    """
    if not history:
        return None
    last, step = history[-1], len(history)
    for name in ("f1", "high_ppl", "entropy"):
        if name in last and not math.isfinite(last[name]):
            return f"{name} is {last[name]} at step {step}"
    low, best = 0, -math.inf
    for f1 in (record["f1"] for record in history if "f1" in record):
        best = max(best, f1)
        low = low + 1 if f1 < f1_share * best else 0
    if low >= f1_steps:
        return f"F1 is below {f1_share:g} of its maximum {best:.3g} for {low} steps, at step {step}"
    if last.get("high_ppl", 0.0) > high_ppl_limit:
        return f"{last['high_ppl']:.1%} of rollouts have a high perplexity at step {step}, above {high_ppl_limit:.0%}"
    first = next((record["entropy"] for record in history if "entropy" in record), math.inf)
    if step > entropy_after and last.get("entropy", 0.0) > entropy_growth * first:
        return f"entropy is {last['entropy']:.3g} at step {step}, above {entropy_growth:g} times the first, {first:.3g}"
    return None


def _of_scores(scores: Tensor) -> dict[str, float]:
    known = scores[~scores.isnan()].double()
    at = {name: int(((known - level).abs() < 1e-6).sum()) for name, level in LEVELS.items()}
    found = {f"score_{name}": _share(count, len(known)) for name, count in at.items()}
    return found | {"score_other": _share(len(known) - sum(at.values()), len(known)), "score_mean": _share(float(known.sum()), len(known))}


def _of_silver(sizes: Sequence[int]) -> dict[str, float]:
    if any(size < 0 for size in sizes):
        raise ValueError(f"silver_sizes must be at least 0, got {min(sizes)}")
    some = [size for size in sizes if size]
    return {"silver_empty": _share(len(sizes) - len(some), len(sizes)), "silver_size": float(np.median(some)) if some else math.nan}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
