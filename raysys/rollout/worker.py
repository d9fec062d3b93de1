"""A rollout worker: one vLLM engine in a Ray actor. Tokens in, tokens out; one coroutine a trajectory."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from raysys.batch import Batch, Bucket, Ragged
from raysys.errors import ConfigError, InfrastructureError, RaysysError, WeightSyncError
from raysys.rollout.spec import Manifest, RolloutSpec, Sampling

_UNFINISHED = "an update was begun and not finished"


class RolloutWorker:
    """Runs an `AsyncLLM`. All methods are coroutines; an actor of it answers several at once.

    The environment of `environment(spec)` must be set before the process imports vLLM.
    """

    def __init__(self, spec: RolloutSpec, rank: int = 0):
        self._spec, self._rank = spec, rank
        self._engine: Any = None
        self._receiver = spec.receiver() if spec.receiver is not None else None
        self._version, self._running, self._requests = 0, 0, 0
        self._quarantined, self._log = "", ""
        self._processes: dict[int, float] = {}
        self._stops = stop_ids(spec.model)

    async def start(self) -> dict[str, Any]:
        """Builds the engine and warms it. Returns versions that every worker of a pool must share.

        Raises:
            InfrastructureError: the engine did not start; names its log.
            ConfigError: what is asked for cannot work on this device.
        """
        self._log = _chatter_to(self._spec.log_dir, self._rank)
        import vllm
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = engine_arguments(self._spec) | (self._receiver.engine_arguments() if self._receiver is not None else {})
        with self._ours("could not start its engine", InfrastructureError):
            self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
            self._processes = _children()
            if self._receiver is not None:
                await self._receiver.ready(self._engine, self._spec.model)
            await self.probe([3, 4])  # the first call compiles and allocates
        # Outputs come as many small objects; without this each full collection walks all that torch and vLLM ever made.
        gc.collect()
        gc.freeze()
        return {"vllm": vllm.__version__, "model": self._spec.model, "pid": os.getpid()}

    async def limits(self) -> dict[str, int]:
        """`vocabulary` (ids) and `length` (tokens) of a sequence that `probe` can take."""
        return {"vocabulary": int(self._engine.model_config.get_vocab_size()), "length": self._spec.max_model_len - 1}

    async def generate(self, prompts: Batch, sampling: Sampling) -> Batch:
        """One response a row, same row order.

        Returns:
            The rows with `response_ids` (the stop token included), `rollout_logprobs` (of the distribution that was sampled from),
            `version_spans`, `stop_reason`.

        Raises:
            WeightSyncError: the last weight update failed half-way.
            InfrastructureError: the engine died.
        """
        if self._quarantined:
            raise WeightSyncError(
                f"rollout worker {self._rank} does not generate: {self._quarantined}", "a whole push makes it usable again"
            )
        rows = zip(prompts.ragged("prompt_ids").rows(), prompts.strings("prompt_id"), prompts.numbers("sample"), strict=True)
        self._running += 1
        try:
            with self._ours("could not generate", InfrastructureError):
                results = await _all(self._respond(ids, sampling, sampling.seed_of(prompt, int(sample))) for ids, prompt, sample in rows)
        finally:
            self._running -= 1
        return prompts.with_columns(
            response_ids=Ragged.of([ids for ids, _, _ in results], np.int32),
            rollout_logprobs=Ragged.of([logprobs for _, logprobs, _ in results], np.float32),
            version_spans=Ragged.of([[0, self._version]] * len(results), np.int32),
            stop_reason=[reason for _, _, reason in results],
        )

    async def _respond(self, prompt_ids: np.ndarray, sampling: Sampling, seed: int) -> tuple[list[int], list[float], str]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        room = self._spec.max_model_len - len(prompt_ids)
        params = SamplingParams(
            temperature=0.0 if sampling.greedy else sampling.temperature,
            top_p=1.0 if sampling.greedy else sampling.top_p,
            seed=None if sampling.greedy else seed,
            max_tokens=min(sampling.max_tokens, room),
            stop_token_ids=self._stops,
            ignore_eos=True,  # `stop_token_ids` has them all
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = (await self._request(prompt_ids, params)).outputs[0]
        if output.finish_reason not in ("stop", "length"):
            raise InfrastructureError(f"rollout worker {self._rank}: the engine ended a request with '{output.finish_reason}'")
        ids = list(output.token_ids)
        logprobs = [position[token].logprob for position, token in zip(output.logprobs, ids, strict=True)]
        return ids, logprobs, output.finish_reason

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

    async def begin_update(self, manifest: Manifest) -> None:
        """Opens an update. Raises WeightSyncError for a name, shape or dtype that the model does not have; nothing is swapped then."""
        assert self._receiver is not None
        if self._running:
            raise WeightSyncError(f"rollout worker {self._rank} has {self._running} batches running", "push between batches")
        with self._ours("could not begin an update", WeightSyncError):
            await self._receiver.check(self._engine, manifest)
            self._quarantined = _UNFINISHED
            await self._receiver.begin(self._engine, manifest)

    async def update(self, bucket: Bucket) -> None:
        """Takes one bucket. Raises WeightSyncError naming the first tensor whose bytes are not those that left."""
        assert self._receiver is not None
        if self._quarantined != _UNFINISHED:
            raise WeightSyncError(f"rollout worker {self._rank} is in no update: {self._quarantined or 'none was begun'}")
        try:
            with self._ours(f"could not load the bucket from {bucket.names[0]} on", WeightSyncError):
                await self._receiver.update(self._engine, bucket)
        except RaysysError as error:
            self._quarantined = error.message
            raise

    async def finish_update(self, version: int) -> dict[str, str]:
        """Closes the update; the weights are `version` now. Returns the digest of each tensor as it arrived."""
        assert self._receiver is not None
        with self._ours("could not finish an update", WeightSyncError):
            digests = await self._receiver.finish(self._engine, version)
            if self._spec.config.prefix_caching:
                await self._engine.reset_prefix_cache()
        self._version, self._quarantined = version, ""
        return digests

    async def differing(self, bucket: Bucket) -> list[str]:
        """Names in this bucket whose copy in the engine can be read back and is not equal."""
        assert self._receiver is not None
        with self._ours("could not read weights back", WeightSyncError):
            return await self._receiver.differing(self._engine, bucket)

    async def quarantine(self, reason: str) -> None:
        """Refuses to generate until a whole update has come: the weights are not those that they should be."""
        self._quarantined = reason

    async def close(self) -> None:
        if self._receiver is not None:
            self._receiver.close()
        if self._engine is not None:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(asyncio.to_thread(self._engine.shutdown, 1.0), 3.0)
        _end(self._processes)
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
            raise kind(f"rollout worker {self._rank} {what}: {cause}", self._hint(cause)) from None

    def _hint(self, cause: str) -> str:
        hints = [f"see {self._log}"] if self._log else []
        if "memory" in cause.lower():
            size = f"kv_cache_mib={self._spec.config.kv_cache_mib}" if self._spec.device == "cpu" else "gpu_memory_utilization"
            hints.append(f"rollout.{size}, max_prompt_tokens and max_response_tokens decide its memory")
        return "; ".join(hints)


async def _all(coroutines: Any) -> list[Any]:
    """Results in order; the first failure cancels the others."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in coroutines]
    return [task.result() for task in tasks]


def _root(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def environment(spec: RolloutSpec) -> dict[str, str]:
    """What the worker's process needs set before vLLM is imported."""
    shared = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if spec.device == "gpu":
        return shared
    threads = str(spec.config.threads)
    # One process for core and worker halves the start; binding threads to cores would fight with the trainer's.
    return shared | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": threads}


def engine_arguments(spec: RolloutSpec) -> dict[str, Any]:
    """Arguments of vLLM's `AsyncEngineArgs`. Raises ConfigError when a sequence cannot fit."""
    config, cpu = spec.config, spec.device == "cpu"
    shared = {
        "model": spec.model,
        "dtype": spec.dtype,
        "max_model_len": spec.max_model_len,
        "max_num_seqs": config.max_sequences,
        "tensor_parallel_size": config.tensor_parallel,
        "enable_prefix_caching": config.prefix_caching,
        "enforce_eager": cpu if config.enforce_eager is None else config.enforce_eager,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "generation_config": "vllm",  # a folder's own top-k or temperature must not shape rollouts
        "seed": 0,
        # Log-probs of the distribution that is sampled from: after temperature and top-p.
        "logprobs_mode": "processed_logprobs",
    }
    if not cpu:
        mp = {"distributed_executor_backend": "mp"} if config.tensor_parallel > 1 else {}
        return shared | mp | {"gpu_memory_utilization": config.gpu_memory_utilization, "max_num_batched_tokens": config.max_batched_tokens}
    if config.tensor_parallel > 1:
        raise ConfigError(f"rollout.tensor_parallel={config.tensor_parallel} needs GPUs", "set it to 1 on CPU")
    return shared | {
        "kv_cache_memory_bytes": config.kv_cache_mib << 20,
        "block_size": 32,
        # A seeded request with a chunked prefill kills the engine on CPU, so a prompt must fit in one batch.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(config.max_batched_tokens, spec.max_model_len),
    }


def stop_ids(model: str) -> list[int]:
    """End-of-sequence ids of a model folder: its generation config's, else its config's. Raises ConfigError when there is none."""
    for name in ("generation_config.json", "config.json"):
        found = _read(model, name).get("eos_token_id")
        if found is not None:
            return [int(one) for one in found] if isinstance(found, list) else [int(found)]
    raise ConfigError(f"{model} names no eos_token_id, so no response would ever end", "add it to the folder's generation_config.json")


def _read(model: str, name: str) -> dict[str, Any]:
    path = Path(model) / name
    if not Path(model).is_dir():
        from huggingface_hub import hf_hub_download

        with contextlib.suppress(OSError):
            path = Path(hf_hub_download(model, name))
    return json.loads(path.read_text()) if path.is_file() else {}


def _chatter_to(folder: str | None, rank: int) -> str:
    """Sends what this process and those of its engine print to a file of the run; returns its path, "" without one."""
    if folder is None:
        return ""
    path = Path(folder) / f"rollout-{rank}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError:
        return ""  # a node that does not share the run's folder keeps its chatter in Ray's log
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    return str(path)


def _children() -> dict[int, float]:
    """The engine's processes: id to start time, which tells a process from a later one with its id."""
    import psutil

    found: dict[int, float] = {}
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if not any("resource_tracker" in part for part in child.cmdline()):  # it cleans up after the others
                found[child.pid] = child.create_time()
    return found


def _end(processes: dict[int, float]) -> None:
    """A stopped engine answers no request to leave, and would outlive its actor."""
    import psutil

    for pid, began in processes.items():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if psutil.Process(pid).create_time() == began:
                os.kill(pid, signal.SIGKILL)
