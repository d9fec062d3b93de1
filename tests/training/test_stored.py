"""Models in folders as the source of a weight push."""

from __future__ import annotations

from pathlib import Path

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
        manifest, count = worker.bucket_plan(20_000)
        stock = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        want = stock.state_dict()
        assert set(manifest) == set(want) and ("lm_head.weight" in manifest) and count > 1
        for index in range(count):
            bucket = worker.gather_bucket(index)
            for name, start, shape in zip(bucket.names, bucket.offsets, bucket.shapes, strict=True):
                size = int(np.prod(shape))
                found = np.frombuffer(bucket.data[start : start + 4 * size], np.float32).reshape(shape)
                np.testing.assert_array_equal(found, want[name].numpy())
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
