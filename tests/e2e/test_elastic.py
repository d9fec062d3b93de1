"""Pretraining whose ranks follow the cluster: a node joins, a rank more; it is killed, a rank less; the samples are those of a calm run."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from raysys.head import Head
from tests.e2e import test_pretrain_moe
from tests.e2e.test_gopd import Workplace
from tests.e2e.test_pretrain_moe import config, tensors
from tests.e2e.test_two_nodes import Node, small_head

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(600)]

__all__ = ["place", "small_head"]
place = test_pretrain_moe.place
STEPS = 400
WORKER = "RayTrainWorker"


@pytest.fixture
def cpus() -> int:
    """Of the head: one rank, and Ray Train's controller."""
    return 1


@pytest.fixture
def elsewhere(place: Workplace, small_head: Head) -> Iterator[Workplace]:
    yield Workplace(place.folder, small_head)


def until(done: Callable[[], bool], what: str, log: Path) -> None:
    end = time.monotonic() + 200
    while not done():
        assert time.monotonic() < end, f"not in time: {what}\n{log.read_text()[-3000:]}"
        time.sleep(0.1)


def crawl(place: Workplace) -> None:
    """Lets ranks make a step or two in seconds: Ray Train has time to look at the cluster, on whatever machine."""
    for number, pause in ((signal.SIGSTOP, 2.0), (signal.SIGCONT, 0.2)):
        for one in place.processes(WORKER):
            with suppress(psutil.NoSuchProcess):
                one.send_signal(number)
        time.sleep(pause)


def test_ranks_follow_the_cluster(place: Workplace, elsewhere: Workplace, tmp_path: Path) -> None:
    # The undisturbed run makes the token cache: the small head has no CPU for that.
    slow = config(place, steps=STEPS, batch=24, checkpoint_every=10, validation=None, restarts=0)
    place.run("pretrain_moe", "calm", slow, "trainer.ranks=1")
    log = place.folder / "elastic.log"

    def ranks() -> list[int]:
        return [int(step["ranks"]) for step in place.metrics("elastic")]

    began, run = time.monotonic(), elsewhere.start("pretrain_moe", "elastic", slow, "trainer.ranks=1..2", "trainer.restarts=3")
    try:
        until(lambda: len(ranks()) > 5, "a first step", log)
        with Node(elsewhere.head, tmp_path / "node.log") as node:
            while 2 not in ranks():
                assert run.poll() is None and time.monotonic() < began + 240, f"no second rank in time\n{log.read_text()[-3000:]}"
                crawl(elsewhere)
            until(lambda: ranks().count(2) > 12, "a resume point of two ranks", log)
            node.kill()
        until(lambda: ranks()[-1] == 1, "one rank again", log)
        assert run.wait(timeout=200) == 0, log.read_text()[-3000:]
    finally:
        run.kill()
        run.wait()
    found, wanted = place.metrics("elastic"), place.metrics("calm")
    assert [step["step"] for step in found] == list(range(STEPS)), "each step once"
    assert sorted(set(ranks())) == [1, 2]
    for one, other in zip(found[:50], wanted, strict=False):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert found[-1]["loss"] == pytest.approx(wanted[-1]["loss"], rel=0.05)
    assert tensors(place.folder / "elastic").keys() == tensors(place.folder / "calm").keys()
