"""Causal language models that give log-probs of asked-for ids instead of logits.

Legend: B rows, L padded tokens, n response tokens of all rows together, K ids asked for at each, D width, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from raysys.errors import ConfigError
from raysys.methods.logprobs import draw_tokens, token_logprobs

# Models that change logits after their head: ignoring such a key would give wrong log-probs with no error.
_LOGIT_KEYS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}


class LogProbHead(nn.Linear):
    """An unembedding that answers with log-probs of ids when it is given ids, and with logits when it is not.

    The products run inside this module's own forward, so ZeRO-3 gathers its parameters for them, in backward too.
    """

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        ids: Tensor | None = None,
        temperature: float = 1.0,
        chunk_tokens: int = 1024,
        entropy: bool = False,
        uniform: Tensor | None = None,
    ) -> Any:
        """`input` [..., D] without ids: logits. [n, D] with ids [n] or [n, K]: as `raysys.methods.logprobs.token_logprobs`; with `uniform`
        [n]: as `draw_tokens` there."""
        if ids is None:
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            if uniform is not None:
                return draw_tokens(input, self.weight, uniform, temperature, chunk_tokens, self.bias)
            return token_logprobs(input, self.weight, ids, temperature, chunk_tokens, self.bias, entropy)


class _ResponseForward:
    """Forward of a model that is asked for response log-probs: one call of the root module, as a wrapping engine needs it."""

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
) -> PreTrainedModel:
    """A transformers model whose output embedding is a `LogProbHead`.

    Names of parameters, tied embeddings, `save_pretrained` and the usual forward stay as they were.

    Args:
        folder: Hugging Face folder or id.
        dtype: of the weights, e.g. torch.float32 or "bfloat16".
        trainable: train mode with gradients; otherwise eval mode, frozen.
        activation_checkpointing: recompute each layer in backward.

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
    _swap_classes(model, folder)
    model.requires_grad_(trainable).train(trainable)
    if activation_checkpointing and trainable:
        # The re-entrant kind gathers ZeRO-3 parameters again by the layers' own hooks.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.to(torch.device(device))  # type: ignore[arg-type]
    return model


def _swap_classes(model: PreTrainedModel, folder: str | Path) -> None:
    for key, neutral in _LOGIT_KEYS.items():
        if getattr(model.config, key, None) not in (None, neutral):
            raise ConfigError(f"{folder}: {key}={getattr(model.config, key)} changes logits after the head, which is not supported")
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ConfigError(f"{folder}: the output embedding is {type(head).__name__}, not a plain linear layer")
    head.__class__ = LogProbHead
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
) -> Any:
    """Log-probs in nats of response tokens, row after row.

    Only hidden states that predict a response token reach the head. Rows are right padded; under causal attention
    nothing real sees the padding, so no attention mask is needed.

    Args:
        model: from `load_causal`, or an engine that wraps one and hands its arguments on.
        input_ids: [B, L]: prompt, response, padding (any valid id).
        prompt_lengths: [B], at least 1.
        response_lengths: [B], may be 0.
        temperature: divides the logits.
        query_ids: [n, K] (or [n]) ids to score instead of the response's own, n = response_lengths.sum().
        entropy: also give [n] entropies in nats, without gradient.
        uniform: [n] float64 in [0, 1): draw one id at each position instead of scoring any.

    Returns:
        [n] ([n, K] with such query_ids) float32 or float64, or that and the entropies; with `uniform` ids and log-probs [n] of the draws.

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
) -> Any:
    predicts = _predicting_positions(input_ids, prompt_lengths, response_lengths)
    ids = input_ids[:, 1:][predicts] if query_ids is None else query_ids
    if len(ids) != int(response_lengths.sum()):
        raise ValueError(f"query_ids must have {int(response_lengths.sum())} rows, one a response token, got {list(ids.shape)}")
    states = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    return model.get_output_embeddings()(states[:, :-1][predicts], ids, temperature, chunk_tokens, entropy, uniform)


def _predicting_positions(input_ids: Tensor, prompt_lengths: Tensor, response_lengths: Tensor) -> Tensor:
    """[B, L-1]: positions whose next token is a response token."""
    if input_ids.dim() != 2 or input_ids.shape[1] < 1:
        raise ValueError(f"input_ids must be [B, L] with L >= 1, got {list(input_ids.shape)}")
    rows, length = input_ids.shape
    for name, lengths in (("prompt_lengths", prompt_lengths), ("response_lengths", response_lengths)):
        if list(lengths.shape) != [rows]:
            raise ValueError(f"{name} must be [{rows}] to fit input_ids, got {list(lengths.shape)}")
    ends = prompt_lengths + response_lengths
    if bool((prompt_lengths < 1).any() | (response_lengths < 0).any() | (ends > length).any()):
        raise ValueError(
            f"prompt_lengths must be at least 1, response_lengths at least 0, their sum at most L={length}; "
            f"got {prompt_lengths.tolist()} and {response_lengths.tolist()}"
        )
    positions = torch.arange(length - 1, device=input_ids.device)
    return (positions >= prompt_lengths[:, None] - 1) & (positions < ends[:, None] - 1)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
