"""The order of sequences: the same for every number of ranks and every resume, mixed by weight, each once an epoch."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from raysys.config.corpora import Corpus, Source
from raysys.data.token_cache import TokenCache
from raysys.data.token_plan import Mixture, Plan, SourceOrder, check_same, counts_file, needed_order, proportions
from raysys.data.token_stream import Packed, TokenStream
from raysys.data.tokenise import tokenise_all
from raysys.errors import CheckpointError, ConfigError, DataError, DeadlineError
from raysys.files import write_atomically


def here(work, units, tasks):
    yield from tokenise_all(work, units)


def filled(folder: Path, tokenizer: str, seed: int = 0, sizes=(("a", 60), ("b", 25)), **more) -> TokenCache:
    """A full cache of sources of so many numbered documents."""
    for label, count in sizes:
        path = folder / "text" / f"{label}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text("".join(json.dumps({"text": f"{label}{number:04} " + "x" * (number % 13)}) + "\n" for number in range(count)))
    sources = {label: Source(path=str(folder / "text" / f"{label}.jsonl"), weight=3.0 if label == "a" else 1.0) for label, _ in sizes}
    values = {"sources": sources, "tokenizer": tokenizer, "sequence": 16, "unit_bytes": 200, "shuffle_units": 3, "held_out_share": 0.0}
    cache = TokenCache(Corpus(**values | more), str(folder / "cache"), seed, here)
    cache.wait(60)
    return cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, bytewise: str) -> TokenCache:
    return filled(tmp_path_factory.mktemp("corpus"), bytewise)


def opened(cache: TokenCache, batch: int = 8, **more) -> TokenStream:
    return TokenStream(cache.path, cache.plan.name, batch=batch, deadline=10, **more)


def plain(sequences: list[Packed]) -> list:
    return [(one.source, one.epoch, one.ids.tolist(), one.lengths.tolist()) for one in sequences]


def test_each_sequence_once_an_epoch_in_another_order(cache: TokenCache) -> None:
    stream = opened(cache, batch=1)
    totals = {label: order.total for label, order in stream._orders.items()}
    assert all(total and total > 10 for total in totals.values())
    by_epoch: dict[tuple[str, int], list] = {}
    for step in range(3 * sum(totals.values())):
        (one,) = stream.take(step)
        by_epoch.setdefault((one.source, one.epoch), []).append(one.ids.tolist())
    for label, total in totals.items():
        first, second = by_epoch[label, 0], by_epoch[label, 1]
        assert len(first) == len(second) == total and sorted(first) == sorted(second) and first != second
    tokens = sum(len(ids) for label in totals for ids in by_epoch[label, 0])
    assert tokens == cache.progress()["tokens"], "an epoch is every token"
    assert stream.epochs == {label: max(epoch for own, epoch in by_epoch if own == label) for label in totals}
    stream.close()


def test_same_samples_for_every_world_and_after_every_resume(cache: TokenCache) -> None:
    straight = opened(cache)
    expected = [plain(straight.take(step)) for step in range(30)]
    assert straight.tokens == sum(len(row[2]) for step in expected for row in step)
    for world in (1, 2, 3, 5):
        ranks = [opened(cache, rank=rank, world=world) for rank in range(world)]
        for step in (0, 1, 7, 29, 3):  # any step at any time
            shares = [plain(rank.take(step)) for rank in ranks]
            assert [row for share in shares for row in share] == expected[step]
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
        for rank in ranks:
            rank.close()
    for step in range(30):
        resumed = opened(cache)
        assert plain(resumed.take(step)) == expected[step]
        resumed.close()
    straight.close()


def test_order_depends_on_the_seed_only(tmp_path: Path, bytewise: str) -> None:
    streams = [opened(filled(tmp_path, bytewise, seed)) for seed in (0, 0, 1)]
    taken = [[plain(stream.take(step)) for step in range(5)] for stream in streams]
    assert taken[0] == taken[1] != taken[2]


def test_a_source_keeps_its_order_beside_others(tmp_path: Path, bytewise: str) -> None:
    both = opened(filled(tmp_path, bytewise), batch=40).take(0)
    alone = opened(filled(tmp_path, bytewise, sizes=(("b", 25),)), batch=10).take(0)
    assert plain([one for one in both if one.source == "b"]) == plain(alone)


def test_without_shuffling_the_files_order(tmp_path: Path, bytewise: str) -> None:
    cache = filled(tmp_path, bytewise, sizes=(("b", 25),), shuffle=False)
    stream = opened(cache, batch=1)
    total = stream.available
    assert total is not None
    texts = [plain(stream.take(step)) for step in range(2 * total)]
    from raysys.data.text import load_tokenizer

    text = load_tokenizer(bytewise).decode([token for ((_, _, ids, _),) in texts[:total] for token in ids])
    assert [int(one[1:5]) for one in text.split("<eos>")[:-1]] == list(range(25))
    assert [row[2:] for (row,) in texts[:total]] == [row[2:] for (row,) in texts[total:]]


def test_rows_of_a_window_are_mixed() -> None:
    order = SourceOrder(plan_of({"a": 1.0}, 10, window=4), "a")
    order.know(np.full(10, 5))
    windows = order.windows(0)
    assert [len(window) for window in windows] == [4, 4, 2] and sorted(np.concatenate(windows).tolist()) == list(range(10))
    mixed = order.permutation(0, 0, 20)
    assert sorted(mixed.tolist()) == list(range(20)) and len({row // 5 for row in mixed[:8]}) > 2
    assert order.permutation(1, 0, 20).tolist() != mixed.tolist() != order.permutation(0, 1, 20).tolist()
    assert [order.after(0, window) for window in range(3)] == [(0, 1), (0, 2), (1, 0)]


def plan_of(weights: dict[str, float], units: int, window: int = 2) -> Plan:
    keys = {label: tuple(f"{label}{number}" for number in range(units)) for label in weights}
    return Plan(16, 300, 1, 0, True, window, weights, keys, {})


def test_places_are_found_as_soon_as_they_can_be() -> None:
    order = SourceOrder(plan_of({"a": 1.0}, 6, window=2), "a")
    first = order.windows(0)
    rows = np.full(6, -1)
    assert order.place(0) is None and order.known == 0
    rows[first[0]], rows[first[1][0]] = [3, 4], 5
    order.know(rows.copy())
    assert order.known == 7 and order.total is None and order.place(7) is None
    assert [(place.window, place.row) for place in map(order.place, (0, 6)) if place] == [(0, 0), (0, 6)]
    assert order.ready(0, 0) and not order.ready(0, 1)
    rows[first[1][1]], rows[first[2]] = 0, [1, 2]
    order.know(rows.copy())
    total = 3 + 4 + 5 + 1 + 2
    assert order.total == total
    every = [order.place(number) for number in range(2 * total)]
    assert [(place.epoch, place.window, place.row) for place in every[:total] if place] == [
        *((0, 0, row) for row in range(7)),
        *((0, 1, row) for row in range(5)),
        *((0, 2, row) for row in range(3)),
    ]
    second = [rows[window].sum() for window in order.windows(1)]
    assert Counter(place.window for place in every[total:] if place) == {number: rows for number, rows in enumerate(second) if rows}


@pytest.mark.parametrize("weights", [{"a": 3.0, "b": 1.0}, {"a": 0.7, "b": 0.2, "c": 0.1}, {"a": 1.0, "b": 2**0.5, "c": 1e-9}, {"a": 0.3}])
def test_weights_are_respected_everywhere(weights: dict[str, float]) -> None:
    mixture = Mixture(weights)
    samples = [mixture.sample(number) for number in range(3000)]
    counts: Counter[str] = Counter()
    for label, number in samples:
        assert number == counts[label], "a source's sequences come one after another"
        counts[label] += 1
        if label != "c" or weights["c"] > 0.01:
            assert abs(counts[label] - weights[label] / sum(weights.values()) * sum(counts.values())) < len(weights) + 1
    far = 10**12 + 7
    assert mixture.sample(far)[1] == pytest.approx(far * weights[mixture.sample(far)[0]] / sum(weights.values()), rel=1e-3)


def test_proportions_are_exact_where_they_can_be() -> None:
    assert proportions([3.0, 1.0]) == [3, 1] and proportions([0.7, 0.2, 0.1]) == [7, 2, 1] and proportions([5.0]) == [1]
    assert proportions([2.0, 4.0, 6.0]) == [1, 2, 3]
    rough = proportions([1.0, 3**0.5, 1e-9])
    assert rough[2] == 1 and rough[1] / rough[0] == pytest.approx(3**0.5, rel=1e-3)


def test_how_far_a_mixture_reaches() -> None:
    mixture = Mixture({"a": 3.0, "b": 1.0})
    for rows in ({"a": 7, "b": 100}, {"a": 100, "b": 2}, {"a": 0, "b": 5}, {"b": 3}):
        end = mixture.until(rows)
        taken = Counter(mixture.sample(number)[0] for number in range(end))
        label = mixture.sample(end)[0]
        assert all(taken[own] <= count for own, count in rows.items()) and taken[label] == rows[label]


def test_units_are_made_in_the_order_of_need() -> None:
    plan = plan_of({"a": 3.0, "b": 1.0}, 12, window=2)
    order = needed_order(plan, {"a": [10] * 12, "b": [10] * 12})
    assert sorted(order) == [(label, unit) for label in "ab" for unit in range(12)]
    for label in "ab":
        assert [unit for own, unit in order if own == label] == np.concatenate(SourceOrder(plan, label).windows(0)).tolist()
    assert Counter(label for label, _ in order[:16]) == {"a": 12, "b": 4}


def test_held_out_sequences_in_a_fixed_order(tmp_path: Path, bytewise: str) -> None:
    cache = filled(tmp_path, bytewise, sizes=(("a", 200), ("b", 100)), held_out_share=0.3)
    streams = [opened(cache, batch=6, split="validation", rank=rank, world=2) for rank in (0, 1)]
    total = streams[0].available
    assert total and total > 12
    taken = [plain([*streams[0].take(step), *streams[1].take(step)]) for step in (0, 1, 0)]
    assert taken[0] == taken[2] != taken[1]
    one = opened(cache, batch=total, split="validation")
    held = [tuple(row.ids.tolist()) for row in one.take(0)]
    whole = [ids for ids in held if len(ids) == 16]
    assert taken[0] == plain(opened(cache, batch=6, split="validation").take(0)) and len(held) == total
    assert len(set(whole)) == len(whole) > total / 3
    with pytest.raises(DataError, match=r"source \w has only \d+ held-out sequences .*data\.held_out_share"):
        one.take(1)
    none = filled(tmp_path / "none", bytewise)
    with pytest.raises(DataError, match=r"has no text for validation .*data\.held_out_share"):
        opened(none, split="validation").take(0)


@pytest.mark.parametrize("world", [1, 2, 5])
def test_a_stream_of_so_many_samples_is_cut_short(cache: TokenCache, world: int) -> None:
    whole = opened(cache)
    expected = [*plain(whole.take(0)), *plain(whole.take(1))][:11]
    ranks = [opened(cache, rank=rank, world=world, samples=11) for rank in range(world)]
    steps = [[plain(rank.take(step)) for rank in ranks] for step in range(3)]
    assert [row for step in steps for share in step for row in share] == expected
    assert [sum(map(len, step)) for step in steps] == [8, 3, 0]
    assert all(max(map(len, step)) - min(map(len, step)) <= 1 for step in steps)
    for stream in (whole, *ranks):
        stream.close()


def test_waits_for_units_and_counts_the_stall(tmp_path: Path, bytewise: str) -> None:
    cache = filled(tmp_path, bytewise)
    path = Path(cache.path) / counts_file(cache.plan.name)
    whole = path.read_text()
    expected = plain(opened(cache).take(0))
    path.write_text(json.dumps({"counts": {}, "error": None}))
    stream = opened(cache)
    timer = threading.Timer(1.5, write_atomically, (path, whole))  # as the driver writes it, under the stream's eyes
    timer.start()
    assert stream.available is None
    assert plain(stream.take(0)) == expected and stream.stall_seconds > 0.3
    timer.join()
    path.write_text(json.dumps({"counts": {}, "error": None}))
    late = TokenStream(cache.path, cache.plan.name, batch=8, deadline=0.1)
    with pytest.raises(DeadlineError, match=r"token stream did not finish 'wait for more tokens of source \w' within 0\.1 s .*data\.wait"):
        late.take(0)
    path.write_text(json.dumps({"counts": {}, "error": {"data": True, "message": "the web is full", "remedy": "empty it"}}))
    with pytest.raises(DataError, match=r"the web is full \(empty it\)"):
        late.take(0)


def test_the_next_window_is_read_in_the_meantime(cache: TokenCache) -> None:
    stream = opened(cache, batch=4)
    for step in range(40):
        stream.take(step)
        assert len(stream._windows) <= 2 * len(cache.plan.units), "one window of each source, and the one behind it"
        newest = {label: max(key[1:] for key in stream._windows if key[0] == label) for label in {key[0] for key in stream._windows}}
        assert len(newest) == 2
    ends = time.monotonic() + 30
    while not all(window.done() for window in stream._windows.values()) and time.monotonic() < ends:
        time.sleep(0.01)
    assert all(window.done() for window in stream._windows.values())
    stream.close()


def test_a_cache_that_this_node_does_not_see(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no plan x on this node .*data\.cache"):
        TokenStream(str(tmp_path), "x", batch=1)
    with pytest.raises(ValueError, match="rank=2, world=2"):
        TokenStream(str(tmp_path), "x", batch=1, rank=2, world=2)


def test_other_data_are_refused_by_name(tmp_path: Path, bytewise: str) -> None:
    saved = json.loads(json.dumps(filled(tmp_path, bytewise).plan.facts))
    check_same(saved, filled(tmp_path, bytewise).plan.facts)
    with open(tmp_path / "text" / "a.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(CheckpointError, match=r"sources\.a\.text was 1 files of \d+ bytes \(\w+\), is 1 files of \d+ bytes") as error:
        check_same(saved, filled(tmp_path, bytewise).plan.facts)
    assert "sources.b" not in str(error.value) and "tokenizer" not in str(error.value)
    with pytest.raises(
        CheckpointError, match=r"cutting was .*order was shuffled by 3 units, seed 0, is .*seed 5.*sources\.b\.text was .*not there"
    ):
        check_same(saved, filled(tmp_path, bytewise, 5, sizes=(("a", 1),), sequence=8).plan.facts)
