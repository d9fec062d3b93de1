"""Quantised layers as files that stock transformers and stock vLLM load: compressed-tensors, format `pack-quantized`, symmetric.

A layer is one file that appears whole or not at all, so a killed job goes on behind the last one; config.json comes last, and nothing
loads the folder before. All linears of a layer have one width, which is what engines need that fuse q, k, v and gate, up.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from raysys.compression import experts
from raysys.compression.packing import pack
from raysys.compression.shards import ABOUT, HEAD, INDEX, Checkpoint, header
from raysys.config.quantising import FOLDS
from raysys.errors import CheckpointError, ConfigError
from raysys.files import sync, write_atomically, write_json, writing
from raysys.methods.d2quant import Quantized, absorb

WIDTHS = range(2, 9)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MLP_BIASES = ("mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias")
_COPIED = (".json", ".txt", ".jinja", ".model", ".tiktoken")
_LEFT = ("config.json", ABOUT)
_SHARD_BYTES = 2**31


def stored(quantized: Quantized, dtype: torch.dtype) -> Quantized:
    """The matrix as a reader of the file gets it: its scales, and so its weights, are rounded to `dtype`.

    Raises:
        ValueError: it is not symmetric and uniform without a column scale (see `Export.write`), or a scale is 0 or infinite in `dtype`.
    """
    for wrong, what in (
        (quantized.scale.dim() != 2, "has binary levels, which no serving kernel knows: use levels=uniform"),
        (quantized.zero is not None, "has zero points, which kernels do not serve below 4 bits: use a symmetric grid"),
        (quantized.column_scale is not None, "has a column scale: absorb it into the up-projection first"),
    ):
        if wrong:
            raise ValueError(what)
    scale = quantized.scale.to(dtype)
    if not bool((torch.isfinite(scale) & (scale != 0)).all()):
        raise ValueError(f"has scales that are 0 or not finite in {_name(dtype)}: use a wider dtype")
    return replace(quantized, scale=scale, dtype=dtype)


def absorbed(quantized: Mapping[str, Quantized], others: Mapping[str, Tensor]) -> tuple[dict[str, Quantized], dict[str, Tensor]]:
    """A layer whose down-projection's column scale has moved into the up-projection and its bias; as it was where there is none."""
    layer, rest = dict(quantized), dict(others)
    for name, down in quantized.items():
        if down.column_scale is None:
            continue
        up = name.replace("down_proj", "up_proj")
        layer |= {up: absorb(layer[up], down.column_scale), name: replace(down, column_scale=None)}
        if (bias := rest.get(f"{up}.bias")) is not None:
            rest[f"{up}.bias"] = bias * down.column_scale.to(bias.dtype)
    return layer, rest


class Export:
    """A folder that fills layer by layer, from one process or several that write different layers.

    Args:
        folder: made if it is not there; one that the same export began is gone on with.
        source: what is quantised.
        bits: of each layer, 2 to 8.
        group_size: inputs that share a scale.
        dtype: of scales and of all that is not quantised; None: the source's.
        about: JSON-able facts that belong to the result: method, seeds, a hash of the calibration data.
        mlp_bias: write biases of gate, up and down, zeros where a layer has none.

    Raises:
        ConfigError: a width, group or dtype that does not fit, a folder of something else or of another run (what differs is named), or
            MLP biases where the family has no place for them.
        CheckpointError: the disk refuses.
    """

    def __init__(
        self,
        folder: str | Path,
        source: Checkpoint,
        bits: Sequence[int],
        group_size: int = 128,
        dtype: torch.dtype | str | None = None,
        about: Mapping[str, Any] | None = None,
        mlp_bias: bool = False,
    ):
        self.folder, self.source, self.bits, self.group_size = Path(folder), source, list(bits), group_size
        self.dtype, self.mlp_bias = _dtype(dtype, source), mlp_bias
        self._check()
        self.about: dict[str, Any] = {
            "source": {"family": source.config.get("model_type"), "digest": source.digest()},
            "bits": self.bits,
            "group_size": group_size,
            "dtype": _name(self.dtype),
            "mlp_bias": mlp_bias,
            "about": json.loads(json.dumps(dict(about or {}))),
        }
        self._begin()

    @property
    def finished(self) -> bool:
        """Whether the folder is complete."""
        return (self.folder / "config.json").is_file()

    def have(self, i: int) -> bool:
        """Whether layer i is there as a whole."""
        path = self._path(i)
        if not path.is_file():
            return False
        try:
            return bool(header(path))
        except ConfigError:
            return False

    def write(self, i: int, quantized: Mapping[str, Quantized], others: Mapping[str, Tensor] | None = None) -> None:
        """One layer; written again, it is replaced.

        Args:
            quantized: each of `source.linears`; symmetric, uniform, column scales absorbed (`absorbed`).
            others: the layer's other tensors; None: the source's.

        Raises:
            ConfigError: what the file cannot hold or no engine serves, with the layer and its modules; a tensor that is missing or has no
                place in the family (a norm's bias).
            CheckpointError: the disk refuses.
        """
        place = f"model.layers.{i}."
        shapes, tensors = self.source.shapes, dict[str, Tensor]()
        if set(quantized) != set(shapes):
            raise ConfigError(f"layer {i} must have {', '.join(shapes)}, got {', '.join(quantized) or 'nothing'}")
        for name, shape in shapes.items():
            tensors |= self._packed(i, name, quantized[name], shape)
        tensors |= self._others(i, others)
        for whole, parts in self.source.fused.items():
            tensors = _joined(tensors, whole, parts)
        self._save(self._path(i), {place + name: tensor for name, tensor in tensors.items()})

    def finish(self, rest: Iterable[tuple[str, Tensor]] | None = None) -> Path:
        """Everything else; returns the folder, which is complete.

        Args:
            rest: tensors outside of the layers; None: the source's. With a head of its own, a tied model is written untied.

        Raises:
            ConfigError: one of the source's tensors is missing in `rest`.
            CheckpointError: a layer is not written yet, or the disk refuses.
        """
        missing = [i for i in range(self.source.layers) if not self.have(i)]
        if missing:
            raise CheckpointError(f"{self.folder}: layers {', '.join(map(str, missing))} are not written yet", "quantise them first")
        written = self._write_rest(self.source.rest() if rest is None else rest)
        lacking = [name for name in self.source.rest_names() if name not in written and not (self.source.tied and name == HEAD)]
        if lacking:
            raise ConfigError(f"{self.folder}: {', '.join(lacking)} missing", "give all tensors that lie outside of the layers")
        where, size = self._index()
        with writing(self.folder):
            write_json(self.folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
            self._copy()
            config = self._config(untied=rest is not None and HEAD in written)
            write_atomically(self.folder / "config.json", json.dumps(config, indent=2) + "\n")
            for draft in self.folder.glob(".*.draft"):
                draft.unlink(missing_ok=True)
            sync(self.folder)
        return self.folder

    def _check(self) -> None:
        layers = self.source.layers
        if len(self.bits) != layers or not all(type(bits) is int and bits in WIDTHS for bits in self.bits):
            raise ConfigError(
                f"bits must be {layers} whole numbers from 2 to 8, one for each layer, got {self.bits}", "correct the bit map"
            )
        for name, (_, columns) in self.source.shapes.items():
            if self.group_size < 1 or columns % self.group_size:
                raise ConfigError(
                    f"{name} has {columns} inputs, no multiple of group_size={self.group_size}", "choose a group_size that divides them"
                )
        if self.mlp_bias and self.source.config.get("model_type") not in FOLDS:
            raise ConfigError(
                f"a {self.source.config.get('model_type')} has no place for MLP biases", "leave the correction of norms out of the file"
            )

    def _begin(self) -> None:
        path = self.folder / ABOUT
        if path.is_file():
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                before = {}
            if before != self.about:
                keys = ", ".join(_differing(before, self.about))
                raise ConfigError(
                    f"{self.folder} holds an export of another run ({keys} differ)", "give another folder, or remove this one"
                )
            return
        if self.folder.exists() and (not self.folder.is_dir() or any(not one.name.startswith(".") for one in self.folder.iterdir())):
            raise ConfigError(f"{self.folder} exists and is no export of this run", "give another folder, or remove this one")
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, self.about)

    def _packed(self, i: int, name: str, one: Quantized, shape: tuple[int, int]) -> dict[str, Tensor]:
        what = f"layer {i}: {name}"
        if tuple(one.codes.shape) != shape or one.scale.shape[:2] != (shape[0], shape[1] // self.group_size):
            groups = [shape[0], shape[1] // self.group_size]
            raise ConfigError(
                f"{what} must be codes {list(shape)} and scales {groups}, got {list(one.codes.shape)} and {list(one.scale.shape)}",
                f"all of a layer share group_size={self.group_size}",
            )
        try:
            scale, packed = stored(one, self.dtype).scale, pack(one.codes, self.bits[i])
        except ValueError as error:
            raise ConfigError(f"{what} {error}", f"all of the layer share {self.bits[i]} bits, symmetric and uniform") from None
        return {f"{name}.weight_packed": packed, f"{name}.weight_scale": scale, f"{name}.weight_shape": torch.tensor(shape)}

    def _others(self, i: int, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        own, shapes = self.source.layer(i, weights=False), self.source.shapes
        wanted = set(own)
        others = own if given is None else dict(given)
        if self.mlp_bias:
            for name in MLP_BIASES:
                others.setdefault(name, torch.zeros(shapes[name.removesuffix(".bias")][0]))
            wanted |= set(MLP_BIASES)
        if extra := sorted(set(others) - wanted):
            family = self.source.config.get("model_type")
            remedy = "leave the correction of norms out of the file; where the family has mlp_bias (Llama), fold it there"
            raise ConfigError(f"layer {i}: a {family} has no place for {', '.join(extra)}, so engines would drop it", remedy)
        if lacking := sorted(wanted - set(others)):
            raise ConfigError(f"layer {i}: {', '.join(lacking)} missing", "give all tensors of the layer that are not quantised")
        return {name: self._kept(f"layer {i}: {name}", tensor) for name, tensor in others.items()}

    def _kept(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.detach().cpu()
        kept = tensor.detach().cpu().to(self.dtype)
        if not bool(torch.isfinite(kept).all()):
            raise ConfigError(
                f"{name} holds numbers that are not finite in {_name(self.dtype)}", "choose a wider dtype, or correct the model"
            )
        return kept

    def _write_rest(self, rest: Iterable[tuple[str, Tensor]]) -> set[str]:
        written: set[str] = set()
        held: dict[str, Tensor] = {}
        shard = 0
        for name, tensor in rest:
            one = self._kept(name, tensor)
            if held and sum(other.nbytes for other in held.values()) + one.nbytes > _SHARD_BYTES:
                self._save(self.folder / f"rest-{shard:05}.safetensors", held)
                held, shard = {}, shard + 1
            held[name] = one
            written.add(name)
        if held:
            self._save(self.folder / f"rest-{shard:05}.safetensors", held)
        return written

    def _index(self) -> tuple[dict[str, str], int]:
        where: dict[str, str] = {}
        size = 0
        for path in sorted(self.folder.glob("*.safetensors")):
            for name, value in header(path).items():
                where[name] = path.name
                size += value["data_offsets"][1] - value["data_offsets"][0]
        return where, size

    def _config(self, untied: bool) -> dict[str, Any]:
        dropped = ("torch_dtype", "auto_map", "_name_or_path")  # code of the source's own is not copied
        config = {key: value for key, value in self.source.config.items() if key not in dropped}
        config |= {"dtype": _name(self.dtype), "quantization_config": quantization_config(self.source, self.bits, self.group_size)}
        if untied:
            config["tie_word_embeddings"] = False
        if self.mlp_bias:
            config["mlp_bias"] = True
        return config

    def _copy(self) -> None:
        """Tokenizer, chat template, generation config, licence."""
        for path in sorted(self.source.folder.iterdir()):
            described = path.name in _LEFT or path.name.endswith(".index.json") or path.name.startswith(".")
            if path.is_file() and not described and (path.suffix in _COPIED or path.stem.upper() == "LICENSE"):
                shutil.copyfile(path, self.folder / path.name)

    def _path(self, i: int) -> Path:
        return self.folder / f"layer-{i:05}.safetensors"

    def _save(self, path: Path, tensors: dict[str, Tensor]) -> None:
        draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
        with writing(path):
            try:
                # Parts of one storage may not be written apart.
                save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, draft, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(str(error)) from None
            sync(draft)
            os.replace(draft, path)


def quantization_config(source: Checkpoint, bits: Sequence[int], group_size: int) -> dict[str, Any]:
    """What config.json says of the format: one group of modules for each width, named by layer, so that each belongs to one only."""
    fused = {part for parts in source.fused.values() for part in parts}
    plain = [name for name in source.linears if name not in fused and not experts.part_of(name)]
    mixture = [r"mlp\.experts\.\d+\.(gate|up|down)_proj"] if source.experts else []
    ends = "|".join([*(re.escape(name) for name in (*source.fused, *plain)), *mixture])
    groups = {}
    for width in sorted(set(bits), reverse=True):
        layers = "|".join(str(i) for i, one in enumerate(bits) if one == width)
        groups[f"w{width}"] = {
            "targets": [rf"re:model\.layers\.({layers})\.({ends})$"],
            "weights": {
                "num_bits": width,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", *([rf"re:model\.layers\.\d+\.{re.escape(experts.ROUTER)}$"] if source.experts else [])],
        "config_groups": groups,
    }


def _joined(tensors: dict[str, Tensor], whole: str, parts: Sequence[str]) -> dict[str, Tensor]:
    """What the family keeps in one piece, in one piece again: rows of its parts one after another."""
    out = dict(tensors)
    for end in ("weight_packed", "weight_scale", "bias"):
        pieces = [out.pop(f"{part}.{end}") for part in parts if f"{part}.{end}" in out]
        if pieces:
            out[f"{whole}.{end}"] = torch.cat(pieces)
    shapes = [out.pop(f"{part}.weight_shape") for part in parts]
    out[f"{whole}.weight_shape"] = torch.stack([torch.stack(shapes)[:, 0].sum(), shapes[0][1]])
    return out


def _dtype(given: torch.dtype | str | None, source: Checkpoint) -> torch.dtype:
    found = given or source.config.get("dtype") or source.config.get("torch_dtype") or "float32"
    dtype = getattr(torch, found, None) if isinstance(found, str) else found
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={found} cannot be served", f"choose one of {', '.join(map(_name, DTYPES))}")
    return dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted({*before, *now}):
        one, other = before.get(key), now.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from (f"{key}.{inner}" for inner in _differing(one, other))
        elif one != other:
            yield key
