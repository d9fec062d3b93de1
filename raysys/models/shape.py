"""A model's sizes from its config alone: no weights, no network, parameters counted on meta tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysys.config.runs import NewModel
from raysys.errors import ConfigError

_QWEN3 = {
    "model_type": "qwen3",
    "head_dim": 128,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
_QWEN2 = {
    "model_type": "qwen2",
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
_QWEN2_1B5 = _QWEN2 | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
_QWEN2_7B = _QWEN2 | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
PUBLIC: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": _QWEN2 | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "Qwen2.5-1.5B": _QWEN2_1B5,
    "Qwen2.5-Coder-1.5B": _QWEN2_1B5,
    "Qwen2.5-3B": _QWEN2 | {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16},
    "Qwen2.5-7B": _QWEN2_7B,
    "Qwen2.5-Coder-7B": _QWEN2_7B,
    "Qwen3-0.6B": _QWEN3 | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "Qwen3-1.7B": _QWEN3 | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "Qwen3-4B": _QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "Qwen3-8B": _QWEN3
    | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "tie_word_embeddings": False},
    "Qwen3-30B-A3B": _QWEN3
    | {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "tie_word_embeddings": False,
    },
}
"""The numbers of the `config.json` files that Qwen publishes with these models (of Qwen3 the first generation, April 2025)."""


@dataclass(frozen=True)
class Shape:
    """What memory estimates need to know of a causal language model. All sizes count elements, not bytes."""

    label: str
    source: str
    """Where the numbers come from."""
    parameters: int
    active_parameters: int
    """Parameters that one token passes through; the embedding table is not counted, the head is."""
    largest_module: int
    """Parameters of the largest decoder layer, or of the embedding if that is larger: what ZeRO 3 gathers at once."""
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Width of the feed-forward part that one token passes through (experts: all that it is routed to)."""
    experts: int = 0
    """Of each layer; 0 of a dense model."""
    expert_ffn: int = 0
    """Width of one of them."""
    tied: bool = False
    """Whether the embedding is the head, too."""

    @property
    def kv_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim


def shape_of(model: str, default: NewModel | None = None) -> Shape:
    """The shape of a Hugging Face folder or id.

    Args:
        model: a folder with `config.json`, or an id; ids that contain a name of `PUBLIC` need no hub.
        default: stands in for a folder that an earlier job will make.

    Raises:
        ConfigError: a damaged `config.json`; or no folder, no public numbers, and the hub does not answer.
    """
    folder = Path(model)
    if (folder / "config.json").is_file():
        try:
            numbers = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder}/config.json cannot be read: {error}", "the folder is damaged, copy it again") from None
        return _measure(model, f"{folder}/config.json", numbers)
    known = max((name for name in PUBLIC if name.lower() in model.lower()), key=len, default=None)
    if known is not None:
        return _measure(model, f"published numbers of {known}", PUBLIC[known])
    if default is not None and model.count("/") != 1:  # an id is owner/name; this is a path
        return _measure(model, "not made yet: taken for the model that jobs/sft.py makes", _from_scratch(default))
    return _measure(model, "model hub", _from_hub(model))


def new_shape(model: NewModel) -> Shape:
    """The shape of a model that a run makes itself."""
    return _measure("new model", "new_model of the config", _from_scratch(model))


def _from_scratch(model: NewModel) -> dict[str, Any]:
    words = Path(model.words) if model.words else None
    return {
        "model_type": "qwen3",
        "vocab_size": 98 + len(model.tokens) + (len(json.loads(words.read_text())) if words and words.is_file() else 0),
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn_size,
        "tie_word_embeddings": model.tied,
        "max_position_embeddings": model.context,
    }


def _from_hub(model: str) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model).to_dict()
    except (OSError, ValueError) as error:
        known = ", ".join(PUBLIC)
        raise ConfigError(
            f"{model} is no folder with a config.json, and no hub answers: {str(error).splitlines()[0]}",
            f"give a folder, or an id that contains one of {known}",
        ) from None


def _measure(label: str, source: str, values: dict[str, Any]) -> Shape:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(values)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())  # tied ones are listed once
    table = model.get_input_embeddings().weight.numel()
    layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in model.get_decoder().layers]
    experts = getattr(config, "num_experts", None) or 0
    routed = getattr(config, "num_experts_per_tok", None) or 0
    expert = 3 * config.hidden_size * config.moe_intermediate_size if experts else 0
    idle = (experts - routed) * expert * config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        label=label,
        source=source,
        parameters=total,
        active_parameters=total - idle - (0 if config.tie_word_embeddings else table),
        largest_module=max([*layers, table]),
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        ffn=routed * config.moe_intermediate_size if experts else config.intermediate_size,
        experts=experts,
        expert_ffn=config.moe_intermediate_size if experts else 0,
        tied=bool(config.tie_word_embeddings),
    )
