"""Small causal language models made from scratch, as Hugging Face folders that stock transformers and stock vLLM load.

The tokenizer knows the 95 printable ASCII characters (32 to 126), one token each, and three specials: 98 ids. Behind
them come the texts of `NewModel.tokens` and `NewModel.words`, which are found first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from raysys.config.runs import NewModel
from raysys.errors import ConfigError

SPECIALS = PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"  # ids 0, 1, 2
CHARACTERS = [chr(code) for code in range(32, 127)]


def new_causal(spec: NewModel, folder: str | Path, seed: int) -> Path:
    """Writes a freshly initialised model and its tokenizer.

    Args:
        spec: sizes of the model.
        folder: made if it is not there; files of the same names are replaced.
        seed: the same seed gives the same bytes; the global random state is left as it was.

    Returns:
        The folder, with config.json, generation_config.json, model.safetensors (float32) and the tokenizer's files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = character_tokenizer(spec.context, spec.tokens, words_of(spec))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(_config(spec, len(tokenizer))).float()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _no_default_sampling(folder)
    return folder


def words_of(spec: NewModel) -> list[str]:
    """The words of `NewModel.words`. Raises ConfigError: no such file, or no list of texts in it."""
    if spec.words is None:
        return []
    try:
        words = json.loads(Path(spec.words).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"new_model.words={spec.words}: {type(error).__name__}: {error}", "give a JSON file with a list of words"
        ) from None
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        raise ConfigError(f"new_model.words={spec.words} holds no list of texts", "give a JSON file of words")
    return words


def character_tokenizer(context: int, texts: Sequence[str] = (), words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token a printable ASCII character; text comes back from ids exactly. `context`: tokens of the model's window.

    `texts` have tokens of their own, and so have `words` where they stand alone. Other characters outside printable ASCII have none
    and are dropped: callers check their texts.
    """
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *CHARACTERS])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in dict.fromkeys(texts)])
    backend.add_tokens([AddedToken(word, normalized=False, special=False, single_word=True) for word in dict.fromkeys(words)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        padding_side="right",
        model_max_length=context,
    )


def _config(spec: NewModel, vocabulary: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=spec.hidden_size,
        initializer_range=spec.initializer_range,
        intermediate_size=spec.ffn_size,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.context,
        tie_word_embeddings=spec.tied,
        pad_token_id=SPECIALS.index(PAD),
        bos_token_id=SPECIALS.index(BOS),
        eos_token_id=SPECIALS.index(EOS),
        dtype="float32",
    )


def _no_default_sampling(folder: Path) -> None:
    # An engine takes sampling defaults from this file; a run's own settings must be the only ones.
    path = folder / "generation_config.json"
    values = json.loads(path.read_text())
    for key in ("temperature", "top_p", "top_k"):
        values.pop(key, None)
    path.write_text(json.dumps(values, indent=2) + "\n")
