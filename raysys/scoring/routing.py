"""Which teacher scores which row, and which rank takes it. Plain Python: driver and worker agree by running the same lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from raysys.errors import DataError

DEFAULT = "default"


def route(domains: Sequence[str], prompt_ids: Sequence[str], teachers: Mapping[str, str]) -> list[str]:
    """The teacher folder of each row, by its domain tag.

    `default` serves rows without a tag and no others: a misspelt tag must not quietly go to some other teacher.

    Raises:
        DataError: a tag has no teacher; names row, prompt and tag.
    """
    folders: list[str] = []
    for row, (domain, prompt) in enumerate(zip(domains, prompt_ids, strict=True)):
        folder = teachers.get(domain or DEFAULT)
        if folder is None:
            what = f"unknown domain tag '{domain}'" if domain else "no domain tag, and there is no default teacher"
            raise DataError(
                f"row {row} (prompt {prompt}): {what}", f"teachers has {', '.join(sorted(teachers))}; add a teacher or correct the data"
            )
        folders.append(folder)
    return folders


def shard(tokens: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Row indices of each rank, ascending, with token counts as even as the longest-first rule makes them; deterministic."""
    loads, rows = [0] * ranks, [[] for _ in range(ranks)]
    for row in np.argsort(-tokens, kind="stable").tolist():
        rank = loads.index(min(loads))
        loads[rank] += int(tokens[row])
        rows[rank].append(row)
    return [np.sort(np.asarray(own, dtype=np.int64)) for own in rows]
