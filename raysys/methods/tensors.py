"""What the methods ask of their arguments: one shape, floating numbers, a mask of 0 and 1, ids in range.

Legend: B rows, R response tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any is, else float32."""
    return torch.float64 if any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def check_shapes(first_name: str, first: Tensor, **others: Tensor | None) -> None:
    """Raises ValueError unless the first is [B, R] and the others, where given, are of its shape, all floating."""
    if first.dim() != 2:
        raise ValueError(f"{first_name} must be [B, R], got shape {list(first.shape)}")
    for name, tensor in {first_name: first, **others}.items():
        if tensor is None:
            continue
        if tensor.shape != first.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, {first_name} has {list(first.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating, got {tensor.dtype}")


def real_mask(mask: Tensor, like_name: str, like: Tensor) -> Tensor:
    """The mask as bool. Raises ValueError when its shape is not that of `like`, or it holds something else than 0 and 1."""
    if mask.shape != like.shape:
        raise ValueError(f"mask has shape {list(mask.shape)}, {like_name} has {list(like.shape)}")
    real = mask != 0
    if mask.dtype != torch.bool and not bool((real == mask).all()):
        raise ValueError(f"mask must hold 0 and 1 only, got {mask[real != mask].flatten()[0].item()}")
    return real


def check_ids(name: str, ids: Tensor, size: int) -> None:
    """Raises ValueError unless all ids lie in [0, size)."""
    if ids.numel():
        low, high = (int(bound) for bound in torch.aminmax(ids))
        if low < 0 or high >= size:
            raise ValueError(f"{name} must lie in [0, {size}), got {low if low < 0 else high}")


def check_chunk(chunk_tokens: int) -> None:
    """Raises ValueError unless it is a positive integer."""
    if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be a positive integer, got {chunk_tokens}")


def chunks(n: int, chunk: int) -> list[slice]:
    """Slices of at most `chunk` that cover range(n)."""
    return [slice(start, min(start + chunk, n)) for start in range(0, n, chunk)]
