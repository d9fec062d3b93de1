"""The driver's side of pretraining data: plans the units of a corpus and has Ray Data make those that the cache lacks.

Only small records come back from tasks, so the driver's memory and Ray's object store stay as they are however much text there is; the
tokens go from task to shard file. What is there is published in a file that workers read (`token_stream`).
"""

from __future__ import annotations

import json
import os
import pickle
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from raysys.config.corpora import Corpus
from raysys.data.cleaning import Account
from raysys.data.corpus import Unit, digest, plan_units
from raysys.data.shards import Folder, read_note, shard_name
from raysys.data.token_plan import Mixture, Plan, SourceOrder, counts_file, needed_order, plan_file, rows_of
from raysys.data.tokenise import Work, tokenise_all
from raysys.errors import ConfigError, DataError, DeadlineError, RaysysError
from raysys.runtime import first_cause, ray_data

Execute = Callable[[Work, Sequence[Unit], int | None], Generator[dict[str, Any], None, None]]
"""Makes units, so many at the same time; gives what `tokenise` does, in any order."""

_CPUS = 0.5
"""Of a task: a job's actors may have booked all but little."""
_UNITS = 1024
"""Of one execution of Ray Data, which knows all its tasks from the beginning."""
_PUBLISH_SECONDS = 0.5
_NOTES_SECONDS = 60.0
_STOP_SECONDS = 5.0


def _notes_file(name: str) -> str:
    return f"{name}.notes.json"


def with_ray_data(work: Work, units: Sequence[Unit], tasks: int | None) -> Generator[dict[str, Any], None, None]:
    """The units as tasks of one execution, a task each, started in their order."""
    items = [{"unit": pickle.dumps(unit)} for unit in units]
    tokenised: Any = (
        ray_data()
        .from_items(items, override_num_blocks=len(items))
        .map_batches(partial(_task, work=work), batch_size=None, num_cpus=_CPUS, concurrency=tasks or _cores())
    )
    tokenised.context.enable_progress_bars = False
    for batch in tokenised.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from (json.loads(text) for text in batch.column("made").to_pylist())


def _cores() -> int | None:
    """Those of a machine by itself that says it has more CPUs, for actors' bookkeeping: a task more is a process that waits for a core."""
    import ray

    nodes, cores = [node for node in ray.nodes() if node["Alive"]], os.cpu_count() or 1
    return cores if len(nodes) == 1 and nodes[0]["Resources"].get("CPU", 0) > cores else None


def _task(batch: Mapping[str, np.ndarray], work: Work) -> Iterator[pa.Table]:
    for made in tokenise_all(work, (pickle.loads(unit) for unit in batch["unit"])):
        yield pa.table({"made": [json.dumps(made)]})


class TokenCache:
    """A corpus as shards of packed sequences.

    Args:
        corpus: what to read and how.
        folder: of the cache, where `data.cache` names none.
        seed: of the run; decides the order of sequences, and with it that in which units are made.
        execute: who makes units; tests do it in their own process.

    Raises:
        ConfigError, DataError: a source is missing, empty or unreadable; see `plan_units`. No tokenizer, or one without an end token.
    """

    def __init__(self, corpus: Corpus, folder: str | None = None, seed: int = 0, execute: Execute = with_ray_data):
        self._corpus, self._execute = corpus, execute
        self.path = corpus.cache or folder or ""
        """What `TokenStream` is to open, together with `plan.name`."""
        if not self.path:
            raise ConfigError("data.cache is not set", "name a folder that all workers see")
        self._folder = Folder.at(self.path)
        self._work = Work.of(corpus, self._folder)
        units = {
            label: plan_units(source, label, corpus.unit_bytes, corpus.longest_row) for label, source in sorted(corpus.sources.items())
        }
        self.plan = _plan(corpus, self._work, units, seed)
        self.account = Account.new(corpus.max_bad_share)
        """What became of the documents of all units made so far, by this run or before."""
        self.tokenised = 0
        """Units made by this run."""
        self._tokens, self._seconds = 0, 0.0
        self._notes: dict[str, dict[str, Any]] = {}
        self._missing = self._look(units)
        self._error: RaysysError | None = None
        self._stopped, self._trained = threading.Event(), threading.Condition()
        self._samples = 0
        self._thread: threading.Thread | None = None
        self._published, self._noted, self._pause = 0.0, time.monotonic(), _PUBLISH_SECONDS
        self._folder.write(plan_file(self.plan.name), self.plan.to_json())
        self._publish()

    # -- what the driver calls

    def fill(self) -> None:
        """Begins to make what is missing, in a thread; nothing is started when nothing is. Raises what `check` does."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="token cache", daemon=True)
            self._thread.start()
            if not self._missing:
                self._thread.join()
        self.check()

    def check(self) -> None:
        """Raises what ended the making of units: DataError (a bad file, too many bad documents, a source smaller than a sequence),
        InfrastructureError (the cache cannot be written, tasks died)."""
        if self._error is not None:
            raise self._error

    def wait(self, seconds: float) -> None:
        """Until the cache is full. Raises DeadlineError, and what `check` does."""
        self.fill()
        assert self._thread is not None
        self._thread.join(timeout=seconds)
        self.check()
        if self._thread.is_alive():
            raise DeadlineError("token cache", "tokenise the corpus", seconds, "data.wait, or free CPUs for Ray Data's tasks")

    def trained(self, samples: int) -> None:
        """Tells how many sequences training has come to; only `data.ahead` needs it."""
        with self._trained:
            self._samples = samples
            self._trained.notify_all()

    def progress(self) -> dict[str, float]:
        """Figures for the run's metrics: units in all and there, units of this run, what is there, tokens that this run made a second."""
        there = list(self._notes.values())
        return {
            "units": len({key for keys in self.plan.units.values() for key in keys}),
            "units_ready": len(there),
            "units_tokenised": self.tokenised,
            "sequences": sum(note["rows"] for note in there),
            "tokens": sum(note["tokens"] for note in there),
            "held_out_sequences": sum(note["held_rows"] for note in there),
            "tokens_per_second": self._tokens / self._seconds if self._seconds else 0.0,
        }

    def close(self) -> None:
        """Stops making units; those under way are left to end."""
        self._stopped.set()
        self.trained(self._samples)
        if self._thread is not None:
            self._thread.join(timeout=_STOP_SECONDS)

    # -- the thread

    def _run(self) -> None:
        try:
            together = min(self._corpus.ahead or _UNITS, _UNITS)
            for at in range(0, len(self._missing), together):
                self._wait_for_training()
                began = time.monotonic()
                with closing(self._execute(self._work, self._missing[at : at + together], self._corpus.tasks)) as made:
                    for note in made:
                        if self._stopped.is_set():
                            return
                        self._take(note)
                        self._seconds, began = self._seconds + time.monotonic() - began, time.monotonic()
                self._publish()
            self._check_whole()
        except BaseException as error:
            self._error = error if isinstance(error, RaysysError) else first_cause(error, "token cache", "tokenise the corpus")
        finally:
            self._publish(notes=True)

    def _take(self, note: dict[str, Any]) -> None:
        if note["key"] in self._notes:  # Ray repeats a task whose node died after it had told
            return
        self._notes[note["key"]] = note
        self.tokenised += 1
        self._tokens += note["tokens"] + note["held_tokens"]
        self.account.add(note["account"])
        self.account.bad.check()
        if time.monotonic() - self._published > self._pause:
            self._publish(notes=time.monotonic() - self._noted > _NOTES_SECONDS)

    def _wait_for_training(self) -> None:
        """Until training has come within `data.ahead` units of the first sequence that it could not have."""
        while self._corpus.ahead is not None and self._notes and not self._stopped.is_set():
            rows = sum(note["rows"] for note in self._notes.values()) / len(self._notes)
            with self._trained:
                if self._horizon() - self._samples < self._corpus.ahead * rows:
                    return
                self._trained.wait(1.0)

    def _horizon(self) -> int:
        """Samples that training can have with the units that are there."""
        counts, known = self._counts(), {}
        for label in self.plan.units:
            order = SourceOrder(self.plan, label)
            order.know(rows_of(self.plan, label, counts, "train"))
            if order.total is None:
                known[label] = order.known
        return Mixture(self.plan.weights).until(known) if known else 0

    def _check_whole(self) -> None:
        """Once everything is there. Raises DataError."""
        self.account.bad.check(complete=True)
        for label, keys in self.plan.units.items():
            tokens = sum(self._notes[key]["tokens"] for key in keys)
            if tokens < self.plan.sequence:
                left = "; ".join(self.account.lines()[:3])
                raise DataError(
                    f"source {label} has {tokens} tokens, less than one sequence of {self.plan.sequence}" + (f" ({left})" if left else ""),
                    f"give data.sources.{label} more text, or lower data.sequence",
                )

    # -- files

    def _look(self, units: Mapping[str, list[Unit]]) -> list[Unit]:
        """Finds out what is there. Returns what is not, in the order in which it will be asked for."""
        self._folder.sweep()
        sizes = self._folder.sizes()
        noted = json.loads(self._folder.read(_notes_file(self.plan.name)) or b"{}")
        missing: dict[str, Unit] = {}
        for label, number in needed_order(self.plan, {label: [unit.bytes for unit in own] for label, own in units.items()}):
            key = self.plan.units[label][number]
            if key in self._notes or key in missing:
                continue
            note = self._valid(key, noted.get(key), sizes)
            if note is None:
                missing[key] = units[label][number]
            else:
                self._notes[key] = note
                self.account.add(note["account"])
        return list(missing.values())

    def _valid(self, key: str, note: dict[str, Any] | None, sizes: Mapping[str, int]) -> dict[str, Any] | None:
        """The note of a unit whose shards are whole, as far as names and sizes say."""
        size, held_size = (sizes.get(shard_name(key, split), 0) for split in ("train", "validation"))
        if not size:
            return None
        if note is None:  # made, but the driver died before it wrote this down
            found = read_note(self._folder, key)
            return None if found is None or bool(found["held_rows"]) > bool(held_size) else found | {"size": size, "held_size": held_size}
        return note if note["size"] == size and (not note["held_rows"] or note["held_size"] == held_size) else None

    def _counts(self) -> dict[str, list[int]]:
        return {key: [note["rows"], note["held_rows"], note["tokens"]] for key, note in self._notes.items()}

    def _publish(self, notes: bool = False) -> None:
        error = self._error
        told = None if error is None else {"data": isinstance(error, DataError), "message": error.message, "remedy": error.remedy}
        began = time.monotonic()
        try:
            self._folder.write(counts_file(self.plan.name), json.dumps({"counts": self._counts(), "error": told}).encode())
            if notes:
                self._folder.write(_notes_file(self.plan.name), json.dumps(self._notes).encode())
                self._noted = time.monotonic()
        except RaysysError as failed:
            self._error = self._error or failed
        self._published = time.monotonic()
        # Of a corpus of a million units this file has tens of megabytes.
        self._pause = max(_PUBLISH_SECONDS, 20 * (self._published - began))


def _plan(corpus: Corpus, work: Work, units: Mapping[str, list[Unit]], seed: int) -> Plan:
    weights = {label: corpus.sources[label].weight for label in units}
    order = f"shuffled by {corpus.shuffle_units} units, seed {seed}" if corpus.shuffle else "as in the files"
    facts = {"tokenizer": work.codec.digest, "cutting": work.cutting, "order": order}
    for label, own in units.items():
        pieces = [piece for unit in own for piece in unit.pieces]
        files = {piece.path: piece.size for piece in pieces}
        content = digest([[unit.column, [piece.content() for piece in unit.pieces]] for unit in own])
        facts[f"sources.{label}.weight"] = f"{weights[label]:g}"
        facts[f"sources.{label}.text"] = f"{len(files)} files of {sum(files.values())} bytes ({content})"
    return Plan(
        sequence=corpus.sequence,
        vocabulary=work.codec.vocabulary,
        eos=work.codec.eos,
        seed=seed,
        shuffle=corpus.shuffle,
        window=corpus.shuffle_units,
        weights=weights,
        units={label: tuple(work.key(unit) for unit in own) for label, own in units.items()},
        facts=facts,
    )
