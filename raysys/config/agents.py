"""Configs of jobs whose samples are episodes of several turns."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from raysys.config.base import Config, placed
from raysys.config.parts import Data, Rollout, Trainer, Weights
from raysys.config.runs import EvaluationPart, Run


class Search(Config):
    """The search service that an agent asks; see `raysys.retrieval.client.SearchSettings`."""

    url: str | None = placed(None)
    """Of a service that runs already. Null: the run has a search of its own, over `corpus`."""
    corpus: str | None = None
    """JSONL that an actor of the run searches in: each line `id` and `contents`, see `raysys.retrieval`."""
    topk: PositiveInt = 3
    """Documents that a search shows."""
    candidates: PositiveInt = 20
    """Of these a service with a reranker chooses."""
    document_chars: PositiveInt = 1200
    """A longer document is cut."""
    timeout: PositiveFloat = placed(10.0)
    """Seconds of one request."""
    retries: NonNegativeInt = placed(5)
    deadline: PositiveFloat = placed(600.0)
    """Seconds that episodes wait for a service that is away before they fail."""
    gather: NonNegativeFloat = placed(0.003)
    """Seconds that a query waits for others to share a request."""


class QuestionFiles(Config):
    """Published question sets; see `raysys.data.questions`."""

    train: list[str]
    test: list[str]
    kind: Literal["auto", "hotpotqa", "2wiki", "musique", "flashrag"] = "auto"


class QuestionWorld(Config):
    """A generated world of two-hop questions; see `raysys.data.world`."""

    documents: PositiveInt = 800
    questions: PositiveInt = 2400
    style: Literal["prose", "short"] = "prose"
    kinds: list[str] = []
    """Some of `raysys.data.world.KINDS`; none: all."""


class QuestionsConfig(Run):
    """`jobs/questions.py`: a search agent's `train.jsonl`, `test.jsonl` and `corpus.jsonl`; of a world `transcripts.jsonl` too."""

    world: QuestionWorld | None = None
    files: QuestionFiles | None = None
    """The corpus is what their contexts hold."""
    instruction: str | None = None
    """What a prompt says before its question. Null: `raysys.data.questions.INSTRUCTION`."""
    messages: bool = True
    """Prompts are chat messages; false: texts, for models without a chat template."""
    transcripts: NonNegativeInt = 0
    """Correct episodes of training questions, for `jobs/sft.py`."""
    exchanged: bool = False
    """Of transcripts: other names in the place of all names; see `raysys.data.world.transcripts`."""
    opener: bool = True
    """Of transcripts: see `SearchAgentConfig`."""
    topk: PositiveInt = 3
    """Documents that a search shows in transcripts."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.world is None) == (self.files is None):
            raise ValueError("give world (a generated one) or files (question sets), one of them")
        if self.files is not None and self.transcripts:
            raise ValueError("transcripts are made of a generated world only; set transcripts=0")
        return self


class SearchRollout(Rollout):
    """Rollouts of episodes: each turn begins with all that was said before."""

    prefix_caching: bool = placed(True)

    @model_validator(mode="before")
    @classmethod
    def _kept(cls, values: Any) -> Any:
        """`kv_cache=keep` goes without the default."""
        return {"prefix_caching": False} | values if isinstance(values, dict) and values.get("kv_cache") == "keep" else values


class SearchAgentConfig(Run):
    """`jobs/search_agent.py`: GRPO on multi-turn search, with calibrated advantages. Paper: arXiv 2604.18235."""

    student: str
    """Hugging Face folder or id."""
    data: Data
    """Questions; `answer` is a text, or a JSON list of accepted texts."""
    search: Search
    steps: PositiveInt = placed(205)
    batch: PositiveInt = 512
    """Questions a step."""
    samples: int = Field(default=5, ge=2)
    """Episodes a question: its group."""
    max_age: NonNegativeInt = 0
    """Weight versions that an episode may lag behind; 0 is synchronous."""
    advantage: Literal["calibadv", "grpo"] = "calibadv"
    """grpo leaves advantages as they are: no soft penalty, no rebalancing."""
    opener: bool = True
    """Put `<think>` before each generation instead of training on it."""
    soft_penalty: bool = True
    """Make negative advantages of search steps smaller by their correctness."""
    rebalance: PositiveFloat | None = 1.0
    """Positive mass on answers, in units of the negative; null: as it is."""
    step_scores: Literal["code", "paper"] = "code"
    """How a search step's correctness is measured."""
    stop_on_collapse: bool = placed(True)
    """End the run when F1, entropy or perplexity say that training has collapsed."""
    generations: PositiveInt = 5
    """Of an episode: one less than these may search."""
    turn_tokens: PositiveInt = 1024
    """Of one generation."""
    max_prompt_tokens: PositiveInt = 2048
    max_response_tokens: PositiveInt = 14336
    """Of an episode, what the service said included."""
    learning_rate: PositiveFloat = 5e-7
    clip_low: float = Field(default=0.2, ge=0)
    clip_high: float = Field(default=0.2, ge=0)
    importance_cap: PositiveFloat = 5.0
    rollout: SearchRollout = SearchRollout()
    trainer: Trainer = Trainer()
    weights: Weights = Weights()
    evaluation: EvaluationPart | None = None
    evaluate_every: PositiveInt | None = None
    checkpoint_every: PositiveInt = placed(10)
    keep_checkpoints: PositiveInt = placed(2)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.evaluate_every is not None and self.evaluation is None:
            raise ValueError("evaluate_every is set but evaluation is not; give evaluation.data")
        self.rollout.check(evaluates=False)
        self.trainer.check(self.batch * self.samples, self.steps)
        if (self.search.url is None) == (self.search.corpus is None):
            raise ValueError("set search.url (of a service that runs) or search.corpus (a file to search in), one of them")
        self.weights.check(colocate=False)
        return self
