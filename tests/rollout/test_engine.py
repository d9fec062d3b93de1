"""One real vLLM engine in one Ray actor, against a transformers forward of the same folder."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from raysys.batch import Batch, Ragged
from raysys.config.parts import Deadlines, Rollout
from raysys.config.runs import NewModel
from raysys.rollout.pool import RolloutPool
from raysys.rollout.spec import RolloutSpec, Sampling
from tests.processes import ended

pytestmark = [pytest.mark.slow]

EOS, WINDOW = 2, 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from raysys.models.scratch import new_causal

    return new_causal(NewModel(hidden_size=64, heads=2, kv_heads=2, ffn_size=96, context=64), tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="module")
def pool(ray_head: Any, folder: Path) -> Iterator[RolloutPool]:
    ray.init(address=ray_head.gcs, log_to_driver=False)
    config = Rollout(kv_cache_mib=16)
    spec = RolloutSpec(str(folder), device="cpu", dtype="float32", max_model_len=WINDOW, config=config, log_dir=str(folder / "logs"))
    try:
        with RolloutPool(config, spec, Deadlines(placement=60, start=200, generate=200, heartbeat=20)) as pool:
            pool.start()
            yield pool
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    """Log-probs [n, V] of what follows each position of the last `n` but one, by transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def logprobs(prompt: np.ndarray, response: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        with torch.no_grad():
            logits = model(torch.tensor(np.concatenate([prompt, response])[None]).long()).logits[0]
        return (logits[len(prompt) - 1 : -1].double() / temperature).log_softmax(-1).numpy()

    return logprobs


def prompts(rows: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch.from_columns(
        prompt_id=[f"p{row // 2}@0" for row in range(rows)],
        sample=np.arange(rows, dtype=np.int32) % 2,
        domain=["d"] * rows,
        prompt_ids=Ragged.of([rng.integers(3, 98, size) for size in np.repeat(rng.integers(2, 20, rows // 2), 2)], np.int32),
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_distribution_sampled_from(pool, reference, temperature):
    out = pool.generate(prompts(24), Sampling(max_tokens=12, seed=3, temperature=temperature))
    rows = zip(out.ragged("prompt_ids").rows(), out.ragged("response_ids").rows(), out.ragged("rollout_logprobs").rows(), strict=True)
    for prompt, response, logprobs in rows:
        want = np.take_along_axis(reference(prompt, response, temperature), response[:, None].astype(int), 1)[:, 0]
        np.testing.assert_allclose(logprobs, want, rtol=0, atol=1e-5)
    assert out.columns == [*prompts(2).columns, "response_ids", "rollout_logprobs", "version_spans", "stop_reason"]
    assert all(span.tolist() == [0, 0] for span in out.ragged("version_spans").rows())


def test_a_row_is_the_same_alone_among_others_and_again(pool):
    rows, sampling = prompts(200), Sampling(max_tokens=14, seed=5)
    among = pool.generate(rows, sampling)
    assert pool.generate(rows, sampling).table.equals(among.table)
    for row in (0, 1, 77, 199):
        assert pool.generate(rows.take([row]), sampling).table.equals(among.take([row]).table)
    assert among.ragged("response_ids")[0].tolist() != among.ragged("response_ids")[1].tolist()  # two samples of one prompt
    other = pool.generate(rows, Sampling(max_tokens=14, seed=6))
    assert not other.table.column("response_ids").equals(among.table.column("response_ids"))


def test_draws_follow_the_model(pool, reference):
    """First tokens of 2,000 samples of one prompt: their mean log-prob is minus the entropy, and frequencies fit."""
    n, prompt = 2000, np.array([40, 50, 60])
    rows = Batch.from_columns(prompt_id=["p"] * n, sample=np.arange(n), domain=[""] * n, prompt_ids=Ragged.of([prompt] * n, np.int32))
    out = pool.generate(rows, Sampling(max_tokens=1, seed=0))
    logp = reference(prompt, np.array([3]))[0]
    p = np.exp(logp)
    mean, spread = float((p * logp).sum()), float(np.sqrt((p * logp**2).sum() - (p * logp).sum() ** 2))
    assert abs(out.ragged("rollout_logprobs").values.mean() - mean) < 4 * spread / np.sqrt(n)
    counts = np.bincount(out.ragged("response_ids").values, minlength=len(p))
    chi_square = float(((counts - n * p) ** 2 / (n * p)).sum())
    assert abs(chi_square - (len(p) - 1)) < 5 * np.sqrt(2 * (len(p) - 1))


def test_top_p_draws_from_the_nucleus_and_renormalises(pool, reference):
    out = pool.generate(prompts(8), Sampling(max_tokens=6, seed=1, top_p=0.4))
    rows = zip(out.ragged("prompt_ids").rows(), out.ragged("response_ids").rows(), out.ragged("rollout_logprobs").rows(), strict=True)
    for prompt, response, logprobs in rows:
        for wanted, token, got in zip(reference(prompt, response), response, logprobs, strict=True):
            order = np.argsort(-wanted)
            mass = np.cumsum(np.exp(wanted[order]))
            nucleus = order[: int(np.searchsorted(mass, 0.4)) + 1]
            assert token in nucleus
            np.testing.assert_allclose(got, wanted[token] - np.log(np.exp(wanted[nucleus]).sum()), atol=1e-4)


def test_responses_end_at_the_stop_id_or_the_limit(pool):
    out = pool.generate(prompts(200), Sampling(max_tokens=14, seed=0))
    reasons = out.strings("stop_reason")
    assert set(reasons) == {"stop", "length"}
    for reason, response in zip(reasons, out.ragged("response_ids").rows(), strict=True):
        ended = np.flatnonzero(response == EOS)
        assert (len(response) == 14 and not len(ended)) if reason == "length" else ended.tolist() == [len(response) - 1]
    long = Batch.from_columns(prompt_id=["p"], sample=[0], domain=[""], prompt_ids=[[5] * (WINDOW - 3)])
    assert len(pool.generate(long, Sampling(max_tokens=14, seed=0)).ragged("response_ids")[0]) <= 3
    assert len(pool.generate(prompts(2).slice(0, 0), Sampling(max_tokens=14, seed=0))) == 0


def test_greedy_takes_the_likeliest(pool, reference):
    out = pool.generate(prompts(6), Sampling(max_tokens=5, seed=0, greedy=True))
    for prompt, response in zip(out.ragged("prompt_ids").rows(), out.ragged("response_ids").rows(), strict=True):
        assert reference(prompt, response).argmax(-1).tolist() == response.tolist()


def test_an_engine_that_stands_still_is_found_out_and_replaced(pool, folder):
    """Nothing of vLLM times out then; only silence tells."""
    calm = pool.generate(prompts(6), Sampling(max_tokens=4, seed=0))
    actor = psutil.Process(pool.facts[0]["pid"])
    core = [child for child in actor.children(recursive=True) if child.memory_info().rss > 100 << 20]
    assert len(core) == 1
    os.kill(core[0].pid, signal.SIGSTOP)
    assert pool.generate(prompts(6), Sampling(max_tokens=4, seed=0)).table.equals(calm.table)
    assert pool.lost == 1
    pool.close()
    until = time.monotonic() + 30
    while not (ended(actor) and ended(core[0])) and time.monotonic() < until:
        time.sleep(0.05)
    assert ended(actor) and ended(core[0])
    assert "vllm" in (folder / "logs" / "rollout-0.log").read_text().lower()
