"""Training tokens a second of packed rows against padded ones, on rows of log-normal lengths; padding counts for nothing.

Forms, each a whole optimiser step (forward, backward, AdamW) on the same rows in one process, in turn:

* `arrival`: rows as they come, `batch` at a time, padded to the longest of them, as a default collator does;
* `sorted`: padded, rows of similar length together, within `micro_batch_tokens` padded tokens: raysys with a model that cannot pack;
* `packed`: one after another without padding, within `micro_batch_tokens` tokens.

The padded forms get causal attention without a mask, which a collator's attention mask would not let them have. Ratios are
medians over rounds, each of new rows; beside the wall clock those of processor time, which other work on the machine does not
touch when `threads=1`. Memory is the high-water mark of resident memory of a fresh process each, beyond model and optimiser.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from raysys.models.causal import load_causal, response_logprobs
from raysys.models.microbatch import pack_rows
from tests.bench.peak import own_memory

DEFAULTS: dict[str, Any] = {
    "rows": 64,
    "median": 120,
    "tail": 8.0,
    "cap": 1024,
    "batch": 8,
    "micro_batch_tokens": 4096,
    "hidden": 256,
    "layers": 4,
    "vocabulary": 4096,
    "rounds": 5,
    "threads": None,
}
FORMS = ("arrival", "sorted", "packed")
MIB = 2**20


def run(threads: int | None, rounds: int, **size: Any) -> dict[str, Any]:
    """Figures by form. `tail`: 99th percentile over median of the lengths before the `cap`; null `threads`: torch's default."""
    if threads:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        _new_model(size, folder)
        memory = {form: _peak(size, form, folder) / MIB for form in FORMS}
        model = load_causal(folder, "float32", trainable=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)  # so that all forms start from the same weights
    done: list[dict[str, tuple[float, float, float]]] = []
    for number in range(rounds + 1):
        rows = _rows(size, seed=number)
        turn = number % len(FORMS)
        done.append({form: _timed(model, optimizer, size, form, rows) for form in FORMS[turn:] + FORMS[:turn]})
    done = done[1:]  # the first round warms caches and the allocator
    tokens = [sum(map(len, _rows(size, seed=number)[0])) for number in range(1, rounds + 1)]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "threads": torch.get_num_threads(),
        "tokens_a_step": statistics.mean(tokens),
        "forms": {form: _figures(form, done, tokens, memory, size) for form in FORMS},
        "targets": {"ratio_to_arrival": 1.8},
    }


def table(figures: dict[str, Any]) -> list[list[Any]]:
    keys = list(figures["forms"]["packed"])
    return [["form", *keys], *([form, *(found[key] for key in keys)] for form, found in figures["forms"].items())]


def _figures(
    form: str, done: list[dict[str, tuple[float, float, float]]], tokens: list[int], memory: dict[str, float], size: dict[str, Any]
) -> dict[str, float]:
    def ratio(other: str, which: int) -> float:
        return statistics.median(each[other][which] / each[form][which] for each in done)

    shares = []
    for number in range(1, len(done) + 1):
        lengths = np.array([len(row) for row in _rows(size, seed=number)[0]])
        taken = [lengths[pack].sum() if form == "packed" else lengths[pack].max() * len(pack) for pack in _packs(size, form, lengths)]
        shares.append(lengths.sum() / sum(taken))
    return {
        "tokens_per_second": statistics.median(count / each[form][0] for count, each in zip(tokens, done, strict=True)),
        "ratio_to_arrival": ratio("arrival", 0),
        "ratio_to_sorted": ratio("sorted", 0),
        "processor_ratio_to_arrival": ratio("arrival", 1),
        "processor_ratio_to_sorted": ratio("sorted", 1),
        "real_share_of_tokens": statistics.median(shares),
        "peak_mib": memory[form],
        "largest_loss_gap": max(abs(each[form][2] - each["arrival"][2]) for each in done),
    }


def _timed(model: Any, optimizer: torch.optim.Optimizer, size: dict[str, Any], form: str, rows: Any) -> tuple[float, float, float]:
    """Seconds, processor seconds, and the loss, by which forms can be compared."""
    began, spent = time.perf_counter(), time.process_time()
    loss = _step(model, size, form, rows)
    optimizer.step()
    return time.perf_counter() - began, time.process_time() - spent, loss


def _step(model: Any, size: dict[str, Any], form: str, rows: tuple[list[np.ndarray], np.ndarray]) -> float:
    """Gradients of the mean negative log-likelihood of the response tokens, which is returned."""
    ids, prompts = rows
    lengths = np.array([len(row) for row in ids])
    responses = lengths - prompts
    model.packs = form == "packed"
    model.zero_grad(set_to_none=True)
    total = 0.0
    for pack in _packs(size, form, lengths):
        flat = torch.from_numpy(np.concatenate([ids[row] for row in pack]))
        found = response_logprobs(model, flat, torch.from_numpy(prompts[pack]), torch.from_numpy(responses[pack]))
        loss = -found.sum() / int(responses.sum())
        loss.backward()
        total += float(loss.detach())
    return total


def _packs(size: dict[str, Any], form: str, lengths: np.ndarray) -> list[np.ndarray]:
    if form == "arrival":
        return [np.arange(first, min(first + size["batch"], len(lengths))) for first in range(0, len(lengths), size["batch"])]
    return pack_rows(lengths, size["micro_batch_tokens"], padded=form == "sorted")


def _rows(size: dict[str, Any], seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Token ids of each row, and how many of them are its prompt: a quarter."""
    rng = np.random.default_rng(seed)
    spread = np.log(size["tail"]) / 2.3263  # the 99th percentile of a normal distribution, in deviations
    lengths = np.clip(np.exp(rng.normal(np.log(size["median"]), spread, size["rows"])).round().astype(np.int64), 8, size["cap"])
    return [rng.integers(0, size["vocabulary"], length) for length in lengths], lengths // 4


def _new_model(size: dict[str, Any], folder: str) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=size["vocabulary"],
        hidden_size=size["hidden"],
        intermediate_size=3 * size["hidden"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["hidden"] // 64,
        num_key_value_heads=max(1, size["hidden"] // 128),
        head_dim=64,
        max_position_embeddings=size["cap"],
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(folder)


def _peak(size: dict[str, Any], form: str, folder: str) -> int:
    """Bytes of a fresh process at the peak of a step, beyond what it had before."""
    call = [sys.executable, "-m", "tests.bench.packing", json.dumps([size, form, folder, torch.get_num_threads()])]
    return int(subprocess.run(call, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]).stdout.splitlines()[-1])


def _measure(size: dict[str, Any], form: str, folder: str, threads: int) -> int:
    torch.set_num_threads(threads)
    model = load_causal(folder, "float32", trainable=True)
    small = _rows({**size, "rows": 2, "median": 9, "cap": 12}, seed=0)
    _step(model, size, form, small)  # libraries, threads and their buffers are no part of any form
    before = own_memory("VmRSS")
    _step(model, size, form, _rows(size, seed=1))
    return own_memory("VmHWM") - before


if __name__ == "__main__":
    print(_measure(*json.loads(sys.argv[1])))
