"""Causal convolution in vectorised torch code: the fast path on CPUs, and correct on every device.

Channels-last tokens are an image of height 1 in the channels-last memory format, which torch convolves depthwise in
one pass without a transpose. Padded by W - 1 on both sides the image has L + W - 1 outputs: the first L are the causal
convolution; the last L, with the taps in reversed order, the anticausal one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.registration import accumulate_dtype

__all__ = ["backward", "forward"]


def _convolve(tokens: Tensor, taps: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """Tokens (B, L, D) convolved with taps (D, W) from the left, or from the right if ``reverse``; (B, L, D)."""
    L, (D, W) = tokens.shape[1], taps.shape
    taps = taps.flip(1) if reverse else taps
    image = tokens.transpose(1, 2).unsqueeze(2)  # (B, D, 1, L)
    filters = taps.view(D, 1, 1, W).contiguous(memory_format=torch.channels_last)
    with torch.autocast(tokens.device.type, enabled=False):  # would run the convolution in 16 bits
        y = F.conv2d(image, filters, bias, padding=(0, W - 1), groups=D)  # (B, D, 1, L + W - 1)
    return y.narrow(3, W - 1 if reverse else 0, L).squeeze(2).transpose(1, 2)


def _tap_gradients(d_y: Tensor, tokens: Tensor, W: int, reverse: bool) -> Tensor:
    """Gradient of the taps, (D, W): products of d_y and the tokens each tap read, both (B, L, D)."""
    L = tokens.shape[1]
    columns = []
    for distance in reversed(range(W)):  # the first tap reads the farthest token
        overlap = max(L - distance, 0)
        here, there = d_y.narrow(1, L - overlap, overlap), tokens.narrow(1, 0, overlap)
        if reverse:
            here, there = d_y.narrow(1, 0, overlap), tokens.narrow(1, L - overlap, overlap)
        columns.append((here * there).sum((0, 1)))
    return torch.stack(columns, dim=1)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: list[bool]) -> Tensor:
    """Outputs (K, B, L, D) in x's dtype from canonical inputs (see ``op.py``)."""
    dtype = accumulate_dtype(x)
    batch, paths_x, L, D = x.shape
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    tokens = x.to(dtype)
    out = x.new_empty(weight.shape[0], batch, L, D)
    for k, backwards in enumerate(reverse):
        y = _convolve(tokens[:, k % paths_x], weight[k], None if bias is None else bias[k], backwards)
        out[k] = F.silu(y, inplace=True) if silu else y
    return out


def backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: list[bool]
) -> list[Tensor]:
    """Gradients of x, weight and, if given, bias; the outputs before the SiLU are recomputed."""
    dtype = accumulate_dtype(x)
    paths_x = x.shape[1]
    taps, shifts = weight.to(dtype), None if bias is None else bias.to(dtype)
    tokens = x.to(dtype)
    d_x, d_weight, d_bias = [], [], []  # one entry per path
    for k, backwards in enumerate(reverse):
        d_y = grad_out[k].to(dtype)
        if silu:
            y = _convolve(tokens[:, k % paths_x], taps[k], None if shifts is None else shifts[k], backwards)
            d_y = torch.ops.aten.silu_backward(d_y, y)
        d_x.append(_convolve(d_y, taps[k], None, not backwards))
        d_weight.append(_tap_gradients(d_y, tokens[:, k % paths_x], weight.shape[2], backwards))
        d_bias.append(d_y.sum((0, 1)))
    d_x = torch.stack(d_x, dim=1)  # (B, K, L, D)
    if paths_x < len(reverse):
        d_x = d_x.sum(1, keepdim=True)
    gradients = [d_x.to(x.dtype), torch.stack(d_weight).to(weight.dtype)]
    return gradients if bias is None else [*gradients, torch.stack(d_bias).to(bias.dtype)]
