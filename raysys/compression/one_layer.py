"""What happens to one layer, in the order of the authors' program. Paper: arXiv 2602.02546.

q k v     on what the norm before attention gives           one set of statistics
o         on the attention of the quantised q k v
DAC       mean of the norm after attention: this layer's attention in full precision less quantised, both on the quantised prefix
gate up   on that norm with its correction                  one set of statistics
down      on the quantised gate and up; its column scale goes into up
DAC       behind the last layer too, where it is asked for: mean of the final norm, this layer's MLP in full precision less quantised

Of a mixture the last two are done for each expert, on the tokens that the router, which stays as it is, gives it in the quantised prefix.
For asymmetric calibration the same tokens' full-precision states go through the same expert in full precision, wherever that stream
routes them. The fewer tokens an expert has, the more its Hessian is taken for the identity, which is rounding to nearest:

    damp_e = damp + expert_damp n / tokens_e               n inputs; without tokens: `rtn`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raysys.compression import experts
from raysys.compression.backends import gptq, rtn
from raysys.compression.blocks import Block
from raysys.compression.statistics import Statistics
from raysys.compression.streams import States
from raysys.errors import DataError
from raysys.methods.d2quant import Quantized, absorb, deviation_bias

if TYPE_CHECKING:
    from raysys.compression.pipeline import Pipeline

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUT, GATE, UP, DOWN = "self_attn.o_proj", ".gate_proj", ".up_proj", ".down_proj"
"""The last three behind the place of an MLP, "mlp" or that of an expert."""

_OUTPUTS = 512
"""Outputs of a linear, evenly spaced, that its output error is told by: all of a large one would cost as much as its quantisation."""


class OneLayer:
    """One layer on its way: the block in full precision, the one being quantised, and what is made of it."""

    def __init__(self, pipeline: Pipeline, i: int, weights: dict[str, Tensor]):
        self._line, self._config, self._i, self._weights = pipeline, pipeline.config, i, weights
        self._bits = pipeline.bits[i]
        self.made: dict[str, Quantized] = {}
        self.record: dict[str, Any] = {}
        self._linears = pipeline.linears
        self._places = [name.removesuffix(DOWN) for name in self._linears if name.endswith(DOWN)]
        self._sums: dict[str, list[float]] = {}
        """By entry of the record: squares of what rounding changed, and of what there was."""
        self._unrounded_up: dict[str, Quantized] = {}
        self._absorbed: dict[str, Tensor] = {}
        self.bias: Tensor | None = None
        """DAC's, [D]."""
        self.final: Tensor | None = None
        """DAC's of the norm before the head, [D]."""
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
        for name in self._linears:
            self._keep(name, rtn(self._weight(name), self._bits, self._config.group_size))

    def quantise_attention(self, full: States, prefix: States) -> None:
        """q, k, v, then o, then DAC's bias. Leaves the states between the halves in both streams' files."""
        joint, out = self._statistics(ATTENTION[0]), self._statistics(OUT)
        for rows, real in self._line.batches():
            given, wanted = (self._student.module.input_layernorm(self._at(states, rows)) for states in (prefix, full))
            self._add(joint, given, wanted, real)
        for name in ATTENTION:
            self._keep(name, self._quantised(name, joint), joint)
        teacher = torch.zeros(len(self._weights[f"{OUT}.weight"]), dtype=torch.float64, device=self._line.device)
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

    def quantise_last_mlp(self) -> None:
        """As `quantise_mlp`, with DAC's bias of the norm before the head."""
        teacher = self._behind()
        self.quantise_mlp()
        tokens = sum(int(real.sum()) for _, real in self._line.batches())
        self.final = deviation_bias(teacher, self._behind(), tokens, self._config.d2quant.strength, self._config.d2quant.clip).float()
        self.record["correction_final"] = float(self.final.square().mean().sqrt())

    def quantise_mlp(self) -> None:
        """gate and up, then down, whose column scale up absorbs: of the layer's MLP, or of each expert."""
        joint = {place: self._statistics(place + GATE) for place in self._places}
        for real, given, wanted in self._normed():
            for place, reached in self._student.reached(given, real):
                self._add(joint[place], given, wanted, reached)
        self._count([one.tokens for one in joint.values()])
        for place in self._places:
            statistics = joint.pop(place)
            for name in (place + GATE, place + UP):
                self._keep(name, self._quantised(name, statistics), statistics)
        down = {place: self._statistics(place + DOWN) for place in self._places}
        for real, given, wanted in self._normed():
            for place, reached in self._student.reached(given, real):
                inputs = [block.hidden(place, states[reached]) for block, states in ((self._student, given), (self._full, wanted))]
                down[place].add(inputs[0].float(), inputs[1].float() if self._asymmetric else None)
        for place in self._places:
            statistics = down.pop(place)
            self._keep(place + DOWN, self._quantised(place + DOWN, statistics), statistics)

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
        found = {name: tensor for name, tensor in self._weights.items() if name.removesuffix(".weight") not in self._linears}
        for place, scale in self._absorbed.items():
            if (bias := found.get(f"{place}{UP}.bias")) is not None:
                found[f"{place}{UP}.bias"] = (bias.to(scale) * scale).to(bias.dtype)
        if self.bias is None or not self._line.folds:
            return found
        kind = self._kind
        for place in self._places:
            for name in (place + GATE, place + UP):
                weight = self.made[name].dequantize().float()
                folded = weight @ self.bias.to(weight)
                old = found.get(f"{name}.bias")
                found[f"{name}.bias"] = (folded if old is None else folded + old.to(folded)).to(kind)
            found.setdefault(f"{place}{DOWN}.bias", torch.zeros(self.made[place + DOWN].codes.shape[0], dtype=kind))
        return found

    # -- inside

    @property
    def _kind(self) -> torch.dtype:
        return self._line.stored or self._weights[f"{OUT}.weight"].dtype

    def _normed(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Real positions [B, L], and what gate and up read there [B, L, D]: on the quantised prefix, and in full precision."""
        full, prefix = (stream.read("middle") for stream in self._line.streams)
        for rows, real in self._line.batches():
            yield real, self._student.normed(self._at(prefix, rows)), self._full.normed(self._at(full, rows))

    def _behind(self) -> Tensor:
        """Sum of what the final norm gives behind the student as it stands, on the quantised prefix: [D] float64."""
        states, total = self._line.streams[1].read("middle"), torch.zeros((), dtype=torch.float64, device=self._line.device)
        for rows, real in self._line.batches():
            normed = self._line.skeleton.norm(self._student.feed(self._at(states, rows)), {"weight": self._line.final_norm})
            total = total + normed[real].double().sum(dim=0)
        return total

    def _count(self, tokens: Sequence[int]) -> None:
        """Of a mixture, how many tokens its experts have."""
        if not experts.part_of(self._places[0] + UP):
            return
        width = self._weights[f"{self._places[0]}{GATE}.weight"].shape[1]
        self.record |= {"experts": len(tokens), "experts_rounded": sum(not one for one in tokens)}
        self.record |= {"experts_scarce": sum(one < width for one in tokens), "expert_tokens_least": min(tokens)}

    def _keep(self, name: str, quantized: Quantized, statistics: Statistics | None = None) -> None:
        """Notes a result as it will be stored and puts it into the student, and with it what it absorbs."""
        self._note(name, quantized, statistics)
        place = name.rpartition(".")[0]
        if quantized.column_scale is not None:
            scale = self._absorbed[place] = quantized.column_scale.float()
            self._set(place + UP, self._stored(absorb(self._unrounded_up.pop(place), scale)))
            if self._blocks is not None and (bias := self._student.bias_of(place + UP)) is not None:
                bias.mul_(scale.to(bias))
            quantized = replace(quantized, column_scale=None)
        if name.endswith(UP):
            self._unrounded_up[place] = quantized
        self._set(name, self._stored(quantized))

    def _note(self, name: str, quantized: Quantized, statistics: Statistics | None) -> None:
        """What it differs by from the weight; experts' linears of a kind are told as one."""
        weight = self._weight(name)
        off, short = quantized.dequantize().to(weight) - weight, name.rpartition(".")[2]
        sizes = [float(one.double().square().sum()) for one in (off, weight)]
        self._told("weight_error", sizes)
        self._told(f"weight_error/{short}", sizes)
        if statistics is None or not statistics.tokens:
            return
        hessian, among = statistics.hessian, len(self._places) if name.endswith((GATE, UP, DOWN)) else 1
        step = max(1, len(weight) * among // _OUTPUTS)
        sizes = [float(((one @ hessian) * one).sum()) for one in (off[::step].to(hessian), weight[::step].to(hessian))]
        self._told(f"output_error/{short}", [one * statistics.tokens for one in sizes])

    def _told(self, key: str, sizes: Sequence[float]) -> None:
        """Adds two squares to an entry of the record, which is their ratio."""
        sums = self._sums[key] = [total + size for total, size in zip(self._sums.get(key, (0.0, 0.0)), sizes, strict=True)]
        self.record[key] = sums[0] / sums[1] if sums[1] > 0 else 0.0

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
        weight, bits, group = self._weight(name), self._bits, self._config.group_size
        down = name.endswith(DOWN) and self._config.method == "d2quant" and part.dual_scale
        levels = part.levels if down else "uniform"
        damp = gptq_part.damp
        if experts.part_of(name):
            if not statistics.tokens:
                return rtn(weight, bits, group, levels, down, iterations=part.iterations)
            damp += gptq_part.expert_damp * statistics.columns / statistics.tokens
        try:
            return gptq(
                weight,
                statistics,
                bits,
                group,
                block=gptq_part.block,
                damp=damp,
                order=gptq_part.order,
                alpha=gptq_part.alpha if self._asymmetric else 0.0,
                down=down,
                levels=levels,
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
