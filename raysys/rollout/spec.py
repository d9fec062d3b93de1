"""What crosses between the rollout pool and its workers. Imports neither torch, Ray nor vLLM."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

from raysys.batch import Batch
from raysys.buckets import Bucket, Plan
from raysys.config.parts import Rollout
from raysys.rollout.environment import EpisodeSpec


class Receiver(Protocol):
    """The weights room's side of a worker: how an engine takes new weights. Handed in, so that rollout knows no transport."""

    def engine_arguments(self) -> dict[str, Any]: ...
    async def ready(self, engine: Any, model: str) -> None: ...
    async def check(self, engine: Any, plan: Plan) -> None: ...
    async def begin(self, engine: Any, plan: Plan) -> None: ...
    async def update(self, engine: Any, bucket: Bucket) -> None: ...
    async def finish(self, engine: Any, version: int) -> list[str]: ...
    async def differing(self, engine: Any, bucket: Bucket) -> list[str]: ...
    def where(self, bucket: Bucket) -> str: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class RolloutSpec:
    """What one worker is built from."""

    model: str
    """Hugging Face folder or id."""
    device: str
    """"cpu" or "gpu"."""
    dtype: str
    max_model_len: int
    """Prompt and response together, in tokens."""
    config: Rollout
    receiver: type[Receiver] | None = None
    sleeps: bool = False
    """The engine shares its GPU and must be able to give it up."""
    episodes: EpisodeSpec | None = None
    """Samples are episodes of several turns; None: of one."""
    log_dir: str | None = None
    """Folder for the engine's own chatter (`rollout-<rank>.log`); None leaves it in Ray's worker log."""


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. `seed` is the run's; each sample's own seed comes from it, the prompt's id and the sample's index."""

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    greedy: bool = False

    def seed_of(self, prompt_id: str, sample: int) -> int:
        """Depends on neither the worker nor the moment nor the other rows."""
        text = f"{self.seed}/{prompt_id}/{sample}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "big")


@dataclass(frozen=True)
class Failure:
    """A sample that a worker could not draw. `retry`: the worker's fault, so another may succeed; else the row's own."""

    ticket: int
    cause: str
    retry: bool


@dataclass(frozen=True)
class Harvest:
    """What a worker has to say: finished samples and how it is. It comes at least every heartbeat, finished samples or not."""

    tickets: tuple[int, ...] = ()
    rows: Batch | None = None
    """`RESPONSE_COLUMNS` of `tickets`, in their order."""
    failures: tuple[Failure, ...] = ()
    version: int = 0
    running: int = 0
    tokens: int = 0
    """Response tokens since the start."""
    busy: float = 0.0
    """Seconds since the start in which something was running."""
    away: float = 0.0
    """Seconds that samples finished since the start had no use for the engine, summed: their tools were at work."""
    broken: str = ""
    """Why this worker will never answer again; "" while it is well."""


RESPONSE_COLUMNS = ("response_ids", "rollout_logprobs", "version_spans", "stop_reason")
"""What a worker adds to a row."""
EPISODE_COLUMNS = ("runs", "episode")
"""And to one that is an episode."""


def response_columns(rows: Batch) -> tuple[str, ...]:
    """Those that these rows have."""
    return tuple(name for name in (*RESPONSE_COLUMNS, *EPISODE_COLUMNS) if name in rows)
