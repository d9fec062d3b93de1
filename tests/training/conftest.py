"""Small models, and ranks that live for the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.training.ranks import Ranks


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of an untied and a tied model."""
    from raysys.config.runs import NewModel
    from raysys.models.scratch import new_causal

    sizes = {"hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "ffn_size": 48, "context": 64}
    root = tmp_path_factory.mktemp("models")
    return {name: str(new_causal(NewModel(**sizes, tied=name == "tied"), root / name, 0)) for name in ("untied", "tied")}


@pytest.fixture(scope="session")
def solo() -> Iterator[Ranks]:
    ranks = Ranks(1)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def pair() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()
