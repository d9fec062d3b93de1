"""Episodes of several turns: generate until a stop, let an environment answer, go on with the same ids. Imports neither torch nor vLLM.

An episode is a coroutine: while one waits for its environment, others generate; nobody waits for everybody between turns. What was sampled
stays as it was sampled: text is decoded for the environment only, and only what that says is turned into tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from raysys.rollout.environment import EpisodeSpec
from raysys.rollout.serving import Response

Generate = Callable[[list[int], int, int], Awaitable[Response]]
"""(ids so far, tokens at most, seed) to one generation."""


class Codec(Protocol):
    """What an episode needs of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class TokenizerCodec:
    """A Hugging Face folder's tokenizer. Text keeps special tokens, but for the stop token at its end."""

    def __init__(self, folder: str, stops: Sequence[int]):
        from transformers import AutoTokenizer

        self._tokenizer, self._stops = AutoTokenizer.from_pretrained(folder), frozenset(stops)

    def encode(self, text: str) -> list[int]:
        """What an environment says are words: control tokens spelled out in it stay letters."""
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: Sequence[int]) -> str:
        whole = ids[:-1] if len(ids) and ids[-1] in self._stops else ids
        return str(self._tokenizer.decode(list(whole), skip_special_tokens=False))


class Episode:
    """One sample of several turns.

    Args:
        generate: the engine.
        codec: between its ids and the environment's text.
        away: held while the environment is at work; gives the engine's seat to others.
    """

    def __init__(self, spec: EpisodeSpec, generate: Generate, codec: Codec, away: Callable[[], AbstractAsyncContextManager[Any]]):
        self._spec, self._generate, self._codec, self._away = spec, generate, codec, away
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.runs: list[int] = []
        """Of each response token: the generation that it is of, -1 for what the environment said."""
        self.spans: list[int] = []
        self.records: list[dict[str, Any]] = []

    async def run(self, prompt: list[int], prompt_id: str, metadata: str, tokens: int, seed: int) -> Response:
        """Plays to the end. `tokens`: of the response, observations included.

        Its reason is "stop" where the environment ended it, "length" where there was no room, or no generation left.
        """
        environment = self._spec.environments.new()
        async with self._away():
            opening = await environment.reset(prompt_id, metadata)
        reason = "stop" if self._observe(opening, tokens) else "length"
        for turn in range(self._spec.generations if reason == "stop" else 0):
            room = min(self._spec.turn_tokens, tokens - len(self.ids))
            made = await self._generate(prompt + self.ids, room, seed_of(seed, turn))
            self._add(made, turn)
            last = turn + 1 == self._spec.generations or len(self.ids) >= tokens
            async with self._away():
                reply = await environment.step(self._codec.decode(made.ids), last)
            self.records.append({"tokens": [len(self.ids) - len(made.ids), len(self.ids)], "stop": made.reason, **reply.record})
            if reply.done:
                self._observe(reply.observation, tokens, end=True)
                break
            if last or not self._observe(reply.observation, tokens):
                reason = "length"
                break
        record = json.dumps({"turns": self.records}, ensure_ascii=False)
        return Response(self.ids, self.logprobs, self.spans or [0, 0], reason, self.runs, record)

    def _add(self, made: Response, turn: int) -> None:
        start = len(self.ids)
        for place, version in zip(made.spans[::2], made.spans[1::2], strict=True):
            if not self.spans or self.spans[-1] != version:
                # What the environment said before the first generation was read with that one's weights.
                self.spans += [start + place if self.spans else 0, version]
        self.ids += made.ids
        self.logprobs += made.logprobs
        self.runs += [turn] * len(made.ids)

    def _observe(self, text: str, tokens: int, end: bool = False) -> bool:
        """Appends what the environment said. False, and nothing is appended, where it leaves no room to answer (with `end`: to be read)."""
        ids = self._codec.encode(text) if text else []
        if len(self.ids) + len(ids) + (0 if end else 1) > tokens:
            return False
        self.ids += ids
        self.logprobs += [0.0] * len(ids)
        self.runs += [-1] * len(ids)
        return True


def seed_of(seed: int, turn: int) -> int:
    """A generation's own: the first one's is the sample's."""
    if not turn:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{turn}".encode(), digest_size=6).digest(), "big")
