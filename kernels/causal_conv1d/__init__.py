"""Short causal convolution: every channel mixes each token with the few before it, then an optional SiLU.

It precedes the scan in Mamba blocks (Gu & Dao, arXiv 2312.00752, section 3.4). With W taps, for every channel::

    y_l   = bias + sum_{w < W} weight[w] * x_{l - (W - 1) + w}      # zero before the first token
    out_l = silu(y_l)                                               # with activation="silu"

A reversed path runs from the last token to the first, ``x_{l + (W - 1) - w}``: the same as flipping the tokens,
convolving and flipping back, but nothing is flipped in memory. Sums are float32 (float64 for float64 inputs).
"""

from collections.abc import Sequence

from torch import Tensor

from zoo.kernels.causal_conv1d.op import causal_conv1d_op

__all__ = ["causal_conv1d"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    reverse: bool | Sequence[bool] = False,
) -> Tensor:
    """Convolves every channel over its own tokens, along one path or along K paths in one launch.

    Args:
        x: Tokens, (B, L, D), any strides with contiguous channels (other strides cost a copy); float32, bfloat16,
            float16 or float64. With K paths also (B, K, L, D), one input per path.
        weight: Taps, (D, W), or (K, D, W) for K paths. The last tap multiplies the current token, as in
            ``nn.Conv1d`` padded on the left. W is 1 to 4; any float dtype.
        bias: Added before the activation, (D,) or (K, D). Default none.
        activation: ``"silu"`` or None.
        reverse: Whether the path runs from the last token to the first; for K paths one flag or K flags.

    Returns:
        (B, L, D), or (B, K, L, D) for K paths, in the dtype of ``x``. The K-path result is a view of memory laid out
        (K, B, L, D), so ``out.transpose(0, 1).flatten(1, 2)`` is free and feeds one batched GEMM for all paths.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together; the message names expected and given.
    """
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv1d: activation {activation!r} is not known; use 'silu' or None")
    several = weight.dim() == 3
    if not several:
        weight = weight.unsqueeze(0)
        bias = None if bias is None else bias.unsqueeze(0)
    if x.dim() == 3:
        x = x.unsqueeze(1)
    reverse = [int(reverse)] * weight.shape[0] if isinstance(reverse, bool) else list(map(int, reverse))
    out = causal_conv1d_op(x, weight, bias, activation == "silu", reverse)  # (K, B, L, D)
    return out.transpose(0, 1) if several else out.squeeze(0)
