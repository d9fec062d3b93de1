"""What a worker of Ray Train does in a pretraining run: a DeepSpeed rank over its share of the token stream. See `raysys.pretraining`."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raysys.data.shards import Split
from raysys.data.text import load_tokenizer
from raysys.data.token_stream import Packed, TokenStream
from raysys.errors import CheckpointError, InfrastructureError, NumericsError, RaysysError
from raysys.files import append_json, write_json
from raysys.ledger import MANIFEST, PER_STEP_FILES, cut_lines
from raysys.pretraining_points import Carrier, Storage, scratch, sweep, tell
from raysys.report.metrics import MetricsWriter
from raysys.runtime import Stopwatch
from raysys.training.pretrain_spec import PretrainSpec, Sequences

if TYPE_CHECKING:
    from raysys.training.pretrainer import Pretrainer

ROUTERS, FAILURE = "routers.jsonl", "failure.jsonl"


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
    storage: Storage
    """Of resume points."""

    @property
    def failure(self) -> Path:
        """Where a rank writes down what starting again would only repeat."""
        return self.folder / "ledger" / FAILURE


def work(settings: dict[str, Any]) -> None:
    """What Ray Train runs on each worker."""
    from ray import train

    from raysys.training.pretrainer import Pretrainer

    task: Work = settings["work"]
    context = train.get_context()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    if task.failure.is_file():  # another worker's, of the attempt before
        return
    sweep(task.spec.config.trainer.scratch)
    pretrainer = Pretrainer(task.spec)
    try:
        _resume(pretrainer, task)
        with ExitStack() as stack:
            _train(pretrainer, task, stack)
        if not task.spec.config.not_exported():
            _export(pretrainer, task)
    except InfrastructureError:
        raise
    except RaysysError as error:  # the same again, however often it is tried
        tell(task.failure, error)
        if not isinstance(error, NumericsError):  # which all ranks have at once; of another one the others know nothing
            raise


def _resume(pretrainer: Pretrainer, work: Work) -> None:
    """Back to the newest complete resume point; what is recorded of later steps goes."""
    from torch import distributed

    point, first = work.storage.newest(), pretrainer.rank == 0
    distributed.barrier()  # nobody removes what another has yet to look at
    if first:
        work.storage.clear(lambda name: point is not None and name <= point)
    if point is not None:
        with work.storage.opened(point, work.folder, first, distributed.barrier) as folder:
            pretrainer.load(folder / "trainer")
    if first:
        for name in (*PER_STEP_FILES, ROUTERS):
            cut_lines(work.folder / name, pretrainer.step_index)


def _train(pretrainer: Pretrainer, work: Work, stack: ExitStack) -> None:
    """The steps that are left, with resume points between them."""
    config, watch = work.spec.config, Stopwatch()
    stream = stack.enter_context(contextlib.closing(_stream(pretrainer, work)))
    writer = stack.enter_context(MetricsWriter(work.folder, work.job, work.folder.name)) if pretrainer.rank == 0 else None
    carrier = Carrier(work.storage, work.folder, work.failure, config.deadlines.checkpoint)
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
        if writer is not None:  # before the resume point, behind which nothing of this step is done again
            writer.write(_record(step, metrics, watch.lap(), stream, pretrainer))
        if done % config.checkpoint_every == 0 or done == config.steps:
            with watch("checkpoint"):
                _checkpoint(pretrainer, carrier, metrics)


def _record(step: int, metrics: dict[str, Any], seconds: dict[str, float], stream: TokenStream, pretrainer: Pretrainer) -> dict[str, Any]:
    record = {"step": step, "version": step + 1} | metrics | {f"epoch/{label}": epoch for label, epoch in stream.epochs.items()}
    record["tokens_per_second"] = rate = metrics["tokens"] / seconds["total"]
    record["ranks"] = pretrainer.world
    if peak := pretrainer.spec.config.trainer.peak_tflops:
        record["mfu"] = rate * 6 * pretrainer.activated / (peak * 1e12 * pretrainer.world)
    return record | {"seconds": seconds}


def _watch(pretrainer: Pretrainer, work: Work, step: int) -> dict[str, float]:
    """The routers in full to a file of their own; of each measure the mean over layers."""
    found = pretrainer.routers()
    if pretrainer.rank == 0:
        append_json(work.folder / ROUTERS, {"step": step} | found)
    return {name: sum(found[name]) / len(found[name]) for name in ("alignment", "row_cosine", "max_violation_global")}


def _stream(pretrainer: Pretrainer, work: Work, split: Split = "train", samples: int | None = None) -> TokenStream:
    config = work.spec.config
    return TokenStream(
        work.cache,
        work.plan,
        batch=config.batch // config.accumulation,
        rank=pretrainer.rank,
        world=pretrainer.world,
        split=split,
        samples=samples,
        deadline=config.data.wait,
    )


def joined(rows: list[Packed]) -> Sequences:
    """Rows one behind another, their pieces of documents still apart."""
    if not rows:
        return Sequences.none()
    return Sequences(np.concatenate([row.ids for row in rows]), np.concatenate([row.lengths for row in rows]))


def _validate(pretrainer: Pretrainer, work: Work) -> float:
    """The loss of the first held-out sequences, as many as were asked for, whatever the size of a pass."""
    config = work.spec.config
    assert config.validation is not None
    asked = config.validation.sequences
    with contextlib.closing(_stream(pretrainer, work, "validation", asked)) as stream:
        passes = math.ceil(asked / (config.batch // config.accumulation))
        return pretrainer.validate([joined(stream.take(number)) for number in range(passes)])


def _checkpoint(pretrainer: Pretrainer, carrier: Carrier, metrics: dict[str, Any]) -> None:
    """Written here, and carried to the run's storage while training goes on."""
    from ray import train
    from ray.train import Checkpoint, CheckpointUploadMode
    from torch import distributed

    carrier.ready()
    config, step = pretrainer.spec.config, pretrainer.step_index
    folder = scratch(config.trainer.scratch)
    try:
        pretrainer.save(folder / "trainer")
    except CheckpointError as error:
        shutil.rmtree(folder, ignore_errors=True)  # it would only help to keep a full disk full
        raise CheckpointError(error.message, "make room, or set trainer.scratch; the resume point before it is intact") from None
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    everyone: list[Any] = [files] * pretrainer.world
    distributed.all_gather_object(everyone, files)
    if pretrainer.rank == 0:
        whole = {name: size for part in everyone for name, size in part.items()}
        write_json(folder / "source.json", {"step": step})
        write_json(folder / MANIFEST, {"step": step, "version": step, "run": str(carrier.run), "files": whole})
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float)) and math.isfinite(value)}
    train.report(
        numbers | {"step": step},
        checkpoint=Checkpoint.from_directory(str(folder)),
        checkpoint_dir_name=f"step_{step:08d}",
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        checkpoint_upload_fn=carrier.carry,
        delete_local_checkpoint_after_upload=True,
    )


def _export(pretrainer: Pretrainer, work: Work) -> None:
    """The stock folder, complete or not at all."""
    from torch import distributed

    from raysys.training.checkpoint import full_disks

    final = work.folder / "export"
    draft = final.with_name(".draft_export")
    first = pretrainer.rank == 0
    if first:
        shutil.rmtree(draft, ignore_errors=True)
    try:
        with full_disks(draft):
            pretrainer.export(draft, load_tokenizer(work.tokenizer) if first else None)
    except CheckpointError:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    if first:
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
    distributed.barrier()
