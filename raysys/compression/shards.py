"""A Hugging Face folder read layer by layer: its headers are checked at once, weights come only when they are asked for."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from raysys.compression import experts
from raysys.errors import ConfigError

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
"""What is quantised in a dense layer, in the order in which it computes."""
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
"""What some families store in one piece, by rows."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ABOUT = "compression.json"
"""What an export is of: source, bits, group, and what the caller says about it."""
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_FLOATS = {"F64", "F32", "F16", "BF16"}
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_MOST_HEADER = 100 * 2**20
_SAMPLE = 4096


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its file, kind ("BF16", ...), shape, and first byte behind the file's header."""

    file: str
    kind: str
    shape: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class Checkpoint:
    """Made by `open`. Small and picklable: headers and the config, no weights, no open file.

    Attributes:
        folder: of the files.
        config: what config.json says.
        layers: how many.
        tensors: of each name as it is stored where it lies.
    """

    folder: Path
    config: dict[str, Any]
    layers: int
    tensors: dict[str, Stored] = field(repr=False)

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Reads config and headers.

        Raises:
            ConfigError: no such folder, no config.json; a model that is quantised already, whose weights are pickled, whose layers are
                not those of `LINEARS` or a mixture of such MLPs (the family is named) or have shapes that the config does not explain; a
                shard that is missing, cut short or damaged, or lacks a tensor of the index (the file is named).
        """
        folder = Path(folder).absolute()
        config = _json(folder / "config.json", "give a folder with a Hugging Face checkpoint as model")
        if config.get("quantization_config"):
            method = config["quantization_config"].get("quant_method", "an unknown method")
            raise ConfigError(f"{folder} is quantised already (by {method})", "give the checkpoint that it was made from as model")
        layers = config.get("num_hidden_layers")
        if not isinstance(layers, int) or layers < 1:
            raise ConfigError(f"{folder}: a {_family(config)} has no num_hidden_layers", "only decoders of one kind of layer are supported")
        found = cls(folder, config, layers, _tensors(folder))
        found._check()
        return found

    @property
    def experts(self) -> int:
        """Of each layer; 0 of a dense model."""
        return experts.count(self.config)

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the quantised linears, relative to a layer, as `layer` gives them; of a mixture all experts' in turn."""
        return (*ATTENTION, *experts.linears(self.experts)) if self.experts else LINEARS

    @property
    def fused(self) -> dict[str, tuple[str, ...]]:
        """What the files hold in one piece, and its parts by rows; {} of most families."""
        return {whole: parts for whole, parts in FUSED.items() if f"model.layers.0.{whole}.weight" in self.tensors}

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key-value heads, and their dimensions."""
        queries = int(self.config["num_attention_heads"])
        return (
            queries,
            int(self.config.get("num_key_value_heads") or queries),
            int(self.config.get("head_dim") or self.config["hidden_size"] // queries),
        )

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """[out, in] of each of `linears`; all layers have the same."""
        queries, shared, size = self.heads
        width, inner = int(self.config["hidden_size"]), self._inner
        found = [(queries * size, width), (shared * size, width), (shared * size, width), (width, queries * size)]
        return dict(zip(self.linears, [*found, *[(inner, width), (inner, width), (width, inner)] * (self.experts or 1)], strict=True))

    @property
    def tied(self) -> bool:
        """Whether the embedding is the unembedding too. transformers' default is yes for some families, so a missing head decides."""
        return HEAD not in self.tensors or bool(self.config.get("tie_word_embeddings", False))

    def layer(self, i: int, weights: bool = True) -> dict[str, Tensor]:
        """Tensors of layer i by name relative to it, fused ones in their parts, stacked experts apart. Opens only the files that hold them.

        Args:
            weights: false leaves out what is quantised, without reading it.
        """
        left = set() if weights else {f"{name}.weight" for name in (*self.linears, *FUSED)} | {experts.GATE_UP, experts.DOWN}
        found = dict(self._read({name: where for name, where in self.layer_names(i).items() if name not in left}))
        sizes = {name: shape[0] for name, shape in self.shapes.items()}
        for whole, parts in self.fused.items():
            for end in (".weight", ".bias"):
                if (tensor := found.pop(whole + end, None)) is not None:
                    pieces = tensor.split([sizes[part] for part in parts])
                    found |= {part + end: piece for part, piece in zip(parts, pieces, strict=True)}
        return experts.apart(found)

    def layer_names(self, i: int) -> dict[str, str]:
        """Stored names of layer i's tensors by name relative to it. Raises ValueError: there is no such layer."""
        if not 0 <= i < self.layers:
            raise ValueError(f"layer must lie in [0, {self.layers}), got {i}")
        place = f"model.layers.{i}."
        return {name.removeprefix(place): name for name in self.tensors if name.startswith(place)}

    def rest(self) -> Iterator[tuple[str, Tensor]]:
        """Everything outside of the layers, by its stored name, one at a time."""
        yield from self._read({name: name for name in self.rest_names()})

    def rest_names(self) -> list[str]:
        return [name for name in self.tensors if not ((match := _LAYER.fullmatch(name)) and int(match[1]) < self.layers)]

    def tensor(self, name: str) -> Tensor:
        """Raises ConfigError: there is none of that name."""
        if name not in self.tensors:
            raise ConfigError(f"{self.folder} has no tensor {name}", "its safetensors files do not belong to its config.json")
        return next(self._read({name: name}))[1]

    def unembedding(self) -> Tensor:
        """[V, D]: the head, or the embedding where they are one."""
        return self.tensor(EMBEDDING if self.tied else HEAD)

    def digest(self) -> str:
        """Tells checkpoints apart wherever they lie: config, names, shapes, and the first 4 KiB of each tensor (not every byte)."""
        found = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted({tensor.file for tensor in self.tensors.values()}):
            with open(self.folder / file, "rb") as raw:
                base = 8 + int.from_bytes(raw.read(8), "little")
                for name, tensor in sorted(self.tensors.items()):
                    if tensor.file == file:
                        raw.seek(base + tensor.first)
                        found.update(f"{name} {tensor.kind} {tensor.shape} ".encode())
                        found.update(raw.read(min(_SAMPLE, math.prod(tensor.shape) * _BYTES.get(tensor.kind, 1))))
        return found.hexdigest()

    def _read(self, names: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by the keys; files are opened one after another."""
        order = sorted(names.items(), key=lambda pair: self.tensors[pair[1]].file)
        opened: Any = None
        try:
            for number, (key, name) in enumerate(order):
                file = self.tensors[name].file
                if opened is None or file != self.tensors[order[number - 1][1]].file:
                    opened = safe_open(self.folder / file, framework="pt")
                yield key, cast(Tensor, opened.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{self.folder} could not be read: {error}", "it has changed; copy the checkpoint again") from None

    @property
    def _inner(self) -> int:
        return int(self.config["moe_intermediate_size" if self.experts else "intermediate_size"])

    @property
    def _stored(self) -> dict[str, tuple[int, ...]]:
        """What the files hold of a layer's linears, by name relative to it."""
        shapes, fused = self.shapes, self.fused
        parts = {part for parts in fused.values() for part in parts}
        found: dict[str, tuple[int, ...]] = {}
        if f"model.layers.0.{experts.GATE_UP}" in self.tensors:
            parts |= set(experts.linears(self.experts))
            found |= experts.stacked_shapes(self.experts, int(self.config["hidden_size"]), self._inner)
        found |= {f"{name}.weight": shape for name, shape in shapes.items() if name not in parts}
        for whole, names in fused.items():
            found[f"{whole}.weight"] = (sum(shapes[name][0] for name in names), shapes[names[0]][1])
        return found

    def _check(self) -> None:
        family = _family(self.config)
        experts.check(self.config, self.layer_names(0))
        missing = [key for key in ("hidden_size", "intermediate_size", "num_attention_heads") if not isinstance(self.config.get(key), int)]
        if missing:
            raise ConfigError(f"{self.folder}: the config of a {family} has no {', '.join(missing)}", "give a Llama- or Qwen-like model")
        stored = self._stored
        for i in range(self.layers):
            names, place = self.layer_names(i), f"model.layers.{i}."
            lacking = [name.removesuffix(".weight") for name in stored if name not in names]
            if lacking:
                told = ", ".join(lacking[:7]) + (f" and {len(lacking) - 7} more" if len(lacking) > 7 else "")
                raise ConfigError(
                    f"{self.folder}: layer {i} of a {family} has no {told}",
                    "only families with q, k, v, o and gate, up, down projections can be quantised",
                )
            for name, shape in stored.items():
                tensor = self.tensors[place + name]
                if tensor.kind not in _FLOATS:
                    raise ConfigError(f"{place}{name} is {tensor.kind}: quantised already", "give the checkpoint it was made from")
                if tensor.shape != shape:
                    raise ConfigError(f"{place}{name} is {list(tensor.shape)}, the config of a {family} says {list(shape)}")
        for name in (EMBEDDING, NORM):
            if name not in self.tensors:
                raise ConfigError(f"{self.folder}: a {family} without {name}", "give a whole causal language model as model")


def header(path: Path) -> dict[str, dict[str, Any]]:
    """What a safetensors file holds, by name: `dtype`, `shape`, `data_offsets`. Raises ConfigError: missing, cut short or damaged."""
    remedy = "copy the checkpoint again"
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_MOST_HEADER, size - 8):
                raise ConfigError(f"{path} is cut short or no safetensors file", remedy)
            values = json.loads(file.read(length))
        values.pop("__metadata__", None)
        end = max((int(value["data_offsets"][1]) for value in values.values()), default=0)
    except OSError as error:
        raise ConfigError(f"{path} could not be read: {error.strerror}", remedy) from None
    except (ValueError, AttributeError, TypeError, KeyError, IndexError):
        raise ConfigError(f"{path} has a damaged header", remedy) from None
    if 8 + length + end != size:
        raise ConfigError(f"{path} has {size} bytes, its header says {8 + length + end}", remedy)
    return values


def _tensors(folder: Path) -> dict[str, Stored]:
    index = folder / INDEX
    where: dict[str, str] | None = None
    if index.is_file():
        where = _json(index, "copy the checkpoint again").get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(file, str) and file == Path(file).name for file in where.values()):
            raise ConfigError(f"{index} has no weight_map of file names", "copy the checkpoint again")
        files = sorted(set(where.values()))
    elif (folder / SINGLE).is_file():
        files = [SINGLE]
    else:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
        if pickled:
            raise ConfigError(f"{folder} has pickled weights only ({pickled[0]})", "convert them to safetensors; pickles can run code")
        raise ConfigError(f"{folder} has neither {INDEX} nor {SINGLE}", "give a folder with safetensors weights as model")
    found: dict[str, Stored] = {}
    for file in files:
        for name, value in header(folder / file).items():
            if where is None or where.get(name) == file:
                found[name] = Stored(file, value["dtype"], tuple(value["shape"]), value["data_offsets"][0])
    for name, file in (where or {}).items():
        if name not in found:
            raise ConfigError(f"{folder / file} has no tensor {name}, which {INDEX} says", "copy the checkpoint again")
    return found


def _json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} could not be read: {error.strerror}", remedy) from None
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}", remedy) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is no JSON object", remedy)
    return values


def _family(config: dict[str, Any]) -> str:
    return str(config.get("model_type") or "model of no named type")
