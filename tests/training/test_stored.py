"""Models in folders as the source of a weight push."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysys.config.runs import NewModel
from raysys.errors import ConfigError
from raysys.models.scratch import new_causal
from raysys.training.stored import StoredWorker

SMALL = NewModel(hidden_size=32, layers=1, heads=2, kv_heads=1, head_dim=16, ffn_size=48, context=64)


@pytest.mark.parametrize("tied", [False, True])
def test_it_gives_the_folder_s_tensors_and_log_probs(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    worker = StoredWorker("float32")
    for seed in (0, 1):
        folder = new_causal(SMALL.model_copy(update={"tied": tied}), tmp_path / f"{seed}", seed)
        worker.read(str(folder))
        plan = worker.bucket_plan(20_000)
        stock = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        want = stock.state_dict()
        assert set(plan.manifest()) == set(want) and ("lm_head.weight" in want) and len(plan.layouts()) > 1
        for index, layout in enumerate(plan.layouts()):
            bucket: Any = worker.gather_bucket(index)
            assert worker.tensor_digests(index) == layout.digests(bucket.data)
            for name, tensor in zip(layout.names, layout.tensors(torch.from_numpy(bucket.data)), strict=True):
                assert torch.equal(tensor, want[name])
        ids = list(range(5, 25))
        with torch.no_grad():
            logprobs = stock(torch.tensor([ids])).logits[0].log_softmax(-1)
        mine = worker.probe_logprobs(ids)
        np.testing.assert_allclose(mine, logprobs[torch.arange(19), torch.tensor(ids[1:])].numpy(), atol=1e-5)
    placed = worker.gather_bucket(0, in_place=True)
    assert Path(placed.path).exists()  # type: ignore[attr-defined]
    worker.withdraw()
    assert not Path(placed.path).exists()  # type: ignore[attr-defined]


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot load a causal language model"):
        StoredWorker("float32").read(str(tmp_path))
