"""A model zoo of vision state-space models on timm's interface.

``import zoo`` registers every backbone with timm, so ``timm.create_model("vim_tiny_patch16_224")`` works too.
"""

import importlib
from typing import Any

from zoo.backbones.scans import list_scans, scan_paths
from zoo.factory import create_model, list_models, list_pretrained
from zoo.kernels import backend, use_backend
from zoo.version import __version__
from zoo.weights import load_checkpoint, load_into

__all__ = [
    "__version__",
    "backend",
    "create_detector",
    "create_model",
    "create_segmentor",
    "create_vlm",
    "list_heads",
    "list_models",
    "list_pretrained",
    "list_scans",
    "list_vlms",
    "load_checkpoint",
    "load_into",
    "scan_paths",
    "use_backend",
]

LATER = {
    "create_detector": "zoo.detector",
    "create_segmentor": "zoo.segmentor",
    "create_vlm": "zoo.vlm",
    "list_heads": "zoo.heads",
    "list_vlms": "zoo.vlm",
}


def __getattr__(name: str) -> Any:
    """Imports heads when they are first asked for: backbones do without."""
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(LATER[name]), name)
