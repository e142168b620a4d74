"""Attention over channels: LocalMamba's BiAttn (arXiv 2403.09338, section 3.3) and EfficientVMamba's gate."""

import math

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from zoo.backbones.layers.layer_norm import LayerNorm

__all__ = ["ChannelAttention"]


@register_notrace_module
class ChannelAttention(nn.Module):
    """Weighs channels by what the tokens of a sequence, or the cells of a map, have in common.

    Args:
        dim: Channels C.
        reduction: How many times narrower the hidden layer is.
    """

    def __init__(
        self,
        dim: int,
        reduction: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = LayerNorm(dim, **dd)
        self.reduce = nn.Linear(dim, dim // reduction, **dd)
        self.select = nn.Linear(dim // reduction, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, L, C) or a map (B, H, W, C) to the weights of the channels, (B, 1, C) or (B, 1, 1, C), 0 to 1."""
        # The mean of many tokens is worth more digits than each of them. It is divided after the sum: the gradient of a
        # mean is divided for every token, in all those digits.
        wide = torch.promote_types(x.dtype, torch.float32)
        total = self.norm(x).sum(tuple(range(1, x.dim() - 1)), keepdim=True, dtype=wide)
        common = (total / math.prod(x.shape[1:-1])).to(self.norm.weight.dtype)
        return torch.sigmoid(self.select(F.gelu(self.reduce(common))))
