"""The parts that run configs are made of: data, rollout, scoring, trainer, deadlines. The class default is the recommended setting."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from raysys.config.base import Config, placed


class Task(Config):
    """One procedural domain: a reasoning-gym task rendered as short text.

    `prompt` and `target` are format strings over the entry's metadata plus `answer`; see `raysys.data.procedural` for the fields.
    """

    task: str
    """reasoning-gym task name, e.g. `chain_sum`."""
    params: dict[str, Any] = {}
    """Arguments of the task, e.g. `{min_terms: 2, max_terms: 2}`."""
    style: Literal["plain", "scratchpad"] = "plain"
    """How question and target are written: `plain` asks the task's own question; `scratchpad` is the compact form of the quickstart."""
    weight: NonNegativeInt = 1
    """Share of this domain in every batch, relative to the others."""


class Procedural(Config):
    """Rows made on the fly by reasoning-gym, one stream a domain."""

    domains: dict[str, Task]
    split: Literal["train", "choose", "report"] = "train"
    """Disjoint streams of tasks: learn from `train`, choose settings on `choose`, print tables from `report`."""
    size: PositiveInt | None = None
    """Rows a domain before the stream repeats; null never repeats."""
    seed: int = 0


class Data(Config):
    """Where prompts (and, for supervised runs, answers) come from: a file or a procedural source, not both."""

    path: str | None = None
    """JSONL or Parquet: a file, a folder or a glob; local, s3://, gs:// or hf://.

    Columns: `prompt` (text or chat messages), optional `id`, `domain`, `answer`, `verifier`, `metadata`; what `jobs/generate.py` writes
    has `gold`, `response_ids` and `tokenizer` besides (see `raysys.data.rows.parse`)."""
    source: Procedural | None = None
    shuffle: bool = True
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    """The run fails when a larger share of rows is unusable."""
    default_verifier: str = "exact"
    """Verifier of rows that name none and have an answer."""
    enable_thinking: bool = False
    """Passed to the chat template."""
    context_field: str | None = None
    """On-policy context distillation: the column whose text the teacher reads in addition to the prompt."""
    context_template: str = "{prompt}\n\nHere is a reference solution:\n{context}\n\nNow solve the problem in your own way."

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.source is None):
            raise ValueError("set exactly one of data.path and data.source")
        return self


class Rollout(Config):
    """vLLM workers and how they sample."""

    workers: PositiveInt | Annotated[str, Field(pattern=r"^[1-9]\d*\.\.[1-9]\d*$")] = placed(1)
    """Engines. A range such as `1..8`: the run starts with the first number and takes more as the cluster has room or grows."""
    tensor_parallel: PositiveInt = placed(1)
    temperature: PositiveFloat = 1.0
    """With `top_p`, of samples to train on or to keep; evaluations have their own."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_sequences: PositiveInt = placed(128)
    """Sequences an engine decodes at once."""
    max_batched_tokens: PositiveInt = placed(2048)
    kv_cache_mib: PositiveInt = placed(64)
    """KV cache of an engine on CPU; a GPU engine takes `gpu_memory_utilization`."""
    gpu_memory_utilization: float = placed(0.85, gt=0, le=1)
    enforce_eager: bool | None = placed(None)
    """Null: eager on CPU, CUDA graphs on GPU."""
    prefix_caching: bool = placed(False)
    threads: PositiveInt = 1
    """CPU threads of an engine. Identity, because the last bits of log-probs depend on it."""
    order: Literal["first_ready", "in_order"] = "first_ready"
    """Which finished groups a step takes when there are more than it needs. `max_age=0` needs all that are asked for, so both are one."""
    kv_cache: Literal["recompute", "keep"] = "recompute"
    """Of samples in progress when weights change: computed again with the new weights, or kept (faster, but their log-probs mix)."""
    buffer_mib: PositiveInt = placed(1024)
    """Responses that may wait for the trainer; generation beyond one batch stops there."""
    retries: NonNegativeInt = placed(2)
    """How often a sample that a worker lost is given to another one; then its prompt is a dead letter."""
    restarts: NonNegativeInt = placed(3)
    """Workers that may be lost one after another with no sample finished in between."""
    max_dead_letters: NonNegativeInt = placed(100)
    """The run stops when more prompts than these could not be sampled."""
    release_after: PositiveFloat | None = placed(None)
    """Seconds without work after which a worker above the range's lower end is given back to the cluster; null: never."""
    record: str | None = placed(None)
    """Folder to which each step's samples are written, for `replay`."""
    replay: str | None = placed(None)
    """Folder of recorded samples to train on instead of generating: no engine is started."""
    generate_only: bool = placed(False)
    """Records samples of the student as it is, and trains nothing: no trainer and no scorer is started."""

    @property
    def fewest(self) -> int:
        """Workers that the run cannot start without."""
        return self.workers if isinstance(self.workers, int) else int(self.workers.partition("..")[0])

    @property
    def most(self) -> int:
        """Workers that the run never exceeds."""
        return self.workers if isinstance(self.workers, int) else int(self.workers.partition("..")[2])

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.most < self.fewest:
            raise ValueError(f"workers={self.workers}: the range ends below its beginning")
        if self.replay and (self.record or self.generate_only):
            raise ValueError("replay gives recorded samples, record and generate_only make them: set one of them")
        if self.generate_only and not self.record:
            raise ValueError("generate_only needs record=FOLDER, where the samples go")
        if self.kv_cache == "keep" and self.prefix_caching:
            raise ValueError("kv_cache=keep with prefix_caching=true would serve new prompts from old weights' cache; set one of them back")
        return self

    def check(self, evaluates: bool) -> None:
        """Raises ValueError for what a job other than gopd does not read; `evaluates`: its engines serve evaluations only."""
        if self.record or self.replay or self.generate_only:
            raise ValueError("rollout.record, replay and generate_only are of jobs/gopd.py")
        if evaluates and (self.temperature, self.top_p) != (1.0, 1.0):
            raise ValueError(
                "rollout.temperature and rollout.top_p are of samples to train on, which this job does not draw: "
                "set evaluation.temperature and evaluation.top_p"
            )


class Scoring(Config):
    """Frozen teachers and references."""

    placement: Literal["own", "colocated"] = placed("own")
    """colocated: each scorer lives on the GPU of a trainer rank, and works while that waits for it; only where data are the source."""
    ranks: PositiveInt = placed(1)
    """Scorer actors; each holds all frozen models and takes a share of the rows."""
    offload: bool = placed(False)
    """Keep the frozen weights in host memory and bring a layer at a time to the GPU (ZeRO-3 with parameter offload): slower, for teachers
    that do not fit."""
    retries: NonNegativeInt = placed(2)
    """How often a scorer that died or hung is replaced in one step."""
    micro_batch_tokens: PositiveInt = placed(16384)
    chunk_tokens: PositiveInt = placed(1024)
    """Positions whose logits exist at the same time."""
    threads: PositiveInt = 1


class Trainer(Config):
    """DeepSpeed ranks and the optimiser."""

    ranks: PositiveInt = placed(1)
    zero_stage: Literal[0, 1, 2, 3] = placed(1)
    micro_batch_tokens: PositiveInt = placed(16384)
    """Tokens of one forward and backward pass on one rank. Padding counts only for models that need it (`raysys/models/packing.py`)."""
    chunk_tokens: PositiveInt = placed(1024)
    mini_batches: PositiveInt = 1
    """Optimiser steps per batch; 1 is the paper's setting (no old log-probs pass, clipping inert)."""
    weight_decay: NonNegativeFloat = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: PositiveFloat = 1e-8
    clip: PositiveFloat = 1.0
    """Largest norm of the global gradient."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: NonNegativeInt = 0
    schedule_steps: PositiveInt | None = None
    """Where a falling learning rate ends, if that is behind the run's end. Null: at `steps`, which then is part of what is learned."""
    min_lr_rate: float = Field(default=0.0, ge=0, le=1)
    """What a falling learning rate falls to, as a share of its peak."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 with float32 masters on GPU, float32 on CPU."""
    activation_checkpointing: bool = placed(False)
    offload_optimizer: bool = placed(False)
    threads: PositiveInt = 2

    def check(self, rows: int, steps: int) -> None:
        """Raises ValueError for more mini-batches than a step has rows, and for a schedule that ends before the run."""
        if rows < self.mini_batches:
            raise ValueError(f"trainer.mini_batches={self.mini_batches} exceeds the {rows} responses of a step")
        if self.schedule_steps is not None and self.schedule == "constant":
            raise ValueError(f"trainer.schedule_steps={self.schedule_steps} is of a learning rate that falls: set trainer.schedule")
        if self.schedule_steps is not None and self.schedule_steps < steps:
            raise ValueError(f"trainer.schedule_steps={self.schedule_steps} is below steps={steps}: raise it, or leave it out")


class Weights(Config):
    """How weights go from trainer to engines and how their arrival is proved."""

    backend: Literal["auto", "shared_memory", "nccl", "ipc"] = placed("auto")
    """shared_memory: through the host, anywhere. nccl: from the trainer's GPU to the engines' own. ipc: on the GPU that they share
    (colocate=true). auto: shared_memory, also where ipc could be, for ipc has not been proved on a GPU yet."""
    bucket_mib: PositiveInt = placed(256)
    """With ipc two buckets of it lie on the GPU during a push."""
    parity_tolerance: PositiveFloat | None = None
    """Allowed log-prob gap between trainer and engine on the probe, in nats: the largest in float32, the mean in bfloat16, where rounding
    alone moves single unlikely tokens far. Null: 1e-3 and 0.25."""

    def check(self, colocate: bool) -> None:
        """Raises ValueError for a backend that cannot reach engines which share their GPU with the trainer, or do not."""
        if self.backend == "ipc" and not colocate:
            raise ValueError("weights.backend=ipc hands weights over inside a GPU and needs colocate=true; else use nccl or auto")
        if self.backend == "nccl" and colocate:
            raise ValueError("weights.backend=nccl needs a GPU for each of its ranks, colocate=true shares them: use ipc or auto")


class Deadlines(Config):
    """Seconds that each kind of wait may take."""

    placement: PositiveFloat = placed(300.0)
    start: PositiveFloat = placed(900.0)
    generate: PositiveFloat = placed(1800.0)
    score: PositiveFloat = placed(900.0)
    train: PositiveFloat = placed(1800.0)
    push: PositiveFloat = placed(300.0)
    checkpoint: PositiveFloat = placed(900.0)
    heartbeat: PositiveFloat = placed(120.0)
    """A rollout worker that has not been heard of for so long is replaced, and its work goes to others."""
