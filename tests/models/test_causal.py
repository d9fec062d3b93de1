"""Response log-probs of a loaded model against logits, log_softmax and gather on the unpadded rows."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from raysys.config.runs import NewModel
from raysys.errors import ConfigError
from raysys.models.causal import LogProbHead, load_causal, response_logprobs
from raysys.models.scratch import new_causal

PROMPTS, RESPONSES = torch.tensor([3, 1, 4, 2]), torch.tensor([5, 7, 0, 1])
LENGTHS = PROMPTS + RESPONSES


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    spec = NewModel(hidden_size=32, layers=2, heads=2, kv_heads=1, ffn_size=48, context=64, tied=request.param)
    return new_causal(spec, tmp_path_factory.mktemp("model"), seed=0)


def batch() -> torch.Tensor:
    return torch.randint(3, 98, (int(LENGTHS.sum()),), generator=torch.Generator().manual_seed(3))


def row_by_row(model, ids, temperature, query=None):
    """Each row alone, unpadded, through the model's own logits."""
    rows, entropies, at = [], [], 0
    for row, prompt, response in zip(ids.split(LENGTHS.tolist()), PROMPTS.tolist(), RESPONSES.tolist(), strict=True):
        logits = model(row[None]).logits[0, prompt - 1 : prompt + response - 1]
        table = torch.log_softmax(logits / temperature, -1)
        asked = row[prompt : prompt + response, None] if query is None else query[at : at + response]
        at += response
        rows.append(table.gather(1, asked))
        entropies.append(-(table.exp() * table).sum(-1))
    return torch.cat(rows), torch.cat(entropies)


@pytest.mark.parametrize("packs", [True, False])
def test_equals_each_row_alone(folder, packs):
    model = load_causal(folder, "float64")
    assert model.packs
    model.packs = packs
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    want, want_entropy = row_by_row(plain, batch(), 0.7)
    got, entropy = response_logprobs(model, batch(), PROMPTS, RESPONSES, 0.7, chunk_tokens=4, entropy=True)
    torch.testing.assert_close(got, want[:, 0], rtol=0, atol=1e-10)
    torch.testing.assert_close(entropy, want_entropy, rtol=0, atol=1e-10)


def test_rows_without_a_response_alone(folder):
    model = load_causal(folder, "float32", trainable=True)
    got = response_logprobs(model, torch.tensor([5, 6, 7]), torch.tensor([2, 1]), torch.tensor([0, 0]))
    assert got.shape == (0,)
    got.sum().backward()


def test_query_ids_replace_the_response_ids_as_targets_only(folder):
    model = load_causal(folder, torch.float64)
    query = torch.randint(0, 98, (13, 2), generator=torch.Generator().manual_seed(4))
    got = response_logprobs(model, batch(), PROMPTS, RESPONSES, 1.0, query_ids=query)
    torch.testing.assert_close(got, row_by_row(model, batch(), 1.0, query)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_plain_transformers(folder, checkpointing):
    model = load_causal(folder, torch.float64, trainable=True, activation_checkpointing=checkpointing)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    weights = torch.randn(13, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    (response_logprobs(model, batch(), PROMPTS, RESPONSES, 0.8, chunk_tokens=5) * weights).sum().backward()
    (row_by_row(plain, batch(), 0.8)[0][:, 0] * weights).sum().backward()
    mine, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, parameter in theirs.items():
        torch.testing.assert_close(mine[name].grad, parameter.grad, rtol=0, atol=1e-10, msg=name)


def test_frozen_unless_trainable(folder):
    frozen = load_causal(folder, "float32")
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    assert not response_logprobs(frozen, batch(), PROMPTS, RESPONSES).requires_grad
    trained = load_causal(folder, "float32", trainable=True)
    assert trained.training and all(p.requires_grad for p in trained.parameters())


def test_saved_again_it_is_the_same_folder(folder, tmp_path):
    model = load_causal(folder, "float32", trainable=True)
    assert type(model.lm_head) is LogProbHead
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_lengths_that_do_not_fit(folder):
    model = load_causal(folder, "float32")
    with pytest.raises(ValueError, match="prompt_lengths must be at least 1"):
        response_logprobs(model, batch(), PROMPTS - 1, RESPONSES)
    with pytest.raises(ValueError, match="their sum T=23"):
        response_logprobs(model, batch(), PROMPTS, RESPONSES + 2)
    with pytest.raises(ValueError, match=r"must be \[B\] with B >= 1, got \[4\] and \[2\]"):
        response_logprobs(model, batch(), PROMPTS, RESPONSES[:2])
    with pytest.raises(ValueError, match=r"input_ids must be \[T\]"):
        response_logprobs(model, batch()[None], PROMPTS, RESPONSES)
    with pytest.raises(ValueError, match="query_ids must have 13 rows"):
        response_logprobs(model, batch(), PROMPTS, RESPONSES, query_ids=torch.zeros(2, 1, dtype=torch.long))


def test_what_cannot_be_loaded_says_so(folder, tmp_path):
    with pytest.raises(ConfigError, match="cannot load a causal language model from"):
        load_causal(tmp_path / "nothing", "float32")
    capped = tmp_path / "capped"
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.final_logit_softcapping = 30.0
    model.save_pretrained(capped)
    with pytest.raises(ConfigError, match=r"final_logit_softcapping=30\.0"):
        load_causal(capped, "float32")


def test_probabilities_over_the_ids_that_are_shared(folder):
    """As if the others had no logit: the softmax is cut, and nothing is learned of what lies beyond."""
    model = load_causal(folder, "float64", trainable=True, vocabulary=60)
    ids = batch() % 60
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    want = []
    for row, prompt, response in zip(ids.split(LENGTHS.tolist()), PROMPTS.tolist(), RESPONSES.tolist(), strict=True):
        table = torch.log_softmax(plain(row[None]).logits[0, prompt - 1 : prompt + response - 1, :60], -1)
        want.append(table.gather(1, row[prompt : prompt + response, None])[:, 0])
    got = response_logprobs(model, ids, PROMPTS, RESPONSES)
    torch.testing.assert_close(got, torch.cat(want))
    got.sum().backward()
    torch.cat(want).sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    assert not model.get_output_embeddings().weight.grad[60:].any()
    drawn, _ = response_logprobs(
        model, ids, PROMPTS, RESPONSES, uniform=torch.full((int(RESPONSES.sum()),), 1 - 1e-12, dtype=torch.float64)
    )
    assert drawn.max() < 60
    with pytest.raises(ValueError, match=r"ids must lie in \[0, 60\)"):
        response_logprobs(model, torch.full_like(ids, 60), PROMPTS, RESPONSES)
