"""Layer after layer: what is on disk, what comes next, and who gets it. Paper: arXiv 2602.02546. What happens in a layer: `one_layer`.

Two streams of hidden states go through the model together: the full-precision one, and that of the layers quantised so far. Both lie in
files, of which those in front of the next layer are kept. So a layer is the unit of work: what a kill can cost is the one it hit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from raysys.compression.blocks import Skeleton, check_halves
from raysys.compression.calibration import TokenWindows
from raysys.compression.corrections import Corrections
from raysys.compression.one_layer import OneLayer
from raysys.compression.shards import EMBEDDING, NORM
from raysys.compression.streams import Stream
from raysys.config.quantising import QuantizeConfig
from raysys.errors import DataError
from raysys.files import write_json
from raysys.methods.d2quant import Quantized


class Layers(Protocol):
    """A checkpoint as `raysys.compression.shards.Checkpoint` gives it, or a changed view of one."""

    @property
    def folder(self) -> Path: ...
    @property
    def layers(self) -> int: ...
    @property
    def linears(self) -> tuple[str, ...]: ...
    def layer(self, i: int) -> dict[str, Tensor]: ...
    def tensor(self, name: str) -> Tensor: ...


class Sink(Protocol):
    """Where finished layers go; each call leaves whole files or none."""

    def have(self, i: int) -> bool: ...
    def write(self, i: int, quantized: Mapping[str, Quantized], others: Mapping[str, Tensor]) -> None: ...
    def finish(self, rest: Iterable[tuple[str, Tensor]] | None = None) -> Any: ...


class Pipeline:
    """Quantises a checkpoint; call `layer(i)` for i from `next` on, then `finish`.

    Args:
        config: method and its numbers.
        checkpoint: where weights come from.
        bits: of each layer.
        windows: calibration; None only with rtn.
        folder: of the run. Hidden states lie in `states/`, what is known of finished layers in `ledger/layers/`.
        sinks: all get every layer.
        device, dtype: of the computation; weights are quantised in float32 at least.
        stored: dtype of the files' scales and biases; None: the weights' own.
        folds: gate and up have a place for a bias, so that DAC can be part of the files.
        rest: tensors outside of the layers, if they are not the source's own.

    Raises:
        ConfigError: see `Skeleton` and `check_halves`.
    """

    def __init__(
        self,
        config: QuantizeConfig,
        checkpoint: Layers,
        bits: Sequence[int],
        windows: TokenWindows | None,
        folder: Path,
        sinks: Sequence[Sink],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        stored: torch.dtype | None = None,
        folds: bool = False,
        rest: Callable[[], Iterable[tuple[str, Tensor]]] | None = None,
    ):
        if len(bits) != checkpoint.layers:
            raise ValueError(f"bits must be of {checkpoint.layers} layers, got {len(bits)}")
        self.config, self._checkpoint, self.bits, self.windows = config, checkpoint, list(bits), windows
        self._sinks, self.device, self._dtype = list(sinks), torch.device(device), dtype
        self.stored, self.folds, self._rest = stored, folds, rest
        self._records = folder / "ledger" / "layers"
        self._records.mkdir(parents=True, exist_ok=True)
        self._states = folder / "states"
        self.corrections = Corrections(folder)
        """DAC's biases, of the layers where no file has a place for them."""

    @property
    def linears(self) -> tuple[str, ...]:
        """What is quantised in a layer, by names relative to it."""
        return self._checkpoint.linears

    # -- what is done

    def record(self, i: int) -> dict[str, Any] | None:
        """What `layer(i)` returned, if that layer is finished."""
        path = self._records / f"{i:05d}.json"
        return json.loads(path.read_text()) if path.is_file() and all(sink.have(i) for sink in self._sinks) else None

    @property
    def next(self) -> int:
        """The first layer that is not finished."""
        return next((i for i in range(self._checkpoint.layers) if self.record(i) is None), self._checkpoint.layers)

    # -- the work

    @torch.no_grad()
    def layer(self, i: int) -> dict[str, Any]:
        """Quantises layer i and advances both streams.

        Returns:
            `layer`, `bits`, `weight_error` of the layer and by linear, `output_error` by linear (on the calibration tokens; of a large one
            by some of its outputs), `correction` (root mean square of DAC's bias; `correction_final` of the norm before the head), and
            `error_before` and `error_after`: the distance of the quantised prefix from full precision in front of the layer and behind it.
            Errors are squared and relative. Of a mixture
            also `experts`, how many of them had no token and were rounded to nearest (`experts_rounded`) or fewer tokens than inputs
            (`experts_scarce`), and the fewest that one had (`expert_tokens_least`); its experts' errors are told together.

        Raises:
            DataError: a weight that is no finite number, or one number only.
            CheckpointError: hidden states that are missing, or files that could not be written.
        """
        work = OneLayer(self, i, self._checked(i))
        if self.windows is None:
            work.round()
        else:
            self._embed()
            full, prefix = (stream.read(i) for stream in self.streams)
            if self.config.method == "rtn":
                work.round()
                work.student_attends(full, prefix)
            else:
                work.quantise_attention(full, prefix)
                last = i == self._checkpoint.layers - 1
                (work.quantise_last_mlp if last and self.config.corrects_final else work.quantise_mlp)()
            work.advance()
        record = work.record | {"layer": i, "bits": self.bits[i]}
        self.corrections.write(i, work.kept, work.final)
        for sink in self._sinks:
            sink.write(i, work.made, work.others())
        write_json(self._records / f"{i:05d}.json", record)
        for stream in self.streams:
            stream.drop(before=i + 1)
        return record

    def finish(self) -> None:
        """Ends the files, and removes the hidden states."""
        for sink in self._sinks:
            sink.finish(None if self._rest is None else self._rest())
        self.corrections.finish()
        shutil.rmtree(self._states, ignore_errors=True)

    # -- inside

    @cached_property
    def skeleton(self) -> Skeleton:
        assert self.windows is not None
        made = Skeleton(self._checkpoint.folder, self.windows.ids.shape[1], self._dtype, self.device)
        check_halves(made.block(0, self._checkpoint.layer(0)), made.config.hidden_size, self._dtype, self.device)
        return made

    @cached_property
    def final_norm(self) -> Tensor:
        """Gain of the norm before the head, [D]."""
        return self._checkpoint.tensor(NORM)

    @cached_property
    def streams(self) -> tuple[Stream, ...]:
        if self.windows is None:
            return ()
        shape = (*self.windows.ids.shape, int(self.skeleton.config.hidden_size))
        return tuple(Stream(self._states, name, shape, self._dtype) for name in ("full", "prefix"))  # type: ignore[arg-type]

    def _embed(self) -> None:
        """States in front of the first layer, where there are none at all yet."""
        assert self.windows is not None
        if self.next or all(stream.have(0) for stream in self.streams):
            return
        table = self._checkpoint.tensor(EMBEDDING)
        ids = torch.from_numpy(self.windows.ids).long()
        for stream in self.streams:
            with stream.write(0) as states:
                for rows, _ in self.batches():
                    states[rows] = table[ids[rows]]

    def batches(self) -> Iterator[tuple[slice, Tensor]]:
        """Windows of a forward pass, and which of their positions [B, L] are real."""
        assert self.windows is not None
        lengths = torch.from_numpy(self.windows.lengths).long()
        places = torch.arange(self.windows.ids.shape[1])
        for start in range(0, len(lengths), self.config.batch):
            rows = slice(start, start + self.config.batch)
            yield rows, (places < lengths[rows, None]).to(self.device)

    def _checked(self, i: int) -> dict[str, Tensor]:
        weights = self._checkpoint.layer(i)
        for name in self.linears:
            weight = weights[f"{name}.weight"]
            low, high = torch.aminmax(weight)
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                raise DataError(f"layer {i}: {name}.weight holds what is no finite number", "the checkpoint is damaged")
            if low == high:
                raise DataError(f"layer {i}: {name}.weight holds {low.item():g} only", "the checkpoint is damaged, or was never trained")
        return weights
