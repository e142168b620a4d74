"""The state of a decoder between tokens: what it has read so far, in memory that does not grow where it is Mamba.

A state is made by reading embeddings (:func:`read`) and can be copied, so that an image is encoded once and many
questions are asked about it, and taken apart into tensors, to be kept in a file.
"""

import copy
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zoo.heads.vlm.decoder import position_limit
from zoo.heads.vlm.mixers import recurrent_mixers

if TYPE_CHECKING:
    from transformers import Cache, PretrainedConfig, PreTrainedModel

__all__ = ["DecoderState", "accepts", "check_limit", "read"]


@dataclass
class DecoderState:
    """What a decoder has read.

    Attributes:
        cache: transformers' cache: per layer a convolution's last inputs and a recurrent state, or keys and values.
        logits: Scores of the next token, (B, V), float32.
        seen: Tokens read in each row, (B,), without padding.
        mask: Which of all positions read hold tokens, (B, T); None for decoders without attention, which do not look
            back at positions.
    """

    cache: "Cache"
    logits: Tensor
    seen: Tensor
    mask: Tensor | None

    def copy(self) -> "DecoderState":
        """A state of its own: reading on from one leaves the other alone."""
        return copy.deepcopy(self)

    def repeat(self, count: int) -> "DecoderState":
        """A copy with every row ``count`` times in succession, for several questions about each."""
        rows = torch.arange(len(self.seen), device=self.seen.device).repeat_interleave(count)
        return self.select(rows)

    def select(self, rows: Tensor) -> "DecoderState":
        """A copy with some of the rows, int64 (R,), in that order."""
        chosen = self.copy()
        chosen.cache.reorder_cache(rows)
        mask = None if self.mask is None else self.mask[rows]
        return replace(chosen, logits=self.logits[rows], seen=self.seen[rows], mask=mask)

    def nbytes(self) -> int:
        """Bytes of the cache."""
        return sum(t.nbytes for t in _cache_tensors(self.cache).values())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the state by name, to be written to a file; :meth:`from_tensors` takes them.

        Raises:
            ValueError: If the cache is not of transformers' common kind.
        """
        if not hasattr(self.cache, "layers"):
            raise ValueError(f"a {type(self.cache).__name__} is not known as tensors by name")
        mask = {} if self.mask is None else {"mask": self.mask}
        return {"logits": self.logits, "seen": self.seen, **mask, **_cache_tensors(self.cache)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], config: "PretrainedConfig") -> "DecoderState":
        """A state of the tensors of another one.

        Args:
            tensors: As of :meth:`tensors`.
            config: Configuration of the decoder that the state is of.

        Raises:
            ValueError: If these are no tensors of a state of such a decoder.
        """
        from transformers import DynamicCache

        if not {"logits", "seen"} <= set(tensors):
            raise ValueError(f"this is no decoder's state; its entries are {', '.join(tensors) or 'none'}")
        own = ("logits", "seen", "mask")
        cache = DynamicCache(config=config)
        for name in sorted(set(tensors) - set(own)):
            layer, kind, slot = name.split(".")
            if int(layer) >= len(cache.layers) or not hasattr(cache.layers[int(layer)], _SLOTS[kind]):
                raise ValueError(f"this is the state of another decoder: a {type(config).__name__} has no {name}")
            _fill(cache, int(layer), kind, int(slot), tensors)
        return cls(cache, *(tensors.get(name) for name in own))


CACHE_NAMES = ("cache", "cache_params", "past_key_values")  # transformers' newer releases have the first
_SLOTS = {"conv": "conv_states", "recurrent": "recurrent_states", "keys": "keys", "values": "values"}


def _cache_tensors(cache: "Cache") -> dict[str, Tensor]:
    """Tensors of a cache by ``layer.kind.slot``."""
    tensors = {}
    for index, layer in enumerate(cache.layers):
        for kind in ("conv", "recurrent"):
            for slot, tensor in getattr(layer, _SLOTS[kind], {}).items():
                if tensor is not None:
                    tensors[f"{index}.{kind}.{slot}"] = tensor
        for kind in ("keys", "values"):
            if getattr(layer, kind, None) is not None and getattr(layer, kind).numel():
                tensors[f"{index}.{kind}.0"] = getattr(layer, kind)
    return tensors


def _fill(cache: "Cache", layer: int, kind: str, slot: int, tensors: Mapping[str, Tensor]) -> None:
    """Puts a saved tensor into an empty cache."""
    tensor = tensors[f"{layer}.{kind}.{slot}"]
    if kind == "conv":
        cache.update_conv_state(tensor, layer, state_idx=slot)
    elif kind == "recurrent":
        cache.update_recurrent_state(tensor, layer, state_idx=slot)
    elif kind == "keys":  # together with the values
        cache.update(tensor, tensors[f"{layer}.values.{slot}"], layer)


@torch.no_grad()
def read(
    model: "PreTrainedModel", embeddings: Tensor, mask: Tensor | None = None, state: DecoderState | None = None
) -> DecoderState:
    """Reads embeddings, from the beginning or on from a state.

    Args:
        model: The decoder; dropout is off while it reads.
        embeddings: (B, L, D).
        mask: (B, L), 0 at padding, which stands before a row's tokens. Default no padding.
        state: What was read before; it is brought up to date in place. Default: this is the beginning.

    Returns:
        The state after all L positions; ``state`` itself if there was one.

    Raises:
        ValueError: If the tokens exceed the decoder's limit, or padding follows tokens that were read before, in a
            decoder with recurrent layers that are not on our kernels.
    """
    batch, length = embeddings.shape[:2]
    mask = None if mask is None or bool(mask.all()) else mask.bool()
    if mask is not None:
        _check_padding(model, mask, state)
    if state is not None and length > 1 and not _reads_on(model, state.cache):
        for position in range(length):
            read(model, embeddings[:, position : position + 1], state=state)
        return state
    given = torch.ones(batch, length, dtype=torch.bool, device=embeddings.device) if mask is None else mask
    seen = given.sum(dim=1) if state is None else state.seen + given.sum(dim=1)
    check_limit(model, seen)
    attends = accepts(model, "position_ids")
    if attends:
        given = given if state is None else torch.cat([state.mask, given], dim=1)  # all positions so far, (B, T)
        positions = given.cumsum(dim=1)[:, -length:] - 1
        inputs = dict(attention_mask=given, position_ids=positions.clamp(min=0))
    else:
        inputs = {} if mask is None else dict(attention_mask=mask)
    cache_name = next((name for name in CACHE_NAMES if accepts(model, name)), CACHE_NAMES[-1])
    if state is not None:
        inputs[cache_name] = state.cache
    if accepts(model, "logits_to_keep"):
        inputs["logits_to_keep"] = 1
    output = _evaluate(model, inputs_embeds=embeddings, use_cache=True, **inputs)
    logits, past = output.logits[:, -1].float(), given if attends else None
    if state is None:
        if output.get(cache_name) is None:
            raise ValueError(f"{type(model).__name__} returns no cache; as a decoder it cannot read on from a state")
        return DecoderState(output[cache_name], logits, seen, past)
    state.logits, state.seen, state.mask = logits, seen, past
    return state


def accepts(model: "PreTrainedModel", argument: str) -> bool:
    """Whether a model's forward names an argument; adapters around a model pass on all of them."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return argument in _arguments(type(inner))


@functools.cache
def _arguments(model_class: type) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)


def _evaluate(model: "PreTrainedModel", **inputs: Any) -> Any:
    """Output of a model in evaluation mode."""
    training = model.training
    try:
        return (model.eval() if training else model)(**inputs)
    finally:
        if training:
            model.train()


def check_limit(model: "PreTrainedModel", seen: Tensor) -> None:
    """Raises ValueError if the tokens of a row, (B,), exceed what the decoder can hold."""
    limit = position_limit(model)
    if limit is not None and int(seen.max()) > limit:
        raise ValueError(
            f"{int(seen.max())} tokens exceed the {limit} of this {type(model).__name__} (max_position_embeddings); "
            "shorten the prompt, give fewer or smaller images, or ask for fewer new tokens"
        )


def _check_padding(model: "PreTrainedModel", mask: Tensor, state: DecoderState | None) -> None:
    """Raises ValueError where padding (B, L) would change the result."""
    name = type(model).__name__
    if not bool(mask[:, -1].all()):
        raise ValueError("padding has to stand before a row's tokens, on the left, and every row needs a token")
    if not accepts(model, "attention_mask"):
        raise ValueError(f"{name} knows no padding; give rows of one length, or one row at a time")
    if state is not None and not _reads_on(model, state.cache):
        raise ValueError(
            f"{name} cannot read rows of different lengths on from a state, because its recurrent layers are not on "
            "this package's kernels; give rows of one length, or one row at a time"
        )


def _reads_on(model: "PreTrainedModel", cache: "Cache") -> bool:
    """Whether several tokens may follow on a cache at once.

    Attention can do that, and our kernels; some recurrent layers of transformers start their state anew.
    """
    if not hasattr(cache, "layers"):  # xLSTM's
        return False
    recurrent = {name.split(".")[0] for name in _cache_tensors(cache) if name.split(".")[1] in ("conv", "recurrent")}
    return len(recurrent) <= recurrent_mixers(model)
