"""What a sample of several turns plays against: a small protocol, so that users bring their own tools. Imports nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Reply:
    """What an environment says to a generation. `record` is kept with the sample: JSON-able."""

    observation: str = ""
    """Read by the model, never trained on."""
    done: bool = False
    record: dict[str, Any] = field(default_factory=dict)


class Environment(Protocol):
    """The world of one episode. Errors of `raysys.errors`: an InfrastructureError lets another worker try, any other is the row's own."""

    async def reset(self, prompt_id: str, metadata: str) -> str:
        """The observation that comes before the first generation; "" for none."""
        ...

    async def step(self, text: str, last: bool) -> Reply:
        """Acts on what was generated, stop string included. `last`: there will be no further generation, so nothing need be fetched."""
        ...


class Environments(Protocol):
    """Makes the environments of one worker. Travels pickled, so connections are made in `open`."""

    @property
    def stops(self) -> Sequence[str]:
        """Strings that end a generation; they are part of it."""
        ...

    async def open(self) -> None: ...
    def new(self) -> Environment: ...
    async def close(self) -> None: ...


@dataclass(frozen=True)
class EpisodeSpec:
    """What a worker needs for episodes."""

    environments: Environments
    generations: int
    """At most, of one episode."""
    turn_tokens: int
    """At most, of one generation."""
