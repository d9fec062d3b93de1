"""A rotation of the residual stream: the model's function stays, outliers are spread over columns. Spec: d2quant.md, section 5.

Legend: D width, V vocabulary, a stream h [T, D], Q orthogonal [D, D]; weights as `nn.Linear` stores them.

    h' = h Q            Q block-diagonal: one random signed Hadamard matrix of `size`, the same in each block
    norm(h) = h / rms(h) * gain: the gain goes into the linears that read the norm, and rms(h') = rms(h)
    reads the stream    W' = (W diag(gain)) Q            q, k, v, gate, up, a mixture's router, unembedding
    writes it           W' = Q^T W,  b' = b Q            o, down; the embedding is E Q

The embedding and the unembedding are no longer the same matrix, so tied ones have to be untied. Nothing inside of attention or the MLP is
rotated: heads, norms of q and k, and the columns of down (whose scales D2Quant needs) stay what they are.

Not for LayerNorm (it subtracts a mean), nor for norms that multiply with 1 + weight, nor for norms behind a sublayer. Computes in float32
(float64 stays) and gives back the dtype that it was given: a layer in halves is best converted before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from raysys.compression import experts
from raysys.methods.tensors import compute_dtype

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", *experts.FAMILIES)
"""Values of `model_type` whose layers are of the form above."""
READERS = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
}
"""Linears that read the stream, and the norm that they read it through; of a mixture each expert's."""
ROUTER = {experts.ROUTER: "post_attention_layernorm"}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
_INSIDE = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
_ROWS = 8192
"""Of a vocabulary at a time."""


@dataclass(frozen=True)
class Rotation:
    """Q, told by its seed.

    Attributes:
        width: D.
        seed: of the signs.
        size: of a block, a power of two that divides D.

    Raises:
        ValueError: a size that is no power of two or does not divide D.
    """

    width: int
    seed: int = 0
    size: int = 128

    def __post_init__(self) -> None:
        if self.size < 1 or self.size & (self.size - 1):
            raise ValueError(f"size must be a power of two, got {self.size}")
        if self.width < 1 or self.width % self.size:
            raise ValueError(f"size must divide the model's width {self.width}, got {self.size}")

    @cached_property
    def block(self) -> Tensor:
        """[size, size] float64, orthogonal: a Hadamard matrix over sqrt(size) whose rows have random signs."""
        out = torch.ones(1, 1, dtype=torch.float64)
        while len(out) < self.size:
            out = torch.cat([torch.cat([out, out], dim=1), torch.cat([out, -out], dim=1)])
        signs = torch.randint(0, 2, (self.size, 1), generator=torch.Generator().manual_seed(self.seed)) * 2 - 1
        return out * signs / self.size**0.5

    def stream(self, h: Tensor) -> Tensor:
        """h Q, [..., D]."""
        if h.shape[-1] != self.width:
            raise ValueError(f"what is rotated must be [..., {self.width}], got {list(h.shape)}")
        block = self.block.to(h.device, compute_dtype(h))
        return (h.to(block.dtype).unflatten(-1, (-1, self.size)) @ block).flatten(-2).to(h.dtype)

    def layer(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A layer's tensors by their name in it ("self_attn.q_proj.weight"), rotated, with norms of gain 1.

        Raises:
            ValueError: a tensor that is missing, or that this form of layer does not have, such as the bias of a norm.
        """
        roles = {name: experts.pooled(name) for name in (full.rpartition(".")[0] for full in tensors)}
        readers = READERS | (ROUTER if any(name != role for name, role in roles.items()) else {})
        needed = {f"{name}.weight" for name in (*readers, *WRITERS, *READERS.values())}
        known = needed | {f"{name}.bias" for name in (*READERS, *WRITERS)} | set(_INSIDE)
        there = {f"{roles[name]}.{end}": full for full in tensors for name, _, end in [full.rpartition(".")]}
        if needed - there.keys():
            raise ValueError(f"a layer that is rotated must have {', '.join(sorted(needed - there.keys()))}")
        if there.keys() - known:
            raise ValueError(f"this form of layer cannot be rotated, it has {', '.join(sorted(there.keys() - known))}")
        out = dict(tensors)
        for name, role in roles.items():
            if role in readers:
                out[f"{name}.weight"] = self._read(tensors[f"{name}.weight"], tensors[f"{readers[role]}.weight"])
            elif role in WRITERS:
                out[f"{name}.weight"] = self.stream(tensors[f"{name}.weight"].T).T.contiguous()
                if f"{name}.bias" in tensors:
                    out[f"{name}.bias"] = self.stream(tensors[f"{name}.bias"])
        for norm in set(READERS.values()):
            out[f"{norm}.weight"] = torch.ones_like(tensors[f"{norm}.weight"])
        return out

    def ends(self, embedding: Tensor, gain: Tensor, unembedding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embedding [V, D], gain of the last norm [D] and unembedding [V, D], rotated; where both are tied the same is given twice."""
        first = torch.cat([self.stream(rows) for rows in embedding.split(_ROWS)])
        last = torch.cat([self._read(rows, gain) for rows in unembedding.split(_ROWS)])
        return first, torch.ones_like(gain), last

    def _read(self, weight: Tensor, gain: Tensor) -> Tensor:
        if gain.shape != (self.width,):
            raise ValueError(f"the gain of a norm must be [{self.width}], got {list(gain.shape)}")
        dtype = compute_dtype(weight, gain)
        return self.stream(weight.to(dtype) * gain.to(dtype)).to(weight.dtype)


def check_family(model_type: str) -> None:
    """Raises ValueError unless models of this type can be rotated."""
    if model_type not in FAMILIES:
        raise ValueError(f"models of type {model_type!r} cannot be rotated: of {', '.join(FAMILIES)} it is known how")
