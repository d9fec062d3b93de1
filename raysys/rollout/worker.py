"""A rollout worker: one vLLM engine in a Ray actor. Tokens in, tokens out; one coroutine a trajectory."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from raysys import memory
from raysys.buckets import Bucket, Plan
from raysys.errors import DataError, InfrastructureError, RaysysError, WeightSyncError
from raysys.processes import imports
from raysys.rollout.engine import chatter_to, children, contents, end, engine_arguments, revision, stop_ids, tie_core
from raysys.rollout.episodes import Episode, TokenizerCodec
from raysys.rollout.serving import Asked, Response, Seat, Serving
from raysys.rollout.spec import RolloutSpec, Sampling

_UNFINISHED = "an update was begun and not finished"


class RolloutWorker(Serving):
    """Runs an `AsyncLLM`. All methods are coroutines; an actor of it answers several at once.

    The environment of `environment(spec)` must be set before the process imports vLLM.
    """

    def __init__(self, spec: RolloutSpec, rank: int = 0):
        super().__init__(spec.config.max_sequences)
        self._spec, self._rank = spec, rank
        self._engine: Any = None
        self._receiver = spec.receiver() if spec.receiver is not None else None
        self._requests, self._inside, self._paused = 0, 0, False
        self._gate = asyncio.Event()
        self._gate.set()
        self._quarantined, self._log = "", ""
        self._processes: dict[int, float] = {}
        self._stops = stop_ids(spec.model)
        self._codec: Any = None

    async def start(self) -> dict[str, Any]:
        """Builds the engine and warms it. Returns versions that every worker of a pool must share.

        Raises:
            InfrastructureError: the engine did not start; names its log.
            ConfigError: what is asked for cannot work on this device.
        """
        self._log = chatter_to(self._spec.log_dir, self._rank)
        with imports():
            import vllm
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

        arguments = engine_arguments(self._spec) | (self._receiver.engine_arguments() if self._receiver is not None else {})
        with self._ours("could not start its engine", InfrastructureError):
            tie_core()
            self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
            self._processes = children()
            if self._receiver is not None:
                await self._receiver.ready(self._engine, self._spec.model)
            if self._spec.episodes is not None:
                self._codec = TokenizerCodec(self._spec.model, self._stops)
                await self._spec.episodes.environments.open()
            await self.probe([3, 4])  # the first call compiles and allocates
        # Outputs come as many small objects; without this each full collection walks all that torch and vLLM ever made.
        gc.collect()
        gc.freeze()
        cache = self._engine.vllm_config.cache_config
        return {
            "vllm": vllm.__version__,
            "model": self._spec.model,
            "revision": f"{revision(self._spec.model)}-{contents(self._spec.model)}",
            "pid": os.getpid(),
            "vocabulary": int(self._engine.model_config.get_vocab_size()),
            "memory": memory.whose(),
            "kv_tokens": int(cache.num_gpu_blocks * cache.block_size),
        }

    async def limits(self) -> dict[str, int]:
        """`vocabulary` (ids) and `length` (tokens) of a sequence that `probe` can take."""
        return {"vocabulary": int(self._engine.model_config.get_vocab_size()), "length": self._spec.max_model_len - 1}

    async def play(self, asked: Asked, sampling: Sampling, seed: int, seat: Seat) -> Response:
        episodes = self._spec.episodes
        if episodes is None:
            return await self.respond(asked.ids, sampling, seed)

        async def generate(ids: list[int], tokens: int, own: int) -> Response:
            return await self.respond(np.array(ids), replace(sampling, max_tokens=tokens), own, episodes.environments.stops)

        episode = Episode(episodes, generate, self._codec, seat.away)
        room = min(sampling.max_tokens, self._spec.max_model_len - len(asked.ids))
        return await episode.run(asked.ids.tolist(), asked.prompt_id, asked.metadata, room, seed)

    async def respond(self, ids: np.ndarray, sampling: Sampling, seed: int, stops: Sequence[str] = ()) -> Response:
        """One generation: ids with what stopped it, log-probs of the distribution that was sampled from, version spans, stop reason.

        Raises:
            DataError: the prompt leaves no room for a response.
            InfrastructureError: the engine died, or ended the request for a reason of its own.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        room = self._spec.max_model_len - len(ids)
        if room < 1 or not len(ids):
            raise DataError(f"a prompt of {len(ids)} tokens, the engine's window is {self._spec.max_model_len}")
        params = SamplingParams(
            temperature=0.0 if sampling.greedy else sampling.temperature,
            top_p=1.0 if sampling.greedy else sampling.top_p,
            seed=None if sampling.greedy else seed,
            max_tokens=min(sampling.max_tokens, room),
            stop_token_ids=self._stops,
            ignore_eos=True,  # `stop_token_ids` has them all
            logprobs=0,
            stop=list(stops) or None,
            include_stop_str_in_output=bool(stops),
            detokenize=bool(stops),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        while not self._gate.is_set():
            await self._gate.wait()  # a request that enters an engine in the middle of an update kills it
        self._inside += 1
        try:
            with self._ours("could not generate", InfrastructureError):
                output = (await self._request(ids, params)).outputs[0]
        finally:
            self._inside -= 1
        if output.finish_reason not in ("stop", "length"):
            raise InfrastructureError(f"rollout worker {self._rank}: the engine ended a request with '{output.finish_reason}'")
        tokens = list(output.token_ids)
        logprobs = [position[token].logprob for position, token in zip(output.logprobs, tokens, strict=True)]
        return Response(tokens, logprobs, self._spans(output.weight_versions), output.finish_reason)

    def _spans(self, found: Any) -> list[int]:
        """vLLM's spans as flat pairs; an engine that never got a push has no number for its weights."""
        return [number for span in found or () for number in (span.start, int(span.version) if span.version.isdigit() else 0)] or [0, 0]

    async def alive(self) -> None:
        if self._gate.is_set():
            with self._ours("does not answer", InfrastructureError):
                await self._engine.get_weight_version()

    def refusal(self, version: int) -> str:
        """An update that goes on is no reason: what comes meanwhile waits at the gate."""
        if self._quarantined and self._quarantined != _UNFINISHED:
            return f"rollout worker {self._rank} does not generate: {self._quarantined}"
        return super().refusal(version)

    async def _request(self, ids: Any, params: Any) -> Any:
        self._requests += 1
        prompt, name = {"prompt_token_ids": [int(token) for token in ids]}, f"r{self._requests}"
        final = None
        async for output in self._engine.generate(prompt, params, name):
            final = output
        return final

    async def probe(self, ids: list[int]) -> np.ndarray:
        """Log-probs of ids[1:] given what precedes each, float32, temperature 1: the engine's half of the parity probe."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        with self._ours("could not probe", InfrastructureError):
            found = (await self._request(ids, params)).prompt_logprobs
        return np.array([found[i][token].logprob for i, token in enumerate(ids) if i > 0], np.float32)

    # -- weights

    async def join(self, address: str, port: int, first_rank: int, world_size: int) -> None:
        """Joins a broadcast group whose rank 0 is the trainer; only for receivers that have one."""
        receiver: Any = self._receiver
        with self._ours("could not join the trainer's group", WeightSyncError):
            await receiver.join(self._engine, address, port, first_rank, world_size)

    async def begin_update(self, plan: Plan) -> None:
        """Opens an update. Samples in progress are frozen and go on when it is closed, with the new weights.

        Raises WeightSyncError for a name, shape or dtype that the model does not have; nothing is touched then.
        """
        assert self._receiver is not None
        with self._ours("could not begin an update", WeightSyncError):
            await self._receiver.check(self._engine, plan)
            self._quarantined = _UNFINISHED
            self._gate.clear()
            if self._inside and not self._paused:
                self._paused = True
                await self._engine.pause_generation(mode="keep", clear_cache=self._spec.config.kv_cache == "recompute")
            await self._receiver.begin(self._engine, plan)

    async def update(self, bucket: Bucket) -> None:
        """Takes one bucket. Raises BucketError with the digests of its tensors, if its bytes are not those that left."""
        assert self._receiver is not None
        if self._quarantined != _UNFINISHED:
            raise WeightSyncError(f"rollout worker {self._rank} is in no update: {self._quarantined or 'none was begun'}")
        try:
            with self._ours(f"could not load {self._receiver.where(bucket)}", WeightSyncError):
                await self._receiver.update(self._engine, bucket)
        except RaysysError as error:
            self._quarantined = error.message
            raise

    async def finish_update(self, version: int) -> list[str]:
        """Closes the update; the weights are `version` now. Returns the digest of each bucket as it arrived."""
        assert self._receiver is not None
        with self._ours("could not finish an update", WeightSyncError):
            digests = await self._receiver.finish(self._engine, version)
            if self._paused:
                await self._engine.resume_generation()
            elif self._spec.config.prefix_caching:
                await self._engine.reset_prefix_cache()
        self._version, self._quarantined, self._paused = version, "", False
        self._gate.set()
        return digests

    async def differing(self, bucket: Bucket) -> list[str]:
        """Names in this bucket whose copy in the engine can be read back and is not equal."""
        assert self._receiver is not None
        with self._ours("could not read weights back", WeightSyncError):
            return await self._receiver.differing(self._engine, bucket)

    async def sleep(self) -> None:
        """Frees the GPU: weights and KV cache are given up, the next push brings weights anew. On CPU nothing happens."""
        if self._spec.device == "gpu":
            with self._ours("could not fall asleep", InfrastructureError):
                await self._engine.sleep(level=2)

    async def wake(self) -> None:
        """Takes the GPU again. What the weights hold then is nothing until a push is complete."""
        if self._spec.device == "gpu":
            with self._ours("could not wake up", InfrastructureError):
                await self._engine.wake_up()

    async def quarantine(self, reason: str) -> None:
        """Refuses to generate until a whole update has come: the weights are not those that they should be."""
        self._quarantined = reason

    async def close(self) -> None:
        if self._codec is not None and self._spec.episodes is not None:
            await self._spec.episodes.environments.close()
        if self._receiver is not None:
            self._receiver.close()
        if self._engine is not None:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(asyncio.to_thread(self._engine.shutdown, 1.0), 3.0)
        end(self._processes)
        self._engine = None

    @contextlib.contextmanager
    def _ours(self, what: str, kind: type[RaysysError]) -> Iterator[None]:
        """vLLM raises what it likes, and an error of its own, unpickled elsewhere, would import vLLM there."""
        try:
            yield
        except RaysysError:
            raise
        except Exception as error:
            cause = _root(error)
            if "EngineDeadError" in cause:
                self._broken = self._broken or "its engine process died"
                kind = InfrastructureError
            raise kind(f"rollout worker {self._rank} {what}: {cause}", self._hint(cause)) from None

    def _hint(self, cause: str) -> str:
        hints = [f"see {self._log}"] if self._log else []
        if "memory" in cause.lower():
            size = f"kv_cache_mib={self._spec.config.kv_cache_mib}" if self._spec.device == "cpu" else "gpu_memory_utilization"
            hints.append(f"rollout.{size}, max_prompt_tokens and max_response_tokens decide its memory")
        return "; ".join(hints)


def _root(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"
