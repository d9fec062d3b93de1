"""Frozen models that score responses: log-probs by teacher and reference, rewards by verifiers.

Legend: B rows, n response tokens of one row, K ids asked for at each.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raysys.batch import Batch, Ragged
from raysys.errors import DataError, NumericsError
from raysys.processes import imports
from raysys.scoring.routing import route


@dataclass(frozen=True)
class ScorerSpec:
    """What one scorer holds. Folders are Hugging Face folders or ids."""

    teachers: dict[str, str]
    """Domain tag to folder."""
    reference: str | None
    """None where nothing asks for it."""
    tokenizer: str
    """Of the student: responses are decoded with it for the verifiers."""
    temperature: float
    device: str
    """"cpu" or "gpu"."""
    dtype: str
    micro_batch_tokens: int
    chunk_tokens: int
    threads: int
    vocabulary: int | None = None
    """First ids that probabilities are over; None: all."""
    offload: bool = False
    """Weights in host memory, a layer at a time on the device."""

    @property
    def folders(self) -> list[str]:
        """Each distinct folder once."""
        return sorted({*self.teachers.values(), *([self.reference] if self.reference else [])})


class ScorerWorker:
    """Holds every distinct frozen model once and scores the rows it is given. Torch is imported when it starts."""

    def __init__(self, spec: ScorerSpec):
        self.spec = spec
        self._models: dict[str, Any] = {}
        self._tokenizer: Any = None

    def start(self) -> dict[str, Any]:
        """Loads the models. Returns what is held: parameters by folder.

        Raises:
            ConfigError: a folder holds no causal language model that can be scored with.
        """
        with imports():
            import torch
            from transformers import AutoTokenizer

            if self.spec.offload:
                from raysys.scoring.offload import load_offloaded as load
            else:
                from raysys.models.causal import load_causal as load

        torch.set_num_threads(self.spec.threads)
        device = "cuda" if self.spec.device == "gpu" else "cpu"
        self._models = {folder: load(folder, self.spec.dtype, device, vocabulary=self.spec.vocabulary) for folder in self.spec.folders}
        self._tokenizer = AutoTokenizer.from_pretrained(self.spec.tokenizer)
        sizes = {folder: [_shape(weight) for weight in model.parameters()] for folder, model in self._models.items()}
        parameters = {folder: sum(map(math.prod, shapes)) for folder, shapes in sizes.items()}
        return {"parameters": parameters, "pid": os.getpid()}

    def score(self, batch: Batch, queries: Ragged | None = None) -> Batch:
        """The new columns of these rows, in the same order.

        The teacher reads `teacher_prompt_ids` where a row has them (context distillation), the reference always
        `prompt_ids`; the response ids are the same for both.

        Args:
            batch: rows with prompt_ids, response_ids, domain, prompt_id; for rewards also answer, verifier, metadata.
            queries: ids to score in place of the response's, n * K a row (K of the first position, then of the second, ...).

        Returns:
            `teacher_logprobs` [, `reference_logprobs`] in nats, n * K a row, and `reward` if there is a verifier column
            (0 for rows that name none).

        Raises:
            DataError: a tag without teacher, an empty prompt, an id that a model has no row for, or queries that do not fit the responses.
        """
        own = batch.ragged("prompt_ids").rows()
        theirs = self._teacher_prompts(batch, own)
        responses = batch.ragged("response_ids").rows()
        asked = self._queries(responses, queries)
        folders = np.array(route(batch.strings("domain"), batch.strings("prompt_id"), self.spec.teachers), dtype=object)
        everyone = np.arange(len(batch))
        teacher: list[Any] = [None] * len(batch)
        reference: list[Any] = [None] * len(batch)
        for folder in self.spec.folders:
            taught = np.flatnonzero(folders == folder)
            if folder == self.spec.reference:
                self._fill(reference, folder, everyone, own, responses, asked)
                # One pass serves both where teacher and reference read the same.
                shared = [row for row in taught if theirs[row] is own[row]]
                for row in shared:
                    teacher[row] = reference[row]
                taught = np.setdiff1d(taught, shared)
            self._fill(teacher, folder, taught, theirs, responses, asked)
        columns: dict[str, Any] = {"teacher_logprobs": Ragged.of(teacher, np.float32)}
        if self.spec.reference is not None:
            columns["reference_logprobs"] = Ragged.of(reference, np.float32)
        rewards = self._rewards(batch, responses)
        return Batch.from_columns(**columns, **({} if rewards is None else {"reward": rewards}))

    def _teacher_prompts(self, batch: Batch, own: list[np.ndarray]) -> list[np.ndarray]:
        if "teacher_prompt_ids" not in batch:
            return own
        return [theirs if len(theirs) else mine for theirs, mine in zip(batch.ragged("teacher_prompt_ids").rows(), own, strict=True)]

    def _queries(self, responses: list[np.ndarray], queries: Ragged | None) -> list[np.ndarray] | None:
        """[n, K] a row, or None for the response's own ids."""
        if queries is None:
            return None
        tokens = sum(len(response) for response in responses)
        width = len(queries.values) // tokens if tokens else 1
        rows = queries.rows()
        if len(rows) != len(responses) or [len(row) for row in rows] != [width * len(response) for response in responses]:
            raise DataError(f"queries must hold the same number of ids for each of the {tokens} response tokens, got {len(queries.values)}")
        return [row.reshape(-1, width) for row in rows]

    def _fill(
        self, out: list[Any], folder: str, rows: np.ndarray, prompts: list[Any], responses: list[Any], asked: list[Any] | None
    ) -> None:
        """Writes the log-probs of these rows by this model, n * K a row, into `out`."""
        from raysys.models.microbatch import pack_rows

        lengths = np.array([len(prompts[row]) + len(responses[row]) for row in rows], dtype=np.int64)
        for pack in pack_rows(lengths, self.spec.micro_batch_tokens, padded=not self._models[folder].packs):
            own = rows[pack]
            pieces = self._forward(
                folder, [prompts[r] for r in own], [responses[r] for r in own], None if asked is None else [asked[r] for r in own]
            )
            for row, piece in zip(own, pieces, strict=True):
                out[row] = piece

    def _forward(self, folder: str, prompts: list[Any], responses: list[Any], asked: list[Any] | None) -> list[np.ndarray]:
        import torch

        from raysys.models.causal import response_logprobs

        model = self._models[folder]
        ids = np.concatenate([part for pair in zip(prompts, responses, strict=True) for part in pair])
        query = None if asked is None else np.concatenate(asked).astype(np.int64)
        self._check_ids(folder, model, prompts, ids, query)

        def tensor(values: Any) -> Any:
            return torch.as_tensor(np.asarray(values, dtype=np.int64), device=model.device)

        counts = [len(response) for response in responses]
        lengths = torch.tensor([len(prompt) for prompt in prompts]), torch.tensor(counts)
        with torch.inference_mode():
            flat = response_logprobs(
                model,
                tensor(ids),
                *lengths,
                self.spec.temperature,
                self.spec.chunk_tokens,
                None if query is None else tensor(query),
            )
        found = flat.float().cpu().numpy()
        if np.isnan(found).any():
            raise NumericsError(
                f"{folder} gives NaN for {np.isnan(found).sum()} of {found.size} tokens", "look at its weights, or at how they were made"
            )
        return [piece.ravel() for piece in np.split(found, np.cumsum(counts)[:-1])]

    def _check_ids(self, folder: str, model: Any, prompts: list[Any], ids: np.ndarray, query: np.ndarray | None) -> None:
        size = _shape(model.get_input_embeddings().weight)[0]
        highest = max(int(ids.max(initial=0)), 0 if query is None else int(query.max(initial=0)))
        if highest >= size:
            raise DataError(
                f"token id {highest} is outside the {size} ids of {folder}", "student, teachers and reference must share one vocabulary"
            )
        if any(len(prompt) == 0 for prompt in prompts):
            raise DataError("a prompt has no tokens, so its first response token has nothing to be predicted from")

    def _rewards(self, batch: Batch, responses: Sequence[np.ndarray]) -> np.ndarray | None:
        if "verifier" not in batch:
            return None
        from raysys.scoring.verifiers import score

        texts = self._tokenizer.batch_decode([response.tolist() for response in responses], skip_special_tokens=True)
        answers = batch.strings("answer") if "answer" in batch else [""] * len(batch)
        metadata = batch.strings("metadata") if "metadata" in batch else [""] * len(batch)
        rows = zip(batch.strings("verifier"), texts, answers, metadata, strict=True)
        return np.array([score(*row) for row in rows], dtype=np.float32)


def _shape(weight: Any) -> tuple[int, ...]:
    """Of the whole tensor, also where it is elsewhere for the moment."""
    return tuple(getattr(weight, "ds_shape", weight.shape))
