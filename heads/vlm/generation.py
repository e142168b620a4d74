"""Generation with every decoder alike: from a state, one token after another, on the state alone.

transformers' ``generate`` refuses embeddings in four of its hybrids and cannot start from an image's state, so the loop
is here; what shapes the distribution (temperature, top-k, top-p and any other ``LogitsProcessor``) is transformers'.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.heads.vlm.decoder import position_limit
from zoo.heads.vlm.state import DecoderState, read

if TYPE_CHECKING:
    from transformers import LogitsProcessorList, PreTrainedModel

__all__ = ["stop_tokens_of", "stream"]


def stream(
    model: "PreTrainedModel",
    state: DecoderState,
    max_new_tokens: int = 256,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    processors: "LogitsProcessorList | None" = None,
    stop_tokens: Sequence[int] | None = None,
    pad_token: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of every row, (B,), until all rows have stopped.

    When the iterator is exhausted, the state has read all that was yielded; if it is left before, all but the last.

    Args:
        model: The decoder.
        state: What it has read; it is brought up to date in place.
        max_new_tokens: Most tokens to generate.
        temperature: Divides the scores before a token is drawn; 0 takes the most likely token instead.
        top_k: Draw among so many most likely tokens only.
        top_p: Draw among the most likely tokens that together have this probability only.
        processors: Further processors of transformers, applied first; they see the tokens generated so far.
        stop_tokens: Tokens that end a row. Default: the decoder's end-of-sequence tokens.
        pad_token: What a row yields after its end; default the first stop token, or 0.
        generator: Source of random numbers.

    Raises:
        ValueError: If an option is out of range, or the tokens would exceed the decoder's limit.
    """
    _check_options(model, state, max_new_tokens, temperature, top_k, top_p)
    stops = torch.tensor(stop_tokens_of(model) if stop_tokens is None else list(stop_tokens), dtype=torch.int64)
    stops = stops.to(state.logits.device)
    pad = pad_token if pad_token is not None else int(stops[0]) if len(stops) else 0
    shape = _processors(temperature, top_k, top_p, processors)
    return _stream(model, state, max_new_tokens, shape, temperature > 0, stops, pad, generator)


@torch.no_grad()
def _stream(
    model: "PreTrainedModel",
    state: DecoderState,
    max_new_tokens: int,
    processors: "LogitsProcessorList",
    sample: bool,
    stops: Tensor,
    pad: int,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """The loop of :func:`stream`, whose arguments are checked when it is called and not at the first token."""
    tokens = torch.empty(len(state.seen), 0, dtype=torch.int64, device=state.logits.device)  # (B, generated so far)
    stopped = torch.zeros_like(state.seen, dtype=torch.bool)
    embed = model.get_input_embeddings()
    for _ in range(max_new_tokens):
        scores = processors(tokens, state.logits)
        if sample:
            token = torch.multinomial(scores.softmax(dim=-1), 1, generator=generator).squeeze(1)
        else:
            token = scores.argmax(dim=-1)
        over, stopped = stopped, stopped | torch.isin(token, stops)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
        yield token.masked_fill(over, pad)
        read(model, embed(token[:, None]), state=state)  # rows that are over read on too, and nobody listens
        if bool(stopped.all()):
            return


def stop_tokens_of(model: "PreTrainedModel") -> list[int]:
    """The decoder's end-of-sequence tokens, as its generation configuration or its configuration has them."""
    for config in (getattr(model, "generation_config", None), model.config):
        token = getattr(config, "eos_token_id", None)
        if token is not None:
            return [token] if isinstance(token, int) else list(token)
    return []


def _processors(
    temperature: float, top_k: int | None, top_p: float | None, further: "LogitsProcessorList | None"
) -> "LogitsProcessorList":
    """transformers' processors for these options."""
    from transformers.generation import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    chosen = LogitsProcessorList(further or [])
    if temperature > 0:
        chosen.append(TemperatureLogitsWarper(float(temperature)))
        if top_k is not None:
            chosen.append(TopKLogitsWarper(top_k))
        if top_p is not None:
            chosen.append(TopPLogitsWarper(top_p))
    return chosen


def _check_options(
    model: "PreTrainedModel",
    state: DecoderState,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must not be negative; 0 takes the most likely token")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError("top_k and top_p choose among tokens to draw from; give a temperature above 0 too")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1")
    limit = position_limit(model)
    if limit is not None and int(state.seen.max()) + max_new_tokens > limit:
        raise ValueError(
            f"{int(state.seen.max())} tokens and max_new_tokens={max_new_tokens} exceed the {limit} of this "
            f"{type(model).__name__} (max_position_embeddings); lower max_new_tokens or shorten the prompt"
        )
