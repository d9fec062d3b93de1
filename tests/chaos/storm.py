"""`bash tests/run.sh chaos`: kills and stops processes of running jobs at random moments, and says what happened.

Every run must end by itself with nothing lost, nothing trained twice, no stale weights and, where the order is fixed, with the weights of
a run that nobody disturbed. The kills are seeded; the moments are as random as the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from raysys.compare import differences
from raysys.head import Head
from tests.processes import below, ended, stopped

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)


@dataclass
class Kill:
    """What was hit, how, at which line of metrics, and how long until the next step was done."""

    what: str
    how: str
    line: int
    seconds: float


class Storm:
    """One run under fire.

    Args:
        command: the supervised run.
        folder: its run folder.
        victims: kind of process to a pattern in its command line; `driver` is the supervisor's child.
    """

    def __init__(self, head: Head, command: list[str], folder: Path, victims: dict[str, str], dice: random.Random, patience: float):
        self._head, self._folder, self._victims, self._dice, self._patience = head, folder, victims, dice, patience
        env = head.env | {"PYTHONPATH": str(ROOT)}
        self._log = folder.with_suffix(".log")
        with open(self._log, "ab") as log:
            self.run = subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log)
        self.kills: list[Kill] = []

    def rage(self, kills: int, pause: tuple[float, float], signals: tuple[signal.Signals, ...] = SIGNALS, in_turn: bool = False) -> None:
        """Kills until there were `kills` or the run is done; each at least one step after the last one was made good.

        `in_turn` hits no kind twice before all had their turn.
        """
        kinds, deck = sorted(self._victims), list[str]()
        with self:
            while len(self.kills) < kills and self.run.poll() is None:
                time.sleep(self._dice.uniform(*pause))
                deck = (deck or self._dice.sample(kinds, len(kinds))) if in_turn else [self._dice.choice(kinds)]
                self.hit(deck.pop(), self._dice.choice(signals))
        assert self.run.returncode == 0, f"the run ended with {self.run.returncode}:\n{self.tail()}"

    def __enter__(self) -> Storm:
        self._until(lambda: self.lines() >= 1)
        return self

    def __exit__(self, kind: type | None, *exc: object) -> None:
        """Waits for the run's end, or ends it if something went wrong."""
        try:
            if kind is None:
                self._until(lambda: self.run.poll() is not None)
        finally:
            if self.run.poll() is None:
                self.run.kill()
            self.run.wait()

    def hit(self, kind: str, how: signal.Signals) -> Kill | None:
        """Hits one process and waits until the run has made it good. None: there was nobody to hit."""
        victim = self._find(kind)
        if victim is None or self.run.poll() is not None:
            return None
        began, line = time.monotonic(), self.lines()
        try:
            victim.send_signal(how)
        except psutil.NoSuchProcess:
            return None
        self._until(lambda: self._recovered(victim, line))
        self.kills.append(Kill(kind, how.name, line, time.monotonic() - began))
        return self.kills[-1]

    def lines(self) -> int:
        path = self._folder / "metrics.jsonl"
        return len(path.read_bytes().splitlines()) if path.is_file() else 0

    def tail(self) -> str:
        return self._log.read_text()[-3000:]

    def _recovered(self, victim: psutil.Process, line: int) -> bool:
        """The next good step is done, and what was stopped is gone: until then its work may still be missing."""
        return self.run.poll() is not None or (self.lines() > line and ended(victim))

    def _find(self, kind: str) -> psutil.Process | None:
        if kind == "driver":
            found = psutil.Process(self.run.pid).children()
        else:
            found = below(psutil.Process(self._head.pid), self._victims[kind])
        alive = [one for one in found if not ended(one) and not stopped(one)]
        return self._dice.choice(alive) if alive else None

    def _until(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + self._patience
        while not done():
            assert self.run.poll() is None or done(), f"the run ended with {self.run.returncode}:\n{self.tail()}"
            assert time.monotonic() < end, f"nothing for {self._patience:g} s after {self.kills[-1:]}:\n{self.tail()}"
            time.sleep(0.02)


FAKE_VICTIMS = {"driver": "", "engine": "ray::StormEngine", "trainer": "ray::StormTrainerRank", "scorer": "ray::StormScorer"}
CASES = ((0, "first_ready"), (2, "in_order"), (1, "first_ready"), (3, "first_ready"))


def fake_run(head: Head, folder: Path, seed: int, kills: int, steps: int = 30, case: tuple[int, str] | None = None) -> list[Kill]:
    """A run on engines that are none, under fire, and everything that must hold afterwards."""
    dice = random.Random(seed)
    max_age, order = case or CASES[seed % len(CASES)]
    flags = ["--max-age", str(max_age), "--order", order, "--steps", str(steps), "--workers", dice.choice(["1", "2", "1..3"])]
    command = [sys.executable, "-u", "-m", "tests.chaos.driver"]
    hit = Storm(head, [*command, str(folder / "hit"), *flags, "--supervise"], folder / "hit", FAKE_VICTIMS, dice, patience=90.0)
    hit.rage(kills, pause=(0.05, 0.6))
    if max_age == 0 or order == "in_order":
        calm = Storm(head, [*command, str(folder / "calm"), *flags, "--supervise"], folder / "calm", {}, dice, patience=90.0)
        calm.rage(0, pause=(0, 0))
        weights = [np.load(folder / which / "export" / "trainer" / "weights.npz")["weights"] for which in ("calm", "hit")]
        assert np.array_equal(*weights), "the weights are not those of the undisturbed run"
    check_ledger(folder / "hit", steps, prompts=8, samples=2, max_age=max_age, fixed=max_age == 0 or order == "in_order")
    return hit.kills


def check_ledger(folder: Path, steps: int, prompts: int, samples: int, max_age: int, fixed: bool) -> None:
    """Each prompt exactly once, versions one by one, nothing too old."""
    taken = [json.loads(line) for line in (folder / "ledger" / "steps.jsonl").read_text().splitlines()]
    ids = [one for step in taken for one in step["ids"]]
    assert [step["step"] for step in taken] == list(range(steps)) and [step["version"] for step in taken] == list(range(1, steps + 1))
    assert max(Counter(ids).values()) == 1 and len(ids) == steps * prompts * samples
    numbers = sorted({int(one[1:].partition("@")[0]) for one in ids})
    assert len(numbers) == steps * prompts and numbers[-1] < (steps + max_age) * prompts
    assert not fixed or numbers == list(range(steps * prompts))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(steps)) and all(record["age_max"] <= max_age for record in records)
    assert not (folder / "dead_letters.jsonl").exists() or not (folder / "dead_letters.jsonl").read_text()


REAL_VICTIMS = {
    "driver": "",
    "engine": "EngineCore",
    "rollout actor": "ray::RolloutWorker",
    "trainer": "ray::TrainerWorker",
    "scorer": "ray::ScorerWorker",
}


def real_command(folder: Path, name: str, steps: int) -> list[str]:
    """`jobs/gopd.py` on two untrained small models, which are made on the first call."""
    from raysys.config.runs import NewModel
    from raysys.models.scratch import new_causal

    models = [folder / f"model{number}" for number in range(2)]
    for number, path in enumerate(models):
        if not path.is_dir():
            new_causal(NewModel(), path, seed=number)
    config = ROOT / "jobs" / "configs" / "gopd" / "local.yaml"
    keys = [f"student={models[0]}", f"teachers={{add: {models[1]}, rev: {models[1]}}}", "reference=null", "reward_scale=1.0"]
    keys += ["evaluation=null", f"steps={steps}", "batch=32", "evaluate_every=null", "checkpoint_every=2", "restarts=8"]
    keys += ["deadlines={heartbeat: 10, train: 15, score: 15, push: 15}"]
    return [sys.executable, "-u", str(ROOT / "jobs" / "gopd.py"), "--config", str(config), f"run_dir={folder / name}", *keys]


def real_run(head: Head, folder: Path, seed: int, kills: int, steps: int = 60) -> list[Kill]:
    """A real run under fire; metrics and weights must equal an undisturbed run's bit for bit."""
    runs: dict[str, Storm] = {}
    for name, count in (("hit", kills), ("calm", 0)):
        runs[name] = Storm(head, real_command(folder, name, steps), folder / name, REAL_VICTIMS, random.Random(seed), patience=240.0)
        runs[name].rage(count, pause=(0.2, 1.5), in_turn=True)
    told = list(differences(folder / "calm", folder / "hit"))
    assert not told, told[0]
    for file in (folder / "calm" / "export").glob("*.safetensors"):
        assert file.read_bytes() == (folder / "hit" / "export" / file.name).read_bytes(), f"{file.name} differs"
    return runs["hit"].kills


def tell(kills: list[Kill]) -> str:
    """A table: what was hit how often, and the median and longest time to the next good step."""
    rows = [f"{'what':<14} {'signal':<8} {'times':>5} {'median s':>9} {'longest s':>10}"]
    for what, how in sorted({(kill.what, kill.how) for kill in kills}):
        seconds = sorted(kill.seconds for kill in kills if (kill.what, kill.how) == (what, how))
        rows.append(f"{what:<14} {how:<8} {len(seconds):>5} {seconds[len(seconds) // 2]:>9.1f} {seconds[-1]:>10.1f}")
    return "\n".join(rows)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bash tests/run.sh chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="on fake engines")
    parser.add_argument("--real", type=int, default=6, help="on a real engine")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with a_head() as (head, home):
        fake: list[Kill] = []
        run = options.seed
        while len(fake) < options.kills:
            folder = home / f"fake{run}"
            folder.mkdir()
            kills = fake_run(head, folder, run, min(10, options.kills - len(fake)), steps=60)
            fake += kills
            told = ", ".join(f"{kill.what} {kill.how} {kill.seconds:.1f} s" for kill in kills)
            print(f"run {run} (max_age, order {CASES[run % len(CASES)]}): {len(kills)} kills made good: {told}", flush=True)
            run += 1
        print(tell(fake), flush=True)
        if options.real:
            (home / "real").mkdir()
            print("real engine:\n" + tell(real_run(head, home / "real", options.seed, options.real)), flush=True)
        print(f"{len(fake)} kills on fake engines and {options.real} on a real one: nothing lost, nothing trained twice")
    return 0


@contextmanager
def a_head() -> Iterator[tuple[Head, Path]]:
    """A Ray head of its own and a folder beside it; both are gone afterwards."""
    from raysys import head as heads

    home = Path(tempfile.mkdtemp(prefix="raysys-chaos-"))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "RAYSYS_HOME": str(home)}
    try:
        with heads.locked(home):
            head = heads.start(home, cpus=16)
        yield head, home
    finally:
        heads.remove_traces(home)
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
