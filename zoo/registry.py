"""What backbones need to be found and loaded: timm's builder with our downloads, and weights inside the package."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg as timm_build_model_with_cfg
from timm.models import resolve_pretrained_cfg
from torch import Tensor, nn

__all__ = ["PRETRAINED_FOLDER", "build_model_with_cfg", "packaged_weights"]

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


def build_model_with_cfg(
    model_cls: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    pretrained_filter_fn: Callable[[Mapping[str, Tensor], nn.Module], dict[str, Tensor]] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """timm's ``build_model_with_cfg``, with published weights from our cache and a strict check of what is loaded.

    A family's builder function calls it in timm's place, so that ``timm.create_model`` gets the same. Without
    ``pretrained`` it is timm's.

    Args:
        model_cls: Class of the model.
        variant: Name of the model.
        pretrained: Whether to load weights; they are downloaded and converted at first use (see :mod:`zoo.weights`).
        pretrained_cfg: Config, or its tag, instead of the registered one.
        pretrained_cfg_overlay: Entries that replace those of the config.
        pretrained_filter_fn: The family's ``checkpoint_filter_fn``.
        **kwargs: Arguments of the model, and timm's others.

    Raises:
        OSError: If the weights cannot be downloaded or written.
        ValueError: If they do not fit; the message says how, and which models they fit.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    if not pretrained:
        return timm_build_model_with_cfg(
            *(model_cls, variant, False, pretrained_cfg, overlay), pretrained_filter_fn=pretrained_filter_fn, **kwargs
        )
    from zoo.weights.fit import differences, misfit  # not above: these import the backbones
    from zoo.weights.pretrained import pretrained_overlay

    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    found = pretrained_overlay(cfg, kwargs.get("cache_dir"))

    def strict_filter(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The family's filter; what timm does not adapt to other classes and channels has to fit."""
        converted = pretrained_filter_fn(state_dict, model) if pretrained_filter_fn else dict(state_dict)
        heads = {f"{part}.{leaf}" for part in _names(cfg.classifier) for leaf in ("weight", "bias")}
        adapted = {f"{part}.weight" for part in _names(cfg.first_conv)} & set(converted)
        adapted |= heads if model.num_classes != cfg.num_classes else heads - set(converted)
        problems = differences(converted, model.state_dict(), adapted)
        if problems:
            raise misfit(variant, problems, state_dict)
        return converted

    model = timm_build_model_with_cfg(
        *(model_cls, variant, True, pretrained_cfg, {**overlay, **found}), pretrained_filter_fn=strict_filter, **kwargs
    )
    for module in (model, getattr(model, "model", None)):  # a feature extractor has the model inside
        for entry in found:
            getattr(module, "pretrained_cfg", {}).pop(entry, None)
    return model


def _names(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names of layers in a pretrained config, which may hold one, several or none."""
    return (value,) if isinstance(value, str) else tuple(value or ())
