"""The mixture-of-experts decoder as a stock Qwen3-MoE folder, and back.

What routes is written as a plain router: stock transformers and stock vLLM know of no other. The parameter behind it stays in training
checkpoints only, so a folder that is loaded again goes on with the written rows.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist

from raysys.errors import ConfigError
from raysys.models.expert_parallel import ExpertGroup
from raysys.models.moe import MoeDecoder, MoeShape
from raysys.models.routing import Routing

_LAYER = {
    "attention.q_proj.weight": "self_attn.q_proj.weight",
    "attention.k_proj.weight": "self_attn.k_proj.weight",
    "attention.v_proj.weight": "self_attn.v_proj.weight",
    "attention.o_proj.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "input_norm.weight": "input_layernorm.weight",
    "mixture_norm.weight": "post_attention_layernorm.weight",
    "mixture.router.weight": "mlp.gate.weight",
}
_ROOT = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
SHARD_BYTES = 2**31
Opened = Callable[[list[torch.nn.Parameter]], AbstractContextManager[Any]]


def hub_config(shape: MoeShape, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The `config.json` of the stock model. Raises ConfigError for a router that it does not have."""
    routing = shape.routing
    if routing.gate != "softmax":
        raise ConfigError(f"a router with gate={routing.gate} cannot be exported", "stock Qwen3-MoE has softmax routers only")
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.expert_width * shape.top_k,  # of dense layers, of which there are none
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tied,
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": shape.expert_width,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        # A softmax over the chosen ones is that over all, renormalised.
        "norm_topk_prob": routing.renormalise or not routing.normalise_first,
        "initializer_range": shape.deviation,
        "dtype": str(dtype).removeprefix("torch."),
    }


def hub_tensors(model: MoeDecoder, opened: Opened = nullcontext) -> Iterator[tuple[str, Tensor]]:
    """Stock names and tensors on the CPU, routers as they route; tied ones once. Collective where experts are split over ranks, which gives
    them on the first of each group only.

    Args:
        opened: a context in which the parameters that it is given are whole; with ranks that hold parts, all iterate together.
    """
    for name, parameter in model.named_parameters():
        if name in _ROOT:
            with opened([parameter]):
                yield _ROOT[name], _taken(parameter)
    for number, layer in enumerate(model.layers):
        place, group = f"model.layers.{number}.", model.expert_group
        with opened(list(layer.parameters())):
            for rest, parameter in layer.named_parameters():
                if rest == "mixture.router.weight":
                    yield place + _LAYER[rest], _taken(layer.mixture.rows().to(parameter.dtype))  # type: ignore[union-attr]
                elif rest in _LAYER:
                    yield place + _LAYER[rest], _taken(parameter)
                else:
                    kind, whole = rest.rpartition(".")[2], parameter.detach() if group is None else group.whole(parameter)
                    for expert, matrix in enumerate(() if whole is None else whole.unbind(0)):
                        yield f"{place}mlp.experts.{expert}.{kind}_proj.weight", _taken(matrix)


def _taken(tensor: Tensor) -> Tensor:
    """A file holds whole storages, and an expert is a view of a stack; what is open now may be closed when it is written."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def export_moe(
    model: MoeDecoder,
    folder: str | Path,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    opened: Opened = nullcontext,
    write: bool | None = None,
) -> Path:
    """Writes the folder: config, safetensors, generation config, and the tokenizer if one is given.

    Where experts are split over ranks all of them call it, and rank 0 writes: the folder is complete when it returns there.

    Args:
        dtype: of the file; None: the model's.
        opened: see `hub_tensors`.
        write: false for the ranks that only help to open parameters; None: rank 0 writes where experts are split, else this process.

    Raises:
        ConfigError: see `hub_config`.
    """
    folder = Path(folder)
    kind = dtype or next(model.parameters()).dtype
    config = hub_config(model.shape, kind)
    tensors = hub_tensors(model, opened)
    if not (write if write is not None else model.expert_group is None or dist.get_rank() == 0):
        deque(tensors, maxlen=0)
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _save(((name, tensor.to(kind)) for name, tensor in tensors), folder)
    finally:
        deque(tensors, maxlen=0)  # other ranks wait for this one, also where a disk is full
    ends = {} if tokenizer is None else {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    (folder / "config.json").write_text(json.dumps(config | ends, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({key: one for key, one in ends.items() if one is not None}, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def load_moe(
    folder: str | Path,
    routing: Routing | None = None,
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
    expert_group: ExpertGroup | None = None,
) -> MoeDecoder:
    """The decoder with the weights of a Qwen3-MoE folder, to train it further.

    Args:
        routing: None: a plain router that does as the folder says. With MPI the folder's rows become its parameter.
        checkpointing, expert_group: see `MoeDecoder`. A rank reads its own experts only.

    Raises:
        ConfigError: no such folder, another architecture, or a tensor that is missing or of another shape.
    """
    folder = Path(folder)
    shape = shape_of_moe(folder, routing)
    with torch.device("meta"):
        model = MoeDecoder(shape, checkpointing, expert_group)
    model = model.to_empty(device="cpu").to(dtype)
    if shape.tied:
        model.head.weight = model.embedding.weight
    found = _Tensors(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in _ROOT:
                parameter.copy_(found.take(_ROOT[name], parameter.shape))
                continue
            _, number, rest = name.split(".", 2)
            place = f"model.layers.{number}."
            if rest in _LAYER:
                parameter.copy_(found.take(place + _LAYER[rest], parameter.shape))
            else:
                kind = rest.rpartition(".")[2]
                first = 0 if expert_group is None else expert_group.rank * len(parameter)
                for expert, matrix in enumerate(parameter, first):
                    matrix.copy_(found.take(f"{place}mlp.experts.{expert}.{kind}_proj.weight", matrix.shape))
    return model


def shape_of_moe(folder: Path, routing: Routing | None = None) -> MoeShape:
    """Sizes of a Qwen3-MoE folder. Raises ConfigError: see `load_moe`."""
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} has no config.json", "give a Hugging Face folder of a Qwen3-MoE model")
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("model_type") != "qwen3_moe":
        raise ConfigError(
            f"{folder} is a {values.get('model_type')}, not a qwen3_moe", "only such mixtures of experts can be trained further"
        )
    if values.get("mlp_only_layers") or values.get("decoder_sparse_step", 1) != 1 or values.get("attention_bias"):
        raise ConfigError(f"{folder} has dense layers or attention biases, which this decoder has not")
    rope = values.get("rope_parameters") or {"rope_theta": values.get("rope_theta", 1e6)}
    if rope.get("rope_type", "default") != "default" or values.get("rope_scaling"):
        raise ConfigError(f"{folder} scales its rotary positions ({rope.get('rope_type')}), which this decoder does not")
    own = Routing(mpi=False, renormalise=bool(values.get("norm_topk_prob", False)))
    return MoeShape(
        vocabulary=values["vocab_size"],
        width=values["hidden_size"],
        layers=values["num_hidden_layers"],
        heads=values["num_attention_heads"],
        kv_heads=values["num_key_value_heads"],
        head_dim=values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"],
        experts=values["num_experts"],
        top_k=values["num_experts_per_tok"],
        expert_width=values["moe_intermediate_size"],
        context=values["max_position_embeddings"],
        rope_theta=float(rope["rope_theta"]),
        norm_eps=values["rms_norm_eps"],
        tied=bool(values.get("tie_word_embeddings", False)),
        deviation=values.get("initializer_range", 0.02),
        routing=routing or own,
    )


def _save(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Safetensors files of about `SHARD_BYTES` with an index, one of them in memory at a time."""
    shards: list[Path] = []
    where: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    size = total = 0

    def write() -> None:
        shards.append(folder / f".draft-{len(shards)}.safetensors")
        save_file(held, shards[-1], metadata={"format": "pt"})
        where.update(dict.fromkeys(held, len(shards) - 1))
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > SHARD_BYTES:
            write()
            size = 0
        held[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    write()
    names = ["model.safetensors"] if len(shards) == 1 else [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    for old in (*folder.glob("model*.safetensors"), *folder.glob("model.safetensors.index.json")):
        old.unlink()
    for draft, name in zip(shards, names, strict=True):
        draft.rename(folder / name)
    if len(names) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {name: names[number] for name, number in where.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


class _Tensors:
    """Tensors of a folder's safetensors files by name, read one at a time."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        self._where = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118  not a mapping

    def take(self, name: str, shape: torch.Size) -> Tensor:
        if name not in self._where:
            raise ConfigError(f"{self._folder} has no tensor {name}", "its safetensors files do not belong to its config.json")
        tensor = self._where[name].get_tensor(name)
        if tensor.shape != shape:
            raise ConfigError(f"{self._folder}: {name} is {list(tensor.shape)}, its config.json says {list(shape)}")
        return tensor
