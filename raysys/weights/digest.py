"""Fingerprints of weights: one digest a tensor, one for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import blake3


def digest(data: Any) -> str:
    """Hex digest (BLAKE3) of a buffer's bytes."""
    threads = blake3.blake3.AUTO if len(data) > 1 << 20 else 1  # starting them costs more than to hash a small one
    return blake3.blake3(data, max_threads=threads).hexdigest()


def fingerprint(digests: Mapping[str, str]) -> str:
    """One digest of all tensors by name, whatever the order they came in."""
    return digest("\n".join(f"{name} {digests[name]}" for name in sorted(digests)).encode())[:16]
