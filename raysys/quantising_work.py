"""What the actor of a quantisation does: see `raysys.quantising`. A plain class, which a test calls without Ray."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysys.compression.calibration import TokenWindows
from raysys.config.quantising import FOLDS, QuantizeConfig
from raysys.files import write_shared_json

if TYPE_CHECKING:
    from raysys.compression.export import Export
    from raysys.compression.pipeline import Pipeline
    from raysys.compression.plain import Plain
    from raysys.compression.shards import Checkpoint

EXPORT, PLAIN = "export", "dequantised"
FULL, QUANTISED, CORRECTED = "full precision", "quantised", "quantised, with its correction"
"""What evaluations call the models."""
FOLDED, LEFT_OUT = "folded into biases of gate and up", "left out: the family has no place for it; see corrections.safetensors"


@dataclass(frozen=True)
class Work:
    """What the actor is told.

    Attributes:
        model: local folder.
        folder: of the run.
        bits: of each layer.
        calibration, held_out: windows, where there are any.
        about: for the file's metadata.
    """

    config: QuantizeConfig
    model: Path
    folder: Path
    bits: list[int]
    calibration: TokenWindows | None
    held_out: TokenWindows | None
    device: str
    dtype: str
    about: dict[str, Any]


def known_of(checkpoint: Checkpoint, config: QuantizeConfig, what: str, **depends: Any) -> Path | None:
    """Where runs share `what` of this checkpoint, which `depends` on these values; None where they do not share."""
    if config.shared is None:
        return None
    told = json.dumps(depends, sort_keys=True, default=str)
    return Path(config.shared).absolute() / checkpoint.digest()[:16] / f"{what}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"


def facts_options(config: QuantizeConfig) -> dict[str, Any]:
    """What the facts of a layer depend on, beside its weights."""
    return {"energy": config.energy, "form": config.expressiveness, "low": config.low, "group_size": config.group_size}


def unembedding_of(checkpoint: Checkpoint, config: QuantizeConfig) -> Any:
    """What NSDS reads layers against; None for other allocations."""
    from raysys.compression.sensitivity import basis_of

    return basis_of(checkpoint, config.energy) if config.allocation == "nsds" else None


def facts_of(checkpoint: Checkpoint, i: int, config: QuantizeConfig, basis: Any) -> dict[str, float]:
    """What the allocation needs to know of a layer. See `layer_facts`."""
    from raysys.compression.sensitivity import layer_facts

    criterion: Any = config.allocation
    return layer_facts(checkpoint, i, [criterion], basis, **facts_options(config))


class Quantiser:
    """One model on its way through the pipeline."""

    def __init__(self, work: Work):
        self._work = work

    def start(self) -> None:
        """Opens files and builds the model's skeleton. Raises ConfigError: see `Export`, `Skeleton` and `check_halves`."""
        import torch

        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without, matrix products on a GPU are not of the deterministic kind
        torch.set_num_threads(self._work.config.threads)
        torch.use_deterministic_algorithms(True, warn_only=True)
        _ = self._pipeline

    def records(self) -> list[dict[str, Any]]:
        """Of the layers that are finished, from the first on."""
        return [record for i in range(self._pipeline.next) if (record := self._pipeline.record(i)) is not None]

    def layer(self, i: int) -> dict[str, Any]:
        """Quantises a layer. See `Pipeline.layer`."""
        return self._pipeline.layer(i)

    def finish(self) -> dict[str, Any]:
        """Ends the files. `models`: sizes by the labels of what there is to evaluate now."""
        began = time.monotonic()
        self._pipeline.finish()
        config = self._work.config
        if config.served and (config.keep_dequantised or config.check_export or config.evaluation is not None):
            from raysys.compression.packed import write_plain

            shutil.rmtree(self._plain, ignore_errors=True)
            write_plain(self._work.folder / EXPORT, self._plain)
        models = {FULL: self._full_sizes(), QUANTISED: self._sizes()}
        beside = (config.corrects(self._folds) and not self._folds) or config.corrects_final
        if beside and config.evaluation is not None:
            models[CORRECTED] = self._sizes()
        return {"models": models, "seconds": time.monotonic() - began}

    def load_export(self) -> str:
        """Says what stock transformers makes of `export/`. Raises CheckpointError: see `loading.largest_difference`."""
        from raysys.compression.loading import largest_difference, unreadable

        folder = self._work.folder / EXPORT
        if (reason := unreadable(folder)) is not None:
            return f"export/ is not loaded in transformers: {reason}"
        gap = largest_difference(folder, self._plain)
        return f"export/ loads in transformers with compressed-tensors; logits of what its codes stand for, to {gap:.2g} of the largest"

    def probe(self) -> dict[str, Any]:
        """For `quantising_served.serve`."""
        import torch

        from raysys.compression.loading import log_probs
        from raysys.quantising_served import probe_length, unservable
        from raysys.weights.push import probe_ids

        avx512 = torch.cpu._is_avx512_supported()
        if (reason := unservable(self._work.folder / EXPORT, self._work.device, avx512)) is not None:
            return {"reason": reason}
        shape = json.loads((self._plain / "config.json").read_text(encoding="utf-8"))
        ids = probe_ids(shape["vocab_size"], probe_length(str(self._plain)))
        return {"reason": None, "ids": ids, "logprobs": log_probs(self._plain, ids)}

    def perplexity(self, label: str) -> dict[str, float]:
        """Of the held-out windows under one of the models of `finish`, a layer at a time; where they are tasks, `accuracy` too: the share
        of answers, of those that are whole, that greedy decoding writes token for token."""
        from raysys.compression.corrections import Corrections
        from raysys.compression.shards import Checkpoint
        from raysys.compression.walk import walk

        windows, config = self._work.held_out, self._work.config
        assert windows is not None
        depends = {"windows": windows.digest, "starts": windows.starts.tolist(), "whole": windows.whole.tolist()}
        depends |= {"batch": config.batch, "threads": config.threads, "dtype": self._work.dtype, "device": self._work.device}
        known = known_of(self._checkpoint, config, "perplexity", **depends)
        if label == FULL and known is not None and known.is_file():
            return json.loads(known.read_text())
        source = self._checkpoint if label == FULL else Checkpoint.open(self._plain)
        corrections = Corrections(self._work.folder) if label == CORRECTED else None
        skeleton = self._skeleton(source.folder, windows.ids.shape[1])
        found = walk(
            *(skeleton, windows, source.layer, source.tensor, source.unembedding, self._work.folder / "states"),
            config.batch,
            None if corrections is None else corrections.read(),
            final=None if corrections is None else corrections.final(),
        )
        tasks = bool((windows.whole & (windows.starts > 1)).any())
        measures = {"perplexity": found.value, "nll": found.mean} | ({"accuracy": found.accuracy} if tasks else {})
        if label == FULL and known is not None:
            write_shared_json(known, measures)
        return measures

    def close(self) -> None:
        """Removes what only the evaluation needed."""
        if self._work.config.served and not self._work.config.keep_dequantised:
            shutil.rmtree(self._plain, ignore_errors=True)

    # -- inside

    @property
    def _plain(self) -> Path:
        return self._work.folder / PLAIN

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        from raysys.compression.shards import Checkpoint

        return Checkpoint.open(self._work.model)

    @property
    def _folds(self) -> bool:
        return self._checkpoint.config.get("model_type") in FOLDS

    @cached_property
    def _pipeline(self) -> Pipeline:
        from raysys.compression.pipeline import Pipeline
        from raysys.compression.rotated import Rotated

        work, sink = self._work, self._sink()
        rotated = Rotated(self._checkpoint, work.config.seed) if work.config.rotation else None
        return Pipeline(
            work.config,
            rotated or self._checkpoint,
            work.bits,
            work.calibration,
            work.folder,
            [sink],
            device=self._device,
            dtype=self._dtype,
            stored=sink.dtype,
            folds=self._folds,
            rest=None if rotated is None else rotated.rest,
        )

    def _sink(self) -> Export | Plain:
        work = self._work
        about = work.about | ({"correction": FOLDED if self._folds else LEFT_OUT} if work.config.corrects(self._folds) else {})
        if not work.config.served:
            from raysys.compression.plain import Plain

            return Plain(self._plain, self._checkpoint, about)
        from raysys.compression.export import Export

        return Export(
            work.folder / EXPORT,
            self._checkpoint,
            work.bits,
            work.config.group_size,
            about=about,
            mlp_bias=work.config.corrects(self._folds) and self._folds,
        )

    @property
    def _device(self) -> str:
        return "cuda" if self._work.device == "gpu" else "cpu"

    @property
    def _dtype(self) -> Any:
        import torch

        return getattr(torch, self._work.dtype)

    def _skeleton(self, folder: Path, length: int) -> Any:
        from raysys.compression.blocks import Skeleton

        return Skeleton(folder, length, self._dtype, self._device)

    def _full_sizes(self) -> dict[str, float]:
        total = sum(path.stat().st_size for path in self._checkpoint.folder.glob("*.safetensors"))
        weight = self._checkpoint.layer(0)["self_attn.o_proj.weight"]
        return {"bits_per_weight": 8.0 * weight.element_size(), "megabytes": total / 1e6}

    def _sizes(self) -> dict[str, float]:
        """Of the packed file: bits of a quantised weight with its scales, and all bytes on the disk."""
        work = self._work
        if not work.config.served:
            return {}
        from raysys.compression.packed import sizes

        folder = work.folder / EXPORT
        return {
            "bits_per_weight": sizes(folder).bits,
            "megabytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6,
        }
