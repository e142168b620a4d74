"""Loading state dicts with errors that say what is wrong and which model would fit."""

import functools
import logging
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import timm
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zoo import backbones
from zoo.backbones.layers.backbone import checkpoint_filter, fit_channels

__all__ = [
    "build_on_meta",
    "differences",
    "fitting_variants",
    "load_features",
    "load_into",
    "misfit",
]

_logger = logging.getLogger(__name__)

INITIALISERS = {
    *("add_", "clamp_", "copy_", "div_", "erfinv_", "exponential_", "fill_", "log_", "mul_", "neg_", "normal_"),
    *("sub_", "uniform_", "zero_"),
}
OF_ANOTHER_FAMILY = (KeyError, ValueError, RuntimeError, AttributeError)  # from a filter that met foreign weights
SIZE_VARIES = ("pos_embed", "rope", "head")  # parts that depend on image size and classes, not on the variant
_sizes: dict[str, int] = {}  # elements of each model's other parts, by name


def load_into(model: nn.Module, state_dict: Mapping[str, Tensor], *, assign: bool = False) -> None:
    """Converts a state dict to the model's names and loads it; every name and shape has to fit.

    Args:
        model: Model of this zoo or of timm.
        state_dict: Weights by name, ours or the authors'.
        assign: Whether the model takes over the tensors themselves instead of copying their values.

    Raises:
        ValueError: If names or shapes differ; the message lists them, and the models that the weights fit.
    """
    _load_converted(model, checkpoint_filter(model)(state_dict, model), state_dict, assign)


def load_features(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Loads a classifier's weights into a model that has no classifier, or is to learn a new one.

    Everything else has to fit but for the number of image channels, to which the first convolution is adapted.

    Args:
        model: Model of this zoo or of timm. A classifier of the same shape is taken over.
        state_dict: Weights by name, ours or the authors'.

    Raises:
        ValueError: As of :func:`load_into`.
    """
    weights = fit_channels(checkpoint_filter(model)(state_dict, model), model)
    own = model.state_dict()
    classifiers = _classifiers(model)
    for name in [name for name in weights if name.rpartition(".")[0] in classifiers]:
        if name not in own:
            del weights[name]
        elif weights[name].shape != own[name].shape:
            _logger.info("New %s for %d classes; the weights have %d", name, len(own[name]), len(weights[name]))
            weights[name] = own[name]
    _load_converted(model, weights, state_dict)


def _load_converted(
    model: nn.Module, converted: Mapping[str, Tensor], state_dict: Mapping[str, Tensor], assign: bool = False
) -> None:
    """Loads weights by the model's names; an error tells which models the ones they were made of fit."""
    problems = differences(converted, model.state_dict())
    if problems:
        raise misfit(type(model).__name__, problems, state_dict)
    model.load_state_dict(converted, assign=assign)


def misfit(what: str, problems: list[str], state_dict: Mapping[str, Tensor]) -> ValueError:
    """The error that says why weights do not fit, and which models they fit.

    Args:
        what: Name of the model.
        problems: As from :func:`differences`.
        state_dict: The weights, under any names.
    """
    fits = fitting_variants(state_dict)
    advice = f"These weights fit {', '.join(fits)}." if fits else "These weights fit no model of this zoo."
    return ValueError(f"the weights do not fit this {what}: {'; '.join(problems)}. {advice}")


def differences(
    given: Mapping[str, Tensor], expected: Mapping[str, Tensor], ignored: Collection[str] = (), shown: int = 4
) -> list[str]:
    """What is missing, unexpected or of another shape, each in a phrase.

    Args:
        given: Tensors by name.
        expected: Tensors by name as they should be.
        ignored: Names that may differ in any way.
        shown: How many names a phrase spells out.
    """

    def phrase(what: str, items: list[str]) -> list[str]:
        rest = [f"and {len(items) - shown} more"] if len(items) > shown else []
        return [f"{what} {', '.join(items[:shown] + rest)}"] if items else []

    reshaped = [
        f"{name} {tuple(given[name].shape)} for {tuple(expected[name].shape)}"
        for name in expected
        if name in given and name not in ignored and given[name].shape != expected[name].shape
    ]
    return [
        *phrase("missing", [name for name in expected if name not in given and name not in ignored]),
        *phrase("unexpected", [name for name in given if name not in expected and name not in ignored]),
        *phrase("wrong shape", reshaped),
    ]


class _NoInitialisation(TorchFunctionMode):
    """Leaves out what would fill tensors on the meta device with values: they have none, and it takes the time."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in INITIALISERS:
            target = args[0] if args else kwargs.get("tensor")
            if isinstance(target, Tensor) and target.is_meta:
                return target
        return func(*args, **kwargs)


def build_on_meta(model_name: str, **kwargs: Any) -> nn.Module:
    """A model without values: names and shapes only, in a fraction of the time.

    Args:
        model_name: Name, with or without tag.
        **kwargs: Arguments of ``timm.create_model``.
    """
    with _NoInitialisation():
        return timm.create_model(model_name, device="meta", **kwargs)


def fitting_variants(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Names of this zoo's models that a state dict fits, with the number of classes where it is not the default.

    Families whose names differ are skipped, and of the others all models of another size: few models are compared.
    """
    shapes = {name: tensor.to("meta") for name, tensor in state_dict.items() if isinstance(tensor, Tensor)}
    fits = []
    for family in backbones.FAMILIES:
        names = timm.list_models(module=family)
        lower, upper = _possible_sizes(_smallest(family), shapes)
        for name in names if upper else ():
            model = None
            if name not in _sizes:
                model = build_on_meta(name)
                _sizes[name] = _variant_size(model.state_dict())
            if not lower <= _sizes[name] <= upper:
                continue
            model = model or build_on_meta(name)
            try:
                converted = checkpoint_filter(model)(shapes, model)
            except OF_ANOTHER_FAMILY:
                continue
            classes = _num_classes(converted, model)
            if classes not in (None, model.num_classes):
                model.reset_classifier(classes)
            if not differences(converted, model.state_dict()):
                default = classes == timm.get_pretrained_cfg_value(name, "num_classes")
                fits.append(name if default else f"{name} (num_classes={classes})")
    return fits


@functools.cache
def _smallest(family: str) -> nn.Module:
    """A small model of a family, to try names on."""
    names = timm.list_models(module=family)
    ours = (name for size in ("_micro", "_pico", "_nano") for name in names if name.endswith(size))
    return build_on_meta(next(ours, names[0]))


def _possible_sizes(model: nn.Module, shapes: Mapping[str, Tensor]) -> tuple[float, float]:
    """Sizes between which a variant that fits lies, judged by what a relative of it makes of the state dict.

    Returns:
        Least and greatest number of elements as from ``_variant_size``; 0, 0 if the names are of another family.
    """
    try:
        converted = checkpoint_filter(model)({n: t for n, t in shapes.items() if "pos_embed" not in n}, model)
    except OF_ANOTHER_FAMILY:
        return 0, math.inf
    known = {_pattern(name) for name in model.state_dict()}
    met = {_pattern(name) for name in converted}
    if len(known & met) < 0.3 * len(met):
        return 0, 0
    size = _variant_size(converted)
    return 0.75 * size, size / 0.75


def _variant_size(state_dict: Mapping[str, Tensor]) -> int:
    """Elements of the parts that tell variants apart."""
    return sum(t.numel() for name, t in state_dict.items() if not any(part in name for part in SIZE_VARIES))


def _pattern(name: str) -> str:
    """A name without its numbers."""
    return re.sub(r"\d+", "#", name)


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """Names of the model's classifiers: mostly one."""
    names = model.pretrained_cfg["classifier"]
    return (names,) if isinstance(names, str) else tuple(names or ())


def _num_classes(state_dict: Mapping[str, Tensor], model: nn.Module) -> int | None:
    """Rows of the classifier in a state dict."""
    weight = next((state_dict.get(f"{name}.weight") for name in _classifiers(model)), None)
    return None if weight is None else weight.shape[0]
