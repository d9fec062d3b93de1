"""How a model is optimised: the rule for its matrices, its learning rate and the schedule. The class default is the recommended setting."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from raysys.config.base import Config

Kind = Literal["adamw", "muon", "adamh", "muonh"]
WHOLE_MATRICES: tuple[Kind, ...] = ("muon", "adamh", "muonh")
"""Kinds whose step looks at a matrix as a whole, not number by number."""


class Optimiser(Config):
    """AdamW, or another rule for the hidden matrices and AdamW for the rest. Defaults: the 1B runs of arXiv 2606.12397."""

    kind: Kind = "adamw"
    """adamw. muon: orthogonal steps. adamh and muonh: the same directions under Hyperball, which fixes the Frobenius norm of every hidden
    matrix and of its step in place of weight decay."""
    learning_rate: PositiveFloat = 1e-3
    """Its peak. All kinds take AdamW's: their steps are scaled to the size that AdamW's have (`raysys/methods/matrix_steps.py`)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW and AdamH."""
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    """Of matrices and embeddings; never of norms, nor of what Hyperball keeps at its norm."""
    router_weight_decay: NonNegativeFloat = 0.0
    """The norm of a router's rows does nothing under MPI but set how fast they turn."""
    clip: PositiveFloat = 1.0
    """Largest norm of the global gradient."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Of muon and muonh, with Nesterov's look ahead."""
    newton_schulz_steps: PositiveInt = Field(default=5, le=20)
    """Of the orthogonalisation; 5 bring all but the smallest singular values between 0.7 and 1.2."""
    matrix_norm: Literal["sqrt_out", "initial"] = "sqrt_out"
    """Of adamh and muonh. sqrt_out: every matrix is scaled to Frobenius norm sqrt(d_out) when training starts, as the MPI paper does.
    initial: it keeps the norm that it has, which continued pretraining needs."""
    base_width: PositiveInt | None = 1024
    """Of adamh and muonh: the model width whose input widths set the scale of steps, so that a learning rate found there serves all widths
    (1024: the paper's 1B). Null: each matrix's own."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """wsd: warm-up, stable, and a linear decay at the end."""
    warmup_steps: NonNegativeInt = 1000
    decay_share: float = Field(default=0.2, gt=0, le=1)
    """Share of all steps in which wsd decays."""
    min_lr_rate: float = Field(default=0.0, ge=0, le=1)
    """What a falling learning rate falls to, as a share of its peak."""

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)}: each must be at least 0 and below 1")
        return self

    @property
    def whole_matrices(self) -> bool:
        return self.kind in WHOLE_MATRICES

    @property
    def hyperball(self) -> bool:
        return self.kind in ("adamh", "muonh")

    def check(self, steps: int, zero_stage: int, offload: bool = False) -> None:
        """Raises ValueError where a run of so many steps, under this ZeRO stage, cannot be optimised like this."""
        if self.warmup_steps >= steps:
            raise ValueError(f"optimiser.warmup_steps={self.warmup_steps} never ends in steps={steps}: lower it")
        if self.schedule == "wsd" and self.warmup_steps + self.decay_share * steps > steps:
            raise ValueError(
                f"optimiser.warmup_steps={self.warmup_steps} and decay_share={self.decay_share:g} of steps={steps} overlap: lower one"
            )
        self.check_placement(zero_stage, offload)

    def check_placement(self, zero_stage: int, offload: bool = False) -> None:
        """Raises ValueError where the rule's matrices would lie where it cannot have them whole."""
        if self.whole_matrices and zero_stage > 2:
            raise ValueError(f"optimiser.kind={self.kind} needs matrices whole: set zero_stage to 0, 1 or 2, or optimiser.kind=adamw")
        if self.whole_matrices and offload:
            raise ValueError(f"optimiser.kind={self.kind} steps on the GPU: set offload_optimizer=false, or optimiser.kind=adamw")
