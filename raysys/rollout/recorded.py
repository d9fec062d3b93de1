"""Samples on disk: written as a run takes them, taken by another run instead of generating. One Arrow file a step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from raysys.batch import Batch
from raysys.errors import ConfigError, DataError
from raysys.files import writing


class Takes(Protocol):
    """The loop's source, of which a recording is made."""

    def take(self, batch: int, max_age: int) -> Batch: ...
    def state(self) -> dict[str, Any]: ...
    def backlog(self) -> Batch | None: ...
    def counts(self) -> dict[str, int]: ...
    def restore(self, state: dict[str, Any], backlog: Batch | None, version: int) -> None: ...
    def status(self) -> dict[str, Any]: ...


def file_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.arrow"


class Recorder:
    """A source that writes down what it gives."""

    def __init__(self, source: Takes, folder: Path):
        self._source, self._folder, self._step = source, folder, 0
        folder.mkdir(parents=True, exist_ok=True)

    def take(self, batch: int, max_age: int) -> Batch:
        samples = self._source.take(batch, max_age)
        path = file_of(self._folder, self._step)
        with writing(path):
            samples.save(path)
        self._step += 1
        return samples

    def state(self) -> dict[str, Any]:
        return self._source.state()

    def backlog(self) -> Batch | None:
        return self._source.backlog()

    def counts(self) -> dict[str, int]:
        return self._source.counts()

    def restore(self, state: dict[str, Any], backlog: Batch | None, version: int) -> None:
        self._step = version
        self._source.restore(state, backlog, version)

    def status(self) -> dict[str, Any]:
        return self._source.status()


class Replay:
    """A source that gives what a `Recorder` wrote, step by step; nothing is generated.

    Raises:
        ConfigError: the folder holds no recording.
    """

    def __init__(self, folder: Path):
        self._folder, self._step = folder, 0
        if not file_of(folder, 0).is_file():
            raise ConfigError(f"rollout.replay={folder} holds no recorded samples", "make them with rollout.record=FOLDER")

    def take(self, batch: int, max_age: int) -> Batch:
        """The step's samples. Raises DataError when the recording ends or has another number of prompts."""
        path = file_of(self._folder, self._step)
        if not path.is_file():
            raise DataError(f"the recording {self._folder} ends before step {self._step}", "lower steps, or record more")
        samples = Batch.load(path)
        prompts = len(set(samples.strings("prompt_id")))
        if prompts != batch:
            raise DataError(f"{path} has {prompts} prompts, the run asks for {batch}", f"set batch={prompts}")
        self._step += 1
        return samples

    def state(self) -> dict[str, Any]:
        return {"step": self._step}

    def backlog(self) -> None:
        return None

    def counts(self) -> dict[str, int]:
        return {}

    def restore(self, state: dict[str, Any], backlog: Batch | None, version: int) -> None:
        self._step = state.get("step", version)


def first_difference(before: Batch, after: Batch, tolerance: float = 0.0) -> str:
    """The first sample and token in which two batches differ, with both values; "" if they do not.

    Args:
        tolerance: largest difference of log-probs that still counts as none.
    """
    for place, (one, other) in enumerate(zip(before.ids, after.ids)):
        if one != other:
            return f"row {place} is sample {one} in the one and {other} in the other"
    if len(before) != len(after):
        return f"{len(before)} samples in the one, {len(after)} in the other"
    for row, name in enumerate(before.ids):
        for column in ("prompt_ids", "response_ids", "rollout_logprobs", "version_spans"):
            if column in before and column in after:
                left, right = before.ragged(column)[row], after.ragged(column)[row]
                same = min(len(left), len(right))
                gap = np.abs(left[:same].astype(np.float64) - right[:same]) > (tolerance if column == "rollout_logprobs" else 0)
                if gap.any():
                    token = int(np.argmax(gap))
                    return f"sample {name}, token {token}: {column} is {left[token]} in the one, {right[token]} in the other"
                if len(left) != len(right):
                    return f"sample {name}, token {same}: {column} ends in one and goes on in the other ({len(left)} and {len(right)})"
    return ""


def differences(before: Path, after: Path, tolerance: float = 0.0) -> Iterator[str]:
    """For each recorded step that differs, where it does first."""
    for path in sorted(before.glob("step_*.arrow")):
        other = after / path.name
        if not other.is_file():
            yield f"{path.stem}: only in {before}"
        elif told := first_difference(Batch.load(path), Batch.load(other), tolerance):
            yield f"{path.stem}: {told}"
