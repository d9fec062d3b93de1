"""Pieces of shared memory: written again in place, found by another process, gone when nobody needs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from raysys import memory
from raysys.errors import InfrastructureError


def test_a_slot_is_the_same_memory_until_it_is_too_small() -> None:
    slots = memory.Slots(2)
    try:
        first, room = slots.room(0, 1000)
        room[:] = 7
        assert Path(first).read_bytes()[:1000] == bytes([7] * 1000) and Path(first).stat().st_mode & 0o777 == 0o600
        other, _ = slots.room(1, 10)
        again, smaller = slots.room(2, 500)
        assert again == first != other and len(smaller) == 500 and smaller[0] == 7
        larger, _ = slots.room(0, 2000)
        assert larger != first and not Path(first).exists() and room[0] == 7, "who has it mapped still sees it"
    finally:
        slots.close()
    assert not Path(larger).exists() and not Path(other).exists()


def test_a_full_memory_is_one_line_and_leaves_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(memory.FOLDER.glob(memory.PREFIX + "*"))
    with pytest.raises(InfrastructureError, match=r"no room for \d+ MiB in /dev/shm: No space left.*lower weights.bucket_mib"):
        memory.Slots(1).room(0, 1 << 50)
    assert set(memory.FOLDER.glob(memory.PREFIX + "*")) == before


def test_another_process_knows_the_memory_and_sweeps_only_what_is_left_behind() -> None:
    code = "from raysys import memory; import numpy as np; print(memory.whose()); print(memory.Slots(1).room(0, 9)[0], flush=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    whose, orphan = done.stdout.split()
    assert whose == memory.whose() != "" and Path(orphan).exists()
    kept = memory.FOLDER / f"{memory.PREFIX}{os.getppid()}-kept"
    kept.write_bytes(np.zeros(3, np.uint8).tobytes())
    try:
        memory.sweep()
        assert not Path(orphan).exists() and kept.exists()
    finally:
        kept.unlink()


def test_what_another_user_left_behind_is_left_to_that_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    left = tmp_path / f"{memory.PREFIX}0-theirs"  # no process has this id
    left.touch()
    monkeypatch.setattr(memory, "FOLDER", tmp_path)
    monkeypatch.setattr(Path, "unlink", refuse)
    memory.sweep()
    assert left.exists()
