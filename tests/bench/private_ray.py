"""A token-protected Ray of this process alone. Nothing here imports Ray before its token is in place: it reads that once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raysys import head as heads


@contextmanager
def private_ray(cpus: int = 8) -> Iterator[None]:
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(heads.token_file(Path(home))), "RAY_USAGE_STATS_ENABLED": "0"}
        os.environ.pop("RAY_ADDRESS", None)
        import ray

        ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()
            os.environ.clear()
            os.environ.update(before)  # for what a bench starts afterwards: the token is gone
