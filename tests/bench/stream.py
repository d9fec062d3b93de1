"""Text to a training worker: Ray Data's tokenising and packing against the bare tokenizer, and how long a worker stands still.

* `bare`: the tokenizer on texts that are in memory, on as many threads as there are `cores`, in a fresh process; ids are taken, no more.
* `ray data`: reading, cleaning, tokenising, packing and writing the cache, on a Ray of as many CPUs that has started its workers. The
  tokens are the same but for one end token a document, which the bench checks.
* Stall: a worker takes a batch and computes for `step_seconds` (it sleeps), with the cache full (`warm`), and with another cache that is
  being filled meanwhile, from its second step on (`filling`). Shares are of the time that the same steps take with all sequences in memory.

Rates are the best of `rounds`, taken by turns. Text is what is installed with Python.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysys.config.corpora import Corpus, Source
from raysys.data.cleaning import clean
from raysys.data.local_text import train_tokenizer, write_local_text
from raysys.data.token_stream import Packed, TokenStream
from raysys.data.tokenise import Codec
from tests.bench.private_ray import private_ray

if TYPE_CHECKING:  # it imports Ray
    from raysys.data.token_cache import TokenCache

DEFAULTS: dict[str, Any] = {
    "megabytes": 40.0,
    "vocabulary": 8192,
    "sequence": 1024,
    "unit_mib": 1.0,
    "cores": None,
    "rounds": 2,
    "batch": 8,
    "steps": 100,
    "step_seconds": 0.05,
}
_WAIT = 600.0
_TOGETHER = 64
"""Texts of a call of the bare tokenizer: its threads share them."""


def run(megabytes: float, vocabulary: int, cores: int | None, rounds: int, **size: Any) -> dict[str, Any]:
    """Figures; `megabytes` of code, and what there is of documentation up to as much. Null `cores`: those that this process may use."""
    cores = cores or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name, private_ray(cores):
        from raysys.data.token_cache import TokenCache

        folder = Path(name)
        write_local_text(folder / "text", megabytes=megabytes, tasks_megabytes=0.2)
        files = sorted((folder / "text").glob("*.jsonl"))
        tokenizer = train_tokenizer(files[1:], vocabulary, folder / "tokenizer")
        sources = {path.stem: Source(path=str(path)) for path in files}
        units = {"unit_bytes": int(size["unit_mib"] * 2**20), "sequence": size["sequence"], "tasks": cores, "held_out_share": 0.0}
        corpus = Corpus(sources=sources, tokenizer=str(tokenizer), shuffle_units=2, **units)
        few = corpus.model_copy(update={"sources": {"tasks": sources["tasks"]}, "unit_bytes": 20_000})
        TokenCache(few, str(folder / "first")).wait(_WAIT)  # starts Ray's workers
        bare, made = [], []
        for number in range(rounds):
            bare.append(_bare(str(tokenizer), files, cores))
            cache = TokenCache(corpus, str(folder / f"cache{number}"))
            made.append(_fill(cache))
            assert made[-1]["tokens"] == bare[-1]["tokens"] + cache.account.kept
        return {
            "cores": cores,
            "tokens": made[-1]["tokens"],
            "bare_tokens_per_second": max(one["rate"] for one in bare),
            "ray_tokens_per_second": max(one["rate"] for one in made),
            "ratio": max(one["rate"] for one in made) / max(one["rate"] for one in bare),
            **_stall(corpus, cache, folder, size),
            "targets": {"ratio": 0.8, "warm_stall": 0.02},
        }


def table(figures: dict[str, Any]) -> list[list[Any]]:
    names = ("cores", "tokens", "bare_tokens_per_second", "ray_tokens_per_second", "ratio", "warm_stall", "filling_stall")
    return [["figure", "value", "target"], *([name, figures[name], figures["targets"].get(name, "")] for name in names)]


def _bare(tokenizer: str, files: list[Path], cores: int) -> dict[str, float]:
    call = [sys.executable, "-m", "tests.bench.stream", json.dumps([tokenizer, [str(path) for path in files]])]
    own = {"RAYON_NUM_THREADS": str(cores), "TOKENIZERS_PARALLELISM": "true"}
    root = Path(__file__).parents[2]
    done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True, cwd=root, env=os.environ | own)
    return json.loads(done.stdout.splitlines()[-1])


def _measure_bare(tokenizer: str, files: list[str]) -> dict[str, float]:
    texts = []
    for path in files:
        with open(path, encoding="utf-8") as file:
            texts += [clean(json.loads(line)["text"]) for line in file]
    texts = [text for text in texts if text]
    codec = Codec.of(tokenizer)
    codec.encode(texts[:_TOGETHER])
    began, tokens = time.perf_counter(), 0
    for at in range(0, len(texts), _TOGETHER):
        tokens += sum(map(len, codec.encode(texts[at : at + _TOGETHER])))
    return {"tokens": tokens, "rate": tokens / (time.perf_counter() - began)}


def _fill(cache: TokenCache) -> dict[str, float]:
    began = time.perf_counter()
    cache.wait(_WAIT)
    tokens = cache.progress()["tokens"]
    return {"tokens": tokens, "rate": tokens / (time.perf_counter() - began)}


def _stall(corpus: Corpus, full: TokenCache, folder: Path, size: dict[str, Any]) -> dict[str, float]:
    steps, seconds = size["steps"], size["step_seconds"]
    stream = TokenStream(full.path, full.plan.name, batch=size["batch"], deadline=_WAIT)
    memory = [stream.take(step) for step in range(steps + 1)]
    stream.close()
    alone = _consume(memory.__getitem__, steps, seconds)
    warm = TokenStream(full.path, full.plan.name, batch=size["batch"], deadline=_WAIT)
    with_cache = _consume(warm.take, steps, seconds)
    filling = type(full)(corpus, str(folder / "filling"))
    filling.fill()
    cold = TokenStream(filling.path, filling.plan.name, batch=size["batch"], deadline=_WAIT)
    while_filling = _consume(cold.take, steps, seconds)
    filling.wait(_WAIT)
    return {
        "memory_seconds": alone,
        "warm_seconds": with_cache,
        "filling_seconds": while_filling,
        "warm_stall": with_cache / alone - 1,
        "filling_stall": while_filling / alone - 1,
    }


def _consume(take: Any, steps: int, seconds: float) -> float:
    """Seconds of `steps` steps behind a first one that does not count."""
    held: list[Packed] = take(0)
    time.sleep(seconds)
    began = time.perf_counter()
    for step in range(1, steps + 1):
        held = take(step)
        time.sleep(seconds)
    assert held
    return time.perf_counter() - began


if __name__ == "__main__":
    print(json.dumps(_measure_bare(*json.loads(sys.argv[1]))))
