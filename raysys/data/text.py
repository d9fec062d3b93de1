"""Text in, tokens out, and back for people. Neither torch nor an engine is imported: the driver encodes too."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raysys.data.rows import BadRow, Prompt, Row
from raysys.errors import ConfigError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Encoded:
    """Token ids of a row. `teacher` and `response` are None where the run has no use for them."""

    prompt: list[int]
    teacher: list[int] | None = None
    response: list[int] | None = None
    runs: list[int] | None = None
    """Of an episode: the generation that each response token is of, -1 for what the environment said."""


@dataclass(frozen=True)
class _Texts:
    """Where among the texts of several rows those of one are."""

    prompt: int
    teacher: int | None
    target: range
    given: list[int] | None
    """The target as ids, in place of texts."""
    generated: tuple[bool, ...] = ()
    """Of an episode: whether each text of the target was."""


class Encoder:
    """Rows to token ids. Pickles with its tokenizer, so other nodes need no folder.

    A tokenizer with a chat template renders text as one user message and messages as they are, with the generation prompt;
    one without encodes text as it stands. No special tokens are added beyond the template's.

    Args:
        folder: Hugging Face folder or id of the tokenizer.
        max_prompt_tokens, max_response_tokens: longer rows are bad rows.
        supervised: also encode the target, with the end token behind it. A target that has token ids of this very tokenizer is
            taken as these ids: text does not always encode to what was sampled.
        shared: rows with ids from here on are bad rows; None: all ids will do.
        enable_thinking: handed to the chat template.
        context_template: text with `{prompt}` and `{context}` that the teacher reads instead; None: no teacher prompt.

    Raises:
        ConfigError: no tokenizer there, or (supervised) one without an end token.
    """

    def __init__(
        self,
        folder: str,
        *,
        max_prompt_tokens: int,
        max_response_tokens: int,
        supervised: bool = False,
        shared: int | None = None,
        enable_thinking: bool = False,
        context_template: str | None = None,
    ):
        self._tokenizer = load_tokenizer(folder)
        self._max_prompt, self._max_response = max_prompt_tokens, max_response_tokens
        self.supervised, self._shared = supervised, shared
        self._thinking, self._template = enable_thinking, context_template
        self._end: int | None = self._tokenizer.eos_token_id
        self._known: dict[str, bool] = {}
        if supervised and self._end is None:
            raise ConfigError(
                f"the tokenizer of {folder} has no end token, so supervised rows cannot end", "set eos_token in its tokenizer_config.json"
            )

    def encode(self, rows: Sequence[Row]) -> list[Encoded | BadRow]:
        """Each row's ids, or why it has none, in order."""
        texts: list[str] = []
        places = [self._place(row, texts) for row in rows]
        ids = [encoding.ids for encoding in self._tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        return [place if isinstance(place, BadRow) else self._fitted(ids, place) for place in places]

    def _place(self, row: Row, texts: list[str]) -> _Texts | BadRow:
        """Appends the row's texts to `texts`."""
        try:
            given = self._given(row)
            own = [self._render(row.prompt)]
            if self._template is not None:
                own.append(self._render(fill(self._template, row.prompt, row.context or "")))
            before = len(own)
            if self.supervised and given is None:
                own += [part.text for part in row.parts] or [self._target(row.target)]
            for text in own:
                self._check_characters(text)
        except BadRow as reason:
            return reason
        first = len(texts)
        texts += own
        generated = tuple(part.generated for part in row.parts) if given is None else ()
        return _Texts(first, first + 1 if before == 2 else None, range(first + before, len(texts)), given, generated)

    def takes(self, row: Row) -> bool:
        """Whether the row has token ids that mean here what they meant where they were sampled."""
        return row.response_ids is not None and row.tokenizer == self.identity

    def _given(self, row: Row) -> list[int] | None:
        if not self.supervised or row.response_ids is None or not self.takes(row):
            return None
        if (largest := max(row.response_ids)) >= len(self._tokenizer):  # models have more ids than tokenizers, to fill up a matrix
            raise BadRow(f"`response_ids` holds {largest}, the tokenizer has {len(self._tokenizer)} tokens")
        return row.response_ids

    @functools.cached_property
    def identity(self) -> str:
        """See `identity`."""
        return identity(self._tokenizer)

    def _fitted(self, ids: list[list[int]], place: _Texts) -> Encoded | BadRow:
        prompt, answer, runs = ids[place.prompt], place.given, None
        if place.generated:
            # One by one, as an environment's words are encoded when a model is sampled from.
            answer = [token for index in place.target for token in ids[index]]
            runs = _runs([len(ids[index]) for index in place.target], place.generated)
        elif place.target and self._end is not None:
            answer = [*ids[place.target[0]], self._end]
        if not prompt:
            return BadRow("`prompt` has no tokens")
        if len(prompt) > self._max_prompt:
            return BadRow(f"prompt too long: {len(prompt)} tokens, max_prompt_tokens is {self._max_prompt}")
        if answer is not None and len(answer) > self._max_response:
            return BadRow(f"answer too long: {len(answer)} tokens with its end, max_response_tokens is {self._max_response}")
        if self._shared is not None and (largest := max(prompt + (answer or []))) >= self._shared:
            return BadRow(f"token not shared: id {largest}, all models have the first {self._shared}")
        return Encoded(prompt, None if place.teacher is None else ids[place.teacher], answer, runs)

    def _render(self, prompt: Prompt) -> str:
        if not self._tokenizer.chat_template:
            if isinstance(prompt, str):
                return prompt
            raise BadRow("`prompt` is chat messages, but the tokenizer has no chat template")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=self._thinking)
        except Exception as error:  # templates raise whatever they like on roles that they do not know
            raise BadRow(f"the chat template refuses the messages: {error}") from None

    def _target(self, text: str) -> str:
        if not text:
            raise BadRow("no `answer` to learn")
        return text

    def _check_characters(self, text: str) -> None:
        """A tokenizer of characters silently drops those that it does not know; such a row would ask something else."""
        for character in set(text) - self._known.keys():
            self._known[character] = self._ids(f"a{character}a") != self._ids("aa")
        if missing := sorted(character for character in set(text) if not self._known[character]):
            raise BadRow(f"characters without a token: {missing[:5]}")

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def _runs(lengths: Sequence[int], generated: Sequence[bool]) -> list[int]:
    runs, turn = [], -1
    for length, made in zip(lengths, generated, strict=True):
        turn += made
        runs += [turn if made else -1] * length
    return runs


class Decoder:
    """Token ids to text for people and verifiers, special tokens left out."""

    def __init__(self, folder: str):
        self._tokenizer = load_tokenizer(folder)

    @functools.cached_property
    def identity(self) -> str:
        """See `identity`."""
        return identity(self._tokenizer)

    def texts(self, rows: Sequence[Any]) -> list[str]:
        """The text of each row of ids."""
        plain = [row.tolist() if isinstance(row, np.ndarray) else list(row) for row in rows]
        return self._tokenizer.batch_decode(plain, skip_special_tokens=True)

    def pieces(self, ids: Sequence[int], ends: Sequence[int]) -> list[str]:
        """The text of a row, special tokens kept, cut behind its first `ends[0]`, `ends[1]`, ... tokens and at its end.

        Joined they are the whole text. Pieces decoded one by one need not be: a token may hold a part of a character.
        """
        plain = [int(one) for one in ids]
        whole, cuts = self._whole(plain), [0]
        for end in ends:
            cuts.append(max(cuts[-1], min(len(whole), len(self._whole(plain[:end])))))
        return [whole[start:end] for start, end in itertools.pairwise([*cuts, len(whole)])]

    def _whole(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def fill(template: str, prompt: Prompt, context: str) -> Prompt:
    """The template over the prompt, or over the last user message of a conversation. Only `{prompt}` and `{context}` are replaced.

    Raises BadRow: a conversation without a user message.
    """
    if isinstance(prompt, str):
        return _filled(template, prompt, context)
    last = max((number for number, message in enumerate(prompt) if message["role"] == "user"), default=None)
    if last is None:
        raise BadRow("no user message to put the context into")
    asked = {**prompt[last], "content": _filled(template, prompt[last]["content"], context)}
    return [*prompt[:last], asked, *prompt[last + 1 :]]


def _filled(template: str, prompt: str, context: str) -> str:
    return re.sub(r"\{(prompt|context)\}", lambda match: prompt if match[1] == "prompt" else context, template)


def identity(tokenizer: Any) -> str:
    """Equal for two tokenizers whose ids mean the same: a hash of all tokens with their ids, and of the end token.

    Merges and templates are no part of it. They decide which ids a text becomes, not which text ids are.
    """
    facts = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()


def load_tokenizer(folder: str) -> Any:
    """The tokenizer of a Hugging Face folder or id, through `tokenizer.json`. (`AutoTokenizer` would import torch into the driver.)

    Raises:
        ConfigError: no such folder, or no tokenizer in it.
    """
    path = Path(folder).expanduser()
    if not path.exists():
        if not _HUB_ID.fullmatch(folder):
            raise ConfigError(f"model folder {folder} does not exist")
        return _from_hub(folder)
    if not (path / "tokenizer.json").is_file():
        raise ConfigError(f"model folder {folder} holds no tokenizer.json", "give a Hugging Face folder with its tokenizer")
    return _load(str(path))


def _from_hub(name: str) -> Any:
    from huggingface_hub import hf_hub_download

    try:  # one file first: without a network every file costs its own round of retries
        with _quiet("huggingface_hub"):
            hf_hub_download(name, "tokenizer.json")
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"there is no folder {name} here, and the hub did not give its tokenizer: {first}", "check the path or the network"
        ) from None
    return _load(name)


def _load(name: str) -> Any:
    from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

    try:
        with _quiet("transformers"):
            return PreTrainedTokenizerFast.from_pretrained(name)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"the tokenizer of {name} does not load: {first}") from None


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def context_length(folder: str) -> int | None:
    """Tokens that the model of a local folder can hold; None where its config does not say. Raises ConfigError: not JSON."""
    path = Path(folder).expanduser() / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ConfigError(f"{path} is not valid JSON") from None
    length = config.get("max_position_embeddings") or (config.get("text_config") or {}).get("max_position_embeddings")
    return length if isinstance(length, int) else None
