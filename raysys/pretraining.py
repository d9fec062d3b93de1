"""Pretraining: Ray Train's workers run a DeepSpeed rank each, over token streams that a Ray Data execution fills.

The driver tokenises, watches and ends the run; a worker needs nothing of it but files. A worker group that lost a member is started
again by Ray Train, maybe with another number of ranks, and goes on from the newest complete resume point of the run's folder.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysys import errors
from raysys.assembly import Hardware
from raysys.checks import found_here, local_or_id, vocabulary_of
from raysys.config.pretraining import LocalTextConfig, PretrainMoeConfig
from raysys.data.token_cache import TokenCache
from raysys.data.token_plan import check_same
from raysys.errors import CheckpointError, InfrastructureError, RaysysError
from raysys.files import read_json_lines, write_atomically, write_json
from raysys.pretraining_points import Storage
from raysys.pretraining_work import Work, work
from raysys.report.live import Live
from raysys.report.progress import Progress
from raysys.runtime import compute_environment, first_cause, waits
from raysys.training.pretrain_spec import PretrainSpec

if TYPE_CHECKING:
    from raysys.job import Session

log = logging.getLogger("raysys")

RESIZE_SECONDS = 20.0
"""That ranks whose number may change wait for places that were there a moment ago."""


def run_pretrain_moe(config: PretrainMoeConfig, session: Session) -> None:
    """Tokenises what is not tokenised yet, and trains meanwhile."""
    from raysys.plan_pretraining import moved  # imports torch, which the other jobs of this file do without

    hardware = Hardware.choose(config, config.trainer.dtype, config.trainer.fewest)
    log.info("what moves which parameter:\n%s", moved(config))
    data = found_here(config.data)
    with ExitStack() as stack:
        cache = stack.enter_context(contextlib.closing(TokenCache(data, str(session.folder / "tokens"), config.seed)))
        _same_data(session, cache)
        cache.fill()
        start = local_or_id(config.start) if config.start else None
        spec = PretrainSpec(config, vocabulary_of(config), start, hardware.device, hardware.dtype)
        stack.enter_context(_shown(config, session, cache))
        storage = Storage.of(session.folder, config.storage, config.name)
        _fit(Work(spec, session.folder, session.job, data.tokenizer, cache.path, cache.plan.name, storage), config, hardware)
    storage.keep(config.keep_checkpoints)
    session.ledger.finish(config.steps)
    if warning := config.not_exported():
        log.warning("%s; weights: %s/%s", warning, storage.base, storage.newest())
    else:
        log.info("weights: %s", session.folder / "export")


def run_local_text(config: LocalTextConfig, session: Session) -> None:
    """Text, tokenizer and prompts as files in the run's folder."""
    from raysys.data.local_text import train_tokenizer, write_local_text

    folder = session.folder
    counts = write_local_text(folder, megabytes=config.megabytes, tasks_megabytes=config.tasks_megabytes, seed=config.seed)
    for name, count in counts.items():
        log.info("%7d documents in %s", count, folder / name)
    train_tokenizer([folder / name for name in counts], config.vocabulary, folder / "tokenizer", context=config.context)
    write_prompts([folder / name for name in counts], config.prompts, folder / "prompts.jsonl")
    session.ledger.finish(0)


def write_prompts(files: Sequence[Path], count: int, path: Path) -> None:
    """Beginnings of documents, of each file in turn, as `data.path` of other jobs takes them."""
    texts = [itertools.islice((record["text"] for _, record in read_json_lines(file)), count) for file in files]
    begun = itertools.islice((text for together in zip(*texts, strict=False) for text in together), count)
    rows = [{"id": f"prompt-{number}", "prompt": _beginning(text)} for number, text in enumerate(begun)]
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _beginning(text: str) -> str:
    """A task's question, else the first words."""
    head, cut, _ = text.partition("\nAnswer:")
    return head + cut if cut else " ".join(text.split()[:12])


def _same_data(session: Session, cache: TokenCache) -> None:
    """A run goes on with the data that it began with. Raises ConfigError naming what changed."""
    path = session.folder / "ledger" / "data.json"
    if path.is_file():
        check_same(json.loads(path.read_text()), cache.plan.facts)
    write_json(path, dict(cache.plan.facts))


def _fit(task: Work, config: PretrainMoeConfig, hardware: Hardware) -> None:
    """Ray Train until the run is at its end. Raises what ended it."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    gpu, ranks = hardware.device == "gpu", (config.trainer.fewest, config.trainer.most)
    elastic = ranks[0] < ranks[1]
    # An elastic group that finds no room was sized for a node that is gone, and is sized anew; a fixed one waits for the autoscaler.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(RESIZE_SECONDS if elastic else config.deadlines.placement)
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"  # a resume point counts when Ray Train has looked at all ranks after it
    environment = compute_environment(config.trainer.threads) | {
        "DS_ACCELERATOR": "cuda" if gpu else "cpu",
        "LOCAL_SIZE": "1",
    }
    trainer = TorchTrainer(
        work,
        train_loop_config={"work": task},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=int(config.deadlines.train)),  # of a rank for the others
        scaling_config=ScalingConfig(
            num_workers=ranks if elastic else ranks[0],
            use_gpu=gpu,
            resources_per_worker={"CPU": 1} | ({"GPU": 1} if gpu else {}),
            elastic_resize_monitor_interval_s=5.0,
        ),
        run_config=RunConfig(
            name=task.storage.name,
            storage_path=task.storage.path,
            failure_config=FailureConfig(
                max_failures=config.trainer.restarts, controller_failure_limit=config.trainer.restarts if elastic else 0
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=config.keep_checkpoints),
            worker_runtime_env={"env_vars": environment},
        ),
    )
    task.failure.unlink(missing_ok=True)
    task.storage.begin_anew()
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise _told(task.failure) or _cause(error) from error
    if found := _told(task.failure):
        raise found


def _told(failure: Path) -> RaysysError | None:
    """What a worker wrote down of an error that starting again would only repeat."""
    for _, record in read_json_lines(failure):
        return getattr(errors, record["kind"])(record["message"], record["remedy"])
    if not failure.is_file():
        return None
    folder = failure.parent.parent
    free = shutil.disk_usage(folder).free >> 20
    return CheckpointError(f"{folder} takes no more files ({free} MiB are free there)", "make room; the newest resume point is intact")


def _cause(error: Any) -> RaysysError:
    """What a worker raised on purpose; else one line of what it died of."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank, failure in sorted(failures.items()):
        found = first_cause(failure, f"trainer rank {rank}", "train")
        if not isinstance(found, InfrastructureError):
            return found
    for rank, failure in sorted(failures.items()):
        return first_cause(failure, f"trainer rank {rank}", "train")
    told = str(error).strip().splitlines()[-1][:300]
    return InfrastructureError(f"Ray Train gave up: {told}", "see trainer.restarts, trainer.ranks and deadlines.placement")


# -- in the driver


@contextmanager
def _shown(config: PretrainMoeConfig, session: Session, cache: TokenCache) -> Iterator[None]:
    """Progress lines and the live status, from what rank 0 writes."""
    follower = _Follower(session.folder / "metrics.jsonl", Progress(config.steps), session.ledger.step)

    def status() -> dict[str, Any]:
        follower.read()
        cache.trained(follower.step * config.batch)
        return {
            "run": session.folder.name,
            "submission_id": session.submission_id,
            "step": follower.step,
            "phase": "train" if follower.step > session.ledger.step else "start",
            "waits": waits(),
            "data": cache.progress(),
            "trainers": [f"trainer rank {rank}" for rank in range(follower.ranks or config.trainer.fewest)],
        }

    try:
        with Live(session.folder, session.job, status):
            yield
    finally:
        follower.read()


class _Follower:
    """Shows each new line of a run's metrics, from a step on."""

    def __init__(self, path: Path, progress: Progress, step: int):
        self._path, self._progress, self._place, self.step = path, progress, 0, step
        self.ranks = 0
        """That made the newest step; 0: there is none yet."""

    def read(self) -> None:
        """What has come since the last call."""
        try:
            if self._path.stat().st_size < self._place:
                self._place = 0  # cut back by a restart
            with self._path.open("rb") as file:
                file.seek(self._place)
                whole = file.read().rpartition(b"\n")[0]
            for line in whole.splitlines():
                record = json.loads(line)
                self.ranks = record.get("ranks", 0)
                if record["step"] >= self.step:
                    self.step = record["step"] + 1
                    self._progress.show(record)
            self._place += len(whole) + (1 if whole else 0)
        except OSError:
            return
        except ValueError:  # cut back and grown again in between
            self._place = 0
