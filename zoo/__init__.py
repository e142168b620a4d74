"""A model zoo of vision state-space models on timm's interface.

``import zoo`` registers every backbone with timm, so ``timm.create_model("vim_tiny_patch16_224")`` works too.
"""

from zoo.backbones.scans import list_scans, scan_paths
from zoo.factory import create_model, list_models, list_pretrained
from zoo.kernels import backend, use_backend
from zoo.version import __version__
from zoo.weights import load_checkpoint, load_into

__all__ = [
    "__version__",
    "backend",
    "create_model",
    "list_models",
    "list_pretrained",
    "list_scans",
    "load_checkpoint",
    "load_into",
    "scan_paths",
    "use_backend",
]
