"""One config a job. Keys marked fixed in the architecture keep their names; what a run learns is `identity()`."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from raysys.config.base import Config, placed
from raysys.config.parts import Data, Deadlines, Rollout, Scoring, Trainer, Weights


class Run(Config):
    """What every job has."""

    name: str | None = placed(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder under `runs/`. Null: the job's name with the next free number."""
    run_dir: str | None = placed(None)
    """Default `runs/<name>`. On a remote cluster: an absolute path that all nodes share."""
    seed: int = 0
    device: Literal["auto", "cpu", "gpu"] = placed("auto")
    price_per_device_hour: PositiveFloat | None = placed(None)
    """What a GPU costs an hour, in any currency; a run of gopd, hpd, sft or search_agent then says what it cost and on what. Other jobs do
    not count device time, and it says nothing to them."""
    restarts: NonNegativeInt = placed(3)
    """Times that a run which was killed or lost a part of the cluster starts again by itself without getting further. 0: never."""
    deadlines: Deadlines = placed(Deadlines())

    def identity(self) -> dict[str, Any]:
        """See `Config.identity`. A falling learning rate makes the number of steps part of what is learned, unless it ends elsewhere."""
        keys = super().identity()
        falls = {keys.get(f"{part}.schedule", "constant") for part in ("trainer", "optimiser")} != {"constant"}
        if falls and keys.get("trainer.schedule_steps") is None:
            keys["steps"] = getattr(self, "steps", None)
        return keys


class EvaluationPart(Config):
    """Held-out tasks of a run."""

    data: Data
    rows: PositiveInt = 256
    """Rows a domain of `data.source`; of a file, whatever its domains, as many rows, or all if it has fewer. Which rows of a shuffled
    file these are follows from `seed`."""
    samples: PositiveInt = 1
    """1 is greedy; more is avg@k at `temperature`."""
    temperature: float = Field(default=1.0, gt=0)
    """With `top_p`, of evaluations whatever `rollout` says of samples to train on; greedy ones read neither."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Null: 1, and no part of what a stage of a pipeline is known by."""


class GopdConfig(Run):
    """`jobs/gopd.py`: on-policy distillation with a reward scale and a free reference. Paper: arXiv 2602.12125."""

    student: str
    """Hugging Face folder or id."""
    teachers: dict[str, str]
    """Domain tag to folder; `default` serves rows without a tag."""
    reference: str | None = None
    """Needed when reward_scale != 1: usually the student's own initial folder, or the teacher's pre-RL model (reward correction)."""
    reward_scale: float = Field(default=1.0, ge=0)
    data: Data
    steps: PositiveInt = placed(50)
    batch: PositiveInt = 1024
    """Prompts a step."""
    samples: PositiveInt = 1
    """Responses a prompt."""
    max_age: NonNegativeInt = 0
    """Weight versions that a trajectory may lag behind; 0 is synchronous."""
    colocate: bool = placed(False)
    """Engines and trainer ranks share GPUs and take turns; only with max_age=0, one engine a rank. Default: GPUs of their own."""
    max_prompt_tokens: PositiveInt = 2048
    max_response_tokens: PositiveInt = 16384
    learning_rate: PositiveFloat = 1e-5
    aggregation: Literal["token", "sequence_token_mean", "sequence_token_sum"] = "token"
    importance_cap: PositiveFloat = 5.0
    clip_low: float = Field(default=0.2, ge=0)
    clip_high: float = Field(default=0.2, ge=0)
    dual_clip: float = Field(default=3.0, gt=1)
    rollout: Rollout = Rollout()
    scoring: Scoring = Scoring()
    trainer: Trainer = Trainer()
    weights: Weights = Weights()
    evaluation: EvaluationPart | None = None
    evaluate_every: PositiveInt | None = None
    """Steps between evaluations inside the run; null: before and after only."""
    checkpoint_every: PositiveInt = placed(10)
    keep_checkpoints: PositiveInt = placed(2)

    def identity(self) -> dict[str, Any]:
        """See `Run.identity`. A run that only records is another one than the run that trains on its recording.

        A run that trains has no such keys, so that its identity is what it was before there were any.
        """
        made = {"rollout.generate_only": True, "rollout.record": self.rollout.record}
        return super().identity() | (made if self.rollout.generate_only else {})

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.reward_scale != 1 and self.reference is None:
            raise ValueError(
                f"reward_scale={self.reward_scale:g} needs reference (the student's initial folder, or the teacher's pre-RL model); "
                "without one the run would silently be plain on-policy distillation"
            )
        if not self.teachers:
            raise ValueError("teachers is empty; map each domain tag, or 'default', to a folder")
        if self.scoring.placement == "colocated":
            raise ValueError("scoring.placement=colocated is for distillation on data (jobs/hpd.py); with rollouts set it to own")
        if self.colocate and self.max_age:
            raise ValueError(
                f"colocate=true lets engines and trainer take turns, max_age={self.max_age} lets them work at once: set one back"
            )
        if self.colocate and (self.rollout.workers != self.trainer.ranks or self.rollout.tensor_parallel > 1):
            raise ValueError(
                f"colocate=true puts one engine beside each trainer rank: set rollout.workers={self.trainer.ranks} (trainer.ranks) "
                f"and rollout.tensor_parallel=1, got {self.rollout.workers} and {self.rollout.tensor_parallel}"
            )
        self.weights.check(self.colocate)
        if self.rollout.replay and self.evaluation is not None:
            raise ValueError("rollout.replay starts no engine, and evaluation needs one; set evaluation=null")
        self.trainer.check(self.batch * self.samples, self.steps)
        if self.evaluate_every is not None and self.evaluation is None:
            raise ValueError("evaluate_every is set but evaluation is not; give evaluation.data")
        return self


class NewModel(Config):
    """A small causal language model made from scratch, with a printable-ASCII character tokenizer."""

    architecture: Literal["qwen3"] = "qwen3"
    hidden_size: PositiveInt = 96
    layers: PositiveInt = 2
    heads: PositiveInt = 3
    kv_heads: PositiveInt = 3
    head_dim: PositiveInt = 32
    ffn_size: PositiveInt = 288
    tied: bool = False
    initializer_range: PositiveFloat = 0.1
    """Standard deviation of the first weights. About 1/sqrt(hidden_size): the 0.02 of large models makes small ones slow to learn."""
    context: PositiveInt = 128
    tokens: list[str] = []
    """Texts that have a token of their own, besides the characters; a line break is a character that has none without it."""
    words: str | None = None
    """JSON file with a list of words that have one, too, where they stand alone; `jobs/questions.py` writes one."""


class OnData(Run):
    """What the jobs have that learn from written responses: the loop with data as its source and no push."""

    data: Data
    steps: PositiveInt = placed(300)
    batch: PositiveInt = 128
    """Rows a step."""
    max_prompt_tokens: PositiveInt = 2048
    max_response_tokens: PositiveInt = 16384
    learning_rate: PositiveFloat = 1e-5
    trainer: Trainer = Trainer()
    evaluation: EvaluationPart | None = None
    evaluate_every: PositiveInt | None = None
    stop_at: dict[str, float] = {}
    """Stop early when each of these domains reaches this greedy accuracy at an evaluation."""
    rollout: Rollout = Rollout()
    weights: Weights = Weights()
    checkpoint_every: PositiveInt = placed(50)
    keep_checkpoints: PositiveInt = placed(1)

    @model_validator(mode="after")
    def _evaluated(self) -> Self:
        if (self.stop_at or self.evaluate_every) and self.evaluation is None:
            raise ValueError("evaluate_every and stop_at need evaluation; give evaluation.data")
        if self.stop_at and self.evaluate_every is None:
            raise ValueError("stop_at needs evaluate_every")
        self.rollout.check(evaluates=True)
        self.trainer.check(self.batch, self.steps)
        self.weights.check(colocate=False)
        return self


class SftConfig(OnData):
    """`jobs/sft.py`: supervised fine-tuning."""

    student: str | None = None
    """Hugging Face folder or id to start from; null makes `new_model`."""
    new_model: NewModel = NewModel()


class HpdConfig(OnData):
    """`jobs/hpd.py`: hybrid-policy distillation on data, and its baselines. Paper: arXiv 2604.20244."""

    student: str
    """Hugging Face folder or id."""
    teachers: dict[str, str]
    """Domain tag to folder; `default` serves rows without a tag. They should have written the data, or been trained on them."""
    loss: Literal["hpd", "sft", "seqkd", "rkld", "jsd"] = "hpd"
    """What weighs the data's tokens: see `raysys.methods.hpd`. sft asks no teacher."""
    use_student_sample: bool = True
    """With the draw from the student at each position; of loss=hpd."""
    use_reinforce: bool = True
    """Count the teacher's probability twice where the draw should be suppressed; of loss=hpd."""
    temperature: PositiveFloat = 1.0
    """Divides the logits of student and teacher."""
    vocabulary: Literal["same", "shared_prefix"] = "same"
    """shared_prefix: models whose first ids mean the same, some with more behind. Probabilities are those over the shared ids, and rows
    that hold others are left out and counted."""
    scoring: Scoring = Scoring()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.teachers:
            raise ValueError("teachers is empty; map each domain tag, or 'default', to a folder")
        if self.vocabulary == "shared_prefix" and self.trainer.zero_stage == 3:
            raise ValueError("vocabulary=shared_prefix cuts the output embedding, which trainer.zero_stage=3 keeps in pieces: set it to 2")
        if self.vocabulary == "shared_prefix" and self.evaluation is not None:
            raise ValueError(
                "vocabulary=shared_prefix trains on a part of what an engine samples from: evaluate the export by jobs/evaluate.py"
            )
        if self.loss != "hpd" and not (self.use_student_sample and self.use_reinforce):
            raise ValueError(f"use_student_sample and use_reinforce are parts of loss=hpd, not of loss={self.loss}: leave them out")
        if self.scoring.placement == "colocated" and self.scoring.ranks != self.trainer.ranks:
            raise ValueError(
                f"scoring.placement=colocated puts a scorer beside each trainer rank: set scoring.ranks={self.trainer.ranks} "
                f"(trainer.ranks), got {self.scoring.ranks}"
            )
        if self.trainer.mini_batches > 1:
            raise ValueError(
                f"trainer.mini_batches={self.trainer.mini_batches}: the weights are those of the step's own student; set it to 1"
            )
        return self


class Harness(Config):
    """Tasks of lm-eval, which has to be installed besides."""

    tasks: list[str] = Field(min_length=1)
    """Names of tasks or of groups."""
    include: str | None = None
    """Folder with YAML files of further tasks. They can name Python functions, which are run: only files that you trust."""
    few_shot: NonNegativeInt | None = None
    """Examples before each question. Null: as each task has it."""
    rows: PositiveInt | None = None
    """Of each task the first so many rows, for a quick look. Null: all."""
    chat: bool = False
    """Questions in the model's chat template."""
    batch: PositiveInt = placed(16)
    """Rows at the same time on a CPU; on a GPU, vLLM decides."""


class EvaluateConfig(Run):
    """`jobs/evaluate.py`: any list of checkpoints on any task source through vLLM, or on tasks of lm-eval."""

    models: dict[str, str]
    """Label to Hugging Face folder or id."""
    evaluation: EvaluationPart | None = None
    harness: Harness | None = None
    max_prompt_tokens: PositiveInt = 2048
    max_response_tokens: PositiveInt = 16384
    rollout: Rollout = Rollout()
    examples: NonNegativeInt = 5
    """Responses a model shown in the report."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.evaluation is None) == (self.harness is None):
            raise ValueError("set either evaluation (tasks of one's own) or harness (lm-eval's), and the other to null")
        self.rollout.check(evaluates=True)
        return self


class GenerateConfig(Run):
    """`jobs/generate.py`: teachers' answers to prompts, written as data that `data.path` of the other jobs reads."""

    teachers: dict[str, str]
    """Domain tag to folder or id; `default` serves rows without a tag."""
    data: Data
    """Prompts are taken in the order of the data, whatever `shuffle` says."""
    rows: PositiveInt | None = None
    """Prompts: of each procedural domain, times its weight; of files the first so many rows. Null: all that there are."""
    samples: PositiveInt = 1
    """Answers a prompt; their ids are `<id of the prompt>/<sample>`."""
    max_prompt_tokens: PositiveInt = 2048
    max_response_tokens: PositiveInt = 16384
    """Answers that have no end by then are left out and counted."""
    rollout: Rollout = Rollout()
    """Engines of the teacher whose turn it is. Of `retries` and `restarts`: answers drawn again, actors started again."""
    keep: Literal["all", "correct"] = "all"
    """correct: only answers that the row's verifier gives a 1."""
    shard_rows: PositiveInt = 256
    """Prompts of a file, which is what a kill can cost. Identity: training shuffles files, so their cut is part of the data."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.teachers:
            raise ValueError("teachers is empty; map each domain tag, or 'default', to a folder")
        if self.rollout.record or self.rollout.replay:
            raise ValueError("rollout.record, replay and generate_only are of on-policy runs; this job writes its answers to data/")
        if self.data.source is not None and self.data.source.size is None and self.rows is None:
            raise ValueError("data.source has no end: set rows, or data.source.size")
        return self


class Stage(Config):
    """One stage of a pipeline: a job with its config."""

    job: str
    config: str | None = None
    """YAML file, relative to the pipeline's own."""
    set: dict[str, Any] = {}
    """Keys on top of the file. `${stage}` becomes that stage's export folder, `${stage:run}` its run folder (`${stage:run}/data`)."""
    main: bool = False
    """Overrides given on the command line go to the stages marked main."""


class PipelineConfig(Run):
    """`jobs/pipeline.py`: stages in order, content-addressed, skipped when done."""

    stages: dict[str, Stage]
    title: str = "pipeline"
