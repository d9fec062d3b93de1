"""One decoder layer of a transformers model at a time: built from the config alone, filled with a layer's weights, run in two halves.

Legend: B windows, L positions, D width.

    middle = h + attention(norm(h))          `Block.attend`
    out    = middle + mlp(norm(middle))      `Block.feed`

An MLP has a place: "mlp" of a dense layer; of a mixture each expert has one, "mlp.experts.3".
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raysys.compression import experts
from raysys.errors import ConfigError


class Block:
    """A decoder layer. `bias` [D], if there is one, is added to what the norm after attention gives."""

    def __init__(self, module: nn.Module, positions: tuple[Tensor, Tensor]):
        self.module: Any = module
        self.bias: Tensor | None = None
        self._positions = positions

    def attend(self, states: Tensor) -> Tensor:
        """[B, L, D] behind the attention, the residual added."""
        length = states.shape[1]
        cos, sin = (table[:, :length] for table in self._positions)
        out = self.module.self_attn(
            hidden_states=self.module.input_layernorm(states), position_embeddings=(cos, sin), attention_mask=None, use_cache=False
        )
        return states + out[0]

    def normed(self, middle: Tensor) -> Tensor:
        """What gate and up read."""
        out = self.module.post_attention_layernorm(middle)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def feed(self, middle: Tensor) -> Tensor:
        """[B, L, D] behind the MLP, the residual added."""
        return middle + self.module.mlp(self.normed(middle))

    def whole(self, states: Tensor) -> Tensor:
        """The layer as transformers computes it, which knows no `bias`."""
        length = states.shape[1]
        cos, sin = (table[:, :length] for table in self._positions)
        out = self.module(states, attention_mask=None, position_embeddings=(cos, sin), use_cache=False)
        return out[0] if isinstance(out, tuple) else out

    def reached(self, normed: Tensor, real: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Places of MLPs, and which of the real positions [B, L] reach each, given what the norm after attention gives [B, L, D]."""
        yield "mlp", real

    def hidden(self, place: str, normed: Tensor) -> Tensor:
        """What the down-projection of an MLP reads, [..., d], of what its gate and up read, [..., D]."""
        mlp = self.module.mlp
        return mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)

    def weight(self, linear: str) -> Tensor:
        return self.module.get_submodule(linear).weight

    def bias_of(self, linear: str) -> Tensor | None:
        return self.module.get_submodule(linear).bias

    def put(self, linear: str, weight: Tensor) -> None:
        """Another weight [out, in] for a linear; taken to the dtype and device that it has."""
        self.weight(linear).copy_(weight)

    @contextmanager
    def seen(self, linear: str) -> Iterator[list[Tensor]]:
        """Collects the inputs [B, L, in] that a linear gets inside the block."""
        found: list[Tensor] = []
        hook = self.module.get_submodule(linear).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        try:
            yield found
        finally:
            hook.remove()


class Mixture(Block):
    """A layer whose MLP is a mixture of experts behind a router."""

    def reached(self, normed: Tensor, real: Tensor) -> Iterator[tuple[str, Tensor]]:
        chosen = self.module.mlp.gate(normed.flatten(0, 1))[-1]  # [B L, K], as the layer itself routes
        for expert in range(self.module.mlp.experts.num_experts):
            yield f"mlp.experts.{expert}", real & (chosen == expert).any(dim=-1).view_as(real)

    def hidden(self, place: str, normed: Tensor) -> Tensor:
        gate, up = (nn.functional.linear(normed, self.weight(f"{place}.{part}_proj")) for part in ("gate", "up"))
        return self.module.mlp.experts.act_fn(gate) * up

    def weight(self, linear: str) -> Tensor:
        part = experts.part_of(linear)
        if part is None:
            return super().weight(linear)
        stacks = self.module.mlp.experts
        if part[1] == "down":
            return stacks.down_proj[part[0]]
        gate, up = stacks.gate_up_proj[part[0]].chunk(2)
        return gate if part[1] == "gate" else up

    def bias_of(self, linear: str) -> Tensor | None:
        return None if experts.part_of(linear) else super().bias_of(linear)


class Skeleton:
    """A model without its layers' weights: makes blocks, embeds, and gives logits.

    Args:
        folder: Hugging Face folder, for its config.
        length: positions of the longest window.
        dtype, device: of the computation.

    Raises:
        ConfigError: transformers does not know the model, it is no stack of layers that are attention and MLP, or it cannot hold
            windows of that length.
    """

    def __init__(self, folder: str | Path, length: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            self.config: Any = AutoConfig.from_pretrained(folder)
            self.config._attn_implementation = "sdpa"
            self.config._experts_implementation = "eager"  # one expert after another, each a plain product, on any device
            with torch.device("meta"):
                model: Any = AutoModelForCausalLM.from_config(self.config)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"{folder} is no model that transformers makes: {(str(error).splitlines() or [type(error).__name__])[0]}",
                "give a Hugging Face folder as model",
            ) from None
        self.dtype, self.device = dtype, torch.device(device)
        self._base = model.model
        self._check(folder, length)
        rotary = type(self._base.rotary_emb)(self.config)
        probe = torch.zeros(1, 1, self.config.hidden_size, dtype=dtype)
        tables = rotary(probe, torch.arange(length)[None])
        self._positions = (tables[0].to(self.device), tables[1].to(self.device))

    def _check(self, folder: str | Path, length: int) -> None:
        family = self.config.model_type
        layers = getattr(self._base, "layers", None)
        parts = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
        if layers is None or not hasattr(self._base, "rotary_emb") or not all(hasattr(layers[0], part) for part in parts):
            raise ConfigError(
                f"{folder}: a layer of {family} is not attention and MLP behind a norm each", "only Llama, Qwen2, Qwen3 and their like are"
            )
        windows = set(getattr(self.config, "layer_types", None) or ()) - {"full_attention"}
        if windows and length > (getattr(self.config, "sliding_window", None) or 0):
            raise ConfigError(
                f"{folder} has layers of {', '.join(sorted(windows))}, which windows of {length} tokens exceed",
                f"set calibration.length and evaluation.length to at most {getattr(self.config, 'sliding_window', 0)}",
            )
        most = getattr(self.config, "max_position_embeddings", None)
        if most and length > most:
            raise ConfigError(
                f"{folder} holds {most} tokens, a window has {length}", "lower calibration.length and evaluation.length to what it holds"
            )

    def block(self, layer: int, weights: Mapping[str, Tensor]) -> Block:
        """A layer with these weights, by names relative to it. Raises ConfigError: they are not those of such a layer."""
        module: Any = copy.deepcopy(self._base.layers[layer])
        own = experts.stacked({name: tensor.to(self.device, self.dtype) for name, tensor in weights.items()})
        own = {name: tensor.clone() if tensor is weights.get(name) else tensor for name, tensor in own.items()}
        try:
            module.load_state_dict(own, strict=True, assign=True)
        except RuntimeError as error:
            told = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"layer {layer} does not fit its config: {told}", "the shards and config.json belong to other models"
            ) from None
        kind = Mixture if hasattr(module.mlp, "experts") else Block
        return kind(module.requires_grad_(False).eval(), self._positions)

    def norm(self, states: Tensor, weight: Mapping[str, Tensor], bias: Tensor | None = None) -> Tensor:
        """The final norm, with its parameters by name ("weight")."""
        module = copy.deepcopy(self._base.norm)
        module.load_state_dict({name: tensor.to(self.device, self.dtype) for name, tensor in weight.items()}, assign=True)
        out = module(states)
        return out if bias is None else out + bias.to(out)


def check_halves(block: Block, width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ConfigError unless a layer computes what its halves do; some families scale a residual or add norms."""
    noise = torch.randn(1, 8, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    length = min(8, noise.shape[1])
    with torch.no_grad():
        whole, halves = block.whole(noise[:, :length]), block.feed(block.attend(noise[:, :length]))
    gap = float((whole - halves).abs().max() / whole.abs().max().clamp_min(1e-30))
    if not gap < (1e-4 if dtype in (torch.float32, torch.float64) else 0.05):
        raise ConfigError(
            f"a layer of {type(block.module).__name__} is not attention and MLP behind a norm each (they differ by {gap:.1g})",
            "only Llama, Qwen2, Qwen3 and their like are",
        )
