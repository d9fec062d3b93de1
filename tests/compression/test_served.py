"""E7: stock vLLM's CUDA kernels serve 2 to 8 bits. On a CPU, where it has 4 only, a run's own check is `tests/e2e/test_quantize.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from raysys.compression.export import Export
from raysys.compression.packed import write_plain
from raysys.compression.shards import Checkpoint
from tests.compression.models import logits_of, qwen3, qwen3_moe, rounded

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROMPTS = [list(range(3 + start, 33 + start)) for start in (0, 17, 40)]
SCRIPT = textwrap.dedent("""
    import json, sys
    from vllm import LLM, SamplingParams

    if __name__ == "__main__":
        engine = LLM(sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=64, max_num_seqs=4, seed=0)
        prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
        found = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0), use_tqdm=False)
        rows = [[next(v.logprob for k, v in one.items() if k == i) for i, one in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:])]
                for out in found]
        print(json.dumps(rows))
""")


def served(folder: Path) -> list[list[float]]:
    """Log-probs of each prompt's tokens behind the first."""
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    call = [sys.executable, "-c", SCRIPT, folder, json.dumps(PROMPTS)]
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(tmp_path: Path, bits: list[int], family: Callable[..., Path] = qwen3) -> None:
    source = Checkpoint.open(family(tmp_path / "source", layers=len(bits), width=256))
    export = Export(tmp_path / "out", source, bits, 128, "bfloat16")
    for i, width in enumerate(bits):
        export.write(i, rounded(source, i, width, 128))
    found = served(export.finish())
    model = AutoModelForCausalLM.from_pretrained(write_plain(tmp_path / "out", tmp_path / "plain"), dtype=torch.bfloat16).eval()
    for ids, row in zip(PROMPTS, found, strict=True):
        expected = logits_of(model, torch.tensor([ids]))[0, :-1].float().log_softmax(-1)
        chosen = expected.gather(1, torch.tensor(ids[1:]).unsqueeze(1))[:, 0]
        # Logits of these models lie within +-10, so bfloat16 alone rounds them by up to 0.03.
        torch.testing.assert_close(torch.tensor(row), chosen, atol=0.15, rtol=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("bits", [[4, 4], [2, 4], [3, 3]])
def test_e7_vllm_serves_all_widths_on_a_gpu(tmp_path: Path, bits: list[int]) -> None:
    """E10 too: scales of both signs."""
    check(tmp_path, bits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("bits", [[4, 4], [2, 4]])
def test_e7_vllm_serves_packed_experts_on_a_gpu(tmp_path: Path, bits: list[int]) -> None:
    """Its CPU kernel for packed experts needs AMX."""
    check(tmp_path, bits, qwen3_moe)
