"""Seconds and memory of calibrating the advantages of one step's trajectories, at the paper's sizes, on one thread.

Step scores come from made-up rollouts with thinkings of `words` words from a Zipf-like vocabulary. In `usual` each is drawn anew, so that
few pairs need their distance; in `hard` the first of a rollout is one text and the others keep 55 words of 100 of it in order, so that half
of the pairs need it, and all documents are silver and new, so that no other veto comes before. Seconds are medians over rounds in a fresh
process, by the wall and of processor time, which other work on the machine touches less; memory is its high-water mark of resident
memory beyond what it had with its arguments in hand.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from raysys.methods.calibadv import calibrate, score_table, step_scores
from raysys.methods.calibadv_metrics import calibration_metrics, run_perplexity
from tests.bench.peak import own_memory

DEFAULTS: dict[str, Any] = {"questions": 512, "samples": 5, "tokens": 4096, "searches": 4, "words": 300, "rounds": 5, "threads": 1}
PARTS = ("step_scores usual", "step_scores hard", "calibrate", "calibration_metrics", "run_perplexity")
MIB = 2**20


def run(**size: Any) -> dict[str, Any]:
    """Figures by part; `output_mib` is the [B, T] that `calibrate` returns and counts in its memory."""
    rows = size["questions"] * size["samples"]
    return {
        "trajectories": rows,
        "parts": {part: _fresh(size, part) for part in PARTS},
        "output_mib": rows * size["tokens"] * 4 / MIB,
        "targets": {"calibrate_seconds": 1.0},
    }


def table(figures: dict[str, Any]) -> list[list[Any]]:
    rows = [[part, found["seconds"], found["processor_seconds"], found["peak_mib"]] for part, found in figures["parts"].items()]
    return [["part", "median s", "processor s", "peak MiB beyond arguments"], *rows]


def _fresh(size: dict[str, Any], part: str) -> dict[str, float]:
    call = [sys.executable, "-m", "tests.bench.calibrate", json.dumps([size, part])]
    done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    return json.loads(done.stdout.splitlines()[-1])


def _measure(size: dict[str, Any], part: str) -> dict[str, float]:
    torch.set_num_threads(size["threads"])
    _work({**size, "questions": 2, "tokens": 64, "words": 9}, part)()  # libraries and their buffers are no part of it
    work = _work(size, part)
    # Writing 5 makes the high-water mark start over from here, else it would be that of making the arguments.
    Path("/proc/self/clear_refs").write_text("5")
    before, seconds, spent = own_memory("VmRSS"), [], []
    for _ in range(size["rounds"]):
        began, used = time.perf_counter(), time.process_time()
        work()
        seconds.append(time.perf_counter() - began)
        spent.append(time.process_time() - used)
    peak = (own_memory("VmHWM") - before) / MIB
    return {"seconds": statistics.median(seconds), "processor_seconds": statistics.median(spent), "peak_mib": peak}


def _work(size: dict[str, Any], part: str) -> Callable[[], Any]:
    if part.startswith("step_scores"):
        groups = _rollouts(size, hard=part.endswith("hard"))
        return lambda: score_table([scores for group in groups for scores in step_scores(group)])
    given = _batch(size)
    if part == "run_perplexity":
        logprobs = -torch.rand(given["runs"].shape)
        return lambda: run_perplexity(logprobs, given["runs"], given["run_counts"])
    function = {"calibrate": calibrate, "calibration_metrics": calibration_metrics}[part]
    return lambda: function(**given)


def _batch(size: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Runs and retrieved text by turns, all of one length, until the tokens are used up."""
    torch.manual_seed(0)
    rows, pieces = size["questions"] * size["samples"], 2 * size["searches"] + 1
    piece = torch.arange(size["tokens"]) * pieces // size["tokens"]
    runs = torch.where(piece % 2 == 0, piece // 2, -1).repeat(rows, 1)
    rewards = torch.randint(0, 4, (rows,)) / 3
    scores = torch.randint(0, 4, (rows, size["searches"])) / 3
    groups = torch.arange(rows) % size["questions"]
    return {
        "rewards": rewards,
        "groups": groups,
        "runs": runs,
        "run_counts": torch.full((rows,), size["searches"] + 1),
        "step_scores": scores,
    }


def _rollouts(size: dict[str, Any], hard: bool) -> list[list[dict[str, Any]]]:
    dice = random.Random(0)
    vocabulary = [f"word{rank}" for rank in range(3000)]
    weights = list(itertools.accumulate(1 / (rank + 3) for rank in range(3000)))
    groups = []
    for _ in range(size["questions"]):
        text = dice.choices(vocabulary, cum_weights=weights, k=size["words"])
        group = []
        for _ in range(size["samples"]):
            steps = []
            for step in range(size["searches"]):
                words = dice.choices(vocabulary, cum_weights=weights, k=size["words"])
                kept = 0.0 if not hard else 0.55 if step else 1.0
                words = [old if dice.random() < kept else new for old, new in zip(text, words, strict=True)]
                ids = [3 * step + k for k in range(3)] if hard else dice.sample(range(12), 3)
                steps.append({"think": " ".join(words), "doc_ids": ids})
            group.append({"valid": True, "reward": 1.0 if hard else dice.choice([0.0, 0.5, 0.8, 1.0]), "steps": steps})
        groups.append(group)
    return groups


if __name__ == "__main__":
    print(json.dumps(_measure(*json.loads(sys.argv[1]))))
