"""CalibAdv, and GRPO as its bare form, as an objective of the one loop. Paper: arXiv 2604.18235; the maths: `raysys.methods.calibadv`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from raysys.batch import Batch, Ragged
from raysys.config.agents import SearchAgentConfig
from raysys.errors import DataError
from raysys.training.objectives import Micro, Outputs

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CalibAdvObjective:
    """Groups are a prompt's samples: rewards normalised within them, negative advantages of good searches made smaller, and those of
    answers balanced. `soft_penalty=False` and `rebalance=None` is GRPO.

    Importance weights correct what the engine's policy and the step's differ by, truncated at `importance_cap`.
    """

    soft_penalty: bool = True
    rebalance: float | None = 1.0
    form: Literal["code", "paper"] = "code"
    threshold: float = 0.7
    similarity: float = 0.5
    shared: int = 1
    clip_low: float = 0.2
    clip_high: float = 0.2
    importance_cap: float = 5.0
    columns: tuple[str, ...] = ("advantages", "rollout_logprobs")
    asks: tuple[str, ...] = ()
    weighting: Literal["token", "sequence"] = "token"

    @classmethod
    def of(cls, config: SearchAgentConfig) -> CalibAdvObjective:
        calibrated = config.advantage == "calibadv"
        return cls(
            soft_penalty=calibrated and config.soft_penalty,
            rebalance=config.rebalance if calibrated else None,
            form=config.step_scores,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            importance_cap=config.importance_cap,
        )

    @property
    def _least(self) -> float:
        """The threshold as a reward of the record can be it: float32 holds an F1 of exactly 0.7 as a little less."""
        return float(np.float32(self.threshold))

    def queries(self, trainer: Any, batch: Batch) -> None:
        return None

    def advantages(self, batch: Batch) -> Batch:
        """Whole groups gain `advantages`, one number a response token, 0 for what the environment said.

        Raises:
            DataError: the rows are no episodes, or have no reward.
        """
        from raysys.methods.calibadv import calibrate

        given = self.given(batch)
        made = calibrate(**given, rebalance=self.rebalance, soft_penalty=self.soft_penalty)
        offsets = batch.ragged("response_ids").offsets
        real = np.arange(made.shape[1])[None, :] < np.diff(offsets)[:, None]
        return batch.with_columns(advantages=Ragged(made.numpy()[real].astype(np.float32), offsets))

    def given(self, batch: Batch) -> dict[str, Any]:
        """The first five arguments of `raysys.methods.calibadv.calibrate`, by name. Raises DataError."""
        import torch

        missing = [name for name in ("runs", "episode", "reward") if name not in batch]
        if missing:
            raise DataError(f"CalibAdv needs episodes with rewards; the batch has no column {missing[0]}")
        runs = batch.ragged("runs")
        turns = [json.loads(text)["turns"] for text in batch.strings("episode")]
        _, groups = np.unique(np.array(batch.strings("prompt_id")), return_inverse=True)
        rewards = torch.from_numpy(batch.numbers("reward").astype(np.float32))
        lengths = np.diff(runs.offsets)
        padded = np.full((len(batch), int(lengths.max(initial=0))), -1, np.int64)
        padded[np.arange(padded.shape[1])[None, :] < lengths[:, None]] = runs.values
        return {
            "rewards": rewards,
            "groups": torch.from_numpy(groups),
            "runs": torch.from_numpy(padded),
            "run_counts": torch.tensor([len(one) for one in turns]),
            "step_scores": self._scores(turns, groups, rewards.tolist()),
        }

    def _scores(self, turns: list[list[dict[str, Any]]], groups: np.ndarray, rewards: list[float]) -> Tensor:
        """[B, S] of the batch's rows."""
        from raysys.methods.calibadv import score_table, step_scores

        scores: list[list[float] | None] = [None] * len(turns)
        for rows, rollouts in _rollouts(turns, groups, rewards):
            found = step_scores(rollouts, threshold=self._least, similarity=self.similarity, shared=self.shared, form=self.form)
            for row, own in zip(rows, found, strict=True):
                scores[row] = own
        return score_table(scores)

    def silver_sizes(self, batch: Batch) -> list[int]:
        """How many silver documents each group has."""
        from raysys.methods.calibadv_steps import silver_documents

        turns = [json.loads(text)["turns"] for text in batch.strings("episode")]
        _, groups = np.unique(np.array(batch.strings("prompt_id")), return_inverse=True)
        found = _rollouts(turns, groups, batch.numbers("reward").tolist())
        return [len(silver_documents(rollouts, threshold=self._least, form=self.form)) for _, rollouts in found]

    def loss(self, outputs: Outputs, micro: Micro) -> tuple[Tensor, dict[str, Tensor | tuple[Tensor, Tensor]]]:
        """The clipped surrogate without a second clip, mean over tokens. Metrics: those of `raysys.methods.gopd.policy_loss`, and
        `importance_mean`, `importance_max`, `advantage_abs_max`."""
        from raysys.methods.gopd import importance_weights, policy_loss

        base = outputs.logprobs.detach() if outputs.old_logprobs is None else outputs.old_logprobs
        weights = importance_weights(base, micro.columns["rollout_logprobs"], outputs.mask, self.importance_cap)
        gain = micro.columns["advantages"]
        loss, metrics = policy_loss(
            outputs.logprobs, base, gain, outputs.mask, weights, self.clip_low, self.clip_high, dual_clip=math.inf, aggregation="token"
        )
        told = {
            "importance_mean": (weights.sum(), outputs.mask.sum()),
            "importance_max": weights.max(),
            "advantage_abs_max": (gain * outputs.mask).abs().max(),
        }
        return loss, {**metrics, **told}


def _rollouts(
    turns: list[list[dict[str, Any]]], groups: np.ndarray, rewards: list[float]
) -> Iterator[tuple[list[int], list[dict[str, Any]]]]:
    """Each group's rows, and what `raysys.methods.calibadv.step_scores` reads of them."""
    for group in range(int(groups.max(initial=-1)) + 1):
        rows = np.flatnonzero(groups == group).tolist()
        yield (
            rows,
            [
                {"valid": bool(turns[row]) and bool(turns[row][-1].get("valid")), "reward": rewards[row], "steps": searches(turns[row])}
                for row in rows
            ],
        )


def searches(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps of an episode that searched and were shown something, as `raysys.methods.calibadv.step_scores` reads them."""
    return [{"think": turn["think"], "doc_ids": turn["doc_ids"]} for turn in turns if "doc_ids" in turn]
