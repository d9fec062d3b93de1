"""Real text that any machine with this package has, and a tokenizer trained on it: what a first pretraining run learns from.

Sources: code and documentation that are installed with Python, and tasks with their answers.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from raysys import tasks
from raysys.data.cleaning import clean
from raysys.data.procedural import split_of
from raysys.data.rows import BadRow
from raysys.files import writing

TASKS = (
    "basic_arithmetic", "calendar_arithmetic", "chain_sum", "family_relationships", "gcd", "lcm", "leg_counting", "letter_counting",
    "number_sequence", "spell_backward", "time_intervals", "word_sorting",
)  # fmt: skip
"""reasoning-gym tasks that are short and quickly made."""
_CODE = (".py",)
_DOCUMENTS = (".md", ".rst", ".txt", "METADATA")
_FEWEST, _MOST = 200, 1 << 17
"""Bytes of a file: stubs say nothing, and the longest ones are tables."""


def write_local_text(folder: str | Path, *, megabytes: float = 16.0, tasks_megabytes: float = 2.0, seed: int = 0) -> dict[str, int]:
    """Writes `code.jsonl`, `documents.jsonl` and `tasks.jsonl`, rows of `text`. The same again where the same is installed; a file that
    would come out as it is stays untouched.

    Args:
        megabytes: of code at most, and of documents at most.
        tasks_megabytes: of tasks.
        seed: of the tasks. Their questions are of the split `train` only (`raysys.data.procedural`).

    Returns:
        Rows of each file.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    limit = int(megabytes * 2**20)
    return {
        "code.jsonl": _write(folder / "code.jsonl", _files(_CODE, limit)),
        "documents.jsonl": _write(folder / "documents.jsonl", _files(_DOCUMENTS, limit)),
        "tasks.jsonl": _write(folder / "tasks.jsonl", _transcripts(int(tasks_megabytes * 2**20), seed)),
    }


def _files(suffixes: tuple[str, ...], limit: int) -> Iterator[str]:
    """Texts of installed files, each once, up to `limit` bytes. Ordered by a hash of the name: a part of it is of all packages."""
    seen: set[bytes] = set()
    held = 0
    for path in sorted(_installed(suffixes), key=lambda path: hashlib.blake2b(str(path[1]).encode(), digest_size=8).digest()):
        try:
            data = Path(path[0]).read_bytes()
            text = clean(data)
        except (OSError, BadRow):
            continue
        mark = hashlib.blake2b(data, digest_size=8).digest()
        if not _FEWEST <= len(data) <= _MOST or mark in seen:
            continue
        if held + len(data) > limit:
            return
        seen.add(mark)
        held += len(data)
        yield _body(text) if path[1].endswith("METADATA") else text


def _installed(suffixes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(path, name below its root) of files with one of the suffixes."""
    roots = sysconfig.get_paths()
    for root in sorted({os.path.realpath(roots[name]) for name in ("stdlib", "purelib", "platlib")}):
        for folder, inside, names in os.walk(root):
            # The standard library's folder holds other packages', which are a root of their own.
            inside[:] = [name for name in inside if name not in ("__pycache__", "site-packages", "dist-packages")]
            for name in names:
                if name.endswith(suffixes):
                    yield os.path.join(folder, name), os.path.relpath(os.path.join(folder, name), root)


def _body(metadata: str) -> str:
    """A package's own description, without the fields before it."""
    return metadata.partition("\n\n")[2]


def _transcripts(limit: int, seed: int) -> Iterator[str]:
    """Tasks by turns, question and answer, up to `limit` bytes."""
    held = index = 0
    params = tasks.canonical({})
    while True:
        for name in TASKS:
            entry = tasks.entry(name, params, seed, index)
            if split_of(entry["question"]) != "train":
                continue
            text = f"Question: {entry['question']}\nAnswer: {entry['answer']}\n"
            held += len(text.encode())
            if held > limit:
                return
            yield text
        index += 1


def _write(path: Path, texts: Iterator[str]) -> int:
    """Rows. The texts are held in memory: they are few."""
    out, rows = io.BytesIO(), 0
    for text in texts:
        if text.strip():
            out.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
            rows += 1
    data = out.getvalue()
    with writing(path):
        if not path.is_file() or path.read_bytes() != data:  # a new time of change would make the token cache start over
            draft = path.with_name(f".{path.name}.draft")
            draft.write_bytes(data)
            os.replace(draft, path)
    return rows


def train_tokenizer(files: Sequence[str | Path], vocabulary: int, folder: str | Path, column: str = "text", context: int = 1 << 20) -> Path:
    """A byte-level BPE tokenizer, trained on the rows of JSONL files: every text has tokens, and comes back from them exactly.

    Args:
        files: JSONL with the text in `column`.
        vocabulary: ids, the 256 bytes and two special ones (`<pad>`: 0, `<eos>`: 1) among them; fewer if the text has no more pairs.
        folder: made if it is not there.
        context: tokens that the folder says a model can hold.

    Returns:
        The folder, as `raysys.data.text.load_tokenizer` takes it.

    Raises:
        ValueError: `vocabulary` is below 258.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

    if vocabulary < 258:
        raise ValueError(f"vocabulary={vocabulary}, expected at least 258: the bytes and two special tokens")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_texts(files, column), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False, model_max_length=context
    )
    tokenizer.save_pretrained(folder)
    return Path(folder)


def _texts(files: Sequence[str | Path], column: str) -> Iterator[str]:
    for path in files:
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    yield json.loads(line)[column]
