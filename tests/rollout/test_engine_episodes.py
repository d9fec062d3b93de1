"""Episodes on one real vLLM engine, against a transformers forward of the whole text that came of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from raysys.batch import Batch, Ragged
from raysys.config.parts import Deadlines, Rollout
from raysys.config.runs import NewModel
from raysys.rollout.environment import EpisodeSpec, Reply
from raysys.rollout.pool import RolloutPool
from raysys.rollout.spec import RolloutSpec, Sampling

pytestmark = [pytest.mark.slow]
TURN = 12


@dataclass(frozen=True)
class Echoes:
    """Say back what was generated, backwards; the row's metadata comes first."""

    stops: tuple[str, ...] = ("a", "e", "o", "s", "t", "1", "2", "3")

    async def open(self) -> None: ...
    async def close(self) -> None: ...
    def new(self) -> Echo:
        return Echo()


class Echo:
    async def reset(self, prompt_id: str, metadata: str) -> str:
        return metadata

    async def step(self, text: str, last: bool) -> Reply:
        return Reply("<" + text[::-1] + ">", done=text.endswith("3"), record={"text": text, "last": last})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from raysys.models.scratch import new_causal

    return new_causal(NewModel(hidden_size=64, heads=2, kv_heads=2, ffn_size=96, context=256), tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="module")
def pool(ray_head: Any, folder: Path) -> Iterator[RolloutPool]:
    ray.init(address=ray_head.gcs, log_to_driver=False)
    config = Rollout(kv_cache_mib=16, max_sequences=4)
    episodes = EpisodeSpec(Echoes(), generations=4, turn_tokens=TURN)
    spec = RolloutSpec(
        str(folder), device="cpu", dtype="float32", max_model_len=200, config=config, log_dir=str(folder / "logs"), episodes=episodes
    )
    try:
        with RolloutPool(config, spec, Deadlines(placement=60, start=200, generate=200, heartbeat=60)) as pool:
            pool.start()
            yield pool
    finally:
        ray.shutdown()


def prompts(rows: int) -> Batch:
    rng = np.random.default_rng(0)
    return Batch.from_columns(
        prompt_id=[f"p{row}@0" for row in range(rows)],
        sample=[0] * rows,
        domain=["d"] * rows,
        metadata=["" if row % 2 else f"{row}:" for row in range(rows)],
        prompt_ids=Ragged.of([rng.integers(3, 98, size) for size in rng.integers(2, 20, rows)], np.int32),
    )


def test_sampled_ids_are_kept_and_their_logprobs_are_those_of_the_whole_text(pool: RolloutPool, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = prompts(12)
    out = pool.generate(asked, Sampling(max_tokens=150, seed=3))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    stopped = 0
    for row in range(len(out)):
        prompt, ids = out.ragged("prompt_ids")[row], out.ragged("response_ids")[row]
        logprobs, runs = out.ragged("rollout_logprobs")[row], out.ragged("runs")[row]
        with torch.no_grad():
            table = model(torch.tensor(np.concatenate([prompt, ids])[None]).long()).logits[0].double().log_softmax(-1).numpy()
        want = table[np.arange(len(prompt) - 1, len(prompt) + len(ids) - 1), ids]
        np.testing.assert_allclose(logprobs[runs >= 0], want[runs >= 0], rtol=0, atol=1e-5)
        assert not logprobs[runs < 0].any()
        turns = json.loads(out.strings("episode")[row])["turns"]
        position, opening = 0, tokenizer.encode(asked.strings("metadata")[row], add_special_tokens=False)
        assert ids[: len(opening)].tolist() == opening
        for number, turn in enumerate(turns):
            start, end = turn["tokens"]
            assert (runs[start:end] == number).all() and end - start <= TURN
            assert (runs[position:start] == -1).all()
            text = tokenizer.decode(ids[start:end], skip_special_tokens=False)
            assert text.startswith(turn["text"])
            letters = tokenizer.decode(ids[start:end], skip_special_tokens=True)  # names of special tokens hold stop letters
            stops = sum(letters.count(stop) for stop in Echoes.stops)
            assert stops == letters.endswith(Echoes.stops) and (not stops or turn["stop"] == "stop")
            stopped += stops
            if number + 1 < len(turns):
                said = tokenizer.encode("<" + turn["text"][::-1] + ">", add_special_tokens=False)
                assert ids[end : turns[number + 1]["tokens"][0]].tolist() == said
            position = end
        assert len(turns) == 4 or (turns[-1]["text"].endswith("3") and out.strings("stop_reason")[row] == "stop")
        assert [turn["last"] for turn in turns] == [number == 3 for number in range(len(turns))]
    assert stopped > len(out)


def test_an_episode_is_the_same_alone_and_among_others(pool: RolloutPool) -> None:
    asked = prompts(12)
    together = pool.generate(asked, Sampling(max_tokens=150, seed=3))
    alone = pool.generate(asked.slice(5, 1), Sampling(max_tokens=150, seed=3))
    assert together.slice(5, 1).strings("episode") == alone.strings("episode")
    assert together.ragged("response_ids")[5].tolist() == alone.ragged("response_ids")[0].tolist()
