"""Rows one after another in one sequence, without padding: attention stays inside each row, positions restart at 0.

Everything but attention works token by token and never learns of rows. Attention is told where they begin through transformers'
registry of attention functions:

* on CUDA in bfloat16 or float16, torch's own variable-length flash attention, for heads of a width that it has;
* elsewhere rows of about one length are laid out as a padded block, each block is one causal attention call (no mask, so the
  square of the packed length is never computed), and backward computes the block again, so that no padded tensor is kept.
  Rows of one length need no layout: they are a block as they lie.

Legend: T tokens of all rows, B rows, H heads, D head width.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

log = logging.getLogger(__name__)

NAME = "raysys_packed"
"""Of the attention function in transformers' registry."""

_KINDS = {"full_attention", "sliding_attention"}
_FLASH_WIDTH = 256
"""Of a head, at most, in torch's flash attention."""
_SLACK = 8
"""Tokens of padding in a block that cost less than a block more."""


@dataclass(frozen=True, eq=False)
class Block:
    """Rows of about one length, as attention sees them: [rows, longest] places."""

    rows: int
    longest: int
    slots: Tensor
    """[rows * longest] token in each place; behind a row's end its last token again."""
    tokens: Tensor
    """[n] the rows' tokens, row after row."""
    places: Tensor
    """[n] where they are in the block."""

    def take(self, values: Tensor) -> Tensor:
        """[T, H, D] to [rows, H, longest, D]."""
        return values.index_select(0, self.slots).view(self.rows, self.longest, *values.shape[1:]).transpose(1, 2)

    def give(self, block: Tensor, out: Tensor) -> None:
        """What `take` took, written back into `out`."""
        flat = block.transpose(1, 2).reshape(self.rows * self.longest, *out.shape[1:])
        out.index_copy_(0, self.tokens, flat.index_select(0, self.places))


class Packing:
    """Where the rows of one sequence begin and end.

    Args:
        lengths: tokens of each row, at least 1.
        device: of the tensors that go with it.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, device: torch.device | str):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.device = torch.device(device)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.longest = int(self.lengths.max())

    @cached_property
    def positions(self) -> Tensor:
        """[1, T], counted from each row's begin."""
        return self._tensor(np.arange(self.starts[-1]) - np.repeat(self.starts[:-1], self.lengths))[None]

    @cached_property
    def bounds(self) -> Tensor:
        """[1, 1, 1, B + 1] int32, where rows begin, and T: four axes, so that transformers takes it for a finished mask and makes none."""
        return self._tensor(self.starts.astype(np.int32))[None, None, None]

    @cached_property
    def blocks(self) -> list[Block]:
        """Every row in one block; the shortest row of a block has at least four fifths of its length, a little slack apart."""
        order = np.argsort(-self.lengths, kind="stable")
        blocks, first = [], 0
        while first < len(order):
            longest = int(self.lengths[order[first]])
            count = int(np.searchsorted(-self.lengths[order[first:]], _SLACK - 0.8 * longest, side="right"))
            blocks.append(self._block(np.sort(order[first : first + count]), longest))
            first += count
        return blocks

    def _block(self, rows: np.ndarray, longest: int) -> Block:
        lengths = self.lengths[rows, None]
        steps = np.arange(longest)[None, :]
        slots = self.starts[rows, None] + np.minimum(steps, lengths - 1)
        places = np.flatnonzero(steps < lengths)
        return Block(len(rows), longest, self._tensor(slots.ravel()), self._tensor(slots.ravel()[places]), self._tensor(places))

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, non_blocking=True)


def teach(model: PreTrainedModel) -> bool:
    """Makes a model's attention keep rows apart when its base model is called with a `Packing` (see `arguments`).

    Without one it attends as before. Tried out here on three rows, with NaN in the middle one: where anything at all
    crosses (recurrent or convolutional layers, attention of a kind of its own), NaN arrives in another row. Train or eval mode
    as it will be used: attention dropout, for one, is not packed.

    Returns:
        Whether it learned it. If not, the model is as before, and rows must be padded.
    """
    config, base = model.config.get_text_config(), model.base_model
    kinds = set(getattr(config, "layer_types", None) or _KINDS)
    if (
        not kinds <= _KINDS
        or getattr(config, "attention_chunk_size", None) is not None
        or model.config._attn_implementation != "sdpa"
        or "position_ids" not in inspect.signature(base.forward).parameters
        or not model._can_set_attn_implementation()
    ):
        return False
    _register()
    model.set_attn_implementation(NAME)
    if _keeps_apart(model):
        return True
    model.set_attn_implementation("sdpa")
    return False


def arguments(packing: Packing) -> dict[str, Any]:
    """What the base model of a taught model is called with beside its tokens, [1, T]."""
    return {"position_ids": packing.positions, "attention_mask": packing.bounds, "packing": packing, "use_cache": False}


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _keeps_apart(model: PreTrainedModel) -> bool:
    packing = Packing([3, 2, 3], model.device)
    try:
        with torch.no_grad():
            embedded = model.get_input_embeddings()(torch.zeros(1, 8, dtype=torch.long, device=model.device))
            embedded[:, 3:5] = torch.nan
            states = model.base_model(inputs_embeds=embedded, **arguments(packing)).last_hidden_state[0]
    except Exception:  # whatever a model of another shape raises when it is tried out, it is one to pad
        log.info("%s cannot pack rows", type(model).__name__, exc_info=True)
        return False
    clean = states.isfinite().all(-1)
    return bool(clean[:3].all() and clean[5:].all() and not clean[3:5].any())


class _CannotPack(RuntimeError):
    """The model's attention asks for something that `attention` does not do."""


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls it: `query` [1, H, T, D], keys and values of as many heads or fewer.

    Returns:
        [1, T, H, D] and no weights.
    """
    if packing is None:
        if attention_mask is not None and attention_mask.dtype == torch.int32:
            raise _CannotPack("the model does not hand its keyword arguments on to its attention")
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    asked = {name: kwargs.get(name) for name in ("softcap", "s_aux", "position_bias", "cache") if kwargs.get(name) is not None}
    if asked or dropout or is_causal is False or len(query) != 1 or query.shape[2] != packing.starts[-1]:
        raise _CannotPack(f"packed attention has no dropout and none of {sorted(asked)}")
    window = sliding_window if sliding_window is not None and sliding_window < packing.longest else None
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    if _fits_flash(query, value):
        return _flash(query, key, value, packing, scaling, window)[None], None
    if (packing.lengths == packing.longest).all():
        q, k, v = (states.reshape(-1, packing.longest, *states.shape[1:]).transpose(1, 2) for states in (query, key, value))
        return _attend(q, k, v, scaling, window).transpose(1, 2).flatten(0, 1)[None], None
    return _Blocks.apply(query, key, value, packing, scaling, window)[None], None  # type: ignore[index]


def _fits_flash(query: Tensor, value: Tensor) -> bool:
    """[T, H, D] each. Heads of an odd width, or values narrower than keys, go block by block."""
    width, half = query.shape[-1], query.dtype in (torch.bfloat16, torch.float16)
    fits = width == value.shape[-1] and width <= _FLASH_WIDTH and not width % 8
    return query.is_cuda and half and fits and torch.backends.cuda.is_flash_attention_available()


def _flash(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float | None, window: int | None) -> Tensor:
    """[T, H, D] each. Never builds a mask; CUDA only."""
    from torch.nn.attention.varlen import varlen_attn

    bounds = packing.bounds.view(-1)
    # Only where it is needed: torch 2.11 does not know it.
    grouped: dict[str, Any] = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    return varlen_attn(  # type: ignore[return-value]
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        bounds,
        bounds,
        packing.longest,
        packing.longest,
        scale=scale,
        window_size=(-1, 0) if window is None else (window - 1, 0),
        **grouped,
    )


class _Blocks(torch.autograd.Function):
    """Causal attention inside rows, block by block: [T, H, D] each, to [T, H, D of value]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float | None, window: int | None) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.packing, ctx.scale, ctx.window = packing, scale, window
        out = query.new_empty(*query.shape[:2], value.shape[2])
        for block in packing.blocks:
            block.give(_attend(block.take(query), block.take(key), block.take(value), scale, window), out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        states = ctx.saved_tensors
        found = [torch.empty_like(one, memory_format=torch.contiguous_format) for one in states]
        for block in ctx.packing.blocks:
            query, key, value = taken = [block.take(one).requires_grad_() for one in states]
            with torch.enable_grad():
                out = _attend(query, key, value, ctx.scale, ctx.window)
            # No gradient comes from behind a row's end, so by causality none goes there.
            grad = grads[0].new_zeros(block.rows * block.longest, *grads[0].shape[1:])
            grad.index_copy_(0, block.places, grads[0].index_select(0, block.tokens))
            grad = grad.view(block.rows, block.longest, *grad.shape[1:]).transpose(1, 2)
            for one, into in zip(torch.autograd.grad(out, taken, grad), found, strict=True):
                block.give(one, into)
        return (*found, None, None, None)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
    """[rows, H, longest, D] each."""
    mask = None
    if window is not None and window < query.shape[2]:
        steps = torch.arange(query.shape[2], device=query.device)
        back = steps[:, None] - steps[None, :]
        mask = (back >= 0) & (back < window)
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
