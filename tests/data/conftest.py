from __future__ import annotations

from pathlib import Path

import pytest

from raysys.config.runs import NewModel
from raysys.models.scratch import new_causal


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny model with the 98-character tokenizer."""
    folder: Path = tmp_path_factory.mktemp("tiny")
    new_causal(NewModel(hidden_size=32, layers=1, heads=1, kv_heads=1, ffn_size=32, context=64), folder, 0)
    return str(folder)


@pytest.fixture(scope="session")
def chatty(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the same tokenizer with a chat template."""
    from raysys.data.text import load_tokenizer

    folder: Path = tmp_path_factory.mktemp("chatty")
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% if enable_thinking %}think{% endif %}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a byte-level tokenizer with 300 ids, of which 1 ends documents."""
    from raysys.data.local_text import train_tokenizer

    folder = tmp_path_factory.mktemp("bytewise")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "the quick brown fox {number} jumps over the lazy dog"}}\n' for number in range(50)))
    return str(train_tokenizer([rows], 300, folder / "tokenizer"))
