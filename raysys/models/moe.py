"""A causal decoder whose feed-forward parts are mixtures of experts: RMSNorm, rotary positions, grouped-query attention, SwiGLU experts.

It is Qwen3-MoE without renormalised routing weights, with a router of choice; `raysys.models.moe_files` writes it as such a model.

Legend: T tokens of all rows, D width, H query and G key-value heads, h head dimension, N experts, d their width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from raysys.config.pretraining import MoeModel
from raysys.config.pretraining import Router as RouterConfig
from raysys.models.causal import LogProbHead
from raysys.models.expert_parallel import ExpertGroup, own_part
from raysys.models.experts import Experts
from raysys.models.packing import Packing, attention
from raysys.models.routing import Routed, Router, Routing


@dataclass(frozen=True, kw_only=True)
class MoeShape:
    """Sizes of the decoder. Raises ValueError for sizes that do not fit together."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    expert_width: int
    context: int = 4096
    rope_theta: float = 5e5
    norm_eps: float = 1e-6
    tied: bool = False
    deviation: float = 0.02
    """Standard deviation of fresh weights."""
    routing: Routing = field(default_factory=Routing)

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even")
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k={self.top_k} must be 1 to experts={self.experts}")


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, shape: MoeShape):
        super().__init__()
        width, size = shape.width, shape.head_dim
        self.q_proj = nn.Linear(width, shape.heads * size, bias=False)
        self.k_proj = nn.Linear(width, shape.kv_heads * size, bias=False)
        self.v_proj = nn.Linear(width, shape.kv_heads * size, bias=False)
        self.o_proj = nn.Linear(shape.heads * size, width, bias=False)
        self.q_norm, self.k_norm = RMSNorm(size, shape.norm_eps), RMSNorm(size, shape.norm_eps)
        self.size = size

    def forward(self, x: Tensor, rows: Packing, turn: tuple[Tensor, Tensor]) -> Tensor:
        query = _turned(self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.size))), turn)
        key = _turned(self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.size))), turn)
        value = self.v_proj(x).unflatten(-1, (-1, self.size))
        states = (one.transpose(0, 1).unsqueeze(0) for one in (query, key, value))
        out, _ = attention(self, *states, attention_mask=None, packing=rows)
        return self.o_proj(out[0].flatten(-2))


class Mixture(nn.Module):
    def __init__(self, shape: MoeShape, group: ExpertGroup | None = None):
        super().__init__()
        self.router = Router(shape.experts, shape.top_k, shape.width, shape.routing, group)
        held = shape.experts if group is None else group.held(shape.experts)
        self.experts = Experts(held, shape.width, shape.expert_width, group)

    def forward(self, x: Tensor) -> tuple[Tensor, Routed]:
        experts = self.experts
        routed = self.router(x, experts.gate, experts.up, experts.down)
        return experts(x, routed.weights, routed.indices), routed

    @torch.no_grad()
    def rows(self) -> Tensor:
        """The router that tokens are scored with, [N, D]."""
        experts = self.experts
        return self.router.rows(experts.gate, experts.up, experts.down)

    def overwrite_(self, weight: Tensor) -> Tensor:
        """See `Router.overwrite_`."""
        experts = self.experts
        return self.router.overwrite_(weight, experts.gate, experts.up, experts.down)


class Layer(nn.Module):
    def __init__(self, shape: MoeShape, group: ExpertGroup | None = None):
        super().__init__()
        self.input_norm, self.attention = RMSNorm(shape.width, shape.norm_eps), Attention(shape)
        self.mixture_norm, self.mixture = RMSNorm(shape.width, shape.norm_eps), Mixture(shape, group)

    def forward(self, x: Tensor, rows: Packing, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Routed]:
        x = x + self.attention(self.input_norm(x), rows, turn)
        made, routed = self.mixture(self.mixture_norm(x))
        return x + made, routed


class MoeDecoder(nn.Module):
    """The decoder with its unembedding `head`, which answers with log-probs of ids: see `raysys.models.causal.LogProbHead`.

    Args:
        shape: its sizes and its router.
        checkpointing: recompute each layer in backward.
        expert_group: the ranks that hold the experts between them (`raysys.models.expert_parallel`); None: they are all here.
    """

    def __init__(self, shape: MoeShape, checkpointing: bool = False, expert_group: ExpertGroup | None = None):
        super().__init__()
        self.shape, self.checkpointing, self.expert_group = shape, checkpointing, expert_group
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape, expert_group) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.width, shape.norm_eps)
        self.head = LogProbHead(shape.width, shape.vocabulary, bias=False)
        if shape.tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, rows: Packing) -> tuple[Tensor, list[Routed]]:
        """Hidden states [T, D] before the head, and what each layer's router decided.

        Args:
            ids: [T], row after row. No row sees another.
            rows: where they begin.
        """
        if ids.dim() != 1 or len(ids) != rows.starts[-1]:
            raise ValueError(f"ids must be [{rows.starts[-1]}], the rows' tokens one after another, got {list(ids.shape)}")
        x, found = self.embedding(ids), []
        turn = self._turn(rows.positions[0], x.dtype)
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x, routed = checkpoint(layer, x, rows, turn, use_reentrant=False)  # type: ignore[misc]
            else:
                x, routed = layer(x, rows, turn)
            found.append(routed)
        return self.norm(x), found

    @torch.no_grad()
    def initialise(self, seed: int) -> MoeDecoder:
        """Fresh weights, the same for the same seed: normal ones, norms at 1. Leaves the global random state as it was."""
        for number, (name, parameter) in enumerate(self.named_parameters()):
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                generator = torch.Generator(parameter.device).manual_seed(seed * 1_000_003 + number)
                split = self.expert_group is not None and parameter.dim() == 3
                whole = parameter.new_empty(self.shape.experts, *parameter.shape[1:]) if split else parameter
                whole.normal_(0.0, self.shape.deviation, generator=generator)
                if split:  # a part of the numbers that one rank would draw
                    parameter.copy_(own_part(self, name, whole))
        return self

    def mixtures(self) -> Iterator[Mixture]:
        for layer in self.layers:
            yield layer.mixture  # type: ignore[misc]

    def _turn(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the rotary angles, [T, 1, h] each."""
        size = self.shape.head_dim
        powers = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size
        angles = positions.to(torch.float32)[:, None] * (1.0 / self.shape.rope_theta**powers)[None, :]
        whole = torch.cat([angles, angles], dim=-1).unsqueeze(1)
        return whole.cos().to(dtype), whole.sin().to(dtype)


@dataclass(frozen=True)
class Counts:
    """Parameters of a shape, as the MPI paper counts them; the norms of queries and keys, which its models lack, apart."""

    dense: int
    sparse: int
    activated: int
    query_key_norms: int

    @property
    def total(self) -> int:
        return self.dense + self.sparse


def counts(shape: MoeShape) -> Counts:
    """Dense: embeddings, attention, norms. Sparse: experts and routers. Activated: what one token passes through."""
    attention_size = shape.width * shape.head_dim * 2 * (shape.heads + shape.kv_heads)
    tables = shape.vocabulary * shape.width * (1 if shape.tied else 2)
    dense = tables + shape.layers * (attention_size + 2 * shape.width) + shape.width
    expert, router = 3 * shape.width * shape.expert_width, shape.experts * shape.width
    sparse = shape.layers * (shape.experts * expert + router)
    activated = dense + shape.layers * (shape.top_k * expert + router)
    return Counts(dense, sparse, activated, shape.layers * 2 * shape.head_dim)


def shape_for(model: MoeModel, router: RouterConfig, vocabulary: int, context: int) -> MoeShape:
    """Sizes of the decoder that a config asks for."""
    own = {name: getattr(model, name) for name in ("width", "layers", "heads", "kv_heads", "experts", "top_k", "expert_width")}
    rest = {name: getattr(model, name) for name in ("rope_theta", "norm_eps", "tied", "deviation")}
    routing = Routing(**router.model_dump())
    return MoeShape(vocabulary=vocabulary, head_dim=model.head_size, context=context, routing=routing, **own, **rest)


def _turned(states: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """[T, heads, h] turned by the rotary angles."""
    first, second = states.chunk(2, dim=-1)
    return states * turn[0] + torch.cat([-second, first], dim=-1) * turn[1]


def next_token_loss(model: MoeDecoder, ids: Tensor, rows: Packing, chunk_tokens: int = 1024) -> tuple[Tensor, Tensor, list[Routed]]:
    """Sum of -log p over all tokens that a row's earlier tokens predict, their number, and the routing of each layer.

    Args:
        ids: [T]; rows of one token predict nothing.
        chunk_tokens: logits of so many tokens exist at once.
    """
    states, routed = model(ids, rows)
    predicts = functional.pad(rows.positions[0][1:] > 0, (0, 1))  # the next token is of the same row
    targets = ids.roll(-1)[predicts]
    logprobs = model.head(states[predicts], targets, 1.0, chunk_tokens)
    return -logprobs.sum(), predicts.sum(), routed
