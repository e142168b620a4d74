"""Connectors: from the features of a vision tower to embeddings of a language model, one file each.

A connector is a head of task ``"connector"``, so ``list_heads("connector")`` names them and ``create_head(name,
in_channels, out_channels)`` creates them. It is called with features (B, N, C), row by row, and their grid (H, W).
"""

from zoo.heads.vlm.connectors.fused_mlp import FusedMLPConnector
from zoo.heads.vlm.connectors.ldp import LDPConnector
from zoo.heads.vlm.connectors.linear import LinearConnector
from zoo.heads.vlm.connectors.mamba2_scan import Mamba2ScanConnector
from zoo.heads.vlm.connectors.mlp import MLPConnector
from zoo.heads.vlm.connectors.mmc import MMCConnector

__all__ = [
    "FusedMLPConnector",
    "LDPConnector",
    "LinearConnector",
    "MLPConnector",
    "MMCConnector",
    "Mamba2ScanConnector",
]
