"""The mixer of A2Mamba (arXiv 2507.16624): attention at two scales whose maps also gather a scan's hidden states.

Maps are channels-last, (B, H, W, C); heads are strided views of their channels.
"""

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from zoo.backbones.layers.backbone import numbers_for_trace
from zoo.backbones.layers.depthwise_conv import DepthwiseConv
from zoo.backbones.layers.layer_norm import LayerNorm
from zoo.backbones.layers.neighborhood import neighborhood_aggregate, neighborhood_maps
from zoo.backbones.layers.recurrence import init_steps, negative_exp
from zoo.backbones.layers.vss import make_norm
from zoo.backbones.scans.memory import remember_tables
from zoo.kernels import selective_scan

__all__ = ["AttentionAugmentedSSM", "MultiScaleMixer", "ScaleMaps", "resize_global_bias", "rotary_tables"]


class ScaleMaps(NamedTuple):
    """Attention maps at two scales; shapes: B batch, n heads in all, K window side.

    Attributes:
        near: Maps of the first half of the heads, (B, n / 2, H, W, K^2).
        far: Dilated maps of the second half.
        kernel_size: Window side K.
        dilation: Dilation of the second half, rows and columns.
    """

    near: Tensor
    far: Tensor
    kernel_size: int
    dilation: tuple[int, int]

    def aggregate_near(self, values: Tensor) -> Tensor:
        """Values (B, H, W, n / 2, c) of the first half of the heads to sums over windows."""
        return neighborhood_aggregate(self.near, values, self.kernel_size)

    def aggregate_far(self, values: Tensor) -> Tensor:
        """Values (B, H, W, n / 2, c) of the second half of the heads to sums over dilated windows."""
        return neighborhood_aggregate(self.far, values, self.kernel_size, self.dilation)


@remember_tables
def rotary_tables(H: int, W: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine by which queries (index 0 of the third dimension, also scaled) and keys turn.

    Pairs of channels turn: the first half of the pairs with the row, the second with the column, in whole cells, at
    frequencies from 1 to 1e-4, both included.

    Returns:
        Two tensors (H, W, 2, 1, head_dim / 2).
    """
    frequency = (1 / 10000 ** torch.linspace(0, 1, head_dim // 4, device=device)).to(dtype)
    row, column = (torch.arange(n, device=device, dtype=dtype).unsqueeze(1) * frequency for n in (H, W))
    turn = torch.cat([row.unsqueeze(1).expand(-1, W, -1), column.expand(H, -1, -1)], dim=-1)[:, :, None, None]
    scale = torch.ones(2, 1, 1, device=device, dtype=dtype)
    scale[0] = head_dim**-0.5
    return turn.cos() * scale, turn.sin() * scale


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns neighbouring channels (..., c) of x by tables (..., c / 2)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)


def resize_global_bias(bias: Tensor, tokens: int) -> Tensor:
    """Position biases (1, n, L, L) of all pairs of L tokens for another number of tokens, as published.

    Whatever the shapes of the grids, the pairs are resized as a picture.
    """
    if isinstance(tokens, int) and bias.shape[-1] == tokens:  # a symbol would be fixed to this number in the graph
        return bias
    wide = bias.to(torch.promote_types(bias.dtype, torch.float32))
    return F.interpolate(wide, size=(tokens, tokens), mode="bicubic", align_corners=False).to(bias.dtype)


class AttentionAugmentedSSM(nn.Module):
    """Row-major scan with one state per channel; attention maps gather the states before they are read (A2SSM).

    Shapes: B batch, C = dim, n heads, R rank of the step projection.

    Args:
        dim: Channels C.
        num_heads: Heads n of the maps, even.
    """

    def __init__(self, dim: int, num_heads: int, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        rank = math.ceil(dim / 16)
        self.splits = [rank, 1, 1]
        self.num_heads = num_heads
        self.conv = DepthwiseConv(dim, 5, activation="silu", **dd)
        self.x_proj = nn.Linear(dim, rank + 2, bias=False, **dd)
        self.dt_proj = nn.Linear(rank, dim, bias=False, **dd)
        self.dt_bias = nn.Parameter(torch.empty(dim, **dd))
        self.A_log = nn.Parameter(torch.empty(dim, 1, **dd))
        self.D = nn.Parameter(torch.empty(dim, **dd))
        self.state_fusion = nn.Linear(num_heads, num_heads, **dd)
        self.init_special()

    def init_special(self) -> None:
        """The published initialisation: steps log-uniform in [0.001, 0.1], A = -1, D = 1."""
        nn.init.kaiming_uniform_(self.x_proj.weight, a=5**0.5)
        bound = self.dt_proj.in_features**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        init_steps(self.dt_bias)
        nn.init.zeros_(self.A_log)
        nn.init.ones_(self.D)

    def forward(self, x: Tensor, maps: ScaleMaps | None = None) -> Tensor:
        """Map (B, H, W, C) to map (B, H, W, C); without attention maps states are read as they are."""
        x = self.conv(x)
        u = x.flatten(1, 2)
        dt, B, C = self.x_proj(u).split(self.splits, dim=-1)
        # Read by ones, the scan's output is its single state.
        A, ones = negative_exp(self.A_log), torch.ones_like(B)
        states = selective_scan(u, self.dt_proj(dt), A, B, ones, delta_bias=self.dt_bias, delta_softplus=True)
        if maps is not None:
            states = self._gather(states.view(x.shape), maps).flatten(1, 2)
        dtype = self.D.dtype  # float32 inside autocast too
        out = states.to(dtype) * C.to(dtype) + self.D * u.to(dtype)
        return out.view(x.shape)

    def _gather(self, states: Tensor, maps: ScaleMaps) -> Tensor:
        """States (B, H, W, C) summed over every cell's windows, then mixed across heads."""
        near, far = states.unflatten(-1, (2, self.num_heads // 2, -1)).unbind(3)
        states = torch.stack([maps.aggregate_near(near), maps.aggregate_far(far)], dim=3).flatten(3)
        # Mixing n heads is a product too narrow for hardware, and its operand would have to be transposed. As one over
        # all channels, with a diagonal block for every pair of heads, it takes the states as they lie.
        head_dim = states.shape[-1] // self.num_heads
        identity = torch.eye(head_dim, device=states.device, dtype=self.state_fusion.weight.dtype)
        weight = torch.kron(self.state_fusion.weight, identity)
        return F.linear(states, weight, self.state_fusion.bias.repeat_interleave(head_dim))


@register_notrace_module
class MultiScaleMixer(nn.Module):
    """Attention at two scales, then a state-space model that uses its maps, or attention over everything (MASS).

    The first half of the heads attends to neighbours. The second half attends to dilated neighbours that reach over the
    whole map, and its values include what the first half found. Dilations follow from the map's size.

    Shapes: B batch, C = dim, n heads, c = C / n, K = kernel_size.

    Args:
        dim: Channels C.
        num_heads: Heads n, even; C / n must be a multiple of 4.
        kernel_size: Window side K, odd.
        global_grid: Grid (H, W) whose tokens the attention over everything is made for; None for a state-space model.
        clamp_windows: Whether maps smaller than K get smaller windows.

    Raises:
        ValueError: If the numbers do not fit together.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        global_grid: tuple[int, int] | None = None,
        clamp_windows: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if num_heads < 2 or num_heads % 2 or dim % (4 * num_heads):
            raise ValueError(
                f"num_heads={num_heads} must be even and divide dim={dim} into heads of a multiple of 4 channels"
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd")
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.clamp_windows = clamp_windows
        self.gate = nn.Sequential(nn.Linear(dim, dim, **dd), make_norm("batchnorm", dim, **dd), nn.SiLU())
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.lepe = DepthwiseConv(dim, 5, **dd)
        self.bias_table = nn.Parameter(torch.empty(num_heads // 2, 2 * kernel_size - 1, 2 * kernel_size - 1, **dd))
        self.ssm, self.global_bias = None, None
        if global_grid is None:
            self.ssm = AttentionAugmentedSSM(dim, num_heads, **dd)
        else:
            tokens = global_grid[0] * global_grid[1]
            self.global_bias = nn.Parameter(torch.empty(1, num_heads, tokens, tokens, **dd))
        self.norm = LayerNorm(dim, eps=1e-6, narrow=False, **dd)
        self.proj = nn.Sequential(LayerNorm(dim, eps=1e-6, **dd), nn.Linear(dim, dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias_table)
        if self.global_bias is not None:
            nn.init.zeros_(self.global_bias)

    def set_global_tokens(self, tokens: int) -> None:
        """Remakes the biases of the attention over everything for another number of tokens."""
        resized = resize_global_bias(self.global_bias.detach(), tokens).clone()
        self.global_bias = nn.Parameter(resized, requires_grad=self.global_bias.requires_grad)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map (B, H, W, C) to turned and scaled queries, turned keys, and values, each (B, H, W, n, c)."""
        _, H, W, C = x.shape
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, C // self.num_heads))
        wide = torch.promote_types(qkv.dtype, torch.float32)
        q, k = rotate_pairs(qkv[:, :, :, :2], *rotary_tables(H, W, qkv.shape[-1], x.device, wide)).unbind(3)
        return q, k, qkv[:, :, :, 2]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ScaleMaps]:
        """Queries, keys and values (B, H, W, n, c) to attended values (B, H, W, n, c) and the maps."""
        kernel_size, dilation, bias = self._windows(*numbers_for_trace(q.shape[1], q.shape[2]))
        (near_q, far_q), (near_k, far_k), (near_v, far_v) = (x.chunk(2, dim=3) for x in (q, k, v))
        maps = ScaleMaps(
            neighborhood_maps(near_q, near_k, kernel_size, 1, bias),
            neighborhood_maps(far_q, far_k, kernel_size, dilation, bias),
            kernel_size,
            dilation,
        )
        near = maps.aggregate_near(near_v)
        return torch.cat([near, maps.aggregate_far(far_v + near)], dim=3), maps

    def _windows(self, H: int, W: int) -> tuple[int, tuple[int, int], Tensor]:
        """Window side, dilations and position biases for a map."""
        kernel_size, bias = self.kernel_size, self.bias_table
        smallest = min(H, W)
        if self.clamp_windows and smallest < kernel_size:
            kernel_size = smallest - 1 + smallest % 2
            margin = self.kernel_size - kernel_size
            bias = bias[:, margin:-margin, margin:-margin]
        return kernel_size, (min(H // kernel_size, kernel_size), min(W // kernel_size, kernel_size)), bias

    def _attend_everywhere(self, q: Tensor, k: Tensor, values: Tensor) -> Tensor:
        """Queries, keys and values (B, H, W, n, c) to (B, H, W, n, c), every token attending to all."""
        _, H, W, _, _ = q.shape
        bias = resize_global_bias(self.global_bias, H * W).to(q.dtype)
        q, k, values = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, values))  # (B, n, L, c)
        return F.scaled_dot_product_attention(q, k, values, bias, scale=1.0).transpose(1, 2).unflatten(1, (H, W))

    def forward(self, x: Tensor) -> Tensor:
        """Normed map (B, H, W, C) to map (B, H, W, C)."""
        q, k, v = self.project(x)
        y, maps = self.attend(q, k, v)
        if self.ssm is None:
            y = self._attend_everywhere(q, k, y).flatten(3)
        else:
            y = self.ssm(y.flatten(3), maps)
        y, gate = self.norm(y) + self.lepe(v.flatten(3)), self.gate(x)
        dtype = self.proj[1].weight.dtype
        # In 16 bits the product of the two would be too coarse. The meta device knows no autocast.
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            return self.proj(y.to(dtype) * gate.to(dtype))
