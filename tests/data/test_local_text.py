"""Text that is on the machine, and the tokenizer trained on it."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from raysys.data import local_text
from raysys.data.local_text import train_tokenizer, write_local_text
from raysys.data.procedural import split_of
from raysys.data.text import identity, load_tokenizer


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python installation of a few files."""
    library, packages = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    files = {
        library / "code.py": "x = 1\n" * 100,
        library / "copy.py": "x = 1\n" * 100,
        library / "stub.py": "pass",
        library / "table.py": "1, " * 2**17,
        library / "latin.py": b"# caf\xe9" * 100,
        library / "binary.py": b"\x00\x01" * 200,
        library / "__pycache__" / "cached.py": "no" * 200,
        packages / "one" / "more.py": "y = 2\n" * 100,
        packages / "one" / "README.md": "# One\n" * 100,
        packages / "one.dist-info" / "METADATA": "Name: one\nVersion: 1\n\n" + "What one is. " * 50,
        packages / "one" / "data.csv": "1;2\n" * 100,
    }
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    paths = {"stdlib": str(library), "purelib": str(packages), "platlib": str(packages)}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    return tmp_path


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_is_collected(installed: Path) -> None:
    folder = installed / "text"
    counts = write_local_text(folder, megabytes=1, tasks_megabytes=0.01)
    assert sorted(texts(folder / "code.jsonl")) == ["x = 1\n" * 99 + "x = 1", "y = 2\n" * 99 + "y = 2"], (
        "each once, no stubs, tables or other encodings"
    )
    assert sorted(texts(folder / "documents.jsonl")) == ["# One\n" * 99 + "# One", "What one is. " * 49 + "What one is."]
    asked = texts(folder / "tasks.jsonl")
    assert counts == {"code.jsonl": 2, "documents.jsonl": 2, "tasks.jsonl": len(asked)} and len(asked) > 20
    assert len(set(asked)) > 20 and sum(map(len, asked)) <= 0.01 * 2**20
    for text in asked:
        question, _, answer = text.removeprefix("Question: ").rpartition("\nAnswer: ")
        assert question and answer.endswith("\n") and split_of(question) == "train"
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert write_local_text(folder, megabytes=1, tasks_megabytes=0.01) == counts
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}, "untouched"
    write_local_text(folder, megabytes=650 / 2**20, tasks_megabytes=0.01, seed=1)
    assert len(texts(folder / "code.jsonl")) == 1 and texts(folder / "tasks.jsonl") != asked


def test_every_task_can_be_asked() -> None:
    for name in local_text.TASKS:
        local_text.tasks.check(name, {})


def test_a_tokenizer_of_ones_own(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": f"def function_{number}(argument):\n    return {number}"}) for number in range(200)]
    rows.write_text("\n".join([*lines, ""]))
    folder = train_tokenizer([rows], 280, tmp_path / "one", context=128)
    tokenizer = load_tokenizer(str(folder))
    assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (280, 0, 1, 128)
    for text in ("def function_7(argument):", "Grüße 日本 😀\t\r\n  x", "\x00\x7f"):
        assert tokenizer.decode(tokenizer.backend_tokenizer.encode(text).ids) == text
    ids = tokenizer.backend_tokenizer.encode("def function_1(argument):\n    return 12345").ids
    assert len(ids) < 25 and 0 not in ids and 1 not in ids
    assert len(tokenizer.backend_tokenizer.encode("12345").ids) == 5, "a token a digit"
    again = load_tokenizer(str(train_tokenizer([rows], 280, tmp_path / "two")))
    assert identity(again) == identity(tokenizer)
    assert (tmp_path / "two" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match="vocabulary=257"):
        train_tokenizer([rows], 257, tmp_path / "three")
