"""Pretraining: Ray Train's workers run a DeepSpeed rank each, over token streams that a Ray Data execution fills.

The driver tokenises, watches and ends the run; a worker needs nothing of it but files. A worker group that lost a member is started
again by Ray Train, maybe with another number of ranks, and goes on from the newest complete resume point of the run's folder.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raysys import errors
from raysys.assembly import Hardware
from raysys.checks import found_here, local_or_id, vocabulary_of
from raysys.config.pretraining import LocalTextConfig, PretrainMoeConfig
from raysys.data.shards import Split
from raysys.data.text import load_tokenizer
from raysys.data.token_cache import TokenCache
from raysys.data.token_plan import check_same
from raysys.data.token_stream import Packed, TokenStream
from raysys.errors import InfrastructureError, NumericsError, RaysysError
from raysys.files import append_json, read_json_lines, write_atomically, write_json
from raysys.ledger import MANIFEST, PER_STEP_FILES, cut_lines, newest_point
from raysys.report.live import Live
from raysys.report.metrics import MetricsWriter
from raysys.report.progress import Progress
from raysys.runtime import Stopwatch, compute_environment, first_cause, waits
from raysys.training.pretrain_spec import PretrainSpec, Sequences

if TYPE_CHECKING:
    from raysys.job import Session
    from raysys.training.pretrainer import Pretrainer

log = logging.getLogger("raysys")

ROUTERS, FAILURE = "routers.jsonl", "failure.jsonl"
SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's record of a run's checkpoints."""


@dataclass(frozen=True)
class Work:
    """What a worker of Ray Train is told."""

    spec: PretrainSpec
    folder: Path
    job: str
    tokenizer: str
    cache: str
    """Folder or URI of the tokens."""
    plan: str
    """Their order; see `raysys.data.token_stream.TokenStream`."""


def run_pretrain_moe(config: PretrainMoeConfig, session: Session) -> None:
    """Tokenises what is not tokenised yet, and trains meanwhile."""
    hardware = Hardware.choose(config, config.trainer.dtype, config.trainer.fewest)
    if warning := config.flat_router():
        log.warning(warning)
    data = found_here(config.data)
    with ExitStack() as stack:
        cache = stack.enter_context(contextlib.closing(TokenCache(data, str(session.folder / "tokens"), config.seed)))
        _same_data(session, cache)
        cache.fill()
        start = local_or_id(config.start) if config.start else None
        spec = PretrainSpec(config, vocabulary_of(config), start, hardware.device, hardware.dtype)
        stack.enter_context(_shown(config, session, cache))
        _fit(Work(spec, session.folder, session.job, data.tokenizer, cache.path, cache.plan.name), config, hardware)
    session.ledger.finish(config.steps)
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


def _fit(work: Work, config: PretrainMoeConfig, hardware: Hardware) -> None:
    """Ray Train until the run is at its end. Raises what ended it."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    gpu, ranks = hardware.device == "gpu", (config.trainer.fewest, config.trainer.most)
    environment = compute_environment(config.trainer.threads) | {
        "DS_ACCELERATOR": "cuda" if gpu else "cpu",
        "LOCAL_SIZE": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    }
    trainer = TorchTrainer(
        _work,
        train_loop_config={"work": work},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=ranks[0] if ranks[0] == ranks[1] else ranks,
            use_gpu=gpu,
            resources_per_worker={"CPU": 1} | ({"GPU": 1} if gpu else {}),
            elastic_resize_monitor_interval_s=5.0,
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=str(work.folder),
            failure_config=FailureConfig(max_failures=config.trainer.restarts, controller_failure_limit=0),
            checkpoint_config=CheckpointConfig(num_to_keep=config.keep_checkpoints),
            worker_runtime_env={"env_vars": environment},
        ),
    )
    failure = work.folder / "ledger" / FAILURE
    failure.unlink(missing_ok=True)
    _begin_anew(work.folder)
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise _told(failure) or _cause(error) from error
    if found := _told(failure):
        raise found


def _begin_anew(folder: Path) -> None:
    """Leaves of earlier attempts the newest complete resume point alone. Where to go on is read from the folders: Ray Train's own record
    may miss the newest, and with one that is gone it would not start."""
    newest = newest_point(folder)
    for path in (folder / "checkpoints").glob("step_*"):
        if path != newest:
            shutil.rmtree(path, ignore_errors=True)
    (folder / "checkpoints" / SNAPSHOT).unlink(missing_ok=True)


def _told(failure: Path) -> RaysysError | None:
    """What a worker wrote down of an error that starting again would only repeat."""
    for _, record in read_json_lines(failure):
        return getattr(errors, record["kind"])(record["message"], record["remedy"])
    return None


def _cause(error: Any) -> RaysysError:
    """What a worker raised on purpose; else one line of what it died of."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank, failure in sorted(failures.items()):
        found = first_cause(failure, f"trainer rank {rank}", "train")
        if not isinstance(found, InfrastructureError):
            return found
    for rank, failure in sorted(failures.items()):
        return first_cause(failure, f"trainer rank {rank}", "train")
    return InfrastructureError(f"Ray Train gave up: {str(error).strip().splitlines()[-1][:300]}", "see trainer.restarts and trainer.ranks")


# -- in a worker


def _work(settings: dict[str, Any]) -> None:
    """What Ray Train runs on each worker."""
    from ray import train

    from raysys.training.pretrainer import Pretrainer

    work: Work = settings["work"]
    context = train.get_context()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    failure = work.folder / "ledger" / FAILURE
    if failure.is_file():  # another worker's, of the attempt before
        return
    pretrainer = Pretrainer(work.spec)
    try:
        _resume(pretrainer, work)
        with ExitStack() as stack:
            _train(pretrainer, work, stack)
        _export(pretrainer, work)
    except InfrastructureError:
        raise
    except RaysysError as error:  # the same again, however often it is tried
        append_json(failure, {"kind": type(error).__name__, "message": error.message, "remedy": error.remedy})
        if not isinstance(error, NumericsError):  # which all ranks have at once; of another one the others know nothing
            raise


def _resume(pretrainer: Pretrainer, work: Work) -> None:
    """Back to the newest complete resume point; what is recorded of later steps goes."""
    from torch import distributed

    point = newest_point(work.folder)
    distributed.barrier()  # nobody removes what another has yet to look at
    if pretrainer.rank == 0:
        for path in (work.folder / "checkpoints").glob("step_*"):
            if point is None or path.name > point.name:
                shutil.rmtree(path, ignore_errors=True)
    if point is not None:
        pretrainer.load(point / "trainer")
    if pretrainer.rank == 0:
        for name in (*PER_STEP_FILES, ROUTERS):
            cut_lines(work.folder / name, pretrainer.step_index)


def _train(pretrainer: Pretrainer, work: Work, stack: ExitStack) -> None:
    """The steps that are left, with resume points between them."""
    config, watch = work.spec.config, Stopwatch()
    stream = stack.enter_context(contextlib.closing(_stream(pretrainer, work)))
    writer = stack.enter_context(MetricsWriter(work.folder, work.job, work.folder.name)) if pretrainer.rank == 0 else None
    for step in range(pretrainer.step_index, config.steps):
        with watch("data"):
            passes = [joined(stream.take(step * config.accumulation + number)) for number in range(config.accumulation)]
        with watch("train"):
            metrics: dict[str, Any] = pretrainer.step(passes)
        done = step + 1
        if done % config.watch_every == 0 or done == config.steps:
            with watch("watch"):
                metrics |= _watch(pretrainer, work, step)
        if config.validation and (done == config.steps or (config.validation.every and done % config.validation.every == 0)):
            with watch("validate"):
                metrics["validation_loss"] = _validate(pretrainer, work)
        if done % config.checkpoint_every == 0 or done == config.steps:
            with watch("checkpoint"):
                _checkpoint(pretrainer, metrics)
        if writer is not None:
            writer.write(_record(step, metrics, watch.lap(), stream, pretrainer))


def _record(step: int, metrics: dict[str, Any], seconds: dict[str, float], stream: TokenStream, pretrainer: Pretrainer) -> dict[str, Any]:
    record = {"step": step, "version": step + 1} | metrics | {f"epoch/{label}": epoch for label, epoch in stream.epochs.items()}
    record["tokens_per_second"] = rate = metrics["tokens"] / seconds["total"]
    if peak := pretrainer.spec.config.trainer.peak_tflops:
        record["mfu"] = rate * 6 * pretrainer.activated / (peak * 1e12 * pretrainer.world)
    return record | {"seconds": seconds}


def _watch(pretrainer: Pretrainer, work: Work, step: int) -> dict[str, float]:
    """The routers in full to a file of their own; of each measure the mean over layers."""
    found = pretrainer.routers()
    if pretrainer.rank == 0:
        append_json(work.folder / ROUTERS, {"step": step} | found)
    return {name: sum(found[name]) / len(found[name]) for name in ("alignment", "row_cosine", "max_violation_global")}


def _stream(pretrainer: Pretrainer, work: Work, split: Split = "train") -> TokenStream:
    config = work.spec.config
    return TokenStream(
        work.cache,
        work.plan,
        batch=config.batch // config.accumulation,
        rank=pretrainer.rank,
        world=pretrainer.world,
        split=split,
        deadline=config.data.wait,
    )


def joined(rows: list[Packed]) -> Sequences:
    """Rows one behind another, their pieces of documents still apart."""
    if not rows:
        return Sequences.none()
    return Sequences(np.concatenate([row.ids for row in rows]), np.concatenate([row.lengths for row in rows]))


def _validate(pretrainer: Pretrainer, work: Work) -> float:
    config = work.spec.config
    assert config.validation is not None
    with contextlib.closing(_stream(pretrainer, work, "validation")) as stream:
        passes = -(-config.validation.sequences // (config.batch // config.accumulation))
        return pretrainer.validate([joined(stream.take(number)) for number in range(passes)])


def _checkpoint(pretrainer: Pretrainer, metrics: dict[str, Any]) -> None:
    """Written here, and carried to the run's folder while training goes on."""
    from ray import train
    from ray.train import Checkpoint, CheckpointUploadMode
    from torch import distributed

    folder, step = Path(tempfile.mkdtemp(prefix="raysys-checkpoint-")), pretrainer.step_index
    pretrainer.save(folder / "trainer")
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    everyone: list[Any] = [files] * pretrainer.world
    distributed.all_gather_object(everyone, files)
    if pretrainer.rank == 0:
        whole = {name: size for part in everyone for name, size in part.items()}
        write_json(folder / "source.json", {"step": step})
        write_json(folder / MANIFEST, {"step": step, "version": step, "files": whole})
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float)) and math.isfinite(value)}
    train.report(
        numbers | {"step": step},
        checkpoint=Checkpoint.from_directory(str(folder)),
        checkpoint_dir_name=f"step_{step:08d}",
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


def _export(pretrainer: Pretrainer, work: Work) -> None:
    """The stock folder, complete or not at all."""
    from torch import distributed

    final = work.folder / "export"
    draft = final.with_name(".draft_export")
    first = pretrainer.rank == 0
    if first:
        shutil.rmtree(draft, ignore_errors=True)
    pretrainer.export(draft, load_tokenizer(work.tokenizer) if first else None)
    if first:
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
    distributed.barrier()


# -- in the driver


@contextmanager
def _shown(config: PretrainMoeConfig, session: Session, cache: TokenCache) -> Iterator[None]:
    """Progress lines and the live status, from what rank 0 writes."""
    follower = _Follower(session.folder / "metrics.jsonl", Progress(config.steps))

    def status() -> dict[str, Any]:
        cache.trained(follower.step * config.batch)
        return {
            "run": session.folder.name,
            "submission_id": session.submission_id,
            "step": follower.step,
            "phase": "train" if follower.step else "start",
            "waits": waits(),
            "data": cache.progress(),
            "trainers": [f"trainer rank {rank}" for rank in range(config.trainer.most)],
        }

    with follower, Live(session.folder, session.job, status):
        yield


class _Follower:
    """Shows each new line of a run's metrics."""

    def __init__(self, path: Path, progress: Progress):
        self._path, self._progress, self.step = path, progress, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> _Follower:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        place = 0
        while True:
            ending = self._stop.wait(0.5)
            place = self._read(place)
            if ending:
                return

    def _read(self, place: int) -> int:
        with contextlib.suppress(OSError, ValueError):
            size = self._path.stat().st_size
            if size < place:
                place = 0  # cut back by a restart
            with self._path.open(encoding="utf-8") as file:
                file.seek(place)
                text = file.read()
            whole = text.rpartition("\n")[0]
            for line in whole.splitlines():
                record = json.loads(line)
                if record["step"] >= self.step:
                    self.step = record["step"] + 1
                    self._progress.show(record)
            place += len(whole.encode()) + (1 if whole else 0)
        return place
