"""A mixture of experts with an MPI router: vLLM computes what our decoder does, and a push reaches packed experts and the router."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from raysys.config.runs import NewModel
from raysys.errors import WeightSyncError
from raysys.models.moe import MoeDecoder, MoeShape
from raysys.models.moe_files import export_moe, hub_tensors
from raysys.models.packing import Packing
from raysys.models.routing import Routing
from raysys.models.scratch import new_causal
from tests.weights.trainer import MovingModel, Place, stale

pytestmark = [pytest.mark.slow]
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


class MovingMixture(MovingModel):
    """Gives the stock model's tensors, and log-probs of the decoder's own."""

    def __init__(self, model: MoeDecoder):
        self.model = model  # type: ignore[assignment]
        self.layouts, self.asked, self.lie = [], 0, None

    def state(self) -> dict[str, torch.Tensor]:
        return dict(hub_tensors(self.model))  # type: ignore[arg-type]

    def probe_logprobs(self, ids: Sequence[int]) -> np.ndarray:
        tokens = torch.tensor(list(ids))
        with torch.no_grad():
            states, _ = self.model(tokens, Packing([len(tokens)], "cpu"))
            logprobs = torch.nn.functional.linear(states[:-1], self.model.head.weight).double().log_softmax(-1)
        return logprobs.gather(-1, tokens[1:, None])[:, 0].numpy()


def made(folder: Path) -> MovingMixture:
    from transformers import AutoTokenizer

    dense = new_causal(NewModel(hidden_size=32, layers=1, heads=1, kv_heads=1, ffn_size=32, context=64), folder / "dense", 0)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    sizes = {"width": 64, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 32, "experts": 8, "top_k": 2, "expert_width": 32}
    shape = MoeShape(vocabulary=len(tokenizer), context=64, deviation=0.1, routing=Routing(scale=2.0), **sizes)
    model = MoeDecoder(shape).initialise(0)
    export_moe(model, folder, tokenizer)
    return MovingMixture(model)


def test_vllm_computes_what_the_decoder_does_before_and_after_pushes(place: Place) -> None:
    pusher = place.pusher()
    for version in (1, 2):
        assert pusher.push(version).parity_gap < 1e-5, "the same log-probs, to float32's rounding"
        place.trainer.move(version)


def test_an_expert_left_behind_is_found_by_the_probe(place: Place) -> None:
    place.pusher().push(3)
    old = place.trainer.state()[EXPERT].clone()
    place.trainer.move(4)
    place.trainer.lie = stale(EXPERT, old + 0.5)
    with pytest.raises(WeightSyncError, match="nats on the probe of push 4"):
        place.pusher().push(4)
    place.trainer.lie = None
    assert place.pusher().push(5).parity_gap < 1e-4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpu_keeps_the_kernel_of_its_experts_which_cuda_graphs_hold_on_to(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.model_loader import reload

    from raysys.weights.engine_backend import SharedMemoryEngine

    monkeypatch.setattr(reload, "initialize_layerwise_reload", lambda _: None)
    model: Any = torch.nn.Module()
    model.quant_method = SimpleNamespace(moe_kernel=object())
    engine = SharedMemoryEngine.__new__(SharedMemoryEngine)
    engine.model, engine.device = model, torch.device(device)
    engine.start_weight_update()
    assert (model.quant_method.moe_kernel is None) == (device == "cpu")
