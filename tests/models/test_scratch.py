"""Models made from scratch: what stock transformers sees in the folder."""

from __future__ import annotations

import json
import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from raysys.config.runs import NewModel
from raysys.errors import ConfigError
from raysys.models.scratch import CHARACTERS, new_causal

SMALL = NewModel(hidden_size=32, layers=1, heads=1, kv_heads=1, ffn_size=48, context=64)


def test_text_survives_the_tokenizer_exactly(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(new_causal(SMALL, tmp_path, seed=0))
    rng = random.Random(0)
    texts = ["".join(CHARACTERS), "  two  spaces , and . dots !  ", "don't 's n't", "a", " ", ""]
    texts += ["".join(rng.choices(CHARACTERS, k=rng.randrange(1, 80))) for _ in range(50)]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert len(tokenizer) == tokenizer.vocab_size == 98
    assert tokenizer("ab")["input_ids"] == [3 + ord("a") - 32, 3 + ord("b") - 32]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.chat_template is None


def test_texts_with_a_token_of_their_own_come_first_and_survive(tmp_path):
    texts = ["\n", "\n\n", "<think>", "</think>", "Doc 1"]
    spec = SMALL.model_copy(update={"tokens": texts})
    tokenizer = AutoTokenizer.from_pretrained(new_causal(spec, tmp_path, seed=0))
    assert tokenizer("a\n\nDoc 1<think>\nb</think>", add_special_tokens=False)["input_ids"] == [68, 99, 102, 100, 98, 69, 101]
    text = "x <think>Doc 12</think>\n\n\nDoc"
    for special in (False, True):  # an environment's words are encoded so that control tokens in them stay letters
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=special)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text and 100 in ids
    assert len(tokenizer) == 103 and tokenizer("<eos>", split_special_tokens=True)["input_ids"] != [2]
    assert AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight.shape == (103, 32)


def test_words_have_a_token_where_they_stand_alone(tmp_path):
    (tmp_path / "words.json").write_text('["Al", "Algeria", "El-Oued"]')
    spec = SMALL.model_copy(update={"words": str(tmp_path / "words.json"), "tokens": ["<think>"]})
    tokenizer = AutoTokenizer.from_pretrained(new_causal(spec, tmp_path / "model", seed=0))
    text = "Al Alba Algeria<think>El-Oued."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [number for number in ids if number >= 98] == [99, 100, 98, 101] and tokenizer.decode(ids) == text
    assert len(tokenizer) == AutoModelForCausalLM.from_pretrained(tmp_path / "model").lm_head.weight.shape[0] == 102
    for content, part in (("[1]", "holds no list of texts"), ("[", "JSONDecodeError")):
        (tmp_path / "words.json").write_text(content)
        with pytest.raises(ConfigError, match=f"new_model.words=.*{part}"):
            new_causal(spec, tmp_path / "other", seed=0)


@pytest.mark.parametrize("tied", [False, True])
def test_the_folder_loads_in_stock_transformers(tmp_path, tied):
    folder = new_causal(SMALL.model_copy(update={"tied": tied}), tmp_path / "model", seed=1)
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert ("lm_head.weight" in weights) != tied
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.lm_head.weight.shape == (98, 32)
    assert model.config.head_dim == 32
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (2, 0)
    assert not {"temperature", "top_p", "top_k"} & set(generation)


def test_seed_decides_the_bytes_and_the_global_state_stays(tmp_path):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    folders = [new_causal(SMALL, tmp_path / name, seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))]
    assert torch.equal(before, torch.random.get_rng_state())
    first, again, other = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert first == again != other


def test_half_the_default_size_is_as_described(tmp_path):
    folder = new_causal(NewModel(), tmp_path, seed=0)
    parameters = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert 0.24e6 < parameters < 0.28e6
