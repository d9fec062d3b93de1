"""One line a step on a terminal, one line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

_SHOWN = (
    *(("reward", "reward", ".3f"), ("reverse_kl", "kl", ".3f"), ("nll", "nll", ".3f"), ("response_tokens", "len", ".1f")),
    *(("pretraining_loss", "loss", ".3f"), ("validation_loss", "held-out", ".3f"), ("max_violation", "MaxVio", ".2f")),
    *(("layer_bits", "bits", "d"), ("weight_error", "weights off", ".4f"), ("error_after", "states off", ".4f")),
    *(("kept", "kept", "d"), ("correct", "correct", ".3f"), ("tokens_per_second", "tokens/s", ",.0f")),
)
_PHASES = (("generate", "gen"), ("score", "score"), ("train", "train"), ("push", "push"))


def line(record: Mapping[str, Any], steps: int, eta: float | None = None) -> str:
    """A step's record as one line; `eta` in seconds."""
    parts = [f"step {record['step'] + 1}/{steps}"]
    if "balance_loss" in record:  # elsewhere the loss says less than the rest
        record = {**record, "pretraining_loss": record.get("loss")}
    parts += [f"{name} {record[key]:{form}}" for key, name, form in _SHOWN if isinstance(record.get(key), (int, float))]
    seconds = record.get("seconds") or {}
    phases = " ".join(f"{name} {seconds[key]:.2f}" for key, name in _PHASES if seconds.get(key, 0) >= 0.005)
    if "total" in seconds:
        parts.append(f"{seconds['total']:.2f} s" + (f" ({phases})" if phases else ""))
    if eta is not None:
        parts.append(f"eta {duration(eta)}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """`45s`, `1m20s`, `2h05m`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Progress:
    """Shows records as they come: on a terminal in one line, in a log at most every `pause` seconds and the last step always."""

    def __init__(self, steps: int, stream: TextIO | None = None, pause: float = 5.0):
        self._steps, self._stream, self._pause = steps, stream or sys.stdout, pause
        self._began, self._first, self._shown = time.monotonic(), -1, float("-inf")

    def show(self, record: Mapping[str, Any]) -> None:
        step, now = record["step"], time.monotonic()
        if self._first < 0:
            self._first, self._began = step, now
        done, left = step - self._first, self._steps - step - 1
        text = line(record, self._steps, (now - self._began) / done * left if done and left else None)
        last = left <= 0
        if self._stream.isatty():
            self._stream.write("\r\x1b[K" + text + ("\n" if last else ""))
        elif last or done == 0 or now - self._shown >= self._pause:
            self._stream.write(text + "\n")
            self._shown = now
        self._stream.flush()
