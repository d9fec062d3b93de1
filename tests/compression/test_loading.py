"""E6 as a job does it: an export in stock transformers, against what its codes stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from raysys.compression.export import Export
from raysys.compression.loading import largest_difference, unreadable
from raysys.compression.packed import write_plain
from raysys.compression.shards import Checkpoint
from raysys.errors import CheckpointError
from tests.compression.models import GROUP, qwen3, qwen3_moe, rounded

pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")


def exported(tmp_path: Path, source: Path, bits: list[int]) -> Path:
    export = Export(tmp_path / "export", Checkpoint.open(source), bits, GROUP)
    for i, width in enumerate(bits):
        export.write(i, rounded(export.source, i, width))
    return export.finish()


def test_an_export_is_what_its_codes_stand_for(tmp_path: Path) -> None:
    export = exported(tmp_path, qwen3(tmp_path / "model"), [2, 4, 8])
    plain = write_plain(export, tmp_path / "plain")
    assert unreadable(export) is None and largest_difference(export, plain) < 1e-6

    path = export / "layer-00001.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight_packed"] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"computes something else with .*export: logits differ by"):
        largest_difference(export, plain)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="transformers does not load"):
        largest_difference(export, plain)


def test_what_the_installed_packages_cannot_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = exported(tmp_path / "moe", qwen3_moe(tmp_path / "mixture"), [2, 4])
    assert unreadable(mixture) == "transformers takes experts of one width only"
    export = exported(tmp_path, qwen3(tmp_path / "model"), [3, 3, 2])
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")

    def padded(codes: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.zeros(1, -(-32 // (32 // bits)))

    monkeypatch.setattr(helpers, "pack_to_int32", padded)
    assert unreadable(export) == "this compressed-tensors unpacks 3 bits in another layout than vLLM and 0.18"
    monkeypatch.setattr("importlib.import_module", _missing)
    assert unreadable(export) == "compressed-tensors is not installed, or keeps its packing elsewhere"


def _missing(name: str) -> None:
    raise ImportError(name)
