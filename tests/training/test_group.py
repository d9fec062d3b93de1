"""The group over real Ray actors: the same numbers as ranks without Ray, and the first cause on top when one fails."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest

from raysys.config.parts import Deadlines, Trainer
from raysys.errors import ConfigError, DataError, DeadlineError, InfrastructureError, NumericsError
from raysys.training import group as groups
from raysys.training.group import TrainerGroup
from raysys.training.objectives import GopdObjective
from tests.training import work
from tests.training.work import gopd_batch, merged, spec, train

OBJECTIVE = GopdObjective(reward_scale=1.25)


def group(model: str, ranks: int = 1, train_seconds: float = 60, **trainer) -> TrainerGroup:
    config = Trainer(ranks=ranks, **{"threads": 1, "micro_batch_tokens": 64, "clip": 0.05, "epsilon": 1e-4, **trainer})
    deadlines = Deadlines(placement=60, start=180, train=train_seconds, push=60, checkpoint=60)
    return TrainerGroup(config, model, OBJECTIVE, work.RATE, 10, 0, 1.0, "cpu", "float32", deadlines)


def test_an_impossible_combination_is_refused():
    with pytest.raises(ConfigError, match="offload_optimizer needs"):
        group("m", zero_stage=0, offload_optimizer=True)


def test_a_group_that_never_started_says_so():
    with group("m") as trainer, pytest.raises(InfrastructureError, match="not running"):
        trainer.step(gopd_batch())


@pytest.fixture(scope="module")
def cluster(ray_head):
    import ray

    ray.init(address=ray_head.gcs, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_two_actors_do_what_two_processes_do(cluster, pair, models, tmp_path, monkeypatch):
    batches = [gopd_batch(seed=seed) for seed in range(2)]
    want = pair(train, of=spec(models["tied"], zero_stage=3, mini_batches=2), batches=batches)
    with group(models["tied"], ranks=2, zero_stage=3, mini_batches=2) as trainer:
        assert [rank["rank"] for rank in trainer.start()] == [0, 1]
        for step, batch in enumerate(batches):
            metrics = trainer.step(batch)
            assert metrics == pytest.approx(merged(want, step), rel=1e-6)
        plan = trainer.bucket_plan(5000)
        count = len(plan.layouts())
        fetched, get = [], groups.get
        with monkeypatch.context() as patch:
            patch.setattr(groups, "get", lambda *refs, **limits: fetched.append(get(*refs, **limits)))
            refs = [trainer.gather_bucket(index) for index in range(count)]
        assert fetched == [None] * (2 * count), "weights came to the driver"
        buckets = cluster.get(refs)
        assert trainer.tensor_digests(1) == plan.layouts()[1].digests(buckets[1].data)
        with pytest.raises(InfrastructureError, match=f"gather bucket {count}"):
            trainer.gather_bucket(count)
        got = {name: tensor for part in zip(buckets, plan.layouts()) for name, tensor in work.unpack(*part).items()}
        assert list(got) == list(plan.manifest()) == list(want[0][1])
        assert all(np.array_equal(got[name], tensor) for name, tensor in want[0][1].items())

        logprobs, batch = trainer.logprobs(batches[0]), batches[0]
        assert [len(row) for row in logprobs] == batch.lengths("response_ids").tolist()
        ids = np.concatenate([batch.ragged("prompt_ids")[0][-1:], batch.ragged("response_ids")[0]])
        probe = trainer.probe_logprobs(ids)
        assert probe.dtype == np.float32 and len(probe) == len(ids) - 1

        trainer.save(str(tmp_path / "point"))
        after = trainer.step(batches[0])
        longest = np.argsort(-batch.lengths("response_ids"))[:2]
        alone = trainer.step(batch.take(longest))  # one row a mini-batch: nothing in it for rank 1
        assert alone["tokens"] == batch.lengths("response_ids")[longest].sum() and np.isfinite(alone["loss"])
        trainer.load(str(tmp_path / "point"))
        assert trainer.step(batches[0]) == after
        with pytest.raises(DataError, match="no response token"):
            trainer.step(batch.take([6, 6]))
        nan = [[float("nan")] * length for length in batch.lengths("response_ids")]
        with pytest.raises(NumericsError, match=r"step 3: rank \d: micro-batch of p\d+@0/0"):
            trainer.step(batch.with_columns(teacher_logprobs=nan))


@pytest.mark.slow
def test_a_killed_rank_is_the_first_cause(cluster, models):
    with group(models["tied"], ranks=2, zero_stage=3, micro_batch_tokens=16) as trainer:
        pids = [rank["pid"] for rank in trainer.start()]
        batch = gopd_batch(400)
        trainer.step(batch.take(range(8)))
        threading.Timer(0.5, os.kill, (pids[1], signal.SIGKILL)).start()
        began = time.monotonic()
        with pytest.raises(InfrastructureError, match=r"trainer rank 1 died during 'train a step'"):
            for _ in range(20):
                trainer.step(batch)
        assert time.monotonic() - began < 50
    assert trainer.workers == []


@pytest.mark.slow
def test_a_hanging_rank_meets_the_deadline(cluster, models):
    with group(models["tied"], train_seconds=15) as trainer:
        (rank,) = trainer.start()
        trainer.step(gopd_batch())
        os.kill(rank["pid"], signal.SIGSTOP)
        with pytest.raises(DeadlineError, match=r"trainer rank 0 .*'train a step' within 15 s .*deadlines.train"):
            trainer.step(gopd_batch())
