"""Structured state-space duality (SSD), the recurrence of Mamba-2, as matrix products over any order of a 2D grid.

Source: Dao & Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space
Duality", arXiv 2405.21060, sections 2.3 and 6 (block decomposition). For every batch element, path and head, with a
state h of (P, N)::

    step  = softplus(dt_t + dt_bias)                # or dt_t + dt_bias without dt_softplus
    h_t   = exp(step * A) * h_{t-1} + step * x_t B_t^T
    y_t   = h_t C_t + D * x_t
    out_t = sum over paths of y_t

Compared with the selective scan the decay is one number per head, so a chunk of tokens is worked out as small matrix
products, on tensor cores where there are some: within a chunk ``y_t`` sums ``(C_t . B_s) exp(sum of step * A over
s < i <= t)``, and chunks hand on their states.

Activations are channels-last. States, decays and sums are float32 whatever the inputs are (float64 for float64 inputs);
16-bit inputs are multiplied in their own dtype and added in float32.
"""

from collections.abc import Sequence

from torch import Tensor

from zoo.kernels.ssd.op import ssd_op

__all__ = ["ssd"]


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    paths: Tensor | None = None,
    reverse: bool | Sequence[bool] = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Runs SSD along one path, or along K paths whose outputs are added on the grid.

    In this op H counts heads, P is the width of a head and S the steps of a path.

    One path (``B`` and ``C`` have three or four dimensions):

    Args:
        x: Input, (B, L, H, P), any strides with contiguous channels. Like dt, B and C: float32, bfloat16, float16 or
            float64.
        dt: Step sizes before bias and softplus, (B, L, H). Without ``A`` the logarithm of the decay itself, at most 0.
        A: Decay of every head, (H,), negative in practice. None: ``h_t = exp(dt_t) * h_{t-1} + x_t B_t^T``, with
            neither bias nor softplus.
        B: Input projection, (B, L, N), or (B, L, G, N) where head h uses group ``h // (H / G)``.
        C: Output projection, same shape as ``B``.
        D: Skip weights, (H,).
        dt_bias: Added to dt, (H,).
        dt_softplus: Whether steps are ``softplus(dt + dt_bias)``.
        paths: Integer table (1, S) or (S,): the token read and written at a step. -1 is a zero token that is stepped
            all the same (it decays the state); -2 fills up a path shorter than the table. A path visits a token at
            most once. Default: the tokens in order.
        reverse: Whether the path is walked from its end to its beginning.
        initial_state: State before the first step, (B, H, P, N). Default zeros.
        return_last_state: Whether to return the state after the last step too.

    K paths (``dt`` has four dimensions): ``dt`` (B, K, L, H), ``A``, ``D`` and ``dt_bias`` (K, H), ``B`` and ``C``
    (B, K, L, N) or (B, K, L, G, N), ``initial_state`` (B, K, H, P, N), ``paths`` (K, S), ``reverse`` one flag or K
    flags; ``x`` is (B, L, H, P) if all paths read the same input, else (B, K, L, H, P).

    Returns:
        Output (B, L, H, P) in the dtype of ``x``; with ``return_last_state`` also the last state, (B, H, P, N) or
        (B, K, H, P, N), in the dtype of the accumulation.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together; the message names expected and given.
    """
    several = dt.dim() == 4
    for name, tensor, dims in (
        ("dt", dt, (3, 4)),
        ("x", x, (4, 5) if several else (4,)),
        ("B", B, (3 + several, 4 + several)),
        ("C", C, (3 + several, 4 + several)),
    ):
        if tensor.dim() not in dims:
            raise ValueError(f"ssd: {name} has {tensor.dim()} dimensions, expected {' or '.join(map(str, dims))}")
    if not several:
        dt, B, C = dt.unsqueeze(1), B.unsqueeze(1), C.unsqueeze(1)
        A, D, dt_bias = (None if t is None else t.unsqueeze(0) for t in (A, D, dt_bias))
        initial_state = None if initial_state is None else initial_state.unsqueeze(1)
    x = x.unsqueeze(1) if x.dim() == 4 else x
    B, C = (t.unsqueeze(3) if t.dim() == 4 else t for t in (B, C))
    paths = paths.unsqueeze(0) if paths is not None and paths.dim() == 1 else paths
    reverse = [int(reverse)] * dt.shape[1] if isinstance(reverse, bool) else list(map(int, reverse))
    out, last_state = ssd_op(x, dt, A, B, C, D, dt_bias, initial_state, paths, dt_softplus, reverse)
    if not return_last_state:
        return out
    return out, (last_state if several else last_state.squeeze(1))
