"""Where class tokens stand in a token sequence, and how to put them in and take them out.

A scan reads tokens one after the other, so the place of the class token is part of the model:

* ``"middle"``  after half of the patches, at index N // 2 for N patches;
* ``"first"``   before the patches;
* ``"last"``    after the patches;
* ``"both"``    one before and one after the patches;
* ``None``      no class token.
"""

from typing import Literal, get_args

import torch
from timm.models import register_notrace_function
from torch import Tensor

__all__ = ["ClassToken", "check_class_token", "insert_class_tokens", "num_class_tokens", "split_class_tokens"]

ClassToken = Literal["middle", "first", "last", "both"]


def check_class_token(place: ClassToken | None) -> None:
    """Raises ValueError unless ``place`` is one of the known places."""
    if place is not None and place not in get_args(ClassToken):
        raise ValueError(f"class_token={place!r} is not known; use one of {', '.join(get_args(ClassToken))} or None")


def num_class_tokens(place: ClassToken | None) -> int:
    """Number of class tokens T: 0, 1 or 2."""
    return {None: 0, "both": 2}.get(place, 1)


@torch.fx.wrap
@register_notrace_function
def insert_class_tokens(patches: Tensor, class_tokens: Tensor, place: ClassToken | None) -> Tensor:
    """Puts class tokens (B, T, D) among patch tokens (B, N, D); returns contiguous (B, N + T, D)."""
    if place is None:
        return patches.contiguous()
    if place == "both":
        return torch.cat([class_tokens[:, :1], patches, class_tokens[:, 1:]], dim=1)
    if place == "last":
        return torch.cat([patches, class_tokens], dim=1)
    index = patches.shape[1] // 2 if place == "middle" else 0
    return torch.cat([patches[:, :index], class_tokens, patches[:, index:]], dim=1)


@torch.fx.wrap
@register_notrace_function
def split_class_tokens(tokens: Tensor, place: ClassToken | None) -> tuple[Tensor, Tensor]:
    """Takes tokens (B, N + T, D) apart into patch tokens (B, N, D) and class tokens (B, T, D)."""
    if place is None:
        return tokens, tokens[:, :0]
    if place == "both":
        return tokens[:, 1:-1], torch.cat([tokens[:, :1], tokens[:, -1:]], dim=1)
    if place == "last":
        return tokens[:, :-1], tokens[:, -1:]
    index = (tokens.shape[1] - 1) // 2 if place == "middle" else 0
    if index == 0:
        return tokens[:, 1:], tokens[:, :1]
    return torch.cat([tokens[:, :index], tokens[:, index + 1 :]], dim=1), tokens[:, index : index + 1]
