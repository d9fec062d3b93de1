"""lm-eval's tasks (EleutherAI, MIT) on a Hugging Face folder, in a process of their own: multiple choice by log-probs, and generation.

Which model class of the library answers follows the device: vLLM on a GPU, transformers on a CPU, where vLLM's build is of another name
than the library looks for and serves no 2 or 3 bits.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from raysys.config.runs import EvaluateConfig, Harness
from raysys.errors import ConfigError, DataError
from raysys.files import append_json, read_json_lines
from raysys.runtime import compute_environment, get

log = logging.getLogger("raysys")

_NO_MEASURES = ("alias", "name", "sample_len", "samples", "sample_count")


def check_harness(part: Harness) -> None:
    """Raises ConfigError: lm-eval is not installed, `include` is no folder, or a task is unknown, naming the nearest ones."""
    if not all(importlib.util.find_spec(name) for name in ("lm_eval", "accelerate")):  # the library does not say what it runs models with
        raise ConfigError(
            "harness.tasks are lm-eval's, which is not installed, or without what it needs for models", "pip install 'lm-eval[hf]>=0.4.13'"
        )
    if part.include is not None and not Path(part.include).is_dir():
        raise ConfigError(f"harness.include={part.include} is no folder", "give one that holds lm-eval's YAML files of tasks")
    known = _tasks(part).all_tasks
    for task in part.tasks:
        if task not in known:
            near = ", ".join(get_close_matches(task, known, 3)) or "see `lm-eval ls tasks`"
            raise ConfigError(f"lm-eval knows no task '{task}'", f"correct harness.tasks: {near}")


def run_harness(config: EvaluateConfig, part: Harness, models: Mapping[str, str], folder: Path, device: str, dtype: str) -> None:
    """One model after another, each in a fresh actor, into `evaluation.jsonl` of the run's folder; one that is on record is left out."""
    import ray

    rollout, path = config.rollout, folder / "evaluation.jsonl"
    gpus = rollout.tensor_parallel if device == "gpu" else 0
    place: dict[str, Any] = {"num_gpus": gpus} if gpus else {"runtime_env": {"env_vars": compute_environment(rollout.threads)}}
    known = {record["label"] for _, record in read_json_lines(path)}
    for label, model in models.items():
        if label in known:
            continue
        worker: Any = ray.remote(num_cpus=1, **place)(HarnessWorker).remote()
        try:
            asked = worker.run.remote(model, part, device, dtype, rollout.tensor_parallel, rollout.gpu_memory_utilization, config.seed)
            limit = config.deadlines.generate
            found = get(asked, timeout=limit, actor=f"lm-eval on {label}", operation="run", knob="deadlines.generate")
        finally:
            ray.kill(worker)
        append_json(path, {"step": 0, "label": label, "mean": 0.0, "domains": {}, "measures": found, "model": model})
        log.info("%s: %s", label, "  ".join(f"{name} {value:.4g}" for name, value in found.items()))


class HarnessWorker:
    """An actor. One lives for one model, so that nothing of it is left on the device for the next."""

    def run(self, folder: str, part: Harness, device: str, dtype: str, tensor_parallel: int, memory: float, seed: int) -> dict[str, float]:
        """Values by `task metric`, and their standard errors by `task metric ±`.

        Args:
            folder: Hugging Face folder or id.
            device: "cpu" or "gpu".
            tensor_parallel, memory: GPUs of vLLM's engine and the share of their memory that it takes.

        Raises:
            DataError: a task's rows cannot be read.
            ConfigError: the library refuses model or settings.
        """
        from lm_eval import simple_evaluate  # type: ignore[import-not-found]

        shared: dict[str, Any] = {"pretrained": folder, "dtype": dtype}
        if device == "gpu":
            kind = {"model": "vllm", "batch_size": "auto"}
            shared |= {"tensor_parallel_size": tensor_parallel, "gpu_memory_utilization": memory, "seed": seed}
        else:
            kind = {"model": "hf", "batch_size": part.batch, "device": "cpu"}
        tasks = _tasks(part)
        try:
            found = simple_evaluate(
                **kind,
                model_args=shared,
                tasks=list(part.tasks),
                task_manager=tasks,
                num_fewshot=part.few_shot,
                limit=part.rows,
                apply_chat_template=part.chat,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except (FileNotFoundError, ConnectionError) as error:
            raise DataError(f"lm-eval's tasks {', '.join(part.tasks)}: {_first_line(error)}", "bring their data to this machine") from error
        except (ValueError, AssertionError, KeyError) as error:
            raise ConfigError(f"lm-eval on {folder}: {_first_line(error)}", "see harness.*") from error
        assert found is not None  # only ranks of a group other than the first get nothing
        return measures(found["results"], part.tasks)


def measures(results: Mapping[str, Mapping[str, Any]], asked: Sequence[str]) -> dict[str, float]:
    """lm-eval's results as numbers by name, those of a group's members beside the group's own.

    A metric is called `acc,none` there and `acc` here; a filter other than `none` stays in the name.
    """
    found: dict[str, float] = {}
    for task in sorted(results, key=lambda name: (name not in asked, name)):
        for key, value in results[task].items():
            metric, _, filtered = key.partition(",")
            if key in _NO_MEASURES or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            error = metric.endswith("_stderr")
            name = f"{task} {metric.removesuffix('_stderr')}" + (f" {filtered}" if filtered not in ("", "none") else "")
            found[name + (" ±" if error else "")] = float(value)
    return found


def _tasks(part: Harness) -> Any:
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]

    return TaskManager(include_path=part.include)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
