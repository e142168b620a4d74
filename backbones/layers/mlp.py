"""The MLP of a transformer block."""

import timm.layers
import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor

from zoo.kernels import bias_gelu, is_exporting

__all__ = ["Mlp"]

FUSED_ON = ("cuda", "xpu")  # types of devices


@register_notrace_module
class Mlp(timm.layers.Mlp):
    """timm's, with the bias and GELU of the hidden layer in one pass on GPUs; parameters have the same names.

    Args:
        in_features: Width D.
        hidden_features: Width of the hidden layer.
        drop: Dropout after either layer.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, hidden_features, drop=drop, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Rows (..., D) to rows (..., D)."""
        # Elsewhere a product adds its bias at no cost, and other tools know the steps of timm's layer.
        if x.device.type not in FUSED_ON or torch.jit.is_tracing() or is_exporting():
            return super().forward(x)
        x = bias_gelu(F.linear(x, self.fc1.weight), self.fc1.bias)
        return self.drop2(self.fc2(self.drop1(x)))
