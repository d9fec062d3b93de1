"""Hidden states between layers, as files that are mapped into memory: a model's activations need not fit into it.

Legend: N windows, L positions of a window, D width.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from raysys.errors import CheckpointError
from raysys.files import writing

_STORED = {torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: np.int16, torch.float16: np.float16}
"""How a dtype lies in a .npy file; numpy has no bfloat16."""


class States:
    """Hidden states [N, L, D] of all windows in one file. Slices of windows are read and written as tensors."""

    def __init__(self, values: np.memmap, dtype: torch.dtype):
        self._values, self._dtype = values, dtype

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, rows: slice) -> Tensor:
        """[n, L, D], a copy."""
        return torch.from_numpy(np.array(self._values[rows])).view(self._dtype)

    def __setitem__(self, rows: slice, states: Tensor) -> None:
        values = states.detach().to(self._dtype).cpu().contiguous()
        self._values[rows] = values.view(torch.int16).numpy() if self._dtype == torch.bfloat16 else values.numpy()


class Stream:
    """One stream's states in front of each layer. A file appears when all of it is written, so a kill leaves none that is half true.

    Args:
        folder: of the files; made if it is not there.
        name: of the stream.
        shape: N, L, D.
        dtype: as they are kept.
    """

    def __init__(self, folder: Path, name: str, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32):
        if dtype not in _STORED:
            raise ValueError(f"dtype must be one of {', '.join(map(str, _STORED))}, got {dtype}")
        self._folder, self._name, self._shape, self._dtype = folder, name, shape, dtype
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, place: int | str) -> Path:
        """The file of the states in front of layer `place`, or of another place between them."""
        return self._folder / (f"{self._name}-{place:05d}.npy" if isinstance(place, int) else f"{self._name}-{place}.npy")

    def have(self, place: int | str) -> bool:
        return self.path(place).is_file()

    def read(self, place: int | str) -> States:
        """Raises CheckpointError: there is no such file, or it is of other windows."""
        path = self.path(place)
        try:
            values = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"hidden states {path} cannot be read: {error}", "choose another name= to begin anew") from None
        if values.shape != self._shape or values.dtype != _STORED[self._dtype]:
            raise CheckpointError(
                f"hidden states {path} are {list(values.shape)} {values.dtype}, this run's {list(self._shape)}",
                "choose another name= to begin anew",
            )
        return States(values, self._dtype)

    @contextmanager
    def write(self, place: int | str) -> Iterator[States]:
        """States to fill in; the file takes its name behind the block. Raises CheckpointError where it cannot be written."""
        path = self.path(place)
        draft = path.with_name(f".{path.name}.draft")
        with writing(path):
            values = np.lib.format.open_memmap(draft, mode="w+", dtype=_STORED[self._dtype], shape=self._shape)
        try:
            yield States(values, self._dtype)
            with writing(path):
                values.flush()
                os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)

    def drop(self, before: int) -> None:
        """Removes the files of all places but those from layer `before` on."""
        kept = {self.path(place).name for place in range(before, before + 2)}
        for path in self._folder.glob(f"*{self._name}-*.npy*"):
            if path.name not in kept:
                path.unlink(missing_ok=True)
