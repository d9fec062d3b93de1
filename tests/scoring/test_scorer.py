"""The scorer worker as a plain class, on small float64 models, against transformers row by row. Property 15 of the method is here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raysys.batch import Batch, Ragged
from raysys.config.runs import NewModel
from raysys.errors import DataError
from raysys.models.scratch import new_causal
from raysys.scoring.scorer import ScorerSpec, ScorerWorker

TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    spec = NewModel(hidden_size=32, layers=2, heads=2, kv_heads=1, ffn_size=48, context=64)
    return {name: str(new_causal(spec, tmp_path_factory.mktemp(name), seed)) for seed, name in enumerate(("math", "code", "base"))}


def worker(folders: dict[str, str], reference: str | None = None, **changes) -> ScorerWorker:
    teachers = {name: folders[name] for name in ("math", "code")}
    spec = ScorerSpec(teachers, reference, folders["base"], TEMPERATURE, "cpu", "float64", 40, 8, 1)
    made = ScorerWorker(replace(spec, **changes))
    made.start()
    return made


def batch(rows: int = 7, seed: int = 0, **columns) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch.from_columns(
        prompt_id=[f"p{row}" for row in range(rows)],
        sample=[0] * rows,
        domain=[("math", "code")[row % 2] for row in range(rows)],
        prompt_ids=Ragged.of([rng.integers(3, 98, rng.integers(1, 9)) for _ in range(rows)], np.int32),
        response_ids=Ragged.of([rng.integers(3, 98, (row * 3) % 8) for row in range(rows)], np.int32),
        **columns,
    )


def alone(folder: str, prompt: np.ndarray, response: np.ndarray, asked: np.ndarray | None = None) -> np.ndarray:
    """One row through stock transformers, float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = torch.as_tensor(np.concatenate([prompt, response]), dtype=torch.long)[None]
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : len(prompt) + len(response) - 1] / TEMPERATURE
    target = torch.tensor(response[:, None] if asked is None else asked, dtype=torch.long)
    return torch.log_softmax(logits, -1).gather(1, target).numpy().ravel()


def assert_rows(column: Ragged, want: list[np.ndarray], atol: float = 2e-6) -> None:
    assert len(column) == len(want)
    for got, row in zip(column.rows(), want, strict=True):
        np.testing.assert_allclose(got, row, rtol=0, atol=atol)


def test_each_row_is_scored_by_its_own_teacher_and_all_by_the_reference(folders):
    rows = batch()
    scored = worker(folders, folders["base"]).score(rows)
    prompts, responses = rows.ragged("prompt_ids"), rows.ragged("response_ids")
    tags = rows.strings("domain")
    assert_rows(scored.ragged("teacher_logprobs"), [alone(folders[tags[i]], prompts[i], responses[i]) for i in range(len(rows))])
    assert_rows(scored.ragged("reference_logprobs"), [alone(folders["base"], prompts[i], responses[i]) for i in range(len(rows))])
    assert scored.columns == ["teacher_logprobs", "reference_logprobs"]


def test_permuting_rows_permutes_the_answer(folders):
    rows, made = batch(), worker(folders, folders["base"])
    order = np.random.default_rng(1).permutation(len(rows))
    straight, permuted = made.score(rows), made.score(rows.take(order))
    for name in ("teacher_logprobs", "reference_logprobs"):
        assert_rows(permuted.ragged(name), [straight.ragged(name)[row] for row in order], atol=1e-6)


@pytest.mark.parametrize("packs", [True, False])
def test_micro_batches_packing_and_padding_do_not_matter(folders, packs):
    rows = batch()
    whole = worker(folders, micro_batch_tokens=10_000, chunk_tokens=1024).score(rows).ragged("teacher_logprobs").rows()
    for tokens in (1, 13, 10_000):
        made = worker(folders, micro_batch_tokens=tokens, chunk_tokens=1)
        for model in made._models.values():
            assert model.packs
            model.packs = packs
        assert_rows(made.score(rows).ragged("teacher_logprobs"), whole, atol=1e-6)


def test_a_row_does_not_see_the_other_teacher(folders):
    rows = batch()
    scored = worker(folders).score(rows)
    other = worker({**folders, "code": folders["base"]}).score(rows)
    for i, tag in enumerate(rows.strings("domain")):
        same = np.array_equal(scored.ragged("teacher_logprobs")[i], other.ragged("teacher_logprobs")[i])
        assert same == (tag == "math" or not len(rows.ragged("response_ids")[i]))


def test_unknown_tag_names_row_and_tag(folders):
    rows = batch().with_columns(domain=["math", "code", "poetry", "math", "math", "math", "math"])
    with pytest.raises(DataError, match=r"row 2 \(prompt p2\): unknown domain tag 'poetry'.*teachers has code, math"):
        worker(folders).score(rows)


def test_default_serves_untagged_rows_only(folders):
    rows = batch().with_columns(domain=["", "code", "", "math", "math", "math", "math"])
    with pytest.raises(DataError, match=r"row 0 .*no domain tag"):
        worker(folders).score(rows)
    made = worker(folders, teachers={"default": folders["base"], "code": folders["code"], "math": folders["math"]})
    prompts, responses = rows.ragged("prompt_ids"), rows.ragged("response_ids")
    np.testing.assert_allclose(made.score(rows).ragged("teacher_logprobs")[2], alone(folders["base"], prompts[2], responses[2]), atol=2e-6)
    with pytest.raises(DataError, match="unknown domain tag 'poetry'"):
        made.score(rows.with_columns(domain=["poetry"] * 7))


def test_a_reference_that_is_also_a_teacher_is_loaded_and_run_once(folders, monkeypatch):
    made = worker(folders, folders["math"])
    assert set(made._models) == {folders["math"], folders["code"]}
    passes: dict[str, int] = {}
    forward = made._forward

    def counted(folder, prompts, *rest):
        passes[folder] = passes.get(folder, 0) + len(prompts)
        return forward(folder, prompts, *rest)

    monkeypatch.setattr(made, "_forward", counted)
    rows = batch()
    scored = made.score(rows)
    assert passes == {folders["math"]: len(rows), folders["code"]: rows.strings("domain").count("code")}
    separate = worker(folders, folders["base"]).score(rows)
    assert_rows(scored.ragged("teacher_logprobs"), separate.ragged("teacher_logprobs").rows(), atol=1e-6)


def test_the_models_are_frozen(folders):
    for model in worker(folders, folders["base"])._models.values():
        assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_15_the_same_prompt_again_changes_nothing(folders):
    rows = batch()
    same = rows.with_columns(teacher_prompt_ids=rows.ragged("prompt_ids"))
    made = worker(folders, folders["base"])
    plain, prompted = made.score(rows), made.score(same)
    for name in ("teacher_logprobs", "reference_logprobs"):
        assert_rows(prompted.ragged(name), plain.ragged(name).rows(), atol=1e-6)


@pytest.mark.parametrize("reference", ["base", "math"])
def test_15_context_changes_what_the_teacher_reads_and_nothing_else(folders, reference):
    rows = batch()
    context = np.array([5, 6, 7], np.int32)
    longer = [
        np.concatenate([context, prompt]) if row != 5 else np.zeros(0, np.int32)
        for row, prompt in enumerate(rows.ragged("prompt_ids").rows())
    ]
    made = worker(folders, folders[reference])
    plain, prompted = made.score(rows), made.score(rows.with_columns(teacher_prompt_ids=Ragged.of(longer, np.int32)))
    tags, prompts, responses = rows.strings("domain"), rows.ragged("prompt_ids"), rows.ragged("response_ids")
    want = [alone(folders[tags[i]], longer[i] if len(longer[i]) else prompts[i], responses[i]) for i in range(len(rows))]
    assert_rows(prompted.ragged("teacher_logprobs"), want)
    assert_rows(prompted.ragged("reference_logprobs"), plain.ragged("reference_logprobs").rows(), atol=1e-6)
    assert np.array_equal(prompted.lengths("teacher_logprobs"), rows.lengths("response_ids"))


def test_two_asked_for_ids_a_position(folders):
    rows = batch()
    rng = np.random.default_rng(2)
    asked = [rng.integers(0, 98, (n, 2)) for n in rows.lengths("response_ids")]
    scored = worker(folders, folders["base"]).score(rows, Ragged.of([ids.ravel() for ids in asked], np.int32))
    prompts, responses, tags = rows.ragged("prompt_ids"), rows.ragged("response_ids"), rows.strings("domain")
    assert_rows(scored.ragged("teacher_logprobs"), [alone(folders[tags[i]], prompts[i], responses[i], asked[i]) for i in range(len(rows))])
    with pytest.raises(DataError, match="queries must hold the same number"):
        worker(folders).score(rows, Ragged.of([ids.ravel()[:-1] for ids in asked], np.int32))


def test_rows_that_do_not_fit_the_models(folders):
    rows = batch()
    with pytest.raises(DataError, match="token id 98 is outside the 98 ids"):
        worker(folders).score(rows.with_columns(response_ids=[[98]] * 7))
    with pytest.raises(DataError, match="a prompt has no tokens"):
        worker(folders).score(rows.with_columns(prompt_ids=[[]] * 7))


def test_rewards_come_from_each_rows_verifier(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders["base"])
    texts = ["42", "41", "71>17", "x"]
    rows = batch(4).with_columns(
        response_ids=[[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts],
        verifier=["exact", "exact", "scratchpad:chain_sum", ""],
        answer=["42", "42", "17", ""],
        metadata=[""] * 4,
    )
    reward = worker(folders).score(rows).numbers("reward")
    assert reward.dtype == np.float32
    assert reward.tolist() == [1, 0, 1, 0]
    assert "reward" not in worker(folders).score(batch(4)).columns
