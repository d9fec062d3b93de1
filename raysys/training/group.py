"""The trainer's ranks as a group, from the driver. Imports neither torch nor an engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import ray
import ray.exceptions
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raysys.batch import Batch, Ragged
from raysys.buckets import Plan
from raysys.config.parts import Deadlines, Trainer
from raysys.errors import ConfigError, DataError, DeadlineError, InfrastructureError, RaysysError
from raysys.runtime import compute_environment, died, get, reserve, waiting_for
from raysys.training.objectives import Objective
from raysys.training.spec import Share, Tally, TrainerSpec
from raysys.training.split import split
from raysys.training.worker import TrainerWorker

# A rank that dies takes the others' collectives down with it; theirs is often the first error to arrive, and never the cause.
_GRACE_SECONDS = 5.0
_PARTING_SECONDS = 2.0


class TrainerGroup:
    """DeepSpeed ranks behind one small interface. A context manager that closes itself.

    Args:
        config: ranks, ZeRO stage, micro-batches, optimiser.
        model: Hugging Face folder or id to start from.
        objective: what a step minimises.
        learning_rate: its peak.
        steps: where a falling learning rate ends.
        temperature: of the rollouts; divides the logits.
        device: "cpu" or "gpu".
        dtype: "float32", or "bfloat16" with float32 masters.
        log_dir: where DeepSpeed's own log goes.
        share: of its GPU that a rank takes, as Ray counts; the rest of its bundle, and a CPU, is for whoever lives there too.

    Raises:
        ConfigError: an impossible combination.
    """

    def __init__(
        self,
        config: Trainer,
        model: str,
        objective: Objective,
        learning_rate: float,
        steps: int,
        seed: int,
        temperature: float,
        device: str,
        dtype: str,
        deadlines: Deadlines,
        log_dir: str | None = None,
        share: float = 1.0,
        vocabulary: int | None = None,
    ):
        if config.offload_optimizer and config.zero_stage == 0:
            raise ConfigError("trainer.offload_optimizer needs trainer.zero_stage of 1 or more, got 0")
        self.config, self._deadlines, self._objective = config, deadlines, objective
        self.spec = TrainerSpec(config, model, objective, learning_rate, steps, seed, temperature, device, dtype, vocabulary, log_dir)
        self.workers: list[Any] = []
        self._share, self._has_placed, self._padded = share, False, False
        self.placement: PlacementGroup | None = None

    def __enter__(self) -> TrainerGroup:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def start(self) -> list[dict[str, Any]]:
        """Places the ranks, lets them meet and load the model. Returns what each holds.

        Raises:
            PlacementError: no room in the cluster.
            DeadlineError: it took longer than `deadlines.start`.
            ConfigError: the folder holds no model that can be trained.
        """
        config, ranks = self.config, self.config.ranks
        gpus = 1.0 if self.spec.device == "gpu" else 0.0
        bundle: dict[str, float] = {"CPU": config.threads + (self._share < 1)} | ({"GPU": gpus} if gpus else {})
        self.placement = reserve([bundle] * ranks, what="trainer", timeout=self._deadlines.placement)
        environment = {"env_vars": compute_environment(config.threads)}
        actor = ray.remote(TrainerWorker)
        for rank in range(ranks):
            place = PlacementGroupSchedulingStrategy(self.placement, placement_group_bundle_index=rank)
            options: dict[str, Any] = {"num_cpus": config.threads, "num_gpus": gpus * self._share, "scheduling_strategy": place}
            self.workers.append(actor.options(runtime_env=environment, **options).remote(self.spec, rank, ranks))
        host, port = get(
            self.workers[0].address.remote(),
            timeout=self._deadlines.start,
            actor="trainer rank 0",
            operation="start its process",
            knob="deadlines.start",
        )
        held = self._all("start", [(host, port)] * ranks, self._deadlines.start, "load the model", "deadlines.start")
        self._padded = held[0]["padded"]
        return held

    # -- training

    def step(self, batch: Batch) -> dict[str, float]:
        """One step on all rows of the batch. Returns metrics: means over the whole batch's response tokens, whoever computed them.

        `loss`, `entropy`, `grad_norm` (before clipping; mean over mini-batches), `learning_rate`, `tokens`, and the objective's own.

        Raises:
            DataError: nothing to train on, or a row that cannot be trained on.
            NumericsError: a loss or the gradient norm is not finite; names the step and the rows.
            InfrastructureError: a rank died.
            DeadlineError: it took longer than `deadlines.train`.
        """
        steps = self._split(batch, self.config.mini_batches)
        if min(step[0].tokens for step in steps) == 0:
            raise DataError(f"a batch of {len(batch)} rows holds no response token to train on in one of {len(steps)} mini-batches")
        parts = [self._part(batch, [step[rank] for step in steps]) for rank in range(self.config.ranks)]
        tallies: list[Tally] = self._all("step", parts, self._deadlines.train, "train a step", "deadlines.train")
        whole = tallies[0]
        for tally in tallies[1:]:
            whole.merge(tally)
        return whole.metrics()

    def logprobs(self, batch: Batch) -> list[np.ndarray]:
        """The student's log-probs in nats of each row's response ids, float32. Errors as `step`."""
        return self._by_row(batch, "logprobs", "compute log-probs", np.float32)

    def draw(self, batch: Batch) -> Ragged:
        """One id a trained response token, drawn from the student on the data's own prefix: see `Engine.draw`. Errors as `step`."""
        return Ragged.of(self._by_row(batch, "draw", "draw on the data", np.int32), np.int32)

    def _by_row(self, batch: Batch, method: str, operation: str, dtype: Any) -> list[np.ndarray]:
        shares = self._split(batch, 1)[0]
        parts = [(part, own[0]) for part, own in (self._part(batch, [share], ()) for share in shares)]
        found: list[Ragged] = self._all(method, parts, self._deadlines.train, operation, "deadlines.train")
        rows: list[np.ndarray] = [np.zeros(0, dtype)] * len(batch)
        for share, piece in zip(shares, found, strict=True):
            for row, values in zip(share.rows, piece.rows(), strict=True):
                rows[row] = values
        return rows

    def _split(self, batch: Batch, mini_batches: int) -> list[list[Share]]:
        return split(
            batch.lengths("prompt_ids"),
            batch.lengths("response_ids"),
            ranks=self.config.ranks,
            mini_batches=mini_batches,
            budget=self.config.micro_batch_tokens,
            padded=self._padded,
            trained=batch.trained,
        )

    def _part(self, batch: Batch, shares: list[Share], columns: tuple[str, ...] | None = None) -> tuple[Batch, list[Share]]:
        """A rank's rows in one batch, and its shares counted in those rows."""
        read = self._objective.columns if columns is None else columns
        wanted = dict.fromkeys(("prompt_id", "sample", "domain", "prompt_ids", "response_ids", "runs", *read))
        missing = [name for name in ("prompt_ids", "response_ids") if name not in batch]
        if missing:
            raise DataError(f"the batch has no column {missing[0]}; it has {', '.join(batch.columns)}")
        needed = Batch(batch.table.select([name for name in wanted if name in batch]))
        rows = np.unique(np.concatenate([share.rows for share in shares]))
        if len(rows) == len(batch):
            return needed, shares
        local = [Share(np.searchsorted(rows, share.rows), share.tokens, share.sequences, share.micro_batches) for share in shares]
        return needed.take(rows), local

    # -- weights

    def bucket_plan(self, max_bytes: int) -> Plan:
        """What the model's weights are, and what lies where in buckets of at most `max_bytes` (a larger tensor gets one of its own).

        Tied tensors appear under each of their names.
        """
        plans = self._all("bucket_plan", [(max_bytes,)] * self.config.ranks, self._deadlines.push, "plan a weight push", "deadlines.push")
        return plans[0]

    def memory(self) -> str:
        """Which shared memory rank 0 sees; see `raysys.memory.whose`."""
        return get(
            self.workers[0].memory.remote(), timeout=self._deadlines.push, actor="trainer rank 0", operation="look", knob="deadlines.push"
        )

    def gather_bucket(self, index: int, in_place: bool = False) -> Any:
        """Object ref of bucket `index` (`raysys.buckets.Packed`) of the last plan; its bytes do not come to the driver.

        With several ranks it is complete on return, and what went wrong is raised here. With `in_place` it only says where its bytes
        are in rank 0's shared memory, and they stay there until `UNDER_WAY` more are gathered.
        """
        self._has_placed |= in_place
        refs = [worker.share_bucket.options(num_returns=2).remote(index, in_place) for worker in self.workers]
        if len(refs) > 1:
            self._wait([done for _, done in refs], self._deadlines.push, f"gather bucket {index}", "deadlines.push")
        return refs[0][0]

    def tensor_digests(self, index: int) -> list[str]:
        """Digest of each tensor of bucket `index` as the trainer has it: what tells which of them arrived otherwise."""
        arguments = [(index,)] * self.config.ranks
        return self._all("tensor_digests", arguments, self._deadlines.push, f"hash bucket {index}", "deadlines.push")[0]

    def meeting_point(self) -> tuple[str, int]:
        """Address of rank 0's node and a port free on it."""
        return get(
            self.workers[0].address.remote(),
            timeout=self._deadlines.push,
            actor="trainer rank 0",
            operation="find a port",
            knob="deadlines.push",
        )

    def open_sender(self, sender: Any, address: str, port: int, world_size: int) -> Any:
        """Object ref that is ready when rank 0's `sender(address, port, world_size)` has met all its receivers."""
        return self.workers[0].open_sender.remote(sender, address, port, world_size)

    def send_bucket(self, index: int) -> list[Any]:
        """Object refs, one a rank, ready when bucket `index` has left; rank 0's holds the digest of what left."""
        return [worker.send_bucket.remote(index) for worker in self.workers]

    def offer_bucket(self, index: int, sender: Any, readers: Collection[int]) -> list[Any]:
        """Object refs, one a rank, of bucket `index` packed on the rank's GPU for another process there to read.

        Args:
            sender: makes each rank's sender, once; see `raysys.training.weights.Packer.offer`.
            readers: ranks whose offer will be read. The others help to gather; rank 0 gives the digest all the same.
        """
        return [worker.offer_bucket.remote(index, sender, rank in readers) for rank, worker in enumerate(self.workers)]

    def withdraw_buckets(self) -> None:
        """Frees what was offered, before anything else that is asked of the ranks; nobody reads it any more. Waits for nothing."""
        for worker in self.workers:
            worker.withdraw_buckets.remote()

    def release_cache(self) -> None:
        """Leaves the GPUs what no tensor of the trainer is in."""
        self._all("release_cache", [()] * self.config.ranks, self._deadlines.push, "release GPU memory", "deadlines.push")

    def probe_logprobs(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Log-probs of ids[1:] given what precedes each, float32, temperature 1."""
        probe = np.asarray(ids, dtype=np.int64)
        return self._all("probe_logprobs", [(probe,)] * self.config.ranks, self._deadlines.push, "probe", "deadlines.push")[0]

    # -- files

    def save(self, folder: str) -> None:
        """Writes all that `load` needs for going on bit by bit. Not atomic: publish it afterwards. Several nodes need a shared folder."""
        self._all("save", [(str(folder),)] * self.config.ranks, self._deadlines.checkpoint, "save", "deadlines.checkpoint")

    def load(self, folder: str) -> None:
        """Goes on from `save`, bit by bit for the same ranks, ZeRO stage and dtype, else to rounding.

        Raises:
            CheckpointError: nothing complete is there.
        """
        self._all("load", [(str(folder),)] * self.config.ranks, self._deadlines.checkpoint, "load", "deadlines.checkpoint")

    def export(self, folder: str) -> None:
        """Writes a Hugging Face folder that stock transformers and stock vLLM load."""
        self._all("export", [(str(folder),)] * self.config.ranks, self._deadlines.checkpoint, "export", "deadlines.checkpoint")

    def close(self) -> None:
        """Ends the ranks and frees their place. Safe to call twice, and on a group that never started."""
        if self._has_placed and self.workers:
            ray.wait([self.workers[0].withdraw_buckets.remote()], timeout=_PARTING_SECONDS)
        for worker in self.workers:
            ray.kill(worker)
        self.workers = []
        if self.placement is not None:
            remove_placement_group(self.placement)
            self.placement = None

    # -- inside

    def _all(self, method: str, arguments: Sequence[tuple[Any, ...]], timeout: float, operation: str, knob: str) -> list[Any]:
        """Calls a method on every rank; results by rank."""
        if not self.workers:
            raise InfrastructureError(f"the trainer cannot {operation}: it is not running", "call start() first")
        refs = [getattr(worker, method).remote(*own) for worker, own in zip(self.workers, arguments, strict=True)]
        return self._wait(refs, timeout, operation, knob)

    def _wait(self, refs: list[Any], timeout: float, operation: str, knob: str) -> list[Any]:
        """Results by rank, or what went wrong first: a rank's own error or death rather than what its peers made of it."""
        with waiting_for([_name(rank) for rank in range(len(refs))], operation, timeout, knob) as answered:
            return self._results(refs, timeout, operation, knob, answered)

    def _results(self, refs: list[Any], timeout: float, operation: str, knob: str, answered: Callable[[str], None]) -> list[Any]:
        deadline, errors = time.monotonic() + timeout, {}
        results: list[Any] = [None] * len(refs)
        pending = {ref: rank for rank, ref in enumerate(refs)}
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            rank = pending.pop(ready[0])
            answered(_name(rank))
            try:
                results[rank] = get(ready[0], timeout=timeout, actor=_name(rank), operation=operation, knob=knob)
            except RaysysError as error:
                if not errors:
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
                errors[rank] = error
                if _is_cause(error):
                    break
        if errors:
            raise next((error for error in errors.values() if _is_cause(error)), next(iter(errors.values())))
        if pending:
            late = ", ".join(str(rank) for rank in pending.values())
            raise DeadlineError(f"trainer rank {late}", operation, timeout, knob)
        return results


def _name(rank: int) -> str:
    return f"trainer rank {rank}"


def _is_cause(error: RaysysError) -> bool:
    """Raised on purpose, or the rank is dead; anything else may be the echo of another rank's end."""
    return type(error) is not InfrastructureError or died(error)
