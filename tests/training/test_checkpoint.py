"""Going on after a save, under the same layout and under another; and the exported folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from raysys.errors import CheckpointError
from raysys.training import checkpoint as checkpoints
from raysys.training import export as exports
from tests.training import work
from tests.training.work import gopd_batch, spec, train

BATCHES = [gopd_batch(seed=seed) for seed in range(4)]


def assert_close(mine, theirs, tolerance):
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_allclose(mine[name], tensor, rtol=0, atol=tolerance, err_msg=name)


def saved_at_two(ranks, folder: Path, of) -> dict[str, np.ndarray]:
    """Saves after two steps of four; returns the weights after all four."""
    ranks(train, of=of, batches=BATCHES[:2], save=str(folder))
    return ranks(train, of=of, batches=BATCHES)[0][1]


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (1, "bfloat16"), (3, "bfloat16")]
)
def test_going_on_is_exact(pair, models, tmp_path, stage, dtype):
    of = spec(models["tied"], zero_stage=stage, dtype=dtype, schedule="cosine", mini_batches=2)
    want = saved_at_two(pair, tmp_path / "point", of)
    results = pair(train, of=of, batches=BATCHES[2:], load=str(tmp_path / "point"))
    assert_close(results[0][1], want, 0)
    assert [tally.common["learning_rate"] for tally in results[0][0]] == pytest.approx(
        [1e-3 * (1 + np.cos(np.pi * s / 10)) / 2 for s in (2, 3)]
    )


@pytest.mark.parametrize(("stage", "others"), [(0, [("pair", 3)]), (1, [("solo", 0), ("pair", 3)]), (3, [("solo", 2), ("pair", 1)])])
def test_going_on_under_another_layout(request, pair, models, tmp_path, stage, others):
    folder = tmp_path / "point"
    want = saved_at_two(pair, folder, spec(models["tied"], zero_stage=stage))
    for ranks, other in others:
        results = request.getfixturevalue(ranks)(train, of=spec(models["tied"], zero_stage=other), batches=BATCHES[2:], load=str(folder))
        assert_close(results[0][1], want, 1e-6)
    assert not list(folder.glob(".relaid*"))


def draw(rank, ranks, port, *, of, save="", load=""):
    made = work.worker(of, rank, ranks, port)
    if load:
        torch.rand(rank + 5)
        made.load(load)
    else:
        torch.rand(rank + 1)
        made.save(save)
    return torch.rand(3).tolist()


def test_each_rank_gets_its_own_random_state_back(pair, models, tmp_path):
    of = spec(models["tied"], zero_stage=1)
    drawn = pair(draw, of=of, save=str(tmp_path / "point"))
    assert drawn[0] != drawn[1]
    assert pair(draw, of=of, load=str(tmp_path / "point")) == drawn


def test_what_is_not_complete_is_refused(solo, models, tmp_path):
    of, point = spec(models["tied"], zero_stage=1), tmp_path / "point"
    solo(train, of=of, batches=[], save=str(point))
    (shard,) = (point / "state").glob("*optim_states.pt")
    shard.write_bytes(shard.read_bytes()[:100])
    for other in (of, spec(models["tied"], zero_stage=2)):
        with pytest.raises(CheckpointError):
            solo(train, of=other, batches=[], load=str(point))
    (point / "layout.json").unlink()
    with pytest.raises(CheckpointError, match="no complete trainer checkpoint"):
        solo(train, of=of, batches=[], load=str(point))


def test_another_model_is_refused(solo, models, tmp_path):
    solo(train, of=spec(models["tied"], zero_stage=1), batches=BATCHES[:1], save=str(tmp_path / "point"))
    with pytest.raises(CheckpointError):
        solo(train, of=spec(models["untied"], zero_stage=1), batches=[], load=str(tmp_path / "point"))
    with pytest.raises(CheckpointError):
        solo(train, of=spec(models["untied"], zero_stage=0), batches=[], load=str(tmp_path / "point"))


@pytest.mark.parametrize("name", ["untied", "tied"])
@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (3, "float32"), (2, "bfloat16"), (3, "bfloat16")])
def test_the_export_is_a_stock_model(pair, models, tmp_path, name, stage, dtype):
    folder = tmp_path / "export"
    results = pair(train, of=spec(models[name], zero_stage=stage, dtype=dtype), batches=BATCHES[:1], export=str(folder))
    weights = results[0][1]
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and model.dtype == torch.float32
    # What bfloat16 engines compute with is their masters rounded; the export has the masters, the source being float32.
    rounded = {key: tensor.to(getattr(torch, dtype)).float().numpy() for key, tensor in model.state_dict().items()}
    assert_close(rounded, weights, 0)
    if dtype == "bfloat16":
        assert any((tensor.bfloat16() != tensor).any() for tensor in model.state_dict().values())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name == "tied")
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) == (name == "untied")
    source = Path(models[name])
    for path in source.iterdir():
        assert path.suffix == ".safetensors" or (folder / path.name).read_bytes() == path.read_bytes()
    assert AutoTokenizer.from_pretrained(folder).encode("ab+1") == AutoTokenizer.from_pretrained(source).encode("ab+1")
    assert not list(tmp_path.glob(".draft*"))


def export_in_shards(rank, ranks, port, *, of, folder):
    exports.SHARD_BYTES = 20_000
    try:
        work.worker(of, rank, ranks, port).export(folder)
    finally:
        exports.SHARD_BYTES = 2**31


def test_a_large_export_is_cut_into_files(pair, models, tmp_path):
    folder = tmp_path / "export"
    pair(export_in_shards, of=spec(models["untied"], zero_stage=3), folder=str(folder))
    files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(files.values())) > 3
    mine, source = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, models["untied"]))
    assert_close(mine, {name: tensor.numpy() for name, tensor in source.items()}, 0)


def test_a_full_disk_is_told_from_a_lost_peer(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with pytest.raises(CheckpointError, match=r"could not be written \(\d+ MiB are free there\)"), checkpoints.full_disks(tmp_path):
        torch.save(torch.zeros(10**6), "/dev/full")
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")  # save_file would replace /dev/full
    with (
        pytest.raises(CheckpointError, match=r"export could not be written \(\d+ MiB"),
        checkpoints.full_disks(tmp_path / "gone" / "export"),
    ):
        raise full
    with pytest.raises(SafetensorError, match="header"), checkpoints.full_disks(tmp_path):
        (tmp_path / "torn.safetensors").write_bytes(b"torn")
        load_file(tmp_path / "torn.safetensors")
    with pytest.raises(RuntimeError, match="Connection closed"), checkpoints.full_disks(tmp_path):
        raise RuntimeError("[gloo] Connection closed by peer")
