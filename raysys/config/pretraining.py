"""Configs of pretraining: the decoder, its router, and how ranks share the work."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from raysys.config.base import Config, placed
from raysys.config.corpora import Corpus
from raysys.config.optimising import Optimiser
from raysys.config.parallel import check_parallel
from raysys.config.runs import Run

MODERATE_LOGIT = 4.0
"""The largest logit that fixed-norm rows can give should not be below it: with less the softmax is flat."""


class LocalTextConfig(Run):
    """`jobs/local_text.py`: text that is on every machine with this package, a tokenizer trained on it, and prompts to try a model on."""

    megabytes: PositiveFloat = 16.0
    """Of code at most, and of documentation at most."""
    tasks_megabytes: PositiveFloat = 2.0
    """Of questions with answers."""
    vocabulary: int = Field(default=4096, ge=258)
    """Tokens, the 256 bytes and two special ones among them."""
    context: PositiveInt = 4096
    """Tokens that the tokenizer's folder says a model can hold."""
    prompts: PositiveInt = 8


class MoeModel(Config):
    """Sizes of the decoder; see `raysys.models.moe.MoeShape`."""

    vocabulary: PositiveInt | None = None
    """Rows of the embedding. Null: as many as the tokenizer has tokens."""
    width: PositiveInt = 1024
    layers: PositiveInt = 8
    heads: PositiveInt = 8
    kv_heads: PositiveInt = 8
    head_dim: PositiveInt | None = None
    """Null: width / heads."""
    experts: PositiveInt = 64
    top_k: PositiveInt = 8
    expert_width: PositiveInt = 512
    rope_theta: PositiveFloat = 5e5
    norm_eps: PositiveFloat = 1e-6
    tied: bool = False
    deviation: PositiveFloat = 0.02
    """Standard deviation of the first weights."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width={self.width} is no multiple of heads={self.heads}: change one, or set head_dim")
        if self.head_size % 2:
            raise ValueError(f"head_dim={self.head_size} must be even: rotary positions turn pairs")
        if self.top_k > self.experts:
            raise ValueError(f"top_k={self.top_k} exceeds experts={self.experts}")
        return self

    @property
    def head_size(self) -> int:
        return self.head_dim or self.width // self.heads


class Router(Config):
    """How tokens find their experts; see `raysys.models.routing.Routing`. Paper: arXiv 2606.12397."""

    mpi: bool = True
    """Rows follow their experts by power iteration; false is a plain linear router."""
    mode: Literal["functional", "inplace"] = "functional"
    """functional: rows are computed from the parameter and the experts in each forward pass, and gradients pass through. inplace, the other
    reading of the paper: after each step the parameter is overwritten with its rows and scores as a plain router's, so that routing sends
    no gradient into the experts."""
    scale: PositiveFloat = 4.0
    """The paper's C': every row has norm C' / sqrt(experts)."""
    iterations: NonNegativeInt = 1
    """Power steps. 0 leaves the normalisation alone."""
    retract: bool = True
    """Bring rows back to their norm; without, they keep what the power step gives them."""
    matrix: Literal["gate", "up", "down"] = "gate"
    detach_expert: bool = False
    """Routing sends no gradient into the experts."""
    gate: Literal["softmax", "sigmoid"] = "softmax"
    """Stock Qwen3-MoE has softmax routers only, so a run with sigmoid ends with its resume points and nothing in `export/`."""
    normalise_first: bool = True
    """Probabilities over all experts, then the largest; false: over the chosen ones only."""
    renormalise: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.mpi and self.mode == "inplace" and not self.retract:
            raise ValueError("mode=inplace with retract=false: rows would grow or vanish step by step, set one of them back")
        return self

    def largest_logit(self, width: int, experts: int) -> float | None:
        """What a token of unit mean square can reach: C' sqrt(D / N). None where nothing bounds it."""
        return self.scale * (width / experts) ** 0.5 if self.mpi and self.retract else None


class Ranks(Config):
    """Ray Train's workers, each a DeepSpeed rank."""

    ranks: PositiveInt | Annotated[str, Field(pattern=r"^[1-9]\d*\.\.[1-9]\d*$")] = placed(1)
    """Workers. A range such as `1..8`: Ray Train takes what the cluster has and changes the number while it runs."""
    zero_stage: Literal[0, 1, 2, 3] = placed(1)
    expert_parallel: PositiveInt = placed(1)
    """Ranks that share a layer's experts; each holds its part, and tokens travel. 1: every rank has all."""
    chunk_tokens: PositiveInt = placed(1024)
    """Positions whose logits exist at the same time."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 with float32 masters on GPU, float32 on CPU."""
    activation_checkpointing: bool = placed(False)
    offload_optimizer: bool = placed(False)
    threads: PositiveInt = 2
    """CPU threads of a rank."""
    peak_tflops: PositiveFloat | None = placed(None)
    """Of one device in this dtype, by its data sheet: the run then records which share of it is used (MFU)."""
    scratch: str | None = placed(None)
    """Folder on each node's own disk where a rank writes its part of a resume point, to be carried away. Null: that of temporary files."""
    restarts: NonNegativeInt = placed(3)
    """Times that Ray Train starts its workers again after it lost one."""

    @property
    def fewest(self) -> int:
        return self.ranks if isinstance(self.ranks, int) else int(self.ranks.partition("..")[0])

    @property
    def most(self) -> int:
        return self.ranks if isinstance(self.ranks, int) else int(self.ranks.partition("..")[2])

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.most < self.fewest:
            raise ValueError(f"ranks={self.ranks}: the range ends below its beginning")
        if self.expert_parallel > 1 and self.fewest != self.most:
            raise ValueError(f"ranks={self.ranks} may change, expert_parallel={self.expert_parallel} needs a fixed number of them")
        return self


class Validation(Config):
    """Held-out loss."""

    sequences: PositiveInt = 64
    every: PositiveInt | None = None
    """Steps between; null: at the end only."""


class PretrainMoeConfig(Run):
    """`jobs/pretrain_moe.py`: a mixture-of-experts decoder from text. Paper of its router: arXiv 2606.12397."""

    model: MoeModel = MoeModel()
    start: str | None = None
    """Qwen3-MoE folder to go on from instead of fresh weights; `model` is then read from it. Its router rows become the parameter."""
    router: Router = Router()
    data: Corpus
    steps: PositiveInt = placed(10_000)
    batch: PositiveInt = 512
    """Sequences a step."""
    accumulation: PositiveInt = 1
    """Passes that a step is made of. Each balances its experts over the sequences of all ranks, so it is part of what is learned."""
    optimiser: Optimiser = Optimiser()
    balance_weight: NonNegativeFloat = 0.01
    z_weight: NonNegativeFloat = 0.0
    """Of the router's z-loss."""
    trainer: Ranks = Ranks()
    validation: Validation | None = None
    watch_every: PositiveInt = placed(10)
    """Steps between looks at the routers: alignment, loads."""
    checkpoint_every: PositiveInt = placed(500)
    keep_checkpoints: PositiveInt = placed(2)
    storage: str | None = placed(None)
    """Where resume points are kept: an absolute folder, or a URI that pyarrow knows (s3://bucket/place, gs://, file://). A folder of the
    run's name is made there. Null: `checkpoints` in the run's folder. What is small stays in that one, and so does the exported model."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.storage is not None and not self.storage.startswith("/") and "://" not in self.storage:
            raise ValueError(f"storage={self.storage} is neither an absolute folder nor a URI such as s3://bucket/place")
        if self.batch % self.accumulation:
            raise ValueError(f"batch={self.batch} is no multiple of accumulation={self.accumulation}")
        if self.batch // self.accumulation < self.trainer.most:
            raise ValueError(
                f"a pass has {self.batch // self.accumulation} sequences (batch / accumulation), fewer than "
                f"trainer.ranks={self.trainer.ranks}"
            )
        if self.start is None:  # else its folder has the experts; see `raysys.checks.sized`
            check_parallel(self.trainer.zero_stage, self.trainer.expert_parallel, self.trainer.fewest, self.model.experts)
        self.optimiser.check(self.steps, self.trainer.zero_stage, self.trainer.offload_optimizer)
        self._check_overwriting()
        if self.validation is not None and not self.data.held_out_share:
            raise ValueError("validation needs data.held_out_share: texts that training never sees")
        return self

    def _check_overwriting(self) -> None:
        """Raises ValueError where a router that is overwritten does not go with what holds or moves it."""
        if not self.router.mpi or self.router.mode == "functional":
            return
        if self.trainer.zero_stage > 2:
            raise ValueError("router.mode=inplace needs routers whole: set trainer.zero_stage to 0, 1 or 2, or router.mode=functional")
        if self.optimiser.hyperball and self.optimiser.matrix_norm == "sqrt_out":
            raise ValueError(
                f"router.mode=inplace gives rows a norm of its own, optimiser.kind={self.optimiser.kind} another: set "
                "optimiser.matrix_norm=initial, or router.mode=functional"
            )

    def not_exported(self) -> str:
        """A warning where no stock model can be written at the end; "" where one can."""
        if self.router.gate == "softmax":
            return ""
        return (
            f"router.gate={self.router.gate}: stock Qwen3-MoE has softmax routers only, the run ends with a resume point and nothing in "
            "export/"
        )

    def flat_router(self) -> str:
        """A warning where the router's rows are so short that every expert looks alike; "" where all is well. MPI spec, section 3.1."""
        largest = self.router.largest_logit(self.model.width, self.model.experts)
        if largest is None or largest >= MODERATE_LOGIT:
            return ""
        wanted = 10 * (self.model.experts / self.model.width) ** 0.5
        return (
            f"router.scale={self.router.scale:g}: no logit can exceed {largest:.1f} (scale * sqrt(width / experts)), which flattens the "
            f"softmax; a scale near {wanted:.1f} allows 10"
        )
