"""Token windows: what activations are measured on while layers are quantised, and what perplexity is measured on afterwards.

Legend: N windows, L positions of a window.

Texts are joined, each with the tokenizer's end token behind it, and cut into whole windows. A task, or a row that has a prompt, is a
window of its own: prompt, answer, end token, and padding behind it, which nothing real sees under causal attention. So is a text where
`joined` is false.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from raysys.config.corpora import Source
from raysys.config.parts import Data
from raysys.config.quantising import Windows
from raysys.data.cleaning import Account
from raysys.data.corpus import plan_units
from raysys.data.files import open_files
from raysys.data.rows import BadRow, Row
from raysys.data.sources import UnitReader
from raysys.data.stream import PromptStream
from raysys.data.text import Encoder, load_tokenizer
from raysys.errors import ConfigError, DataError, RaysysError
from raysys.evaluation.perplexity import cut

TEXT_BYTES = 2**26
"""Of texts, that are read: more would only be chosen from."""
ROWS = 100_000
"""Of a file with prompts, that are looked at."""
_UNIT = 2**22
_ANY_LENGTH = 2**30


@dataclass(frozen=True)
class TokenWindows:
    """Windows of token ids.

    Attributes:
        ids: [N, L] int32; behind a window's own tokens anything.
        lengths: [N], its own tokens.
        starts: [N], the first position that perplexity counts: behind the prompt, else 1.
        whole: [N] bool, whether all that was to come from there on is in the window.
    """

    ids: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    whole: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @cached_property
    def digest(self) -> str:
        """Of the ids alone: equal for the same tokens, wherever they come from."""
        real = np.arange(self.ids.shape[1]) < self.lengths[:, None]
        told = np.concatenate([self.lengths.astype("<i4"), self.ids[real].astype("<i4")])
        return hashlib.blake2b(told.tobytes(), digest_size=16).hexdigest()


def token_windows(config: Windows, tokenizer: str, seed: int, key: str, in_order: bool = False) -> TokenWindows:
    """The windows that a config asks for; the same again from the same files and seed.

    Args:
        tokenizer: Hugging Face folder or id.
        seed: which windows are taken, and in which order.
        key: what errors call the config: "calibration" or "evaluation".
        in_order: the first ones as they stand, whatever the seed.

    Raises:
        ConfigError, DataError: the source is missing, empty or cannot be read, or has too few tokens for a window; each names `key`.
    """
    rng = None if in_order else np.random.default_rng(seed)
    try:
        if config.source is not None:
            return _of_tasks(config, tokenizer, seed)
        if _has_prompts(str(config.path)):
            return _of_rows(config, tokenizer, rng)
        return _of_texts(config, tokenizer, rng, key)
    except (ConfigError, DataError) as error:
        raise _named(error, key) from None


def warnings(windows: TokenWindows, wanted: int, columns: int, key: str = "calibration") -> list[str]:
    """What a person should know of windows that are few. `columns`: of the widest input of a linear layer."""
    found = []
    if len(windows) < wanted:
        found.append(f"{key} has {len(windows)} windows, fewer than {key}.samples={wanted}")
    if key == "evaluation" and (windows.starts > 1).any() and not windows.whole.all():
        short = len(windows) - int(windows.whole.sum())
        found.append(f"{short} of {len(windows)} answers do not fit into evaluation.length: accuracy is that of the others")
    if windows.tokens < columns:
        found.append(
            f"{key} has {windows.tokens} tokens, fewer than the {columns} inputs of the widest linear layer: what they do not tell of it "
            "is left to gptq.damp; more samples are better"
        )
    return found


def _of_texts(config: Windows, tokenizer: str, rng: np.random.Generator | None, key: str) -> TokenWindows:
    texts = _text_ids(config, load_tokenizer(tokenizer))
    if not config.joined:
        alone = list(itertools.islice((ids for ids in texts if len(ids) > 1), None if rng is not None else config.samples))
        if not alone:
            raise DataError(f"{config.path} has no text of two tokens or more", "give more text")
        order = range(len(alone)) if rng is None else rng.permutation(len(alone))[: config.samples].tolist()
        return _padded([(alone[number], 1) for number in order], config.length)
    ids = _joined(texts, None if rng is not None else config.samples * config.length)
    if len(ids) < config.length:
        raise ConfigError(
            f"{key}.path={config.path} holds {len(ids)} tokens, which make no window of {key}.length={config.length}",
            "give more text, or a smaller length",
        )
    windows = cut(ids, config.length, None if rng is not None else config.samples)
    if rng is not None:
        windows = [windows[number] for number in rng.permutation(len(windows))[: config.samples].tolist()]
    return _padded([(window, 1) for window in windows], config.length)


def _joined(texts: Iterator[list[int]], enough: int | None) -> list[int]:
    """Ids of the texts, up to about `enough` of them."""
    ids: list[int] = []
    for own in texts:
        ids += own
        if enough is not None and len(ids) >= enough:
            break
    return ids


def _text_ids(config: Windows, tokenizer: object) -> Iterator[list[int]]:
    """Ids of each text with the end token behind them. Raises DataError where there is no text."""
    end = tokenizer.eos_token_id  # type: ignore[attr-defined]
    held, account = 0, Account.new()
    for text in _texts(str(config.path), account):
        (encoding,) = tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)  # type: ignore[attr-defined]
        yield encoding.ids if end is None else [*encoding.ids, end]
        held += len(text)
        if held >= TEXT_BYTES:
            return
    if not held:
        raise DataError(f"{config.path} has no usable text: {'; '.join(account.bad.examples[:3])}", "rows need `text` or `prompt`")


def _texts(path: str, account: Account) -> Iterator[str]:
    """Documents; pieces of a file that is read in parts are joined again."""
    open_text = ""
    for unit in plan_units(Source(path=path), "text", _UNIT, 4 * _UNIT):
        for document in unit.documents():
            text = account.text(document.raw, document.where, 1, document.last)
            if not document.last:
                open_text += text or ""
                continue
            if whole := open_text + (text or ""):
                yield whole
            open_text = ""


def _has_prompts(path: str) -> bool:
    """Whether the first row of a file of rows has a prompt. A text file, or Parquet without such a column, has none."""
    try:
        files = open_files(path)
    except RaysysError:
        return False
    raw = next((raw for unit in files.units for raw in files.read(unit) if raw.record is not None), None)
    return raw is not None and isinstance(raw.record, dict) and bool({"prompt", "messages"} & raw.record.keys())


def _of_rows(config: Windows, tokenizer: str, rng: np.random.Generator | None) -> TokenWindows:
    data = Data(path=config.path)
    files = open_files(str(config.path))
    reader = UnitReader(files, None, data)
    found = itertools.islice(itertools.chain.from_iterable(reader.parsed(unit) for unit in files.units), ROWS)
    rows = [row for _, row in found if isinstance(row, Row)]
    if rng is not None:
        rows = [rows[number] for number in rng.permutation(len(rows)).tolist()]
    windows: list[tuple[list[int], int]] = []
    for start in range(0, len(rows), config.samples):
        windows += _encoded(rows[start : start + config.samples], tokenizer, data)
        if len(windows) >= config.samples:
            break
    if not windows:
        raise DataError(f"{config.path} has no usable row", "rows need `prompt`, and `response` or `answer`; or `text`")
    return _padded(windows[: config.samples], config.length)


def _encoded(rows: Sequence[Row], tokenizer: str, data: Data) -> list[tuple[list[int], int]]:
    """(ids, where the answer begins) of the rows that can be encoded."""
    found = []
    for answered in (True, False):
        own = [(number, row) for number, row in enumerate(rows) if bool(row.target or row.parts) == answered]
        if own:
            encoder = Encoder(
                tokenizer,
                max_prompt_tokens=_ANY_LENGTH,
                max_response_tokens=_ANY_LENGTH,
                supervised=answered,
                enable_thinking=data.enable_thinking,
            )
            for (number, _), one in zip(own, encoder.encode([row for _, row in own]), strict=True):
                if not isinstance(one, BadRow):
                    found.append((number, [*one.prompt, *(one.response or [])], len(one.prompt) if one.response else 1))
    return [(ids, start) for _, ids, start in sorted(found, key=lambda one: one[0])]


def _of_tasks(config: Windows, tokenizer: str, seed: int) -> TokenWindows:
    stream = PromptStream(Data(source=config.source), tokenizer, seed, config.length, config.length, supervised=True)
    batch = stream.take(config.samples)
    rows = zip(batch.ragged("prompt_ids").rows(), batch.ragged("response_ids").rows(), strict=True)
    return _padded([([*prompt.tolist(), *response.tolist()], len(prompt)) for prompt, response in rows], config.length)


def _padded(windows: Sequence[tuple[Sequence[int], int]], length: int) -> TokenWindows:
    """Windows cut off at `length`; no longer than the longest of them."""
    longest = min(length, max(len(ids) for ids, _ in windows))
    ids = np.zeros((len(windows), longest), np.int32)
    for number, (own, _) in enumerate(windows):
        ids[number, : len(own[:longest])] = own[:longest]
    own, starts = np.array([(len(own), max(1, start)) for own, start in windows], np.int32).T
    return TokenWindows(ids, own.clip(max=longest), starts, (starts < own) & (own <= longest))


def _named(error: RaysysError, key: str) -> RaysysError:
    """The errors of the data's own readers call their keys by other names, and some of theirs are none here."""
    told, remedy = error.message, error.remedy
    if "data.max_bad_share" in remedy:  # of tasks alone
        remedy = f"raise {key}.length, or give {key}.source.domains params whose rows are shorter"
    elif "data.sources.text.column" in remedy:
        remedy = "rename the column"
    names = {
        "data.sources.text.path": f"{key}.path", "data.path": f"{key}.path", "data.source": f"{key}.source",
        "data.max_bad_share=": "a share of ", "max_prompt_tokens": f"{key}.length", "max_response_tokens": f"{key}.length",
    }  # fmt: skip
    for other, own in names.items():
        told, remedy = told.replace(other, own), remedy.replace(other, own)
    return type(error)(told, remedy)
