"""Mamba-2 scan connector (MSC) of ML-Mamba (arXiv 2407.19832, section 3.3): blocks of 2D scans between two MLPs.

The released form is the bidirectional scan (BSM) with all parts ("advanced"). The cross scan (CSM) and the form without
the blocks' MLPs ("basic") are in the paper alone. In the cross scan a direction's weights serve rows and columns, so a
bidirectional connector's weights fit; as everywhere in this package the convolution mixes neighbours in a row.
"""

from collections.abc import Sequence

import torch
from timm.layers import SwiGLU
from torch import Tensor, nn

from zoo.backbones.layers.recurrence import negative_exp
from zoo.backbones.layers.ssd import SSDMixer
from zoo.backbones.scans import list_scans, scan_paths
from zoo.heads.registry import register_head
from zoo.heads.vlm.connectors.fused_mlp import FusedMLPConnector
from zoo.heads.vlm.connectors.grid import feature_grid
from zoo.kernels import ssd

__all__ = ["Mamba2ScanConnector"]


@register_head("mamba2_scan_connector", task="connector")
class Mamba2ScanConnector(nn.Module):
    """Linear and GELU, blocks of a bidirectional Mamba-2 mixer and a SwiGLU, layer norm, three-layer MLP.

    Args:
        in_channels: Channels C of the image features.
        out_channels: Width D of the decoder's embeddings, and of all layers between.
        depth: Blocks.
        d_state: States N of the mixers.
        head_dim: Width of a head.
        expand: Inner width as a multiple of ``out_channels``.
        d_conv: Taps of the convolutions.
        groups: Groups of heads that share B and C.
        scans: Scan strategies of one path, each walked from both ends: ``("raster",)`` is the bidirectional scan,
            ``("raster", "columns")`` the cross scan.
        block_mlp: Whether blocks end with a SwiGLU; without it this is the paper's basic form.

    Raises:
        ValueError: If a scan strategy is not known, or sizes do not divide.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        depth: int = 2,
        d_state: int = 128,
        head_dim: int = 64,
        expand: int = 2,
        d_conv: int = 4,
        groups: int = 1,
        scans: Sequence[str] = ("raster",),
        block_mlp: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        unknown = [scan for scan in scans if scan not in list_scans()]
        if unknown or not scans:
            raise ValueError(f"scans={tuple(scans)} are not known; choose from {', '.join(list_scans())}")
        self.scans = tuple(scans)
        self.proj = nn.Sequential(nn.Linear(in_channels, out_channels, **dd), nn.GELU())
        mixer = dict(
            d_state=d_state, head_dim=head_dim, expand=expand, d_conv=d_conv, groups=groups, norm_groups=groups
        )
        self.blocks = nn.ModuleList([_Block(out_channels, mixer, block_mlp, dd) for _ in range(depth)])
        self.norm = nn.LayerNorm(out_channels, **dd)
        self.mlp = FusedMLPConnector(out_channels, out_channels, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-normal weights and no biases in the last MLP, as published; the rest starts as its layers do."""
        for layer in self.mlp.layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Features (B, H * W, C) to tokens (B, H * W, D).

        Args:
            features: Image features, row by row.
            grid: Their rows and columns (H, W); default a square. The bidirectional scan does not ask.

        Raises:
            ValueError: If the features do not fit the grid that a scan needs.
        """
        return self.mlp(self.forward_features(features, grid))

    def forward_features(self, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """What the last MLP gets, (B, H * W, D); arguments as for the whole."""
        paths = None
        if self.scans != ("raster",):
            H, W = feature_grid(features, grid)
            paths = torch.cat([scan_paths(scan, H, W, features.device) for scan in self.scans])
        x = self.proj(features)
        for block in self.blocks:
            x = block(x, paths)
        return self.norm(x)


class _Block(nn.Module):
    """Mixer without a norm before it, then layer norm and SwiGLU, both with residuals."""

    def __init__(self, dim: int, mixer: dict, mlp: bool, dd: dict) -> None:
        super().__init__()
        self.mixer = _PathsMixer(dim, bidirectional=True, **mixer, **dd)
        self.norm = nn.LayerNorm(dim, **dd) if mlp else None
        self.mlp = SwiGLU(dim, dim, **dd) if mlp else None

    def forward(self, x: Tensor, paths: Tensor | None = None) -> Tensor:
        x = x + self.mixer(x, paths)
        return x if self.mlp is None else x + self.mlp(self.norm(x))


class _PathsMixer(SSDMixer):
    """A bidirectional Mamba-2 mixer whose two directions each walk several paths, with the same weights."""

    def forward(self, x: Tensor, paths: Tensor | None = None) -> Tensor:
        """Tokens (B, L, D) to tokens (B, L, D) along paths (K, L) from both ends; default the tokens in order."""
        if paths is None:
            return super().forward(x)
        z, xBC, dt = self.in_proj(x).split([self.projected[0], sum(self.projected[1:4]), self.projected[4]], dim=-1)
        convolved, _ = self._convolve(xBC, None)
        directions = convolved.unbind(1)
        outputs = [self._gate_and_norm(self._scan_paths(directions[k], dt, k, paths), z) for k in (0, 1)]
        return self.out_proj((outputs[0] + outputs[1]) / 2)

    def _scan_paths(self, xBC: Tensor, dt: Tensor, k: int, paths: Tensor) -> Tensor:
        """Mean over paths of one direction's scan, from convolved x, B and C (B, L, channels) to (B, L, E)."""
        K = len(paths)
        x, B, C = xBC.split(self.convolved, dim=-1)
        x = x.unflatten(-1, (self.heads, self.head_dim))  # (B, L, H, P), the same for all paths
        B, C = (t.unflatten(-1, (self.groups, self.d_state))[:, None].expand(-1, K, -1, -1, -1) for t in (B, C))
        A, D, bias = (t[k].expand(K, -1) for t in (negative_exp(self.A_log), self.D, self.dt_bias))
        dt = dt[:, None].expand(-1, K, -1, -1)
        y = ssd(x, dt, A, B, C, D, bias, dt_softplus=True, paths=paths, reverse=self.reverse[k])
        return y.flatten(2) / K
