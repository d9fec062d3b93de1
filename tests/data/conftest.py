from __future__ import annotations

from pathlib import Path

import pytest

from raysys.config.runs import NewModel
from raysys.models.scratch import new_causal


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny model with the 98-character tokenizer."""
    folder: Path = tmp_path_factory.mktemp("tiny")
    new_causal(NewModel(hidden_size=32, layers=1, heads=1, kv_heads=1, ffn_size=32, context=64), folder, 0)
    return str(folder)
