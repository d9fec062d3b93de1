"""Config of the job that quantises: which layers get how many bits, by which method, on which data."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from raysys.config.base import Config, placed
from raysys.config.parts import Procedural
from raysys.config.runs import Run

Method = Literal["rtn", "gptq", "gptaq", "d2quant"]
Allocation = Literal["nsds", "zd", "mse", "kurtosis", "first_half", "last_half", "random", "uniform"]
BY_WEIGHTS = ("nsds", "zd", "mse", "kurtosis")
"""Allocations that look at the weights."""
FOLDS = ("llama",)
"""Families whose config can say that the MLP has biases, which is where DAC's can go."""


class Windows(Config):
    """Token windows from texts or tasks. Texts are joined and cut into windows of equal length; a task or a row with a prompt is a window
    of its own, cut off at that length."""

    path: str | None = None
    """JSONL or Parquet (rows of `text`, or of `prompt` with `response` or `answer`), or any text file; a file, a folder or a glob."""
    source: Procedural | None = None
    """Tasks made on the fly, with their answers."""
    samples: PositiveInt = 128
    """Windows."""
    length: int = Field(default=2048, ge=2)
    """Tokens of a window."""
    joined: bool = True
    """false: each text is a window of its own, too. For models that saw each document alone in training, as `jobs/pretrain_moe.py` makes
    them."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.source is None):
            raise ValueError("set exactly one of path and source")
        return self


class Gptq(Config):
    """How the quantisers that look at activations work. Paper: arXiv 2602.02546."""

    damp: PositiveFloat = 0.01
    """Added to the Hessian's diagonal, as a share of its mean."""
    expert_damp: float = Field(default=0.5, ge=0)
    """Of an expert added to `damp`, times its inputs over the tokens that reach it: few tokens say little of many inputs."""
    block: PositiveInt = 128
    """Columns whose errors are passed on at once. Identity: sums are rounded by it."""
    order: Literal["group", "none"] = "group"
    """Of columns: by falling importance inside groups, and of the groups; or as they stand."""
    alpha: PositiveFloat = 0.25
    """Weight of the deviation between the two streams; of gptaq and d2quant."""


class D2Quant(Config):
    """What d2quant adds to gptaq."""

    dual_scale: bool = True
    """DSQ: the down-projection has a scale for each input column, absorbed into the up-projection."""
    iterations: NonNegativeInt = 15
    """Alternations of DSQ's fit."""
    levels: Literal["uniform", "binary"] = "uniform"
    """Of the down-projection. Binary ones are the authors' program's; no kernel serves them."""
    correction: bool | None = None
    """DAC: a bias of the norm after attention, folded into gate and up. Null: where the family has a place for it (Llama's `mlp_bias`).
    true elsewhere keeps it beside the file for evaluation; the file alone is then worse than without, for its codes were fitted with it."""
    final_norm: bool = False
    """DAC of the norm before the head too. No family has a place for it, so it is kept beside the file for evaluation."""
    strength: float = Field(default=1.0, ge=0)
    clip: PositiveFloat = 10.0


class QuantizeConfig(Run):
    """`jobs/quantize.py`: bits by layer and a checkpoint that vLLM serves. Papers: arXiv 2603.17354 (NSDS), 2602.02546 (D2Quant)."""

    model: str
    """Hugging Face folder or id."""
    bits: float = Field(default=3.0, ge=2, le=8)
    """Of a weight on average, scales not counted."""
    allocation: Allocation = "nsds"
    """What says which layers get `high`: a score of their weights, where they stand, or chance. uniform: all have `bits`."""
    low: int = Field(default=2, ge=2, le=8)
    high: int = Field(default=4, ge=2, le=8)
    energy: float = Field(default=0.99, gt=0, le=1)
    """Share of the squared singular values that NSDS keeps."""
    expressiveness: Literal["product", "ratio"] = "product"
    """How NSDS joins magnitude and effective rank."""
    method: Method = "d2quant"
    group_size: PositiveInt = 128
    """Inputs that share a scale."""
    rotation: bool = False
    """Turn the residual stream by a random block-diagonal Hadamard matrix first; tied embeddings are untied for it."""
    gptq: Gptq = Gptq()
    d2quant: D2Quant = D2Quant()
    calibration: Windows | None = None
    """What gptq, gptaq and d2quant measure activations on. With rtn it only serves the error of each layer."""
    evaluation: Windows | None = None
    """Held-out windows whose perplexity is measured, in their order."""
    batch: PositiveInt = 8
    """Windows in a forward pass. Identity, as `threads`: sums are rounded by it."""
    threads: PositiveInt = 2
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the forward passes. auto: float32 on CPU, bfloat16 on GPU."""
    scoring_tasks: PositiveInt | None = placed(None)
    """Layers whose weights are looked at simultaneously. Null: as many as there are CPUs free."""
    shared: str | None = placed(None)
    """Folder in which runs keep for each other what is known of a model in full precision: of its layers' weights, and its perplexity."""
    keep_dequantised: bool = False
    """Also write `dequantised/`, a plain Hugging Face folder of what the codes stand for."""
    check_export: bool = placed(False)
    """Load `export/` in transformers with compressed-tensors, and in vLLM where it has kernels for it, and compare what they compute with
    what the codes stand for. The whole model is in memory for it."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.allocation == "uniform":
            if self.bits != int(self.bits):
                raise ValueError(f"allocation=uniform gives all layers bits={self.bits:g}, which must be a whole number")
        elif not self.low < self.high:
            raise ValueError(f"low={self.low} must be below high={self.high}")
        elif not self.low <= self.bits <= self.high:
            raise ValueError(f"bits={self.bits:g} cannot be met by widths low={self.low} and high={self.high}: change one of them")
        if self.method != "rtn" and self.calibration is None:
            raise ValueError(f"method={self.method} measures activations and needs calibration (calibration.path or calibration.source)")
        if self.method == "d2quant" and self.d2quant.levels == "binary":
            if not self.keep_dequantised:
                raise ValueError("d2quant.levels=binary has no form that can be served: set keep_dequantised=true, or levels=uniform")
            if self.widest > 4:
                raise ValueError(f"d2quant.levels=binary goes up to 4 bits, got {self.widest}")
        return self

    def corrects(self, folds: bool) -> bool:
        """Whether DAC runs for a family that has (`folds`) or has no place for its bias."""
        wanted = self.d2quant.correction
        return self.method == "d2quant" and (folds if wanted is None else wanted)

    @property
    def corrects_final(self) -> bool:
        """Whether DAC runs for the norm before the head."""
        return self.method == "d2quant" and self.d2quant.final_norm

    @property
    def widest(self) -> int:
        return int(self.bits) if self.allocation == "uniform" else self.high

    @property
    def served(self) -> bool:
        """Whether `export/` holds packed codes."""
        return not (self.method == "d2quant" and self.d2quant.dual_scale and self.d2quant.levels == "binary")
