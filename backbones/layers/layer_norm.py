"""Layer norm over channels that come last, by the zoo's kernel where that is faster than torch's."""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn

from zoo.kernels import GATES, MAX_NORM_CHANNELS, GateActivation, add_layer_norm, autocast_dtype, gated_layer_norm

__all__ = ["LayerNorm", "normed_dtype", "plain_on_cpu"]


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last dimension, with the parameters of ``nn.LayerNorm``.

    On CPUs, and for more than 8192 channels, it is torch's.

    Args:
        dim: Channels C.
        eps: Added to the variance.
        narrow: Whether the normed rows are of autocast's dtype where it is on: right if a linear layer or a convolution
            reads them. Otherwise they are float32 there, and of the input's dtype where autocast is off.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        narrow: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, eps, device=device, dtype=dtype)
        self.narrow = narrow

    def forward(self, x: Tensor) -> Tensor:
        """Rows (..., C) to rows (..., C)."""
        return _layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps, self.narrow)

    def gated(self, x: Tensor, z: Tensor, activation: GateActivation | None) -> Tensor:
        """Normed rows (..., C) times the activation of a gate z (..., C), in the dtype of z. FX cannot trace it."""
        watched = self._forward_hooks or self._forward_pre_hooks  # which want to see rows and normed rows
        # On CPUs torch keeps what the backward needs, which the op would compute again.
        if watched or x.device.type == "cpu" or self.normalized_shape[0] > MAX_NORM_CHANNELS:
            return self(x).to(z.dtype) * GATES[activation](z)
        return gated_layer_norm(x, z, self.weight, self.bias, self.eps, activation=activation)


def normed_dtype(device: str, dtype: torch.dtype, narrow: bool) -> torch.dtype:
    """Dtype of normed rows on a type of device, if it is ``dtype`` without autocast."""
    cast = autocast_dtype(device, dtype)
    if cast is None:
        return dtype
    return cast if narrow else torch.float32


def plain_on_cpu(dtype: torch.dtype, *tensors: Tensor) -> bool:
    """Whether tensors are on CPUs and all of the dtype of the normed rows, so that torch's layer norm serves best.

    The op's CPU code calls torch's kernel too, but takes 30 to 50 us more, and its backward finds means and deviations
    anew.
    """
    return all(tensor.device.type == "cpu" and tensor.dtype == dtype for tensor in tensors)


@torch.fx.wrap
@register_notrace_function
def _layer_norm(
    x: Tensor, shape: tuple[int, ...], weight: Tensor, bias: Tensor | None, eps: float, narrow: bool
) -> Tensor:
    """A single node for FX, which chooses the dtype when it runs."""
    dtype = normed_dtype(x.device.type, x.dtype, narrow)
    if plain_on_cpu(dtype, x, weight) or shape[0] > MAX_NORM_CHANNELS:
        return F.layer_norm(x, shape, weight, bias, eps).to(dtype)
    return add_layer_norm(None, x, weight, bias, eps, dtype)[0]
