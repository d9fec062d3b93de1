"""A teacher's engine in an actor of Ray Data: takes shards, answers their prompts, publishes them.

The engine is the rollout room's. Several shards are with it at once, so that its seats stay full while the last answers of one are
waited for. An engine that dies or hangs is replaced here; an actor that dies is started again by Ray Data, and its shards come again.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raysys.config.parts import Deadlines
from raysys.data.rows import BadRow, Row
from raysys.data.stream import encoder_for
from raysys.data.text import Decoder, Encoded, Encoder
from raysys.errors import DeadlineError, InfrastructureError, RaysysError
from raysys.generation.answers import Answer, Record, plain, sift, table, told
from raysys.generation.books import publish
from raysys.generation.shards import Prompts, Shard
from raysys.rollout.serving import Response
from raysys.rollout.spec import RolloutSpec, Sampling
from raysys.rollout.worker import RolloutWorker
from raysys.scoring.verifiers import score

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0


@dataclass(frozen=True)
class Work:
    """What an actor is built from: one teacher's part of a run."""

    folder: Path
    """The run's."""
    beats: Path
    """Folder for its actors' signs of life."""
    teacher: str
    spec: RolloutSpec
    sampling: Sampling
    samples: int
    keep: str
    prompts: Prompts
    shards: Mapping[int, Shard]
    max_prompt_tokens: int
    max_response_tokens: int
    retries: int
    deadlines: Deadlines
    engine: Callable[[RolloutSpec, int], Any] = RolloutWorker


class Teacher:
    """A batch of shard numbers in, for each its record out, or the error of ours that ended it. Called from several threads."""

    def __init__(self, work: Work):
        self._work = work
        self._encoder: Encoder | None = None
        self._decoder: Decoder | None = None
        self._reading = threading.Lock()  # tasks' generators and scorers are not made for threads
        self._engine = Engine(work)
        self._loop = asyncio.new_event_loop()
        # The engine's process ends with the thread that started it, so this one must last.
        threading.Thread(target=self._loop.run_forever, name="teacher", daemon=True).start()
        self._beat = asyncio.run_coroutine_threadsafe(self._engine.beat(), self._loop)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        results = np.empty(len(batch["shard"]), dtype=object)
        for place, number in enumerate(batch["shard"]):
            try:
                result: Record | RaysysError = self.answer(self._work.shards[int(number)])
            except RaysysError as error:  # as a value: what Ray Data makes of an exception hides whose it is
                result = error
            results[place] = told(result)
        return {"shard": batch["shard"], "result": results}

    def answer(self, shard: Shard) -> Record:
        """Answers a shard and publishes it.

        Raises:
            DataError: a row that cannot be: unknown tag, damaged file.
            InfrastructureError: an answer could not be drawn in `rollout.retries` further tries, or no engine starts.
            CheckpointError: the shard could not be written.
        """
        began = time.monotonic()
        work, record = self._work, Record(shard.name)
        with self._reading:
            prompts = self._read(shard, record)
        if prompts:
            asyncio.run_coroutine_threadsafe(self._engine.up(), self._loop).result()
        record.waited = time.monotonic() - began
        began, before = time.monotonic(), self._engine.tokens
        asked = [(row, ids, sample) for row, ids in prompts for sample in range(work.samples)]
        drawn = self._engine.respond([(row.id, sample, ids) for row, ids, sample in asked])
        responses = asyncio.run_coroutine_threadsafe(drawn, self._loop).result()  # each answer in it has a deadline of its own
        record.rate = (self._engine.tokens - before) / max(1e-6, time.monotonic() - began)
        with self._reading:
            answers = self._judged([(row, sample) for row, _, sample in asked], responses)
            kept = sift(answers, work.keep, record, lambda row: plain(row.prompt))
        record.seconds = time.monotonic() - began
        publish(work.folder, table(kept, self._text().identity), record)
        return record

    def _read(self, shard: Shard, record: Record) -> list[tuple[Row, list[int]]]:
        """The shard's usable rows and what the teacher reads of each."""
        found = self._work.prompts.read(shard)
        record.seen = len(found)
        encoded = iter(self._encode([row for _, row in found if isinstance(row, Row)]))
        prompts = []
        for where, row in found:
            result = self._fitted(next(encoded)) if isinstance(row, Row) else row
            if isinstance(row, Row) and isinstance(result, list):
                prompts.append((row, result))
                continue
            record.bad += 1
            reason = str(result).partition(":")[0]
            record.reasons[reason] = record.reasons.get(reason, 0) + 1
            record.examples.append(f"{where}: {result}")
        del record.examples[20:]
        return prompts

    def _encode(self, rows: list[Row]) -> list[Encoded | BadRow]:
        work = self._work
        if self._encoder is None:
            self._encoder = encoder_for(work.prompts.data, work.teacher, work.max_prompt_tokens, work.max_response_tokens, supervised=False)
        return self._encoder.encode(rows)

    def _fitted(self, encoded: Encoded | BadRow) -> list[int] | BadRow:
        if isinstance(encoded, BadRow):
            return encoded
        ids = encoded.prompt if encoded.teacher is None else encoded.teacher
        if len(ids) > self._work.max_prompt_tokens:
            return BadRow(f"prompt with context too long: {len(ids)} tokens, max_prompt_tokens is {self._work.max_prompt_tokens}")
        return ids

    def _judged(self, asked: list[tuple[Row, int]], responses: list[Response]) -> list[Answer]:
        texts = self._text().texts([response.ids for response in responses])
        answers = []
        for (row, sample), response, text in zip(asked, responses, texts, strict=True):
            value = score(row.verifier, text, row.answer, row.metadata) if row.verifier else None
            answers.append(Answer(row, sample, response.ids, text, response.reason == "stop", value))
        return answers

    def _text(self) -> Decoder:
        if self._decoder is None:
            self._decoder = Decoder(self._work.teacher)
        return self._decoder


class Engine:
    """The engine and its replacements. All coroutines run in one loop; a teacher that has nothing to answer starts none."""

    def __init__(self, work: Work):
        self._work = work
        self._seats = asyncio.Semaphore(work.spec.config.max_sequences)
        self._changing = asyncio.Lock()
        self._worker: Any = None
        self._state, self._beats = "idle", 0
        self.running = self.finished = self.tokens = self.lost = 0

    async def respond(self, asked: list[tuple[str, int, list[int]]]) -> list[Response]:
        """One response to each (prompt id, sample, ids), in order. Raises what the first that cannot be drawn raises."""
        tasks = [asyncio.create_task(self._drawn(*one)) for one in asked]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _drawn(self, prompt: str, sample: int, ids: list[int]) -> Response:
        seed, limit, causes = self._work.sampling.seed_of(prompt, sample), self._work.deadlines.generate, []
        async with self._seats:
            self.running += 1
            try:
                for _ in range(self._work.retries + 1):
                    worker = await self.up()
                    try:
                        response = await asyncio.wait_for(worker.respond(np.asarray(ids), self._work.sampling, seed), limit)
                    except TimeoutError:
                        causes.append(f"no answer in {limit:g} s (deadlines.generate)")
                    except InfrastructureError as error:
                        causes.append(error.message)
                    else:
                        self.finished, self.tokens = self.finished + 1, self.tokens + len(response.ids)
                        return response
                    await self._lose(worker, causes[-1])
            finally:
                self.running -= 1
        told = "; then ".join(dict.fromkeys(causes))
        raise InfrastructureError(f"sample {prompt}/{sample} could not be drawn: {told}", "rollout.retries sets how often it is tried")

    async def up(self) -> Any:
        """The engine that is up, or a new one. All that wait for it start only one."""
        async with self._changing:
            if self._worker is None:
                self._state = "starting"
                self._show()  # building it holds up this loop
                worker, limit = self._work.engine(self._work.spec, os.getpid()), self._work.deadlines.start
                try:
                    await asyncio.wait_for(worker.start(), limit)
                except BaseException as error:
                    self._state = "idle"
                    await worker.close()
                    if isinstance(error, TimeoutError):
                        raise DeadlineError(f"the engine of {self._work.teacher}", "start", limit, "deadlines.start") from None
                    raise
                self._worker, self._state = worker, "generating"
            return self._worker

    async def _lose(self, worker: Any, cause: str) -> None:
        """Ends an engine that failed one of its requests. The others of it fail, too, and come again."""
        async with self._changing:
            if worker is self._worker:
                log.warning("the engine of %s is lost: %s; %d samples come again", self._work.teacher, cause, self.running)
                self._worker, self._state, self.lost = None, "idle", self.lost + 1
                await worker.close()

    # -- what the driver sees

    async def beat(self) -> None:
        """Shows the driver that this loop goes round, for as long as it does."""
        while True:
            self._show()
            await asyncio.sleep(BEAT_SECONDS)

    def _show(self) -> None:
        self._beats += 1
        facts = {"state": self._state, "running": self.running, "finished": self.finished, "tokens": self.tokens, "lost": self.lost}
        draft = self._file.with_name(f".{self._file.name}")
        try:
            draft.write_text(json.dumps(facts | {"beats": self._beats, "pid": os.getpid()}))
            os.replace(draft, self._file)
        except OSError:  # a full disk is told where a shard is written
            return

    @functools.cached_property
    def _file(self) -> Path:
        """The same for all lives of an actor."""
        import ray

        name = ray.get_runtime_context().get_actor_id() if ray.is_initialized() else None
        return self._work.beats / f"{name or os.getpid()}.json"
