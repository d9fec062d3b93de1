"""Text to tokens and back. Tokens travel between actors; text is for people and verifiers."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raysys.errors import ConfigError


@functools.cache
def load_tokenizer(folder: str) -> Any:
    """The tokenizer of a Hugging Face folder or id. Raises ConfigError when there is none."""
    from transformers import AutoTokenizer
    from transformers.utils import logging as chatter

    chatter.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ConfigError(f"no tokenizer can be loaded from {folder}: {first}", "give a Hugging Face folder or a reachable id") from None


def render(tokenizer: Any, prompt: str | Sequence[Mapping[str, str]], enable_thinking: bool = False) -> list[int]:
    """Token ids of a prompt, ready for the model to answer.

    Chat messages, and text where the tokenizer has a chat template, go through the template with the opener of the
    assistant's turn; text for a tokenizer without a template is encoded as it is, with no special tokens added.

    Raises:
        ValueError: messages for a tokenizer without a chat template.
    """
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(message) for message in prompt]
        rendered = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False, enable_thinking=enable_thinking
        )
        return [int(token) for token in rendered]
    if not isinstance(prompt, str):
        raise ValueError("chat messages need a tokenizer with a chat template")
    return tokenizer.encode(prompt, add_special_tokens=False)


def encode_answers(tokenizer: Any, answers: Sequence[str]) -> list[list[int]]:
    """Supervised targets: the answer's ids and the end-of-sequence id."""
    ids = tokenizer(list(answers), add_special_tokens=False)["input_ids"] if answers else []
    return [[*row, tokenizer.eos_token_id] for row in ids]


class Decoder:
    """Ids to text, special tokens left out."""

    def __init__(self, folder: str):
        self._folder = folder

    def texts(self, rows: Sequence[Any]) -> list[str]:
        tokenizer = load_tokenizer(self._folder)
        plain = [np.asarray(row).tolist() for row in rows]
        return tokenizer.batch_decode(plain, skip_special_tokens=True, clean_up_tokenization_spaces=False)
