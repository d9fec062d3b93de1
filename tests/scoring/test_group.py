"""Dealing rows out, and the group over real Ray actors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from raysys.batch import Batch, Ragged
from raysys.config.parts import Deadlines, Scoring
from raysys.config.runs import NewModel
from raysys.errors import ConfigError, DataError, DeadlineError
from raysys.scoring import group as module
from raysys.scoring.group import ScorerGroup, _merge
from raysys.scoring.routing import shard


def test_shards_are_even_and_hold_every_row_once():
    tokens = np.random.default_rng(0).integers(1, 500, 64)
    shards = shard(tokens, 3)
    assert sorted(np.concatenate(shards).tolist()) == list(range(64))
    loads = [tokens[rows].sum() for rows in shards]
    assert max(loads) - min(loads) <= tokens.max()
    assert [len(rows) for rows in shard(np.array([5, 5]), 4)] == [1, 1, 0, 0]


def test_merging_puts_rows_back():
    shards = [np.array([1, 3]), np.array([0, 2])]
    first = Batch.from_columns(teacher_logprobs=[[1.0], [3.0, 3.0]], reward=[0.5, 1.0])
    second = Batch.from_columns(teacher_logprobs=[[], [2.0]], reward=[0.25, 0.75])
    columns = _merge([first, second], shards)
    assert columns["teacher_logprobs"].to_pylist() == [[], [1.0], [2.0], [3.0, 3.0]]
    assert columns["reward"].to_pylist() == [0.25, 0.5, 0.75, 1.0]


def group(teachers, reference=None, reward_scale=1.0, ranks=1, tokenizer="student", offload=False, dtype="float64") -> ScorerGroup:
    return ScorerGroup(
        Scoring(ranks=ranks, micro_batch_tokens=64, offload=offload),
        teachers=teachers,
        reference=reference,
        reward_scale=reward_scale,
        tokenizer_folder=tokenizer,
        temperature=1.0,
        device="cpu",
        dtype=dtype,
        deadlines=Deadlines(placement=60, start=120, score=60),
    )


def test_what_a_scorer_holds():
    teachers = {"math": "A", "code": "B", "default": "A"}
    assert group(teachers, "C", 1.25).spec.folders == ["A", "B", "C"]
    assert group(teachers, "B", 1.25).spec.folders == ["A", "B"]
    assert group(teachers, "C", 1.0).spec.folders == ["A", "B"]
    assert group(teachers, "C", 1.0).spec.reference is None


def test_an_unknown_tag_fails_before_any_work_is_sent():
    rows = Batch.from_columns(prompt_id=["p"], domain=["poetry"], prompt_ids=[[1]], response_ids=[[2]])
    with group({"math": "A"}) as scorers, pytest.raises(DataError, match=r"row 0 .*'poetry'"):
        scorers.annotate(rows)  # never started: there is nobody to send it to


def test_a_replacement_that_does_not_load_is_replaced_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Call:
        def __init__(self, worker: str):
            self._worker = worker

        def remote(self, *args: object) -> str:
            return self._worker

    class Worker:
        def __init__(self, name: str):
            self.name, self.score, self.start = name, Call(name), Call(f"start of {name}")

    def get(ref: str | list[str], **known: object) -> str:
        if ref in ("first", ["start of second"], "second"):
            raise DeadlineError(str(ref), "work", 1.0, "deadlines.score")
        return str(ref)

    killed: list[str] = []
    monkeypatch.setattr(module, "get", get)
    monkeypatch.setattr(module.ray, "kill", lambda worker: killed.append(worker.name))
    scorers, others = group({"math": "A"}), iter([Worker("second"), Worker("third")])
    monkeypatch.setattr(scorers, "_actor", lambda rank, bundle: next(others))
    first = Worker("first")
    scorers._workers = [first]
    rows = Batch.from_columns(prompt_id=["p"])
    assert scorers._scored(module._Sent(0, np.array([0]), (rows, None), "first", first)) == "third"
    assert killed == ["first", "second"] and scorers.lost == 2


def test_the_driver_side_imports_no_engine():
    code = "import sys, raysys.scoring.group; sys.exit(bool({'torch', 'vllm', 'transformers', 'deepspeed'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_two_ranks_answer_as_one_worker_does(ray_head, tmp_path):
    import ray

    from raysys.models.scratch import new_causal
    from raysys.scoring.scorer import ScorerWorker

    spec = NewModel(hidden_size=32, layers=1, heads=1, kv_heads=1, ffn_size=48, context=64)
    folders = {name: str(new_causal(spec, tmp_path / name, seed)) for seed, name in enumerate(("math", "code", "base"))}
    rng = np.random.default_rng(0)
    rows = Batch.from_columns(
        prompt_id=[f"p{row}" for row in range(9)],
        sample=[0] * 9,
        domain=["math", "code", "code"] * 3,
        prompt_ids=Ragged.of([rng.integers(3, 98, rng.integers(1, 9)) for _ in range(9)], np.int32),
        response_ids=Ragged.of([rng.integers(3, 98, rng.integers(0, 9)) for _ in range(9)], np.int32),
    )
    asked = Ragged.of([rng.integers(0, 98, 2 * n) for n in rows.lengths("response_ids")], np.int32)
    ray.init(address=ray_head.gcs)
    try:
        with group({"math": folders["math"], "code": folders["code"]}, folders["base"], 1.25, 2, folders["base"]) as scorers:
            pids = [facts["pid"] for facts in scorers.start()]
            scored, queried = scorers.annotate(rows), scorers.annotate(rows, asked)
            assert "reward" not in scorers.annotate(rows.with_columns(verifier=[""] * 9))
            rewarded = scorers.annotate(rows.with_columns(verifier=["exact"] * 9, answer=["?"] * 9))
            assert scorers.annotate(rows).table.equals(scored.table)
            os.kill(pids[1], signal.SIGKILL)
            assert scorers.annotate(rows).table.equals(scored.table) and scorers.lost == 1
            assert np.array_equal(queried.ragged("query_ids").values, asked.values) and "query_ids" not in scored

            def parts():
                """Four rows, then one of the scorers dies with work in hand, then the others."""
                yield np.arange(4), Ragged.of([asked[row] for row in range(4)], np.int32)
                os.kill(pids[0], signal.SIGKILL)
                yield np.arange(4, 9), Ragged.of([asked[row] for row in range(4, 9)], np.int32)

            pieces = scorers.annotate(rows, parts())
            assert scorers.lost == 2 and np.array_equal(pieces.ragged("query_ids").values, asked.values) and pieces.ids == rows.ids
        assert rewarded.numbers("reward").tolist() == [0.0] * 9
        alone = ScorerWorker(scorers.spec)
        alone.start()
        for got, want in ((scored, alone.score(rows)), (queried, alone.score(rows, asked)), (pieces, alone.score(rows, asked))):
            assert got.ids == rows.ids
            for name in ("teacher_logprobs", "reference_logprobs"):
                np.testing.assert_array_equal(got.ragged(name).offsets, want.ragged(name).offsets)
                np.testing.assert_allclose(got.ragged(name).values, want.ragged(name).values, rtol=0, atol=1e-6)
        # Float32: DeepSpeed takes no float64 on processors that have float16.
        with group(
            {"math": folders["math"], "code": folders["code"]}, folders["base"], 1.25, 1, folders["base"], offload=True, dtype="float32"
        ) as offloaded:
            (facts,) = offloaded.start()
            assert set(facts["parameters"].values()) == {sum(p.numel() for p in alone._models[folders["base"]].parameters())}
            elsewhere = offloaded.annotate(rows, asked)
            for name in ("teacher_logprobs", "reference_logprobs"):
                np.testing.assert_allclose(elsewhere.ragged(name).values, queried.ragged(name).values, rtol=0, atol=1e-5)
        with group({"math": str(tmp_path / "nothing")}) as broken, pytest.raises(ConfigError, match="cannot load a causal language model"):
            broken.start()
    finally:
        ray.shutdown()
