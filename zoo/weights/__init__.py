"""Weights: finding, downloading, checking, converting and loading them.

``create_model(..., pretrained=True)`` needs nothing of this; it is here for tools and for checkpoints of your own.
"""

from zoo.backbones.layers.backbone import checkpoint_filter
from zoo.weights.cache import Record, cache_folder
from zoo.weights.checkpoint import load_checkpoint, save_weights
from zoo.weights.fit import build_on_meta, fitting_variants, load_features, load_into
from zoo.weights.pretrained import (
    cached_weights,
    convert_checkpoint,
    fetch_pretrained,
    licence_note,
    pretrained_overlay,
    verify_pretrained,
)
from zoo.weights.transfer import DownloadError, download

__all__ = [
    "DownloadError",
    "Record",
    "build_on_meta",
    "cache_folder",
    "cached_weights",
    "checkpoint_filter",
    "convert_checkpoint",
    "download",
    "fetch_pretrained",
    "fitting_variants",
    "licence_note",
    "load_checkpoint",
    "load_features",
    "load_into",
    "pretrained_overlay",
    "save_weights",
    "verify_pretrained",
]
