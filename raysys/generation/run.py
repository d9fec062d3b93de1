"""The driver of a generation: teacher after teacher, shards through Ray Data, one line of metrics a shard.

Ray Data hands out shard numbers to a pool of actors, starts those again that die, and grows the pool with the cluster. Rows do not pass
through it: an actor reads a shard's prompts and publishes its answers by itself.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raysys.checks import local_or_id
from raysys.config.runs import GenerateConfig
from raysys.data.rows import BadRows
from raysys.errors import DataError, RaysysError
from raysys.files import append_json, read_json_lines, write_atomically
from raysys.generation.answers import Record, heard
from raysys.generation.books import Books
from raysys.generation.shards import Prompts, Shard
from raysys.generation.teacher import Teacher, Work
from raysys.generation.watch import Watch
from raysys.job import Session
from raysys.report.live import Live
from raysys.report.metrics import MetricsWriter
from raysys.report.progress import Progress
from raysys.rollout.engine import environment
from raysys.rollout.spec import RolloutSpec, Sampling
from raysys.runtime import first_cause, ray_data, waiting

log = logging.getLogger("raysys")

AT_ONCE = 32
"""Shards that an engine has at the same time, at most."""
SAMPLES = 6
"""Answers that the report shows."""


def generate(config: GenerateConfig, session: Session, device: str, dtype: str) -> None:
    """Answers what is not answered yet and closes the run.

    Raises:
        DataError: a row's tag has no teacher, too many rows are unusable, or no answer at all could be kept.
        CheckpointError: the data changed since the run began, or a shard could not be written.
        PlacementError, DeadlineError, InfrastructureError: engines that find no room, do not start, hang or die too often.
    """
    teachers = {tag: local_or_id(folder) for tag, folder in config.teachers.items()}
    prompts = Prompts.of(config.data, config.seed, teachers)
    shards = prompts.cut(config.rows, config.shard_rows)
    books = Books(session.folder, shards)
    watch = Watch(config, session.folder)
    live = Live(session.folder, session.job, lambda: watch.status(session))
    with MetricsWriter(session.folder, session.job, session.folder.name) as metrics, live:
        account = Account(config, session, shards, metrics)
        done = books.finished()
        for number, record in done.items():
            account.add(number, record)
        if done:
            log.info("resumed: %d of %d shards are finished", len(done), len(shards))
        account.fresh = True
        for teacher, own in itertools.groupby(shards, lambda shard: shard.teacher):
            left = {shard.number: shard for shard in own if shard.number not in done}
            if left:
                bundle = {"GPU": float(config.rollout.tensor_parallel)} if device == "gpu" else {"CPU": 1.0}
                work = _work(config, session.folder, watch.begin(teacher, bundle), teacher, left, prompts, device, dtype)
                for number, record in Stage(config, work, watch).results():
                    account.add(number, record)
    account.close(books.finished())
    session.ledger.finish(len(shards))


def _work(
    config: GenerateConfig, folder: Path, beats: Path, teacher: str, shards: dict[int, Shard], prompts: Prompts, device: str, dtype: str
) -> Work:
    return Work(
        folder=folder,
        beats=beats,
        teacher=teacher,
        spec=RolloutSpec(
            model=teacher,
            device=device,
            dtype=dtype,
            max_model_len=config.max_prompt_tokens + config.max_response_tokens,
            config=config.rollout,
            log_dir=str(folder),
        ),
        sampling=Sampling(
            max_tokens=config.max_response_tokens,
            seed=config.seed,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
        ),
        samples=config.samples,
        keep=config.keep,
        prompts=prompts,
        shards=shards,
        max_prompt_tokens=config.max_prompt_tokens,
        max_response_tokens=config.max_response_tokens,
        retries=config.rollout.retries,
        deadlines=config.deadlines,
    )


class Stage:
    """One teacher's shards through its engines.

    Ray Data runs in a thread, so that each wait for it can have a deadline. What the engines do meanwhile is in `ledger/engines/`.
    """

    def __init__(self, config: GenerateConfig, work: Work, watch: Watch):
        self._config, self._work, self._watch = config, work, watch
        self._gpus = config.rollout.tensor_parallel if work.spec.device == "gpu" else 0
        self._came: queue.Queue[Any] = queue.Queue()

    def results(self) -> Iterator[tuple[int, Record]]:
        """(number, record) of each shard as it is published. See `generate` for the errors."""
        log.info("%s answers %d shards", self._work.teacher, len(self._work.shards))
        threading.Thread(target=self._stream, name="ray-data", daemon=True).start()
        for _ in self._work.shards:
            number, result = self._next()
            if isinstance(result, RaysysError):
                raise result
            self._watch.shard()
            yield number, result

    def _next(self) -> tuple[int, Any]:
        with waiting("the teacher's engines", "generate", self._watch.patience, "deadlines.generate"):
            while True:
                try:
                    found = self._came.get(timeout=1.0)
                except queue.Empty:
                    self._watch.check()
                    continue
                if isinstance(found, BaseException):
                    raise first_cause(found, f"the engine of {self._work.teacher}", "generate") from found
                return found

    def _stream(self) -> None:
        try:
            for block in self._dataset().iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for number, result in zip(block.column("shard").to_pylist(), block.column("result").to_pylist(), strict=True):
                    self._came.put((number, heard(result)))
        except BaseException as error:
            error.__cause__ = None  # Ray Data says with it that the error is none of its user's, and hides it behind that
            self._came.put(error)

    def _dataset(self) -> Any:
        data, rollout, numbers = ray_data(), self._config.rollout, list(self._work.shards)
        at_once = shards_at_once(rollout.max_sequences, self._config.shard_rows * self._config.samples)
        pool = data.ActorPoolStrategy(
            min_size=min(rollout.fewest, len(numbers)),
            max_size=min(rollout.most, len(numbers)),
            # A pool that may grow does so when its actors have twice as much as they can do at once.
            max_tasks_in_flight_per_actor=at_once if rollout.fewest == rollout.most else 2 * at_once,
            max_concurrent_calls_per_actor=at_once,
            enable_true_multi_threading=True,
        )
        rows = data.from_items([{"shard": number} for number in numbers], override_num_blocks=len(numbers))
        place: dict[str, Any] = {"num_gpus": self._gpus} if self._gpus else {"num_cpus": 1}
        answered = rows.map_batches(
            Teacher,
            fn_constructor_args=(self._work,),
            batch_size=1,
            compute=pool,
            runtime_env={"env_vars": environment(self._work.spec)},
            **place,
        )
        answered.context.enable_progress_bars = False
        return answered


def shards_at_once(seats: int, samples: int) -> int:
    """How many shards of so many samples keep an engine's seats full while the last answers of one are waited for."""
    return min(AT_ONCE, 1 + -(-seats // samples))


class Account:
    """What the run knows of its shards: a line of metrics each, progress, the unusable rows, and what is left to report."""

    def __init__(self, config: GenerateConfig, session: Session, shards: Sequence[Shard], metrics: Any):
        self._config, self._session, self._shards, self._metrics = config, session, shards, metrics
        self._progress = Progress(len(shards))
        self._bad = BadRows(config.data.max_bad_share)
        self._done = 0
        self.fresh = False
        """Shards that come now are this attempt's own."""

    def add(self, number: int, record: Record) -> None:
        """Raises DataError when too large a share of the rows is unusable."""
        line = self._line(number, record)
        self._metrics.write(line)
        self._bad.good(record.seen - record.bad)
        self._bad.seen, self._bad.bad = self._bad.seen + record.bad, self._bad.bad + record.bad
        self._bad.reasons.update(record.reasons)
        self._bad.examples.extend(record.examples[: 20 - len(self._bad.examples)])
        self._done += 1
        if self.fresh:
            self._session.ledger.committed = self._session.ledger.step + self._done  # a restart has something to go on from
            self._progress.show(line | {"step": self._done - 1})
        self._bad.check()

    def _line(self, number: int, record: Record) -> dict[str, Any]:
        """The line of a shard: numbers of all domains together, shares where there is something to share, and `counts` by domain."""
        samples, judged = record.total("samples"), record.total("judged")
        line: dict[str, Any] = {"step": number, "version": 0, "shard": record.shard, "rows": record.total("prompts"), "samples": samples}
        line |= {name: record.total(name) for name in ("kept", "cut_off", "empty", "wrong", "tokens")}
        line |= {"bad_rows": record.bad, "tokens_per_second": record.rate}
        if samples:
            line |= {"response_tokens": record.total("tokens") / samples, "truncated": record.total("cut_off") / samples}
        if judged:
            line["correct"] = record.total("correct") / judged
        return line | {
            "counts": record.counts,
            "seconds": {"generate": record.seconds, "other": record.waited, "total": record.seconds + record.waited},
        }

    def close(self, records: dict[int, Record]) -> None:
        """Puts the lines in the order of the shards and quotes some answers. Raises DataError: none was kept."""
        folder = self._session.folder
        for line in self._bad.lines():
            log.info(line)
        self._bad.check(complete=True)
        lines = {record["step"]: line for line, record in read_json_lines(folder / "metrics.jsonl")}
        write_atomically(folder / "metrics.jsonl", "".join(lines[step] + "\n" for step in sorted(lines)))
        total = {name: sum(record.total(name) for record in records.values()) for name in ("samples", "kept", "cut_off", "empty", "wrong")}
        told = f"{total['kept']:,} of {total['samples']:,} answers kept; cut off {total['cut_off']:,}, empty {total['empty']:,}"
        told += f", wrong {total['wrong']:,}" if self._config.keep == "correct" else ""
        if not total["kept"]:
            raise DataError(
                f"there is nothing to train on: {told}", "see max_response_tokens, keep and the teachers; then choose another name="
            )
        self._quote(folder / "samples.jsonl", records)
        log.info("%s; data: %s", told, folder / "data")

    def _quote(self, path: Path, records: dict[int, Record]) -> None:
        by_domain: dict[str, list[dict[str, Any]]] = {}
        for record in records.values():
            for text in record.texts:
                by_domain.setdefault(text["domain"], []).append(text)
        in_turn = [text for group in itertools.zip_longest(*by_domain.values()) for text in group if text is not None]
        path.unlink(missing_ok=True)
        for text in in_turn[:SAMPLES]:
            append_json(path, {"step": 0, "label": "teacher"} | text)
