"""The scorers as the driver sees them: one call annotates a batch. Imports neither torch nor an engine."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raysys.batch import Batch, Ragged
from raysys.config.parts import Deadlines, Scoring
from raysys.errors import DeadlineError, InfrastructureError
from raysys.runtime import compute_environment, died, get, reserve
from raysys.scoring.routing import route, shard
from raysys.scoring.scorer import ScorerSpec, ScorerWorker

log = logging.getLogger(__name__)

_READ = ("prompt_id", "domain", "prompt_ids", "teacher_prompt_ids", "response_ids", "answer", "verifier", "metadata")


Queries = Ragged | Iterable[tuple[np.ndarray, Ragged | None]] | None


@dataclass(frozen=True)
class _Sent:
    """A piece of a batch on its way through a scorer."""

    rank: int
    rows: np.ndarray
    work: tuple[Batch, Ragged | None]
    ref: Any
    worker: Any


class Host(Protocol):
    """Somebody with a place for each scorer beside its own ranks."""

    placement: PlacementGroup | None


class ScorerGroup:
    """Scorer actors, each with all frozen models; rows are dealt out by their tokens. A context manager that closes itself.

    Args:
        config: ranks, micro-batches, threads.
        teachers: domain tag to folder; `default` serves rows without a tag.
        reference: folder or None. Neither loaded nor scored when `reward_scale` is 1, held once when it is also a teacher.
        tokenizer_folder: the student's.
        temperature: of the rollouts; divides the logits.
        device: "cpu" or "gpu".
        dtype: of the frozen weights, e.g. "float32", "bfloat16".
        vocabulary: first ids that probabilities are over; None: all.
        rewards: whether rows with a verifier get a `reward`.
        host: whose placement group the scorers live in (a bundle a rank, reserved before), each beside a rank; None: their own.
        share: of a GPU for each, where there is a host.
    """

    def __init__(
        self,
        config: Scoring,
        teachers: dict[str, str],
        reference: str | None,
        reward_scale: float,
        tokenizer_folder: str,
        temperature: float,
        device: str,
        dtype: str,
        deadlines: Deadlines,
        rewards: bool = True,
        vocabulary: int | None = None,
        host: Host | None = None,
        share: float = 1.0,
    ):
        self._config, self._deadlines, self._rewards, self._host, self._share = config, deadlines, rewards, host, share
        self.spec = ScorerSpec(
            teachers=dict(teachers),
            reference=reference if reward_scale != 1 else None,
            tokenizer=tokenizer_folder,
            temperature=temperature,
            device=device,
            dtype=dtype,
            micro_batch_tokens=config.micro_batch_tokens,
            chunk_tokens=config.chunk_tokens,
            threads=config.threads,
            vocabulary=vocabulary,
            offload=config.offload,
        )
        self._placement: PlacementGroup | None = None
        self._workers: list[Any] = []
        self.lost = 0

    def __enter__(self) -> ScorerGroup:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def start(self) -> list[dict[str, Any]]:
        """Places the actors and loads the models. Returns what each holds.

        Raises:
            PlacementError: no room in the cluster.
            DeadlineError: loading took longer than `deadlines.start`.
            ConfigError: a folder holds no model to score with.
        """
        bundle = self._bundle
        if self._host is not None:
            self._placement = self._host.placement
        else:
            self._placement = reserve([bundle] * self._config.ranks, what="scorer", timeout=self._deadlines.placement)
        self._workers = [self._actor(rank, bundle) for rank in range(self._config.ranks)]
        return self._loaded([worker.start.remote() for worker in self._workers])

    def _actor(self, rank: int, bundle: dict[str, float]) -> Any:
        assert self._placement is not None
        place = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=rank)
        resources: dict[str, Any] = {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0)}
        environment = {"env_vars": compute_environment(self._config.threads)}
        return ray.remote(ScorerWorker).options(scheduling_strategy=place, runtime_env=environment, **resources).remote(self.spec)

    def _loaded(self, refs: list[Any]) -> list[dict[str, Any]]:
        return get(refs, timeout=self._deadlines.start, actor="scorer", operation="load the frozen models", knob="deadlines.start")

    def annotate(self, batch: Batch, queries: Queries = None) -> Batch:
        """The same rows with `teacher_logprobs` [, `reference_logprobs`] and, if any row has a verifier, `reward` (0 for rows without).

        Args:
            batch: rows with responses.
            queries: ids to score in place of the sampled ones, K for each response token, flat by row (see `ScorerWorker.score`); or pairs
                of consecutive rows and their ids, which are scored as they come. They are kept in the column `query_ids`.

        Raises:
            DataError: a tag has no teacher (checked before any work is sent), or a row does not fit the models.
            InfrastructureError, DeadlineError: a scorer died or took longer than `deadlines.score`, and so did those that took its place
                (`scoring.retries`).
        """
        route(batch.strings("domain"), batch.strings("prompt_id"), self.spec.teachers)
        if not len(batch):
            return batch
        needed = Batch(batch.table.select([name for name in _READ if name in batch]))
        if "verifier" in needed and not (self._rewards and any(needed.strings("verifier"))):
            needed = Batch(needed.table.drop_columns("verifier"))
        if queries is None or isinstance(queries, Ragged):
            queries = iter([(np.arange(len(batch)), queries)])
        sent: list[_Sent] = []
        asked: list[np.ndarray] = []
        for rows, ids in queries:
            sent += self._send(needed, rows, ids)
            asked += [] if ids is None else ids.rows()
        scored = [self._scored(part) for part in sent]
        kept = {"query_ids": Ragged.of(asked, np.int32)} if asked else {}
        return batch.with_columns(**_merge(scored, [part.rows for part in sent]), **kept)

    def _send(self, batch: Batch, rows: np.ndarray, queries: Ragged | None) -> list[_Sent]:
        """Deals these rows out to the ranks; `queries` are theirs."""
        part, sent = batch.take(rows), []
        for rank, own in enumerate(shard(self._tokens(part), len(self._workers))):
            if len(own):
                work = (part.take(own), None if queries is None else Ragged.of([queries[row] for row in own], np.int32))
                worker = self._workers[rank]
                sent.append(_Sent(rank, rows[own], work, worker.score.remote(*work), worker))
        return sent

    def _scored(self, sent: _Sent) -> Batch:
        """A rank's answer; when it dies or hangs, that of the actor which takes its place: scoring twice gives the same twice."""
        rank, ref, worker = sent.rank, sent.ref, sent.worker
        for left in reversed(range(self._config.retries + 1)):
            try:
                if ref is None:
                    # Another part may have found the loss out before.
                    worker = self._replaced(rank) if self._workers[rank] is worker else self._workers[rank]
                    ref = worker.score.remote(*sent.work)
                return get(ref, timeout=self._deadlines.score, actor=f"scorer {rank}", operation="score a batch", knob="deadlines.score")
            except InfrastructureError as error:
                if not left or not (isinstance(error, DeadlineError) or died(error)):
                    raise
                if ref is None:
                    worker = self._workers[rank]  # what took the place failed, too
                if self._workers[rank] is worker:
                    log.warning("%s; another takes its place", error.message)
                    self.lost += 1
                ref = None
        raise AssertionError("the last try returns or raises")

    def _replaced(self, rank: int) -> Any:
        """A new actor in the place of a dead or hung one, with its models loaded."""
        ray.kill(self._workers[rank])
        self._workers[rank] = self._actor(rank, self._bundle)
        self._loaded([self._workers[rank].start.remote()])
        return self._workers[rank]

    @property
    def _bundle(self) -> dict[str, float]:
        cpus = float(self._config.threads) if self._host is None else 1.0  # a lodger's one
        return {"CPU": cpus} | ({"GPU": self._share} if self.spec.device == "gpu" else {})

    def _tokens(self, batch: Batch) -> np.ndarray:
        prompts = batch.lengths("teacher_prompt_ids" if "teacher_prompt_ids" in batch else "prompt_ids")
        return prompts + batch.lengths("response_ids")

    def close(self) -> None:
        """Ends the actors and frees their place. Safe to call twice, and on a group that never started."""
        for worker in self._workers:
            ray.kill(worker)
        self._workers = []
        if self._placement is not None and self._host is None:
            remove_placement_group(self._placement)
        self._placement = None


def _merge(scored: list[Batch], shards: list[np.ndarray]) -> dict[str, pa.ChunkedArray]:
    """Columns of all shards in the batch's order."""
    order = np.argsort(np.concatenate(shards))
    table = pa.concat_tables([part.table for part in scored]).take(pa.array(order))
    return {name: table.column(name) for name in table.column_names}
