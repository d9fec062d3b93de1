"""What happens to one layer, in the order of the authors' program. Paper: arXiv 2602.02546.

q k v     on what the norm before attention gives           one set of statistics
o         on the attention of the quantised q k v
DAC       mean of the norm after attention: this layer's attention in full precision less quantised, both on the quantised prefix
gate up   on that norm with its correction                  one set of statistics
down      on the quantised gate and up; its column scale goes into up
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raysys.compression.backends import gptq, rtn
from raysys.compression.blocks import Block
from raysys.compression.shards import LINEARS
from raysys.compression.statistics import Statistics
from raysys.compression.streams import States
from raysys.errors import DataError
from raysys.methods.d2quant import Quantized, absorb, deviation_bias

if TYPE_CHECKING:
    from raysys.compression.pipeline import Pipeline

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUT, GATE, UP, DOWN = "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"

_OUTPUTS = 512
"""Outputs of a linear, evenly spaced, that its output error is told by: all of a large one would cost as much as its quantisation."""


class OneLayer:
    """One layer on its way: the block in full precision, the one being quantised, and what is made of it."""

    def __init__(self, pipeline: Pipeline, i: int, weights: dict[str, Tensor]):
        self._line, self._config, self._i, self._weights = pipeline, pipeline.config, i, weights
        self._bits = pipeline.bits[i]
        self.made: dict[str, Quantized] = {}
        self.record: dict[str, Any] = {}
        self._sums = [0.0, 0.0]
        """Squares of what rounding changed, and of the weights."""
        self._absorbed: Tensor | None = None
        self.bias: Tensor | None = None
        """DAC's, [D]."""
        self._asymmetric = self._config.method in ("gptaq", "d2quant")
        self._corrects = self._config.corrects(pipeline.folds)
        self._blocks = None if pipeline.windows is None else tuple(pipeline.skeleton.block(i, weights) for _ in range(2))

    @property
    def _full(self) -> Block:
        assert self._blocks is not None
        return self._blocks[0]

    @property
    def _student(self) -> Block:
        assert self._blocks is not None
        return self._blocks[1]

    # -- methods

    def round(self) -> None:
        """Round to nearest, which no activation is needed for."""
        for name in LINEARS:
            self._keep(name, rtn(self._weight(name), self._bits, self._config.group_size))

    def quantise_attention(self, full: States, prefix: States) -> None:
        """q, k, v, then o, then DAC's bias. Leaves the states between the halves in both streams' files."""
        joint, out = self._statistics(ATTENTION[0]), self._statistics(OUT)
        for rows, real in self._line.batches():
            given, wanted = (self._student.module.input_layernorm(self._at(states, rows)) for states in (prefix, full))
            self._add(joint, given, wanted, real)
        for name in ATTENTION:
            self._keep(name, self._quantised(name, joint), joint)
        teacher = torch.zeros(self._weight(DOWN).shape[0], dtype=torch.float64, device=self._line.device)
        student, tokens = teacher.clone(), 0
        full_stream, prefix_stream = self._line.streams
        with full_stream.write("middle") as middle:
            for rows, real in self._line.batches():
                with self._full.seen(OUT) as wanted:
                    middle[rows] = self._full.attend(self._at(full, rows))
                states = self._at(prefix, rows)
                with self._student.seen(OUT) as given:
                    self._student.attend(states)
                self._add(out, given[0], wanted[0], real)
                if self._corrects:
                    teacher += self._full.normed(self._full.attend(states))[real].double().sum(dim=0)
        self._keep(OUT, self._quantised(OUT, out), out)
        with prefix_stream.write("middle") as middle:
            for rows, real in self._line.batches():
                attended = self._student.attend(self._at(prefix, rows))
                middle[rows] = attended
                if self._corrects:
                    student += self._student.normed(attended)[real].double().sum(dim=0)
                    tokens += int(real.sum())
        if self._corrects:
            self.bias = deviation_bias(teacher, student, tokens, self._config.d2quant.strength, self._config.d2quant.clip).float()
            self.record["correction"] = float(self.bias.square().mean().sqrt())
            self._student.bias = self.bias

    def student_attends(self, full: States, prefix: States) -> None:
        """The states between the halves of a layer that is quantised already."""
        for block, states, stream in zip((self._full, self._student), (full, prefix), self._line.streams, strict=True):
            with stream.write("middle") as middle:
                for rows, _ in self._line.batches():
                    middle[rows] = block.attend(self._at(states, rows))

    def quantise_mlp(self) -> None:
        """gate and up, then down, whose column scale up absorbs."""
        full, prefix = (stream.read("middle") for stream in self._line.streams)
        joint, down = self._statistics(GATE), self._statistics(DOWN)
        for rows, real in self._line.batches():
            given, wanted = self._student.normed(self._at(prefix, rows)), self._full.normed(self._at(full, rows))
            self._add(joint, given, wanted, real)
        for name in (GATE, UP):
            self._keep(name, self._quantised(name, joint), joint)
        for rows, real in self._line.batches():
            inputs = []
            for block, states in ((self._student, prefix), (self._full, full)):
                with block.seen(DOWN) as seen:
                    block.feed(self._at(states, rows))
                inputs.append(seen[0])
            self._add(down, inputs[0], inputs[1], real)
        self._keep(DOWN, self._quantised(DOWN, down), down)

    def advance(self) -> None:
        """Both streams through the MLP, to the front of the next layer."""
        full_stream, prefix_stream = self._line.streams
        before = self._distance(full_stream.read(self._i), prefix_stream.read(self._i))
        full, prefix = (stream.read("middle") for stream in self._line.streams)
        with full_stream.write(self._i + 1) as after, prefix_stream.write(self._i + 1) as quantised:
            for rows, _ in self._line.batches():
                after[rows] = self._full.feed(self._at(full, rows))
                quantised[rows] = self._student.feed(self._at(prefix, rows))
        after = self._distance(full_stream.read(self._i + 1), prefix_stream.read(self._i + 1))
        self.record |= {"error_before": before, "error_after": after}

    # -- what is written

    @property
    def kept(self) -> Tensor | None:
        """The bias that the file has no place for."""
        return None if self.bias is None or self._line.folds else self.bias

    def others(self) -> dict[str, Tensor]:
        """Everything of the layer that is not quantised. DAC's bias is W_hat mu in gate and up, where they have a place for it."""
        found = {name: tensor for name, tensor in self._weights.items() if name.removesuffix(".weight") not in LINEARS}
        scale = self._absorbed
        if scale is not None and (bias := found.get(f"{UP}.bias")) is not None:
            found[f"{UP}.bias"] = (bias.to(scale) * scale).to(bias.dtype)
        if self.bias is None or not self._line.folds:
            return found
        kind = self._kind
        for name in (GATE, UP):
            weight = self.made[name].dequantize().float()
            folded = weight @ self.bias.to(weight)
            old = found.get(f"{name}.bias")
            found[f"{name}.bias"] = (folded if old is None else folded + old.to(folded)).to(kind)
        found.setdefault(f"{DOWN}.bias", torch.zeros(self.made[DOWN].codes.shape[0], dtype=kind))
        return found

    # -- inside

    @property
    def _kind(self) -> torch.dtype:
        return self._line.stored or self._weights[f"{DOWN}.weight"].dtype

    def _keep(self, name: str, quantized: Quantized, statistics: Statistics | None = None) -> None:
        """Notes a result as it will be stored and puts it into the student, and with it what it absorbs."""
        weight = self._weight(name)
        off, short = quantized.dequantize().to(weight) - weight, name.rpartition(".")[2]
        sizes = [float(one.double().square().sum()) for one in (off, weight)]
        self._sums = [total + size for total, size in zip(self._sums, sizes, strict=True)]
        self.record |= {f"weight_error/{short}": sizes[0] / sizes[1], "weight_error": self._sums[0] / self._sums[1]}
        if statistics is not None:
            hessian, step = statistics.hessian, max(1, len(weight) // _OUTPUTS)
            sizes = [float(((one @ hessian) * one).sum()) for one in (off[::step].to(hessian), weight[::step].to(hessian))]
            self.record[f"output_error/{short}"] = sizes[0] / sizes[1] if sizes[1] > 0 else 0.0
        if quantized.column_scale is not None:
            self._absorbed = quantized.column_scale.float()
            self._set(UP, self._stored(absorb(self._unrounded_up, self._absorbed)))
            if self._blocks is not None and (bias := self._student.module.mlp.up_proj.bias) is not None:
                bias.mul_(self._absorbed.to(bias))
            quantized = replace(quantized, column_scale=None)
        if name == UP:
            self._unrounded_up = quantized
        self._set(name, self._stored(quantized))

    def _set(self, name: str, quantized: Quantized) -> None:
        self.made[name] = quantized
        if self._blocks is not None:
            self._student.put(name, quantized.dequantize())

    def _stored(self, quantized: Quantized) -> Quantized:
        """With scales in the dtype of the file, which is what its readers multiply with."""
        kind = self._kind
        if quantized.scale.dim() == 3:  # binary levels are only written as the weights that they stand for
            return replace(quantized, dtype=kind)
        return replace(quantized, scale=quantized.scale.to(kind), dtype=kind)

    def _quantised(self, name: str, statistics: Statistics) -> Quantized:
        part, gptq_part = self._config.d2quant, self._config.gptq
        down = name == DOWN and self._config.method == "d2quant" and part.dual_scale
        try:
            return gptq(
                self._weight(name),
                statistics,
                self._bits,
                self._config.group_size,
                block=gptq_part.block,
                damp=gptq_part.damp,
                order=gptq_part.order,
                alpha=gptq_part.alpha if self._asymmetric else 0.0,
                down=down,
                levels=part.levels if down else "uniform",
                iterations=part.iterations,
            )
        except ValueError as error:
            raise DataError(f"layer {self._i}: {name}: {error}", "see the calibration data and gptq.damp") from None

    def _weight(self, name: str) -> Tensor:
        """[out, in] in float32 at least, where the computation is."""
        weight = self._weights[f"{name}.weight"]
        return weight.to(self._line.device, torch.float64 if weight.dtype == torch.float64 else torch.float32)

    def _statistics(self, name: str) -> Statistics:
        return Statistics(self._weights[f"{name}.weight"].shape[1], device=self._line.device)

    def _add(self, statistics: Statistics, given: Tensor, wanted: Tensor, real: Tensor) -> None:
        """Inputs [B, L, n] of the quantised prefix and of full precision."""
        statistics.add(given[real].float(), wanted[real].float() if self._asymmetric else None)

    def _at(self, states: States, rows: slice) -> Tensor:
        return states[rows].to(self._line.device)

    def _distance(self, full: States, prefix: States) -> float:
        off = size = 0.0
        for rows, real in self._line.batches():
            wanted, given = self._at(full, rows)[real].double(), self._at(prefix, rows)[real].double()
            off, size = off + float((given - wanted).square().sum()), size + float(wanted.square().sum())
        return off / size if size else 0.0
