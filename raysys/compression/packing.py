"""Codes of 1 to 8 bits as dense words, the layout of compressed-tensors' `pack-quantized`.

A row is one stream of bits, least significant first, whose codes cross the borders of words: column j has bits j b to (j + 1) b - 1. A
signed code is stored as code + 2^(b-1), and what a row has left in its last word is 0. So 8 codes are exactly b bytes: they are moved
together eight at a time, in halves of growing size, within one 64-bit word.

Compiled by numba on first use (a second for each width) and kept on disk where a place can be written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

WIDTHS = range(1, 9)
_WORD = 32


def packed_words(columns: int, bits: int) -> int:
    """Words of 32 bits that a row takes."""
    return -(-columns * bits // _WORD)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [out, in] to int32 [out, ceil(in bits / 32)], on the CPU.

    Args:
        codes: integers from -2^(bits-1) to 2^(bits-1) - 1.
        bits: 1 to 8.

    Raises:
        ValueError: another shape or width, no integers, or a code that does not fit.
    """
    _check_bits(bits)
    if codes.dim() != 2 or codes.is_floating_point() or codes.is_complex() or not codes.numel():
        raise ValueError(f"codes must be integers [out, in], got {codes.dtype} of shape {list(codes.shape)}")
    if codes.dtype != torch.int8:
        low, high = (int(bound) for bound in torch.aminmax(codes.to(torch.int64)))
        if low < -128 or high > 127:
            raise ValueError(_outside(bits))
        codes = codes.to(torch.int8)
    rows, columns = codes.shape
    whole = _eights(codes.detach().cpu(), columns, fill=-(2 ** (bits - 1)))  # what is stored as 0
    out = torch.empty(rows, whole.shape[1] // 8 * bits, dtype=torch.uint8)
    if not _kernels(bits)[0](whole.numpy().reshape(-1).view(np.uint64), out.numpy().reshape(-1)):
        raise ValueError(_outside(bits))
    spare = 4 * packed_words(columns, bits) - out.shape[1]
    if spare > 0:
        out = torch.nn.functional.pad(out, (0, spare))
    elif spare < 0:
        out = out[:, :spare].contiguous()
    return out.view(torch.int32)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The codes, int8 [out, columns], that `pack` was given.

    Raises:
        ValueError: not int32 of [out, ceil(columns bits / 32)], or another width.
    """
    _check_bits(bits)
    if packed.dim() != 2 or packed.dtype != torch.int32 or columns < 1 or packed.shape[1] != packed_words(columns, bits):
        wanted = f"int32 of [out, {packed_words(max(columns, 1), bits)}] for {columns} columns of {bits} bits"
        raise ValueError(f"packed must be {wanted}, got {packed.dtype} of shape {list(packed.shape)}")
    raw = packed.detach().cpu().contiguous().view(torch.uint8)
    eights = -(-columns // 8)
    spare = eights * bits - raw.shape[1]
    raw = torch.nn.functional.pad(raw, (0, spare)) if spare > 0 else raw[:, : eights * bits].contiguous()
    out = torch.empty(len(raw), eights * 8, dtype=torch.int8)
    _kernels(bits)[1](raw.numpy().reshape(-1), out.numpy().reshape(-1).view(np.uint64))
    return out if out.shape[1] == columns else out[:, :columns].contiguous()


def _eights(codes: Tensor, columns: int, fill: int) -> Tensor:
    """Contiguous, with rows of a multiple of 8."""
    return torch.nn.functional.pad(codes, (0, -columns % 8), value=fill).contiguous() if columns % 8 else codes.contiguous()


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in WIDTHS:
        raise ValueError(f"bits must be {WIDTHS.start} to {WIDTHS.stop - 1}, got {bits}")


def _outside(bits: int) -> str:
    return f"codes of {bits} bits must lie in [{-(2 ** (bits - 1))}, {2 ** (bits - 1) - 1}]"


def _lanes(width: int, step: int) -> np.uint64:
    """A word with the lowest `width` bits set of every `step`."""
    return np.uint64(sum(((1 << width) - 1) << place for place in range(0, 64, step)))


@cache
def _kernels(bits: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Machine code for one width, so that shifts and masks are constants: (codes, bytes) -> whether all fit, and (bytes, codes)."""
    codes_mask, top = _lanes(bits, 8), _lanes(1, 8) << np.uint64(bits - 1)
    signs, high = _lanes(8, 8) ^ codes_mask, _lanes(1, 8) << np.uint64(7)
    one, eight = np.uint64(1), np.uint64(8)
    # Neighbours become one run: the upper of two lanes moves down by what its lane has too much.
    down1, down2, down3 = (np.uint64(count * (8 - bits)) for count in (1, 2, 4))
    low1, low2, low3 = _lanes(bits, 16), _lanes(2 * bits, 32), _lanes(4 * bits, 64)
    up1, up2, up3 = (low << np.uint64(count * bits) for low, count in ((low1, 1), (low2, 2), (low3, 4)))

    def move_in(codes: np.ndarray, out: np.ndarray) -> bool:
        bad = np.uint64(0)
        for block in range(codes.size):
            x = codes[block]
            # Of a code that fits, all bits from the highest kept one on are the same.
            bad |= (x ^ (x << one)) & signs
            x = (x & codes_mask) ^ top
            x = (x & low1) | ((x >> down1) & up1)
            x = (x & low2) | ((x >> down2) & up2)
            x = (x & low3) | ((x >> down3) & up3)
            for place in range(bits):
                out[block * bits + place] = np.uint8(x >> (np.uint64(place) * eight))
        return bad == np.uint64(0)

    def move_out(packed: np.ndarray, out: np.ndarray) -> None:
        for block in range(out.size):
            x = np.uint64(0)
            for place in range(bits):
                x |= np.uint64(packed[block * bits + place]) << (np.uint64(place) * eight)
            x = (x & low3) | ((x & up3) << down3)
            x = (x & low2) | ((x & up2) << down2)
            x = (x & low1) | ((x & up1) << down1)
            # With the highest bit set, nothing is borrowed from the next byte.
            out[block] = x ^ high if bits == 8 else ((x | high) - top) ^ high

    return _compiled(move_in), _compiled(move_out)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    from numba import njit

    options: dict[str, Any] = {"nogil": True, "boundscheck": False}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder where numba could keep the code
        return njit(**options)(function)
