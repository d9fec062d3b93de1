"""The text that a model is pretrained on: sources by weight, how they are cleaned, cut into tokens and packed."""

from __future__ import annotations

from typing import Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from raysys.config.base import Config, placed


class Source(Config):
    """One kind of text."""

    path: str
    """A file, a folder or a glob; local, s3://, gs:// or hf://.

    JSONL (.jsonl, .ndjson, .json) and Parquet hold a document a row; any other file is text and is one document. A folder that holds
    JSONL or Parquet is read as these; else its .txt, .md, .rst, .py and .tex files are."""
    column: str = "text"
    """Of JSONL and Parquet: where the text is."""
    weight: PositiveFloat = 1.0
    """Share of this source in the sequences that are trained on, relative to the others. A small source repeats earlier."""


class Corpus(Config):
    """Text sources, and how text becomes sequences of tokens.

    A document is followed by the tokenizer's end token; documents stand one behind another and are cut into sequences. A *unit* is the
    piece of a source that is read, cut into tokens and cached at once.
    """

    sources: dict[str, Source] = Field(min_length=1)
    """Label to source."""
    tokenizer: str
    """Hugging Face folder or id."""
    sequence: PositiveInt = 2048
    """Tokens of a sequence."""
    shuffle: bool = True
    """False: the files' order, the same in each epoch."""
    shuffle_units: PositiveInt = 8
    """Units whose sequences are mixed with each other. A worker holds so many of each source in memory, and the next ones."""
    unit_bytes: PositiveInt = 4 * 2**20
    """Text of a unit. A row of a JSONL or Parquet file that is more than four times as long is unusable; text files may have any length."""
    min_characters: NonNegativeInt = 1
    """Shorter documents are left out."""
    max_document_tokens: PositiveInt | None = None
    """Longer documents are cut into pieces that do not see each other. Null: only where sequences end."""
    held_out_share: float = Field(default=0.005, ge=0, le=0.5)
    """Documents that are never trained on, chosen by a hash of their text, for validation."""
    max_bad_share: float = placed(0.01, ge=0, le=1)
    """The run fails when a larger share of the documents cannot be read."""
    cache: str | None = placed(None)
    """Folder or URI of the token cache, visible to all workers. Null: `tokens` in the run's folder."""
    tasks: PositiveInt | None = placed(None)
    """Units that are made at the same time. Null: as many as there are CPUs free; on one machine by itself no more than it has cores."""
    ahead: PositiveInt | None = placed(None)
    """Units made beyond those that training has come to, at most twice as many. Null: everything, as fast as it goes."""
    wait: PositiveFloat = placed(900.0)
    """Seconds that a worker waits for sequences which are not in the cache yet."""

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        if self.sequence < 2:
            raise ValueError("sequence=1 leaves nothing to predict, set at least 2")
        return self

    @property
    def longest_row(self) -> int:
        """Bytes of a row that are read into memory."""
        return 4 * self.unit_bytes
