"""The token cache: a second run makes nothing, a changed file is noticed, half of a shard is not believed, errors reach the caller."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from raysys.config.corpora import Corpus, Source
from raysys.data import token_cache as module
from raysys.data.shards import shard_name
from raysys.data.token_cache import TokenCache
from raysys.data.token_stream import TokenStream
from raysys.data.tokenise import tokenise_all
from raysys.errors import ConfigError, DataError, DeadlineError, InfrastructureError
from raysys.head import Head


@pytest.fixture(scope="module")
def cluster(ray_head: Head):
    import ray

    ray.init(address=ray_head.gcs, log_to_driver=False)
    yield
    ray.shutdown()


def here(work, units, tasks):
    yield from tokenise_all(work, units)


def no_tasks(work, units, tasks):
    raise AssertionError("a full cache starts no tasks")
    yield


def write(path: Path, count: int, word: str = "word") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": f"{word} {number} of the text"}) + "\n" for number in range(count)))
    return path


def corpus_of(folder: Path, tokenizer: str, **more) -> Corpus:
    values = {
        "sources": {"web": Source(path=str(folder / "text"))},
        "tokenizer": tokenizer,
        "sequence": 16,
        "unit_bytes": 400,
        "shuffle_units": 2,
        "held_out_share": 0.1,
    }
    return Corpus(**values | more)


def cache_of(folder: Path, tokenizer: str, execute=here, seed: int = 0, **more) -> TokenCache:
    return TokenCache(corpus_of(folder, tokenizer, **more), str(folder / "cache"), seed, execute)


def first_steps(cache: TokenCache, steps: int = 5) -> list:
    stream = TokenStream(cache.path, cache.plan.name, batch=4, deadline=30)
    taken = [[one.ids.tolist() for one in stream.take(step)] for step in range(steps)]
    stream.close()
    return taken


def test_through_ray_data(tmp_path: Path, bytewise: str, cluster) -> None:
    write(tmp_path / "text" / "a.jsonl", 150)
    cache = cache_of(tmp_path, bytewise, module.with_ray_data, tasks=2)
    cache.fill()
    stream = TokenStream(cache.path, cache.plan.name, batch=4, deadline=120)
    taken = [[one.ids.tolist() for one in stream.take(step)] for step in range(5)]  # while tasks run
    cache.wait(120)
    units = len(cache.plan.units["web"])
    assert cache.tokenised == units > 10 and cache.account.kept == 150
    figures = cache.progress()
    assert figures["units_ready"] == units and figures["tokens"] > 1000 and figures["tokens_per_second"] > 0
    again = cache_of(tmp_path, bytewise, no_tasks)
    again.wait(10)
    assert again.tokenised == 0 and first_steps(again) == taken == first_steps(cache)
    by_hand = cache_of(tmp_path / "by_hand", bytewise, sources={"web": Source(path=str(tmp_path / "text"))})
    by_hand.wait(60)
    assert by_hand.plan.name == cache.plan.name and first_steps(by_hand) == taken, "who makes the units does not matter"
    os.utime(tmp_path / "text" / "a.jsonl", ns=(5, 5))
    changed = cache_of(tmp_path, bytewise, module.with_ray_data)
    (tmp_path / "text" / "a.jsonl").unlink()
    with pytest.raises(DataError, match=r"a\.jsonl changed while the run was reading it"):
        changed.wait(120)


def test_a_second_run_makes_nothing_and_a_change_is_noticed(tmp_path: Path, bytewise: str) -> None:
    for name in "abc":
        write(tmp_path / "text" / f"{name}.jsonl", 40, name)
    first = cache_of(tmp_path, bytewise)
    first.wait(60)
    assert first.tokenised == len(first.plan.units["web"])
    for seed in (0, 1):
        second = cache_of(tmp_path, bytewise, no_tasks, seed)
        second.wait(10)
        assert second.tokenised == 0 and second.account.state() == first.account.state()
    write(tmp_path / "text" / "b.jsonl", 40, "B")
    third = cache_of(tmp_path, bytewise)
    third.wait(60)
    assert third.plan.name != first.plan.name
    changed = set(third.plan.units["web"]) - set(first.plan.units["web"])
    assert third.tokenised == len(changed) == len(first.plan.units["web"]) // 3
    assert cache_of(tmp_path, bytewise, sequence=32)._missing and cache_of(tmp_path, bytewise, min_characters=3)._missing
    assert not cache_of(tmp_path, bytewise, shuffle_units=5)._missing, "the order is no part of a shard"


def test_what_a_dead_driver_left_is_used_and_half_shards_are_not(tmp_path: Path, bytewise: str) -> None:
    write(tmp_path / "text" / "a.jsonl", 80)
    cache = cache_of(tmp_path, bytewise)
    cache.wait(60)
    taken, units = first_steps(cache), cache.plan.units["web"]
    for path in (tmp_path / "cache").glob("*.json"):
        path.unlink()  # as if the driver had died before it wrote anything down
    again = cache_of(tmp_path, bytewise, no_tasks)
    again.wait(10)
    assert again.account.state() == cache.account.state() and first_steps(again) == taken
    torn = tmp_path / "cache" / shard_name(units[1], "train")
    torn.write_bytes(torn.read_bytes()[:-7])
    (tmp_path / "cache" / shard_name(units[2], "train")).unlink()
    held = next(tmp_path.glob("cache/shards/*.validation.parquet"))
    held.unlink()
    spoilt = {units[1], units[2], held.name.partition(".")[0]}
    for notes in (True, False):
        if not notes:
            for path in (tmp_path / "cache").glob("*.json"):
                path.unlink()
        assert {again._work.key(unit) for unit in cache_of(tmp_path, bytewise)._missing} == spoilt
    healed = cache_of(tmp_path, bytewise)
    healed.wait(60)
    assert healed.tokenised == len(spoilt) and first_steps(healed) == taken


def test_documents_that_cannot_be_read_end_the_run_each_time(tmp_path: Path, bytewise: str) -> None:
    write(tmp_path / "text" / "a.jsonl", 30)
    with open(tmp_path / "text" / "a.jsonl", "ab") as file:
        file.write(b"\xff\xfe\n" * 10)
    for execute in (here, no_tasks):
        cache = cache_of(tmp_path, bytewise, execute)
        with pytest.raises(DataError, match=r"10 of 40 rows are unusable, more than data\.max_bad_share=0\.01: a\.jsonl at byte"):
            cache.wait(60)
        with pytest.raises(DataError):
            cache.check()
        with pytest.raises(DataError, match="10 of 40 rows are unusable"):
            first_steps(cache)
    lenient = cache_of(tmp_path, bytewise, no_tasks, max_bad_share=0.5)
    lenient.wait(10)
    assert lenient.account.lines()[0].startswith("10 of 40 data rows were unusable: 10 x not UTF-8")


def test_too_little_text(tmp_path: Path, bytewise: str) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("few")
    with pytest.raises(DataError, match=r"source web has 4 tokens, less than one sequence of 16 .*data\.sources\.web"):
        cache_of(tmp_path, bytewise, held_out_share=0.0).wait(60)
    (tmp_path / "text" / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"has 0 tokens, .*1 documents were left out: empty"):
        cache_of(tmp_path, bytewise).wait(60)
    with pytest.raises(ConfigError, match=r"data\.cache is not set"):
        TokenCache(corpus_of(tmp_path, bytewise))


def test_what_a_task_raises_reaches_driver_and_workers(tmp_path: Path, bytewise: str) -> None:
    write(tmp_path / "text" / "a.jsonl", 40)

    def breaks(work, units, tasks):
        yield from tokenise_all(work, units[:2])
        raise InfrastructureError("the node burned down")

    cache = cache_of(tmp_path, bytewise, breaks)
    with pytest.raises(InfrastructureError, match="burned down"):
        cache.wait(60)
    with pytest.raises(InfrastructureError, match="burned down"):
        cache.fill()
    with pytest.raises(InfrastructureError, match="burned down"):
        first_steps(cache)
    rest = cache_of(tmp_path, bytewise)
    rest.wait(60)
    assert rest.tokenised == len(rest.plan.units["web"]) - 2


def test_no_further_ahead_than_asked_for(tmp_path: Path, bytewise: str) -> None:
    write(tmp_path / "text" / "a.jsonl", 300)
    calls: list[int] = []

    def counted(work, units, tasks):
        calls.append(len(units))
        yield from tokenise_all(work, units)

    cache = cache_of(tmp_path, bytewise, counted, ahead=4)
    cache.fill()

    def settled() -> int:
        before = -1
        while before != (before := len(calls)) or not calls:
            time.sleep(1.2)
        return before

    begun = settled()
    assert set(calls) == {4} and 4 * begun <= 12
    stream = TokenStream(cache.path, cache.plan.name, batch=4, deadline=30)
    rows = 0
    for step in range(20):
        rows += len(stream.take(step))
        cache.trained(rows)
    assert settled() > begun and cache.tokenised < len(cache.plan.units["web"])
    with pytest.raises(DeadlineError, match=r"data\.wait"):
        cache.wait(0.1)
    cache.close()
    assert not any(thread.name == "token cache" and thread.is_alive() for thread in threading.enumerate())
