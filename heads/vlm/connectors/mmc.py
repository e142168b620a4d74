"""Multimodal connector (MMC) of VL-Mamba (arXiv 2403.13600, section 3.3): one Mamba layer that scans in 2D.

The paper has no released code and leaves open the norm, how directions are merged and the width between the layers;
here these are a layer norm, the mean, and the decoder's width. Directions have weights of their own, and as everywhere
in this package the convolution mixes neighbours in a row.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.backbones.layers.mamba import MambaMixer
from zoo.backbones.scans import scan_paths
from zoo.heads.registry import register_head
from zoo.heads.vlm.connectors.grid import feature_grid

__all__ = ["MMCConnector", "MMCForm", "MMCScan"]

MMCForm = Literal["l2", "mlp"]
MMCScan = Literal["bidirectional", "cross"]


@register_head("mmc_connector", task="connector")
class MMCConnector(nn.Module):
    """Scan with a skip connection and a norm, between linear layers or before an MLP.

    Args:
        in_channels: Channels C of the image features.
        out_channels: Width D of the decoder's embeddings.
        form: ``"l2"`` (the paper's VSS-L2, its best): linear, GELU, scan, skip around both, norm, linear;
            ``"mlp"`` (VSS-MLP): scan of the features themselves, skip, norm, two-layer MLP.
        scan: ``"bidirectional"`` reads the rows from both ends, ``"cross"`` the columns too.
        d_state: States per channel of the scan.

    Raises:
        ValueError: If ``form`` or ``scan`` is not one of its choices.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        form: MMCForm = "l2",
        scan: MMCScan = "bidirectional",
        d_state: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if form not in get_args(MMCForm):
            raise ValueError(f"form={form!r} is not known; use one of {', '.join(get_args(MMCForm))}")
        if scan not in get_args(MMCScan):
            raise ValueError(f"scan={scan!r} is not known; use one of {', '.join(get_args(MMCScan))}")
        self.scan = scan
        width = out_channels if form == "l2" else in_channels
        self.proj = nn.Linear(in_channels, out_channels, **dd) if form == "l2" else None
        self.mixer = MambaMixer(width, d_state, directions=4 if scan == "cross" else "bidirectional", **dd)
        self.norm = nn.LayerNorm(width, **dd)
        last = nn.Linear(width, out_channels, **dd)
        self.mlp = last if form == "l2" else nn.Sequential(last, nn.GELU(), nn.Linear(out_channels, out_channels, **dd))

    def forward(self, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Features (B, H * W, C) to tokens (B, H * W, D).

        Args:
            features: Image features, row by row.
            grid: Their rows and columns (H, W); default a square. The bidirectional scan does not ask.

        Raises:
            ValueError: If the features do not fit the grid that the cross scan needs.
        """
        paths = None
        if self.scan == "cross":
            paths = scan_paths("cross", *feature_grid(features, grid), features.device)
        x = features if self.proj is None else self.proj(features)
        scanned = self.mixer(x if self.proj is None else F.gelu(x), paths)
        return self.mlp(self.norm(scanned + x))
