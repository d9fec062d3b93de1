"""Small checkpoints of the families that are quantised, and layers of them by plain rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raysys.compression.shards import Checkpoint
from raysys.config.runs import NewModel
from raysys.methods.d2quant import Quantized, quantize

GROUP = 32
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def qwen3(folder: Path, layers: int = 3, tied: bool = False, seed: int = 0, width: int = 64) -> Path:
    from raysys.models.scratch import new_causal

    inner = 3 * width // 2
    spec = NewModel(hidden_size=width, layers=layers, heads=4, kv_heads=2, head_dim=width // 2, ffn_size=inner, tied=tied)
    return new_causal(spec, folder, seed)


def qwen2(folder: Path) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, num_hidden_layers=2)).float()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def llama(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2)).float().save_pretrained(folder, max_shard_size="100KB")
    return folder


def phi3(folder: Path) -> Path:
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    Phi3ForCausalLM(Phi3Config(**SIZES, num_hidden_layers=2)).float().save_pretrained(folder)
    return folder


def qwen3_moe(folder: Path, layers: int = 2, experts: int = 4, chosen: int = 2, stacked: bool = False, width: int = 64) -> Path:
    """Experts of half the width, as different from each other as trained ones. `stacked`: as transformers 5 holds them."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(3)
    sizes = SIZES | {"hidden_size": width, "head_dim": width // 4, "num_hidden_layers": layers, "vocab_size": 64}
    routing = {"num_experts": experts, "num_experts_per_tok": chosen, "moe_intermediate_size": width // 2, "norm_topk_prob": True}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **routing, tie_word_embeddings=False)).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.add_(0.2 * torch.randn_like(weight))
            else:
                weight.normal_(0, weight.shape[-1] ** -0.5)
    model.save_pretrained(folder, save_original_format=not stacked)
    return folder


def rounded(source: Checkpoint, i: int, bits: int, group_size: int = GROUP) -> dict[str, Quantized]:
    layer = source.layer(i)
    return {name: quantize(layer[f"{name}.weight"].float(), bits, group_size) for name in source.linears}


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits
