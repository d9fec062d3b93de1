"""Causal language models that give log-probs of asked-for ids instead of logits.

Legend: B rows, T tokens of all rows, n response tokens of all rows, K ids asked for at each, D width, V vocabulary.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from raysys.errors import ConfigError
from raysys.methods.logprobs import Slope, draw_tokens, surrogate, token_logprobs
from raysys.models import packing
from raysys.models.microbatch import response_positions

log = logging.getLogger(__name__)

# Models that change logits after their head: ignoring such a key would give wrong log-probs with no error.
_LOGIT_KEYS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}


class LogProbHead(nn.Linear):
    """An unembedding that answers with log-probs of ids when it is given ids, and with logits when it is not.

    The products run inside this module's own forward, so ZeRO-3 gathers its parameters for them, in backward too.
    """

    vocabulary: int | None = None
    """First ids that probabilities are over; None: all."""

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        ids: Tensor | None = None,
        temperature: float = 1.0,
        chunk_tokens: int = 1024,
        entropy: bool = False,
        uniform: Tensor | None = None,
        slope: Slope | None = None,
    ) -> Any:
        """`input` [..., D] without ids: logits. [n, D] with ids [n] or [n, K]: as `raysys.methods.logprobs.token_logprobs`; with `uniform`
        [n] as `draw_tokens`, with `slope` as `surrogate` there."""
        if ids is None:
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            weight, bias = self._shared()
            if uniform is not None:
                return draw_tokens(input, weight, uniform, temperature, chunk_tokens, bias)
            if slope is not None:
                return tuple(surrogate(input, weight, ids, slope, temperature, chunk_tokens, bias, entropy))
            return token_logprobs(input, weight, ids, temperature, chunk_tokens, bias, entropy)

    def _shared(self) -> tuple[Tensor, Tensor | None]:
        """The rows of the ids that count. The parameter itself where all do: under ZeRO 3 a slice of it would not be gathered again."""
        if self.vocabulary is None:
            return self.weight, self.bias
        return self.weight[: self.vocabulary], None if self.bias is None else self.bias[: self.vocabulary]


class _ResponseForward:
    """Forward of a model that is asked for response log-probs: one call of the root module, as a wrapping engine needs it."""

    packs: bool
    """Whether its rows lie one after another; else they are padded inside the model."""

    def forward(self: Any, *args: Any, prompt_lengths: Tensor | None = None, **kwargs: Any) -> Any:
        if prompt_lengths is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return _responses(self, *args, prompt_lengths=prompt_lengths, **kwargs)


def load_causal(
    folder: str | Path,
    dtype: torch.dtype | str,
    device: torch.device | str = "cpu",
    trainable: bool = False,
    activation_checkpointing: bool = False,
    vocabulary: int | None = None,
) -> PreTrainedModel:
    """A transformers model whose output embedding is a `LogProbHead` and whose rows need no padding where it can be told of rows (`packs`).

    Names of parameters, tied embeddings, `save_pretrained` and the usual forward stay as they were.

    Args:
        folder: Hugging Face folder or id.
        dtype: of the weights, e.g. torch.float32 or "bfloat16".
        trainable: train mode with gradients; otherwise eval mode, frozen.
        activation_checkpointing: recompute each layer in backward.
        vocabulary: log-probs are those over so many first ids; None: over all.

    Raises:
        ConfigError: nothing loadable is there, or the model changes its logits after the head.
    """
    kind = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot load a causal language model from {folder}: {_first_line(error)}", "give a Hugging Face folder or id"
        ) from error
    _swap_classes(model, folder, vocabulary)
    model.requires_grad_(trainable).train(trainable)
    model.packs = packing.teach(model)  # type: ignore[assignment]
    if not model.packs:
        log.warning("%s: the attention of %s cannot be told where rows begin, so its rows are padded", folder, model.config.model_type)
    if activation_checkpointing and trainable:
        # The re-entrant kind gathers ZeRO-3 parameters again by the layers' own hooks.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.to(torch.device(device))  # type: ignore[arg-type]
    return model


def _swap_classes(model: PreTrainedModel, folder: str | Path, vocabulary: int | None) -> None:
    for key, neutral in _LOGIT_KEYS.items():
        if getattr(model.config, key, None) not in (None, neutral):
            raise ConfigError(f"{folder}: {key}={getattr(model.config, key)} changes logits after the head, which is not supported")
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ConfigError(f"{folder}: the output embedding is {type(head).__name__}, not a plain linear layer")
    head.__class__ = LogProbHead
    head.vocabulary = vocabulary  # type: ignore[assignment]
    kind = type(model)
    # Same name: save_pretrained writes it into config.json as the architecture.
    model.__class__ = type(kind.__name__, (_ResponseForward, kind), {"__module__": kind.__module__})


def response_logprobs(
    model: Any,
    input_ids: Tensor,
    prompt_lengths: Tensor,
    response_lengths: Tensor,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    query_ids: Tensor | None = None,
    entropy: bool = False,
    uniform: Tensor | None = None,
    slope: Slope | None = None,
    targets: Tensor | None = None,
) -> Any:
    """Log-probs in nats of response tokens, row after row. No row sees another.

    Only hidden states that predict a response token reach the head.

    Args:
        model: from `load_causal`, or an engine that wraps one and hands its arguments on.
        input_ids: [T]: prompt and response of the first row, of the second, ...; no padding.
        prompt_lengths: [B], at least 1; best on the CPU, where they are read.
        response_lengths: [B], may be 0.
        temperature: divides the logits.
        query_ids: [n, K] (or [n]) ids to score instead of the responses' own, n = response_lengths.sum().
        entropy: also give [n] entropies in nats, without gradient.
        uniform: [n] float64 in [0, 1): draw one id at each position instead of scoring any.
        targets: [n] where the tokens are among the T that count, if not all response tokens do; none may be a row's first.
        slope: a loss's derivative by the log-probs of some of the n tokens, where it is a sum over them.

    Returns:
        [n] ([n, K] with such query_ids) float32 or float64, or that and the entropies; with `uniform` ids and log-probs [n] of the draws;
        with `slope` what `raysys.methods.logprobs.surrogate` gives, as a plain tuple.

    Raises:
        ValueError: shapes or lengths do not fit together.
    """
    return model(
        input_ids,
        prompt_lengths=prompt_lengths,
        response_lengths=response_lengths,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        query_ids=query_ids,
        entropy=entropy,
        uniform=uniform,
        slope=slope,
        targets=targets,
    )


def _responses(
    model: Any,
    input_ids: Tensor,
    prompt_lengths: Tensor,
    response_lengths: Tensor,
    temperature: float,
    chunk_tokens: int,
    query_ids: Tensor | None,
    entropy: bool,
    uniform: Tensor | None,
    slope: Slope | None,
    targets: Tensor | None,
) -> Any:
    prompts, responses = prompt_lengths.cpu().numpy(), response_lengths.cpu().numpy()
    _check_lengths(input_ids, prompts, responses)
    if targets is None:
        targets = torch.from_numpy(response_positions(prompts, responses)).to(input_ids.device)
    ids = input_ids[targets] if query_ids is None else query_ids
    if len(ids) != len(targets):
        raise ValueError(f"query_ids must have {len(targets)} rows, one a response token, got {list(ids.shape)}")
    states = _hidden_states(model, input_ids, prompts + responses)
    return model.get_output_embeddings()(states.index_select(0, targets - 1), ids, temperature, chunk_tokens, entropy, uniform, slope)


def _hidden_states(model: Any, input_ids: Tensor, lengths: np.ndarray) -> Tensor:
    """[T, D]."""
    if model.packs:
        rows = packing.Packing(lengths, input_ids.device)
        return model.base_model(input_ids=input_ids[None], **packing.arguments(rows)).last_hidden_state[0]
    real = torch.from_numpy(np.arange(lengths.max())[None, :] < lengths[:, None]).to(input_ids.device)
    # Right padded: under causal attention and in recurrent layers nothing real sees the padding, so no mask is needed.
    padded = input_ids.new_zeros(real.shape).masked_scatter_(real, input_ids)
    return model.base_model(input_ids=padded, use_cache=False).last_hidden_state[real]


def _check_lengths(input_ids: Tensor, prompts: np.ndarray, responses: np.ndarray) -> None:
    if input_ids.dim() != 1:
        raise ValueError(f"input_ids must be [T], rows one after another without padding, got {list(input_ids.shape)}")
    if prompts.ndim != 1 or prompts.shape != responses.shape or not len(prompts):
        raise ValueError(
            f"prompt_lengths and response_lengths must be [B] with B >= 1, got {list(prompts.shape)} and {list(responses.shape)}"
        )
    if (prompts < 1).any() or (responses < 0).any() or prompts.sum() + responses.sum() != len(input_ids):
        raise ValueError(
            f"prompt_lengths must be at least 1, response_lengths at least 0, their sum T={len(input_ids)}; "
            f"got {prompts.tolist()} and {responses.tolist()}"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
