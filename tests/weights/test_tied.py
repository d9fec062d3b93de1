"""Tied embeddings: the engine keeps a packed copy of its own for the head, which a push must reach as well."""

from __future__ import annotations

import pytest

from raysys.errors import WeightSyncError
from tests.weights.trainer import Place

TIED = True

pytestmark = [pytest.mark.slow]


def test_a_push_reaches_both_ends_of_tied_embeddings(place: Place):
    pusher = place.pusher()
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(pusher._plan.manifest())
    for version in (1, 2):
        place.trainer.move(version)
        assert pusher.push(version).parity_gap < 1e-4


def test_a_head_left_behind_is_found_by_the_probe(place: Place, monkeypatch: pytest.MonkeyPatch):
    """What happens when only the embedding is sent: the stock reload says nothing, the probe does."""
    place.trainer.move(3)
    state = place.trainer.state()
    del state["lm_head.weight"]
    with monkeypatch.context() as patch, pytest.raises(WeightSyncError, match=r"nats on the probe of push 3, allowed: 0.001"):
        patch.setattr(place.trainer, "state", lambda: state)
        place.pusher().push(3)
    assert place.pusher().push(4).parity_gap < 1e-4
