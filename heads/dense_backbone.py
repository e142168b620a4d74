"""A classifier's body as a backbone for dense prediction: maps (B, D, H, W) of chosen stages or blocks, with norms.

It works with every model that has timm's ``forward_intermediates``. Dense prediction does better where each map goes
through a norm, its own or the model's.
"""

import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.layers import LayerNorm2d
from timm.models import group_parameters, load_state_dict
from torch import Tensor, nn

from zoo.backbones.layers.backbone import checkpoint_filter, fit_channels

__all__ = ["DenseBackbone", "FeatureSource", "misfits"]

FeatureSource = Literal["stream", "mixer"]


class DenseBackbone(nn.Module):
    """A model of this zoo, or any of timm's with ``forward_intermediates``, without what classifies.

    Hierarchical models give one map per stage, mostly of strides 4, 8, 16 and 32. Columnar models give the maps after
    chosen blocks, all of the patch's stride (16 for most) and of the same width.

    Attributes:
        channels: Width of every map, in the order of ``out_indices``.
        strides: Pixels of the image to a cell of every map.
        mean: Mean of the images' channels, from 0 to 1, by which the pretrained model normalises.
        std: Their standard deviation.

    Args:
        model_name: Name of the model, with or without tag.
        pretrained: Whether to load the tag's weights.
        checkpoint: Other weights, by name or in a file; see :meth:`load`.
        out_indices: Stages or blocks whose features are returned, in rising order; negative ones count from the end.
            Default: all stages, or four blocks, at the end of each quarter of the column.
        norm: Whether features without a norm of their own go through the model's final norm, which pretrained weights
            have: those of all blocks of columnar models, the last stage's of hierarchical ones.
        feature_norms: Features that go through a layer norm of their own: True for all, else their indices. These are
            untrained unless the weights have them. Default none.
        source: What a feature of a columnar model is: ``"stream"``, the residual stream after the block, or
            ``"mixer"``, what the block adds to it, in families that know the difference.
        grad_checkpointing: Whether blocks are recomputed in the backward, which saves memory and takes time.
        **kwargs: Further arguments of the model, ``drop_path_rate``, ``in_chans`` or ``img_size`` for example.

    Raises:
        ValueError: If an index is out of range, weights are given twice or do not fit, or ``source`` is not known.
    """

    def __init__(
        self,
        model_name: str,
        pretrained: bool = False,
        checkpoint: Mapping[str, Tensor] | str | Path | None = None,
        out_indices: Sequence[int] | None = None,
        norm: bool = True,
        feature_norms: bool | Sequence[int] | None = None,
        source: FeatureSource = "stream",
        grad_checkpointing: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if pretrained and checkpoint is not None:
            raise ValueError("pretrained=True and checkpoint are two sources of weights; give one")
        self.model_name = model_name
        self.arguments = {"num_classes": 0, **kwargs}

        with torch.device("meta"):
            info = list(_create_model(model_name, **self.arguments).feature_info)
        columnar = len({level["reduction"] for level in info}) == 1
        self.out_indices = _indices("out_indices", _default_indices(len(info), columnar, out_indices), len(info))
        normed = self.out_indices if feature_norms is True else feature_norms or ()
        self.normed = [index for index in _indices("feature_norms", normed, len(info)) if index in self.out_indices]
        others = set(self.out_indices) - set(self.normed)
        self.norm = norm and bool(others if columnar else others & {len(info) - 1})

        self.model = self._create()
        _check_source(source, self.model)
        self.source = source
        info = list(self.model.feature_info)
        self.channels = [info[index]["num_chs"] for index in self.out_indices]
        self.strides = [info[index]["reduction"] for index in self.out_indices]
        self.mean, self.std = _normalisation(self.model)
        behind = [index for index in self.normed if str(index) not in getattr(self.model, "feature_norms", ())]
        self.norms = nn.ModuleDict({str(index): LayerNorm2d(info[index]["num_chs"]) for index in behind})
        self.model.prune_intermediate_layers(self.out_indices, prune_norm=not self.norm)
        if grad_checkpointing:
            self.set_grad_checkpointing()
        if pretrained:
            self._copy_from(_create_model(model_name, pretrained=True, **self.arguments))
        elif checkpoint is not None:
            self.load(checkpoint)

    def _create(self) -> nn.Module:
        """The whole model; with norms for features unless its family has no such argument."""
        try:
            return _create_model(self.model_name, feature_norms=self.normed, **self.arguments)
        except TypeError as error:
            if "feature_norms" not in str(error):
                raise
            return _create_model(self.model_name, **self.arguments)

    def _copy_from(self, source: nn.Module) -> None:
        """Takes over the parameters of the same model with all its blocks."""
        own = self.model.state_dict()
        given = {name: tensor for name, tensor in source.state_dict().items() if name in own}
        self.model.load_state_dict(given, strict=False)

    def load(self, weights: Mapping[str, Tensor] | str | Path, origin: str = "the checkpoint") -> None:
        """Loads weights of a backbone of this class, of a classifier, or of the authors' models for dense prediction.

        Args:
            weights: Tensors by name, ours or the authors', or a file that holds nothing else. They have to fit but for
                classifiers, norms of features and the number of image channels.
            origin: What an error calls tensors.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If they do not fit, or the file holds more.
        """
        if isinstance(weights, str | Path):
            weights, origin = _read(Path(weights)), str(weights)
        own = self.state_dict()
        if weights.keys() & own.keys():  # of a backbone of this class
            _check_fit(weights, own, origin)
            self.load_state_dict(weights)
            return
        source = self._create()
        weights = fit_channels(checkpoint_filter(source)(weights, source), source)
        unused = tuple(
            f"feature_norms.{index}." for index in range(len(source.feature_info)) if index not in self.normed
        )
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(unused)}
        _check_fit(weights, source.state_dict(), origin)
        source.load_state_dict({n: t for n, t in weights.items() if not _is_head(n)}, strict=False)
        self._copy_from(source)

    def convert(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the model, by our names or the authors', to the names of this backbone, without checking them."""
        return {f"model.{name}": tensor for name, tensor in checkpoint_filter(self.model)(weights, self.model).items()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks are recomputed in the backward instead of kept."""
        self.model.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone."""
        tell = getattr(self.model, "no_weight_decay", set)  # convolutional models of timm have none
        return {f"model.{name}" for name in tell()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """Order of parameters by name, from stem to the last block, for layer-wise decay and freezing.

        Norms of features come after everything else, together with whatever reads the features: they are as new.
        """
        groups = group_parameters(self.model, self.model.group_matcher(coarse=coarse), reverse=True)
        groups = {f"model.{name}": group for name, group in groups.items() if not name.startswith("feature_norms.")}
        return lambda name: groups.get(name, math.inf)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, C, H, W) to one map (B, D, H / stride, W / stride) per index."""
        options = {"source": self.source} if self.source != "stream" else {}
        features = self.model.forward_intermediates(
            x, indices=self.out_indices, norm=self.norm, output_fmt="NCHW", intermediates_only=True, **options
        )
        return tuple(
            self.norms[str(index)](feature) if str(index) in self.norms else feature
            for index, feature in zip(self.out_indices, features, strict=True)
        )


def _create_model(model_name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
    """``timm.create_model``, but with arguments that are None, which it drops: ``class_token=None`` is a choice."""
    if all(value is not None for value in arguments.values()):
        return timm.create_model(model_name, pretrained, **arguments)
    name, _, tag = model_name.partition(".")
    return timm.models.model_entrypoint(name)(pretrained, pretrained_cfg=tag or None, **arguments)


def _default_indices(count: int, columnar: bool, given: Sequence[int] | None) -> Sequence[int]:
    """The features asked for, or all stages, or the last block of each quarter of a column."""
    if given is not None:
        return given
    return sorted({count * quarter // 4 - 1 for quarter in (1, 2, 3, 4)} - {-1}) if columnar else range(count)


def _indices(name: str, given: Sequence[int], count: int) -> list[int]:
    """Indices of features, counted from the start and in rising order."""
    outside = [index for index in given if not -count <= index < count]
    if outside:
        raise ValueError(f"{name}={tuple(given)} names features that the model does not have; use 0 to {count - 1}")
    return sorted({index % count for index in given})


def _check_source(source: str, model: nn.Module) -> None:
    known = getattr(model, "feature_sources", ("stream",))
    if source not in known:
        raise ValueError(f"source={source!r} is not known to {type(model).__name__}; use one of {', '.join(known)}")


def _normalisation(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each of the model's image channels; their averages for unusual channels."""
    cfg, channels = model.pretrained_cfg, getattr(model, "in_chans", 3)
    return tuple(
        tuple(cfg[name]) if len(cfg[name]) == channels else (sum(cfg[name]) / len(cfg[name]),) * channels
        for name in ("mean", "std")
    )


def _read(path: Path) -> Mapping[str, Tensor]:
    """The tensors in a file by name."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        return load_state_dict(str(path), use_ema=False, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:  # the second is what newer timm makes of the first
        raise ValueError(
            f"{path} holds more than weights, which could be code, or is damaged; give the weights alone: "
            f"zoo.load_checkpoint({str(path)!r})"
        ) from error


def _is_head(name: str) -> bool:
    return name.split(".")[0] in ("head", "fc", "classifier")


def _check_fit(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str) -> None:
    """Raises an error unless the weights fit but for classifiers and norms."""
    optional = ("feature_norms.", "model.feature_norms.", "norms.", "norm.", "model.norm.")
    given = {name: tensor for name, tensor in given.items() if not _is_head(name)}
    needed = {n: t for n, t in expected.items() if not _is_head(n) and (n in given or not n.startswith(optional))}
    problems = misfits(given, needed)
    if problems:
        raise ValueError(
            f"the weights in {origin} do not fit: {'; '.join(problems)}. Choose the model_name that they belong "
            "to; of a larger model, load the backbone's part (prefix in mmengine's configs)"
        )


def misfits(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """What is missing, unexpected or of another shape, each in a phrase."""
    reshaped = [name for name in expected if name in given and given[name].shape != expected[name].shape]
    return [
        f"{len(names)} {what}, for example {names[0]}"
        for what, names in (
            ("missing", [name for name in expected if name not in given]),
            ("unexpected", [name for name in given if name not in expected]),
            ("of another shape", reshaped),
        )
        if names
    ]
