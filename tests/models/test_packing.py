"""Packed rows against each row alone through stock transformers: no row sees another, whatever lies beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from raysys.models.causal import load_causal, response_logprobs
from raysys.models.packing import NAME, Packing, _Blocks, _flash

SMALL: dict[str, Any] = {
    "vocab_size": 98,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-sliding": ("qwen3", {"head_dim": 16, "use_sliding_window": True, **SLIDING}),
    "qwen3-moe": ("qwen3_moe", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
    "qwen2": ("qwen2", {}),
    "llama": ("llama", {"tie_word_embeddings": True}),
    "mistral-sliding": ("mistral", {"head_dim": 8, "sliding_window": 5}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "attn_pdrop": 0.0}),
    "deepseek": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "first_k_dense_replace": 2,
        },
    ),
}
PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "recurrent": ("mamba", {"num_hidden_layers": 2, "state_size": 4}),
    "linear attention": (
        "qwen3_next",
        {
            "head_dim": 16,
            "num_experts": 0,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "convolution": ("lfm2", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
    "no positions": ("bloom", {"n_layer": 2, "n_head": 2}),
    "dropout": ("llama", {"attention_dropout": 0.5}),
}
PROMPTS, RESPONSES = torch.tensor([3, 1, 4, 2, 9]), torch.tensor([5, 7, 0, 1, 20])
LENGTHS = (PROMPTS + RESPONSES).tolist()


def save(tmp_path, kind: str, changes: dict[str, Any]) -> str:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**({} if "n_layer" in changes else SMALL), "vocab_size": 98, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # fresh models attend to all alike, so that little would show
            parameter.mul_(3.0) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    return str(tmp_path)


def rows() -> list[torch.Tensor]:
    return list(torch.randint(3, 98, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3)).split(LENGTHS))


def alone(model: Any, ids: list[torch.Tensor]) -> torch.Tensor:
    """Each row by itself through the model's own logits."""
    found = []
    for row, prompt, response in zip(ids, PROMPTS.tolist(), RESPONSES.tolist(), strict=True):
        table = torch.log_softmax(model(row[None], use_cache=False).logits[0, prompt - 1 : prompt + response - 1], -1)
        found.append(table.gather(1, row[prompt:, None])[:, 0])
    return torch.cat(found)


SINGLE_ONLY = {"qwen3-moe", "recurrent", "linear attention", "no positions"}
"""Models that compute a part in float32 whatever their dtype."""


# Log-probs lie near -5, so 1e-5 is twenty roundings of float32: where float64 cannot be asked for, some processors take more.
CASES = [(name, "float32", 5e-5 if name in SINGLE_ONLY else 1e-5) for name in [*PACKED, *PADDED]]
CASES += [(name, "float64", 1e-10) for name in [*PACKED, *PADDED] if name not in SINGLE_ONLY]


@pytest.mark.parametrize(("name", "dtype", "tolerance"), CASES)
def test_log_probs_and_gradients_equal_each_row_alone(tmp_path, name, dtype, tolerance):
    folder = save(tmp_path, *(PACKED | PADDED)[name])
    model, plain = load_causal(folder, dtype, trainable=True).eval(), AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    assert model.packs == (name in PACKED)
    assert (model.config._attn_implementation == NAME) == model.packs
    got, want = response_logprobs(model, torch.cat(rows()), PROMPTS, RESPONSES), alone(plain, rows())
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)
    weights = torch.randn(len(want), dtype=want.dtype, generator=torch.Generator().manual_seed(5))
    (got * weights).mean().backward()
    (want * weights).mean().backward()
    theirs = dict(plain.named_parameters())
    assert sum(float(parameter.grad.abs().sum()) for parameter in theirs.values() if parameter.grad is not None) > 0.1
    for key, parameter in model.named_parameters():
        wanted = theirs[key].grad
        if wanted is None or parameter.grad is None:
            assert wanted is None and parameter.grad is None, key
        else:
            torch.testing.assert_close(parameter.grad, wanted, rtol=tolerance, atol=tolerance, msg=key)


@pytest.mark.parametrize("name", ["qwen3", "mistral-sliding"])
def test_rows_of_one_length_equal_each_row_alone(tmp_path, name):
    folder = save(tmp_path, *PACKED[name])
    model, plain = load_causal(folder, "float64"), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = torch.randint(3, 98, (4, 11), generator=torch.Generator().manual_seed(2))
    got = response_logprobs(model, ids.flatten(), torch.full((4,), 3), torch.full((4,), 8))
    table = torch.log_softmax(plain(ids).logits[:, 2:-1], -1)
    torch.testing.assert_close(got, table.gather(2, ids[:, 3:, None]).flatten(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama", "mistral-sliding"])
def test_a_row_does_not_depend_on_its_neighbours_or_their_order(tmp_path, name):
    model = load_causal(save(tmp_path, *PACKED[name]), torch.float64)
    order = [4, 2, 0, 3, 1]
    ids = rows()

    def scored(wanted: list[torch.Tensor], at: list[int]) -> list[torch.Tensor]:
        flat = response_logprobs(model, torch.cat([wanted[row] for row in at]), PROMPTS[at], RESPONSES[at])
        pieces = flat.split(RESPONSES[at].tolist())
        return [pieces[at.index(row)] for row in range(len(at))]

    straight, turned = scored(ids, list(range(5))), scored(ids, order)
    others = scored([ids[0], *(row.flip(0) for row in ids[1:])], list(range(5)))
    for one, other in zip(straight, turned, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    torch.testing.assert_close(others[0], straight[0], rtol=0, atol=1e-12)
    assert not torch.allclose(others[1], straight[1])


def test_the_ordinary_forward_is_the_stock_one(tmp_path):
    folder = save(tmp_path, *PACKED["qwen3-sliding"])
    model, plain = load_causal(folder, "float32"), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(3, 98, (2, 9), generator=torch.Generator().manual_seed(1))
    left = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    for asked in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": left}, {"input_ids": ids[:1], "position_ids": positions}):
        assert torch.equal(model(**asked, use_cache=False).logits, plain(**asked, use_cache=False).logits)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), plain.generate(ids, max_new_tokens=4, do_sample=False))


def test_keyword_arguments_that_get_lost_are_noticed(tmp_path):
    model = load_causal(save(tmp_path, *PACKED["llama"]), "float32")
    bounds = Packing([3, 2], "cpu").bounds
    with pytest.raises(RuntimeError, match="does not hand its keyword arguments on"):
        model.base_model(input_ids=torch.zeros(1, 5, dtype=torch.long), attention_mask=bounds)


@pytest.mark.parametrize("seed", range(4))
def test_blocks_hold_every_token_once_and_little_padding(seed):
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.exp(rng.normal(3, 1.2, rng.integers(1, 80))).astype(np.int64), 1, 500)
    packing = Packing(lengths, "cpu")
    assert sorted(torch.cat([block.tokens for block in packing.blocks]).tolist()) == list(range(lengths.sum()))
    assert packing.positions[0].tolist() == [step for length in lengths for step in range(length)]
    assert packing.bounds.flatten().tolist() == [0, *np.cumsum(lengths)]
    values = torch.arange(float(lengths.sum()))[:, None, None]
    back = torch.empty_like(values)
    for block in packing.blocks:
        taken = block.take(values)
        assert taken.shape == (block.rows, 1, block.longest, 1)
        block.give(taken, back)
        assert block.rows * block.longest <= len(block.tokens) / 0.8 + 10 * block.rows
    assert torch.equal(back, values)
    assert len(packing.blocks) < 30


def heads(lengths: list[int], device: str = "cpu", dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(sum(lengths), count, 16, generator=generator, dtype=torch.float64) for count in (4, 2, 2)]
    return [states.to(device, dtype).requires_grad_() for states in made]


@pytest.mark.parametrize("window", [None, 4])
def test_gradients_of_blocks_equal_finite_differences(window):
    packing = Packing([3, 1, 7, 6], "cpu")
    given = heads([3, 1, 7, 6])
    assert torch.autograd.gradcheck(lambda *states: _Blocks.apply(*states, packing, 0.3, window), given, atol=1e-6, fast_mode=True)


def test_what_one_row_holds_reaches_no_other_not_even_as_nan():
    packing = Packing([9, 40, 11, 10], "cpu")
    states = heads([9, 40, 11, 10])
    for one in states:
        one.data[49:60] = torch.nan
    out = _Blocks.apply(*states, packing, None, None)
    out[:49].sum().backward()
    assert out[:49].isfinite().all() and out[49:60].isnan().all() and out[60:].isfinite().all()
    assert all(one.grad[:49].isfinite().all() and one.grad[60:].isfinite().all() for one in states)


def kept(model: Any, lengths: list[int], packs: bool) -> int:
    """Bytes that a forward pass keeps for backward."""
    stores: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        stores[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.packs = packs
    prompts = torch.ones(len(lengths), dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = response_logprobs(model, torch.full((sum(lengths),), 7), prompts, torch.tensor(lengths) - 1).sum()
    loss.backward()
    return sum(stores.values())


@pytest.mark.parametrize("lengths", [[64] * 8, [64, 61, 58, 50, 45, 40, 38, 30, 22, 20, 20, 20, 15, 14, 10, 5], [300, 200, 8, 4]])
def test_packed_rows_keep_no_more_than_as_many_padded_tokens(tmp_path, lengths):
    model = load_causal(save(tmp_path, *PACKED["qwen3"]), "float32", trainable=True)
    assert sum(lengths) == 512
    # The angles of T positions are kept once for all layers, not those of L: what they take shows at a width of 32.
    assert kept(model, lengths, True) <= 1.02 * kept(model, [64] * 8, False)
    assert kept(model, lengths, True) <= 1.06 * kept(model, lengths, False) * 512 / (len(lengths) * max(lengths))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 70])
def test_flash_attention_on_a_gpu_equals_blocks(window):
    lengths = [300, 1, 64, 129, 7]
    packing, near = Packing(lengths, "cuda"), Packing(lengths, "cpu")
    states, exact = heads(lengths, "cuda", torch.bfloat16), heads(lengths)
    got, want = _flash(*states, packing, None, window), _Blocks.apply(*exact, near, None, window)
    torch.testing.assert_close(got.double().cpu(), want, rtol=0, atol=0.03)
    weights = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (got * weights.to("cuda", torch.bfloat16)).sum().backward()
    (want * weights).sum().backward()
    for one, other in zip(states, exact, strict=True):
        torch.testing.assert_close(one.grad.double().cpu(), other.grad, rtol=0.03, atol=0.1)


@pytest.mark.gpu
def test_a_model_on_a_gpu_in_bfloat16_takes_flash_attention(tmp_path, monkeypatch):
    from raysys.models import packing

    calls = []
    monkeypatch.setattr(packing, "_flash", lambda *given: calls.append(1) or _flash(*given))
    folder = save(tmp_path, *PACKED["llama"])
    model = load_causal(folder, "bfloat16", "cuda")
    got = response_logprobs(model, torch.cat(rows()).cuda(), PROMPTS, RESPONSES)
    assert len(calls) == 2
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(got.cpu(), alone(plain, rows()), rtol=0, atol=0.3)
