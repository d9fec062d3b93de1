"""What quantising one layer costs by RTN, GPTQ, GPTAQ and D2Quant, and beside llmcompressor's GPTQ where that is installed.

A layer of random weights at the given shape, inputs with columns that hang together and a few that are large, and a full-precision path
that deviates. Seconds are processor time, medians over the repeats; methods alternate. Counted: sums
over calibration tokens, factors, columns; D2Quant is GPTAQ, the column scales of down (DSQ) and the bias after attention (DAC: sums of the
norm's outputs with either weights). Not counted: the passes through the layer that give inputs and those outputs, alike for all but RTN.
The library sums a Hessian for each linear, takes its scales from the weights' range (not timed), and has no asymmetric part; ours sums one
for linears that share an input and searches ranges.

`error` is the squared error of the layer's outputs on the full-precision ones, relative, mean over its linears. `dsq + dac` is their
share on top of GPTAQ, with the tokens of the bench and with sums scaled to those of the method's paper.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raysys.compression.backends import gptq, rtn
from raysys.compression.statistics import Statistics
from raysys.methods.d2quant import Quantized, absorb, deviation_bias

DEFAULTS: dict[str, Any] = {
    "hidden": 1024,
    "ffn": 3072,
    "heads": 16,
    "kv_heads": 8,
    "head_dim": 64,
    "tokens": 4096,
    "bits": 2,
    "group_size": 128,
    "repeats": 3,
    "threads": 1,
    "library": True,
}
PAPER_TOKENS = 128 * 2048


def run(
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    tokens: int,
    bits: int,
    group_size: int,
    repeats: int,
    threads: int,
    library: bool,
) -> dict[str, Any]:
    """Seconds by method and part, and errors."""
    torch.set_num_threads(threads)
    attention, kv = heads * head_dim, kv_heads * head_dim
    rows = {"q": (attention, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, attention)}
    rows |= {"gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn)}
    shared = {"q": "hidden", "k": "hidden", "v": "hidden", "o": "attention", "gate": "mlp", "up": "mlp", "down": "ffn"}
    weights = {name: _normal(index, *shape).mul_(0.02) for index, (name, shape) in enumerate(rows.items())}
    inputs = {name: _inputs(index, tokens, rows[_reader(shared, name)][1]) for index, name in enumerate(dict.fromkeys(shared.values()))}

    beside = library and importlib.util.find_spec("llmcompressor") is not None
    spent: dict[str, list[float]] = defaultdict(list)
    errors: dict[str, float] = {}
    for repeat in range(repeats + 1):
        made = _once(weights, inputs, shared, bits, group_size, spent)
        if beside:
            made["llmcompressor"] = _library(weights, inputs, shared, bits, group_size, spent)
        if not repeat:  # compiles kernels, fills caches
            spent.clear()
            errors = {method: _error(weights, inputs, shared, out) for method, out in made.items()}
    seconds = {part: statistics.median(values) for part, values in spent.items()}
    totals = {
        "rtn": seconds["rtn"],
        "gptq": seconds["sums H"] + seconds["factor H"] + seconds["columns gptq"],
        "gptaq": seconds["sums H, D"] + seconds["factor H, D"] + seconds["columns gptaq"],
    }
    own = seconds["down dsq"] - seconds["down"] + seconds["absorb"] + seconds["dac"]
    totals["d2quant"] = totals["gptaq"] + own
    if beside:
        totals["llmcompressor"] = seconds["sums library"] + seconds["columns library"]
    # Sums take time by the token, and so does the bias.
    more = PAPER_TOKENS / tokens - 1
    at_paper = (own + more * seconds["dac"]) / (totals["gptaq"] + more * seconds["sums H, D"])
    figures: dict[str, Any] = {"parts": seconds, "seconds": totals, "error": errors}
    figures |= {"own_share": own / totals["gptaq"], "own_share_at_paper_tokens": at_paper, "target_own_share": 0.15}
    if beside:
        ours = seconds["factor H"] + seconds["columns gptq"]
        figures |= {
            "ratio": totals["gptq"] / totals["llmcompressor"],
            "ratio_without_sums": ours / seconds["columns library"],
            "target_ratio": 1.2,
        }
    return figures


def table(figures: dict[str, Any]) -> list[list[Any]]:
    rows: list[list[Any]] = [["method", "s a layer", "over GPTQ", "error"]]
    for method, seconds in figures["seconds"].items():
        rows.append([method, seconds, seconds / figures["seconds"]["gptq"], figures["error"][method]])
    rows += [[part, seconds, "", ""] for part, seconds in figures["parts"].items()]
    names = ("own_share", "own_share_at_paper_tokens", "ratio", "ratio_without_sums")
    told = ("dsq + dac over gptaq", f"the same at {PAPER_TOKENS} tokens", "gptq over the library's", "the same without sums")
    return [*rows, *([text, figures[name], "", ""] for name, text in zip(names, told, strict=True) if name in figures)]


def _once(
    weights: dict[str, Tensor],
    inputs: dict[str, tuple[Tensor, Tensor]],
    shared: dict[str, str],
    bits: int,
    group_size: int,
    spent: dict[str, list[float]],
) -> dict[str, dict[str, Quantized]]:
    def timed(part: str, call: Callable[[], Any]) -> Any:
        return _timed(spent, part, call)

    made: dict[str, dict[str, Quantized]] = {"rtn": timed("rtn", lambda: {name: rtn(w, bits, group_size) for name, w in weights.items()})}
    plain = timed("sums H", lambda: _sums(inputs, full=False))
    timed("factor H", lambda: [one.factor(group_size) for one in plain.values()])
    made["gptq"] = timed("columns gptq", lambda: {name: gptq(w, plain[shared[name]], bits, group_size) for name, w in weights.items()})
    sums = timed("sums H, D", lambda: _sums(inputs, full=True))
    timed("factor H, D", lambda: [one.factor(group_size) for one in sums.values()])
    made["gptaq"] = timed("columns gptaq", lambda: {name: gptq(w, sums[shared[name]], bits, group_size) for name, w in weights.items()})
    timed("down", lambda: gptq(weights["down"], sums["ffn"], bits, group_size))
    down = timed("down dsq", lambda: gptq(weights["down"], sums["ffn"], bits, group_size, down=True))
    timed("absorb", lambda: absorb(made["gptaq"]["up"], down.column_scale))
    timed("dac", lambda: _dac(*inputs["mlp"]))
    made["d2quant"] = made["gptaq"] | {"down": down}
    return made


def _dac(teacher: Tensor, student: Tensor) -> Tensor:
    sums = [sum((part.sum(0) for part in one.split(2048)), torch.zeros(one.shape[1])) for one in (teacher, student)]
    return deviation_bias(sums[0], sums[1], len(teacher))


def _library(
    weights: dict[str, Tensor],
    inputs: dict[str, tuple[Tensor, Tensor]],
    shared: dict[str, str],
    bits: int,
    group_size: int,
    spent: dict[str, list[float]],
) -> dict[str, Any]:
    """Results by linear, as objects with `dequantize`."""
    helpers = importlib.import_module("llmcompressor.modifiers.gptq.helpers")
    library = importlib.import_module("llmcompressor.modifiers.gptq.gptq_quantize")
    quantization = importlib.import_module("compressed_tensors.quantization")
    kind = quantization.QuantizationArgs(num_bits=bits, symmetric=True, strategy="group", group_size=group_size, actorder="weight")
    linears = {name: torch.nn.Linear(weight.shape[1], 1, bias=False) for name, weight in weights.items()}

    def summed(name: str) -> Tensor:
        hessian = helpers.make_empty_hessian(linears[name])
        count = torch.zeros(())
        for part in inputs[shared[name]][0].split(2048):
            helpers.accumulate_hessian(part, linears[name], hessian, count)
        return hessian / len(inputs[shared[name]][0])

    hessians = _timed(spent, "sums library", lambda: {name: summed(name) for name in weights})
    scales = {name: w.unflatten(1, (-1, group_size)).abs().amax(-1)[None] / ((2**bits - 1) / 2) for name, w in weights.items()}

    def quantised(name: str) -> Tensor:
        zero = torch.zeros_like(scales[name])
        return library.quantize_weight(weights[name][None].clone(), hessians[name][None], scales[name], zero, None, kind)[0][0]

    return _timed(spent, "columns library", lambda: {name: _Dense(quantised(name)) for name in weights})


class _Dense:
    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def dequantize(self) -> Tensor:
        return self._weight


def _timed(spent: dict[str, list[float]], part: str, call: Callable[[], Any]) -> Any:
    started = time.process_time()
    out = call()
    spent[part].append(time.process_time() - started)
    return out


def _sums(inputs: dict[str, tuple[Tensor, Tensor]], full: bool) -> dict[str, Statistics]:
    made = {}
    for name, (x, other) in inputs.items():
        made[name] = Statistics(x.shape[1])
        for start in range(0, len(x), 2048):
            made[name].add(x[start : start + 2048], other[start : start + 2048] if full else None)
    return made


def _error(weights: dict[str, Tensor], inputs: dict[str, tuple[Tensor, Tensor]], shared: dict[str, str], made: dict[str, Any]) -> float:
    errors = []
    for name, weight in weights.items():
        x, full = (one[:1024] for one in inputs[shared[name]])
        want = full @ weight.T
        errors.append(float((x @ made[name].dequantize().T - want).square().sum() / want.square().sum()))
    return statistics.mean(errors)


def _reader(shared: dict[str, str], of: str) -> str:
    return next(name for name, one in shared.items() if one == of)


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _inputs(seed: int, tokens: int, columns: int) -> tuple[Tensor, Tensor]:
    """Directions shared by columns, and a deviation that follows the inputs; one column in a hundred is large."""
    rank = columns // 8
    x = _normal(100 + seed, tokens, columns) + 2 * _normal(200 + seed, tokens, rank) @ _normal(300 + seed, rank, columns) / rank**0.5
    x[:, ::100] *= 8
    return x, x + 0.1 * x.roll(1, dims=1) + 0.05 * _normal(400 + seed, tokens, columns)
