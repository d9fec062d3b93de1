"""What a vLLM engine is started with, and what has to be cleaned up after it. Imports vLLM only where it is told to."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

from raysys.errors import ConfigError
from raysys.processes import die_with_parent
from raysys.rollout.spec import RolloutSpec

_PIECES, _PIECE_BYTES = 64, 4096


def environment(spec: RolloutSpec) -> dict[str, str]:
    """What the worker's process needs set before vLLM is imported."""
    shared = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if spec.device == "gpu":
        return shared
    # vLLM's own helpers would each be built by a C++ compiler, in every process, for models that run eagerly anyway.
    compiled = {} if spec.config.enforce_eager is False else {"TORCH_COMPILE_DISABLE": "1"}
    # One process for core and worker halves the start; binding threads to cores would fight with the trainer's.
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(spec.config.threads)}
    return shared | compiled | threads | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def engine_arguments(spec: RolloutSpec) -> dict[str, Any]:
    """Arguments of vLLM's `AsyncEngineArgs`. Raises ConfigError when a sequence cannot fit."""
    config, cpu = spec.config, spec.device == "cpu"
    shared = {
        "model": spec.model,
        "dtype": spec.dtype,
        "max_model_len": spec.max_model_len,
        "max_num_seqs": config.max_sequences + 1,  # one seat for the parity probe: a push must not wait for long samples
        "tensor_parallel_size": config.tensor_parallel,
        "enable_prefix_caching": config.prefix_caching,
        "enforce_eager": cpu if config.enforce_eager is None else config.enforce_eager,
        "skip_tokenizer_init": spec.episodes is None,  # stop strings are found in text
        "disable_log_stats": True,
        "generation_config": "vllm",  # a folder's own top-k or temperature must not shape rollouts
        "seed": 0,
        # Log-probs of the distribution that is sampled from: after temperature and top-p.
        "logprobs_mode": "processed_logprobs",
    }
    if not cpu:
        mp = {"distributed_executor_backend": "mp"} if config.tensor_parallel > 1 else {}
        return (
            shared
            | mp
            | {
                "gpu_memory_utilization": config.gpu_memory_utilization,
                "max_num_batched_tokens": config.max_batched_tokens,
                "enable_sleep_mode": spec.sleeps,
            }
        )
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


def quantised(model: str) -> bool:
    """Whether a folder's weights are packed codes, which no push carries."""
    return "quantization_config" in _read(model, "config.json")


def revision(model: str) -> str:
    """Tells one model's architecture from another's: a hash of its config."""
    return hashlib.blake2b(json.dumps(_read(model, "config.json"), sort_keys=True).encode(), digest_size=6).hexdigest()


def contents(model: str) -> str:
    """Tells one set of a model's weights from another: a hash of names, sizes and pieces of all weight files, "" where there are none.

    Pieces, because whole files take minutes to read: `_PIECES` of each, spread evenly, in which two trained models hardly are the same.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        with contextlib.suppress(OSError):
            folder = Path(snapshot_download(model, allow_patterns=["*.safetensors"], local_files_only=True))
    known = hashlib.blake2b(digest_size=6)
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        size = path.stat().st_size
        known.update(f"{path.name}/{size}/".encode())
        with open(path, "rb") as file:
            for piece in range(_PIECES):
                file.seek(piece * max(0, size - _PIECE_BYTES) // (_PIECES - 1))
                known.update(file.read(_PIECE_BYTES))
    return known.hexdigest() if files else ""


def _read(model: str, name: str) -> dict[str, Any]:
    path = Path(model) / name
    if not Path(model).is_dir():
        from huggingface_hub import hf_hub_download

        with contextlib.suppress(OSError):
            path = Path(hf_hub_download(model, name))
    return json.loads(path.read_text()) if path.is_file() else {}


def chatter_to(folder: str | None, rank: int) -> str:
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


_whole_core: Any = None


def tie_core() -> None:
    """Has the engine's process, which vLLM will start, die with this one.

    An actor that is killed has no time to end it, Ray, which would, may have been killed with it, and an engine that still waits for
    its actor to answer waits for ever.
    """
    from vllm.v1.engine.core import EngineCoreProc

    global _whole_core
    if _whole_core is None:
        _whole_core = EngineCoreProc.run_engine_core
        EngineCoreProc.run_engine_core = staticmethod(_Core(os.getpid()))  # type: ignore[assignment]


class _Core:
    """The engine's process: vLLM's own main function, once the process is tied to `parent`.

    It arrives there in a pickle with vLLM's config behind it, whose classes bring all of vLLM's imports: no collections until it is called.
    """

    def __init__(self, parent: int):
        self._parent = parent

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (self._parent,)

    def __call__(self, *arguments: Any, **options: Any) -> None:
        from vllm.v1.engine.core import EngineCoreProc

        gc.freeze()
        gc.enable()
        die_with_parent(self._parent)
        # Where the process is a fork of the actor, its class is the changed one.
        (_whole_core or EngineCoreProc.run_engine_core)(*arguments, **options)


def _arrived(parent: int) -> _Core:
    gc.disable()
    return _Core(parent)


def children() -> dict[int, float]:
    """The engine's processes: id to start time, which tells a process from a later one with its id."""
    import psutil

    found: dict[int, float] = {}
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if not any("resource_tracker" in part for part in child.cmdline()):  # it cleans up after the others
                found[child.pid] = child.create_time()
    return found


def end(processes: dict[int, float]) -> None:
    """A stopped engine answers no request to leave, and would outlive its actor."""
    import psutil

    for pid, began in processes.items():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if psutil.Process(pid).create_time() == began:
                os.kill(pid, signal.SIGKILL)
