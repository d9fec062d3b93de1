"""What is wrong with data, tokenizers and models is said before anything starts, without Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from raysys.checks import check_sft
from raysys.config.parts import Data
from raysys.config.runs import SftConfig
from raysys.data.preflight import check_vocabularies, preflight, shared_ids
from raysys.data.text import load_tokenizer
from raysys.errors import ConfigError, DataError
from raysys.scoring.verifiers import check as check_verifier
from tests.data.test_files import rows, write
from tests.data.test_procedural import data


def check(source: Data | str, tiny: str | None, prompt: int = 16, response: int = 14, **more):
    given = source if isinstance(source, Data) else Data(path=source)
    return preflight(given, tiny, max_prompt_tokens=prompt, max_response_tokens=response, **more)


def test_good_data_passes(tmp_path: Path, tiny: str) -> None:
    report = check(write(tmp_path, [*rows(300), "{"]), tiny, domains={"add"}, supervised=True, check_verifier=check_verifier)
    assert (report.seen, report.bad) == (301, 1) and "rows.jsonl:301: invalid JSON" in report.lines()[1]
    assert check(data(), tiny, domains={"add", "rev"}, check_verifier=check_verifier).seen == 128
    assert check(data(), None).seen == 128


def test_missing_and_empty(tmp_path: Path, tiny: str) -> None:
    with pytest.raises(ConfigError, match=r"gone\.jsonl does not exist"):
        check(str(tmp_path / "gone.jsonl"), tiny)
    with pytest.raises(ConfigError, match="is empty"):
        check(write(tmp_path, [], "empty.jsonl"), tiny)
    with pytest.raises(ConfigError, match="no usable row, only blank lines"):
        check(write(tmp_path, ["", " "], "blank.jsonl"), tiny)
    with pytest.raises(DataError, match=r"2 of 2 rows are unusable.*bad\.jsonl:1: invalid JSON"):
        check(write(tmp_path, ["{", "]"], "bad.jsonl"), tiny)


@pytest.mark.parametrize("new", [False, True])
def test_what_evaluates_fine_tuning_is_looked_at_too(tmp_path: Path, tiny: str, new: bool) -> None:
    good = write(tmp_path, rows(3))
    values = {"data": {"path": good}, "max_prompt_tokens": 16, "max_response_tokens": 14} | ({} if new else {"student": tiny})
    check_sft(SftConfig.parse(values | {"evaluation": {"data": {"path": good}}}))
    with pytest.raises(ConfigError, match=r"gone\.jsonl does not exist"):
        check_sft(SftConfig.parse(values | {"evaluation": {"data": {"path": str(tmp_path / "gone.jsonl")}}}))


def test_tags(tmp_path: Path, tiny: str) -> None:
    tagged, untagged = write(tmp_path, rows(3)), write(tmp_path, [{"prompt": "a"}], "untagged.jsonl")
    check(tagged, tiny, domains={"add"})
    check(untagged, tiny, domains={"default"})
    check(untagged, tiny)
    for domains in ({"math"}, {"default"}):
        with pytest.raises(DataError, match=rf"rows\.jsonl:1: unknown domain tag 'add' \(teachers has {next(iter(domains))}"):
            check(tagged, tiny, domains=domains)
    with pytest.raises(DataError, match=r"untagged\.jsonl:1: no domain tag, and there is no default teacher"):
        check(untagged, tiny, domains={"math"})
    with pytest.raises(ConfigError, match=r"data\.source\.domains\.rev: unknown domain tag 'rev'.*teachers has add"):
        check(data(), tiny, domains={"add"})
    check(data(rev=0), tiny, domains={"add"})


def test_lengths(tmp_path: Path, tiny: str) -> None:
    with pytest.raises(DataError, match=r"long\.jsonl:1: prompt too long: 99 tokens, max_prompt_tokens is 16"):
        check(write(tmp_path, [{"prompt": "x" * 99}], "long.jsonl"), tiny)
    with pytest.raises(DataError, match=r"answer too long: 100 tokens with its end, max_response_tokens is 14"):
        check(write(tmp_path, [{"prompt": "x", "answer": "y" * 99}], "answer.jsonl"), tiny, supervised=True)
    with pytest.raises(DataError, match="no `answer` to learn"):
        check(write(tmp_path, [{"prompt": "x"}], "none.jsonl"), tiny, supervised=True)
    with pytest.raises(DataError, match="domain add, row 0: prompt too long: 6 tokens"):
        check(data(), tiny, prompt=4)
    with pytest.raises(ConfigError, match="max_prompt_tokens=60 and max_response_tokens=60 together exceed the 64 tokens"):
        check(write(tmp_path, rows(3)), tiny, 60, 60)


def test_ids_verifiers_and_characters(tmp_path: Path, tiny: str) -> None:
    with pytest.raises(DataError, match=r"twice\.jsonl:2: id 'a' is used before, at twice\.jsonl:1"):
        check(write(tmp_path, [{"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}], "twice.jsonl"), tiny)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: unknown verifier 'judge'"):
        check(write(tmp_path, [{"prompt": "x", "verifier": "judge"}]), tiny, check_verifier=check_verifier)
    with pytest.raises(DataError, match="characters without a token"):
        check(write(tmp_path, [{"prompt": "2 × 3\n="}], "signs.jsonl"), tiny)
    with pytest.raises(DataError, match="no chat template"):
        check(write(tmp_path, [{"prompt": [{"role": "user", "content": "a"}]}], "chat.jsonl"), tiny)


def test_neither_ray_nor_torch_is_needed(tmp_path: Path, tiny: str) -> None:
    path = write(tmp_path, rows(3))
    code = (
        "import sys; from raysys.data.preflight import *; from raysys.config.parts import Data;"
        "preflight(Data(path=sys.argv[1]), sys.argv[2], max_prompt_tokens=16, max_response_tokens=14);"
        "check_vocabularies({'a': sys.argv[2]});"
        "print('torch' in sys.modules, 'ray.data' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, path, tiny], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


def copy(folder: str, to: Path) -> Path:
    to.mkdir()
    for file in Path(folder).iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_vocabularies_are_compared_by_id(tmp_path: Path, tiny: str) -> None:
    check_vocabularies({"student": tiny, "teachers.add": tiny, "reference": str(copy(tiny, tmp_path / "same"))})
    other = copy(tiny, tmp_path / "other")
    spec = json.loads((other / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(spec))
    message = r"student and teachers\.add have different vocabularies: id 68 is 'a' in student and 'b' in teachers\.add"
    with pytest.raises(ConfigError, match=message):
        check_vocabularies({"student": tiny, "teachers.add": str(other)})
    longer = copy(tiny, tmp_path / "longer")
    tokenizer = load_tokenizer(str(longer))
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(longer)
    with pytest.raises(ConfigError, match="id 98 is no token in student and '<extra>' in reference"):
        check_vocabularies({"student": tiny, "reference": str(longer)})
    with pytest.raises(ConfigError, match=r"id 98 is no token .*vocabulary=shared_prefix allows"):
        check_vocabularies({"student": tiny, "reference": str(longer)}, shared_prefix=False)
    check_vocabularies({"student": str(longer), "reference": tiny}, shared_prefix=True)
    with pytest.raises(ConfigError, match="id 68 is 'a' in student"):
        check_vocabularies({"student": tiny, "teachers.add": str(other)}, shared_prefix=True)
    assert shared_ids([str(longer), tiny]) == 98 and shared_ids([str(longer)]) == 99


def test_rows_with_ids_that_not_all_models_have_are_unusable(tmp_path: Path, tiny: str) -> None:
    spec = write(tmp_path, [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+1=", "answer": "~"}])
    report = check(Data(path=spec, max_bad_share=0.5), tiny, supervised=True, shared=97)
    assert (report.seen, report.bad) == (2, 1) and "token not shared: id 97, all models have the first 97" in report.lines()[1]
    assert check(Data(path=spec, max_bad_share=0.5), tiny, supervised=True).bad == 0


def test_models_that_are_not_there(tmp_path: Path, tiny: str) -> None:
    with pytest.raises(ConfigError, match=r"student: model folder .*nowhere does not exist"):
        check_vocabularies({"student": str(tmp_path / "nowhere")})
    with pytest.raises(ConfigError, match=r"model folder runs/a/b/export does not exist"):
        check_vocabularies({"student": "runs/a/b/export"})
    bare = copy(tiny, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"teachers\.x: model folder .*bare holds no tokenizer\.json"):
        check_vocabularies({"student": tiny, "teachers.x": str(bare)})
    (bare / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        check_vocabularies({"teachers.x": str(bare)})
    broken = copy(tiny, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="does not load"):
        check_vocabularies({"student": str(broken)})
