"""Token ids back to text for people, piece by piece."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysys.data.text import Decoder


@pytest.fixture(scope="module")
def octets(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tokenizer whose tokens are bytes, so that a character may be several, and one special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folder: Path = tmp_path_factory.mktemp("octets")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(folder)
    return str(folder)


def test_pieces_are_the_whole_with_its_special_tokens(octets: str) -> None:
    decoder = Decoder(octets)
    encode = decoder._tokenizer.backend_tokenizer.encode
    ids = encode("é <b>, n't ü").ids + [decoder._tokenizer.eos_token_id, *encode("\n\n日本").ids]
    whole = "é <b>, n't ü<|end|>\n\n日本"
    assert decoder.pieces(ids, []) == [whole] and decoder.texts([ids]) == [whole.replace("<|end|>", "")]
    assert decoder.pieces(ids, [2, 14]) == ["é", " <b>, n't ü", "<|end|>\n\n日本"]
    for first in range(len(ids) + 1):
        for second in range(first, len(ids) + 1):
            assert "".join(decoder.pieces(ids, [first, second])) == whole, "also where a cut splits a character"


def test_pieces_of_nothing(octets: str) -> None:
    assert Decoder(octets).pieces([], []) == [""]
