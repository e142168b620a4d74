"""Weights that ship inside the package. Standard library only, so that backbones can ask without an import cycle."""

from pathlib import Path

__all__ = ["PRETRAINED_FOLDER", "packaged_weights"]

PRETRAINED_FOLDER = Path(__file__).parent / "pretrained"


def packaged_weights(name: str) -> dict[str, str]:
    """The ``file`` entry of a pretrained config for weights in this package.

    Args:
        name: Model name and tag, ``"vim_nano.fashion_mnist"``.

    Returns:
        ``{"file": path}``, or an empty dict if this build does not ship the weights.
    """
    path = PRETRAINED_FOLDER / f"{name}.safetensors"
    return {"file": str(path)} if path.is_file() else {}
