"""HPD and its baselines as an objective of the one loop: data as the source, a teacher that scores two tokens a position, no push."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from raysys.batch import Batch, Ragged
from raysys.config.runs import HpdConfig
from raysys.training.objectives import Micro, Outputs, by_domain

if TYPE_CHECKING:
    from torch import Tensor

PARTS = 4
"""Of a batch, on their way from trainer to teacher: what the two do at the same time."""
DOUBT = -1.0
"""k falls below this only where the student is nearly sure of a token that the teacher gives less than a third of that."""


@dataclass(frozen=True)
class HpdObjective:
    """Hybrid-policy distillation, and SFT, sequence KD, reverse KL and Jensen-Shannon on data. Paper: arXiv 2604.20244.

    A step: the trainer draws one token a position from the student, the teacher scores data tokens and draws (K=2), the trainer's forward
    with gradient gives the student's log-probs of both. The maths is in `raysys.methods.hpd`.
    """

    kind: Literal["hpd", "sft", "seqkd", "rkld", "jsd"] = "hpd"
    use_student_sample: bool = True
    use_reinforce: bool = True
    weighting: Literal["token", "sequence"] = "token"

    @classmethod
    def of(cls, config: HpdConfig) -> HpdObjective:
        return cls(config.loss, config.use_student_sample, config.use_reinforce)

    @property
    def draws(self) -> bool:
        """Whether there is a second token at each position."""
        return self.kind == "hpd" and self.use_student_sample

    @property
    def columns(self) -> tuple[str, ...]:
        taught = () if self.kind == "sft" else ("teacher_logprobs",)
        return ("response_ids", *taught, *(("draw_ids", "teacher_draw_logprobs") if self.draws else ()))

    @property
    def asks(self) -> tuple[str, ...]:
        return ("draw_ids",) if self.draws else ()

    def queries(self, trainer: Any, batch: Batch) -> Iterator[tuple[np.ndarray, Ragged]] | None:
        """Data token and draw of each position, some rows at a time, so that the teacher scores while the trainer draws the next ones; None
        where nothing is drawn: then the data's tokens are scored."""
        return self._drawn(trainer, batch) if self.draws else None

    def _drawn(self, trainer: Any, batch: Batch) -> Iterator[tuple[np.ndarray, Ragged]]:
        for rows in np.array_split(np.arange(len(batch)), min(PARTS, len(batch))):
            part = batch.slice(int(rows[0]), len(rows))
            data, drawn = part.ragged("response_ids"), trainer.draw(part)
            second = data.values.copy()  # what an episode's environment said is not drawn: its own id, which nobody reads
            second[part.ragged("runs").values >= 0 if "runs" in part else ...] = drawn.values
            yield rows, Ragged(np.stack([data.values, second], 1).astype(np.int32).ravel(), data.offsets * 2)

    def advantages(self, batch: Batch) -> Batch:
        """The teacher's answers, one column a token; weights are made in the step, where the student's log-probs are."""
        if not self.draws:
            return batch
        asked, told, offsets = batch.ragged("query_ids"), batch.ragged("teacher_logprobs"), batch.ragged("response_ids").offsets
        return batch.with_columns(
            draw_ids=Ragged(asked.values[1::2].copy(), offsets),
            teacher_logprobs=Ragged(told.values[0::2].copy(), offsets),
            teacher_draw_logprobs=Ragged(told.values[1::2].copy(), offsets),
        )

    def loss(self, outputs: Outputs, micro: Micro) -> tuple[Tensor, dict[str, Tensor | tuple[Tensor, Tensor]]]:
        """Metrics: those of `raysys.methods.hpd.token_loss`, as far as the kind has them; `nll` also by domain; `teacher_doubts`, the share
        of data tokens with k below -1."""
        import torch

        from raysys.methods.hpd import token_loss

        mask, student, ids = outputs.mask, outputs.logprobs, micro.columns["response_ids"]
        teacher = micro.columns.get("teacher_logprobs", student.detach())
        drawn, drawn_teacher = (outputs.asked["draw_ids"], micro.columns["teacher_draw_logprobs"]) if self.draws else (student, teacher)
        same = micro.columns["draw_ids"] == ids if self.draws else torch.ones_like(mask)
        loss, found = token_loss(student, teacher, drawn, drawn_teacher, same, mask, self.kind, self.use_student_sample, self.use_reinforce)
        metrics: dict[str, Tensor | tuple[Tensor, Tensor]] = {name: found[name] for name in self._told()}
        rows = (-student.detach() * mask).sum(1)
        metrics |= by_domain("nll", rows, mask.sum(1), micro.domains)
        if self.draws:
            others = (mask & ~same).sum()
            metrics["k_draw_mean"] = (found["k_draw_mean"] * others, others)
        if self.kind != "sft":
            lq = student.detach()
            metrics["teacher_doubts"] = ((mask & (lq.exp() * (teacher - lq) < DOUBT)).sum(), mask.sum())
        return loss, metrics

    def _told(self) -> tuple[str, ...]:
        """Token means, smallest and largest numbers that mean something for this kind."""
        if self.kind == "sft":
            return ("nll",)
        common = ("nll", "forward_kl_data", "k_mean", "k_min", "k_max", "expert_negative")
        draws = ("sampled_other", "reinforced", "suppressed", "k_draw_min", "k_draw_max", "reverse_kl_draws")
        return common + (draws if self.draws else ())


def uniforms(ids: Sequence[str], lengths: np.ndarray, seed: int) -> list[np.ndarray]:
    """The random numbers behind a row's draws, in [0, 1), float64, one a response token.

    They follow from the run's seed and the sample's id, which holds the epoch: a row draws the same whoever computes it, in whatever
    micro-batch, and again after a resume.
    """
    keys = (hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest() for name in ids)
    generators = (np.random.Generator(np.random.Philox(key=np.frombuffer(key, np.uint64))) for key in keys)
    return [generator.random(int(length)) for generator, length in zip(generators, lengths, strict=True)]
