"""Selective scan (S6), the recurrence at the heart of Mamba, over any order of a 2D grid.

Source: Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752, eq. 2 and
algorithm 2 (zero-order hold for A, Euler for B). For every batch element, path, channel and state::

    step  = softplus(delta_t + delta_bias)          # or delta_t + delta_bias without delta_softplus
    h_t   = exp(step * A) * h_{t-1} + step * B_t * u_t
    y_t   = sum_n C_t[n] * h_t[n] + D * u_t
    out_t = silu(z_t) * sum over paths of y_t

With a window of W > 1 steps (LBMamba, arXiv 2506.15976) every token also receives, from the later tokens of its window,
``r_t = exp(step_t * A) * (r_{t+1} + step_{t+1} * B_{t+1} * u_{t+1})``, and C_t reads ``h_t + r_t``.

Activations are channels-last. State, softplus and exponentials are float32 whatever the inputs are (float64 for
float64 inputs).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.kernels.selective_scan import op
from zoo.kernels.selective_scan.projected import projected_scan

__all__ = ["LARGEST_WINDOW", "projected_scan", "selective_scan", "selective_scan_fn"]

LARGEST_WINDOW = op.CHUNK  # steps; a window lies in one of the chunks that a scan works through


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    paths: Tensor | None = None,
    reverse: bool | Sequence[bool] = False,
    window: int = 1,
    complete: bool = False,
    partition: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Runs the selective scan along one path, or along K paths whose outputs are added on the grid.

    One path (``A`` has two dimensions):

    Args:
        u: Input, (B, L, D), any strides with contiguous channels. Like delta, B, C and z: float32, bfloat16,
            float16 or float64.
        delta: Step sizes before bias and softplus, (B, L, D).
        A: State decay, (D, N), negative in practice.
        B: Input projection, (B, L, N), or (B, L, G, N) where channel d uses group ``d // (D / G)``.
        C: Output projection, same shape as ``B``.
        D: Skip weights, (D,).
        z: Gate, (B, L, D).
        delta_bias: Added to delta, (D,).
        delta_softplus: Whether steps are ``softplus(delta + delta_bias)``.
        paths: Integer table (1, P) or (P,): the token read and written at step p. -1 is a zero token that is stepped
            all the same (it decays the state); -2 fills up a path shorter than the table. A path visits a token at
            most once. Default: the tokens in order.
        reverse: Whether the path is walked from its end to its beginning.
        window: Steps of a locally bidirectional window (LBMamba, arXiv 2506.15976): a token also sees the later tokens
            of its window, through the same decays. 1, a plain scan, to 16, powers of two. Windows start at the first
            step of the path; the last one may be shorter. The last state is that of the plain scan.
        complete: Promises that every row of ``paths`` has all tokens and nothing else, which spares a buffer of zeros
            and a pass over it. A promise broken by a table on a GPU, where it is not checked, gives wrong results.
        partition: Promises that every token is on exactly one path, as on sub-grids, which spares the same. Each path
            has a row of ``paths``.
        initial_state: State before the first step, (B, D, N). Default zeros.
        return_last_state: Whether to return the state after the last step too.

    K paths (``A`` has three dimensions): ``A`` (K, D, N), ``D`` and ``delta_bias`` (K, D), ``delta`` (B, K, L, D),
    ``B`` and ``C`` (B, K, L, N) or (B, K, L, G, N), ``initial_state`` (B, K, D, N), ``reverse`` one flag or K flags,
    ``paths`` (U, P) where U divides K: path k walks row k mod U, so that an order walked from both ends is one row.
    ``u`` is (B, L, D) if all paths read the same input, else (B, K, L, D). ``z`` stays (B, L, D).

    Returns:
        Output (B, L, D) in the dtype of ``u``; with ``return_last_state`` also the last state, (B, D, N) or
        (B, K, D, N), in the dtype of the accumulation.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together; the message names expected and given.
    """
    several = A.dim() == 3
    if A.dim() not in (2, 3):
        raise ValueError(f"selective_scan: A has {A.dim()} dimensions; it must be (D, N) or, for K paths, (K, D, N)")
    for name, x, dims in (("u", u, (3, 4) if several else (3,)), ("delta", delta, (3 + several,))):
        if x.dim() not in dims:
            raise ValueError(f"selective_scan: {name} has {x.dim()} dimensions, expected {' or '.join(map(str, dims))}")
    for name, x in (("B", B), ("C", C)):
        if x.dim() not in (3 + several, 4 + several):
            raise ValueError(
                f"selective_scan: {name} has {x.dim()} dimensions, expected {3 + several} or {4 + several}"
            )
    if not several:
        A, delta, B, C = A.unsqueeze(0), delta.unsqueeze(1), B.unsqueeze(1), C.unsqueeze(1)
        D = None if D is None else D.unsqueeze(0)
        delta_bias = None if delta_bias is None else delta_bias.unsqueeze(0)
        initial_state = None if initial_state is None else initial_state.unsqueeze(1)
    if u.dim() == 3:
        u = u.unsqueeze(1)
    if B.dim() == 4:
        B = B.unsqueeze(3)
    if C.dim() == 4:
        C = C.unsqueeze(3)
    if paths is not None and paths.dim() == 1:
        paths = paths.unsqueeze(0)
    reverse = [int(reverse)] * A.shape[0] if isinstance(reverse, bool) else list(map(int, reverse))
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    options = (delta_softplus, reverse, window, complete, partition)
    out, last_state, _ = op.selective_scan_op(*inputs, paths, *options, needs_grad)
    if not return_last_state:
        return out
    return out, (last_state if several else last_state.squeeze(1))


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    window: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """Drop-in for ``mamba_ssm.ops.selective_scan_interface.selective_scan_fn`` (real A), channels before tokens.

    Args:
        u: Input, (B, D, L).
        delta: Step sizes before bias and softplus, (B, D, L).
        A: State decay, (D, N), real.
        B: (B, G, N, L), (B, N, L), or constant over tokens (D, N).
        C: Same choices as ``B``.
        D: Skip weights, (D,).
        z: Gate, (B, D, L).
        delta_bias: Added to delta, (D,).
        delta_softplus: Whether steps are ``softplus(delta + delta_bias)``.
        return_last_state: Whether to return the state after the last token too.
        window: Our addition, as in :func:`selective_scan`.

    Returns:
        Output (B, D, L); with ``return_last_state`` also the last state (B, D, N).
    """
    if A.is_complex():
        raise ValueError("complex A is not supported; vision models use real A of shape (D, N)")

    def tokens_first(x: Tensor) -> Tensor:
        """(B, L, G, N)"""
        if x.dim() == 2:  # (D, N), the same at every token: one group per channel
            return x.expand(u.shape[0], u.shape[2], *x.shape)
        return x.transpose(1, 2).unsqueeze(2) if x.dim() == 3 else x.permute(0, 3, 1, 2)

    B, C = tokens_first(B), tokens_first(C)
    if B.shape[2] != C.shape[2]:  # one of them is constant over tokens, with a group per channel
        B, C = (x.repeat_interleave(u.shape[1] // x.shape[2], dim=2) for x in (B, C))
    result = selective_scan(
        u.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        B,
        C,
        D,
        None if z is None else z.transpose(1, 2),
        delta_bias,
        delta_softplus=delta_softplus,
        window=window,
        return_last_state=return_last_state,
    )
    if return_last_state:
        return result[0].transpose(1, 2), result[1]
    return result.transpose(1, 2)
