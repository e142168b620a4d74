"""Our backbones inside mmengine and mmsegmentation.

A config that says ``custom_imports = dict(imports=["zoo.heads.mmseg"])`` runs from any folder; scripts import this
module before they import ``mmseg``. It does three things:

1. It registers :class:`ZooBackbone` with mmengine, where mmsegmentation looks too. mmsegmentation's own
   ``TIMMBackbone`` then knows our models as well, since they are registered with timm.
2. It makes mmsegmentation work with ``mmcv-lite``, which holds everything of mmcv but the compiled operators, so that
   nobody has to build mmcv for the installed torch. mmsegmentation looks for these operators when it is imported; it is
   given a stand-in whose functions raise an error when they are called. A compiled mmcv is left alone.
3. It lets ``torch.load`` read what mmengine keeps beside weights, so that training resumes and models can be tested.

Where worker processes start anew instead of as a fork of their parent (Windows, macOS), they import ``mmseg`` before
they know of this module: set ``num_workers=0`` there, or use a compiled mmcv.

A model of one column (Vim, PlainMamba, LocalVim...) in a config, with the neck that brings its maps, all of stride 16,
to four strides::

    backbone=dict(type="ZooBackbone", model_name="vim_tiny_patch16_224", pretrained=True, out_indices=(5, 11, 17, 23)),
    neck=dict(type="Feature2Pyramid", embed_dim=192, rescales=[4, 2, 1, 0.5]),
    decode_head=dict(type="UPerHead", in_channels=[192] * 4, in_index=[0, 1, 2, 3], ...),
"""

import importlib.util
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import timm
import torch
from timm.layers import LayerNorm2d
from timm.models import load_state_dict
from torch import Tensor, nn

try:
    from mmengine.logging import HistoryBuffer
    from mmengine.model import BaseModule
    from mmengine.model.weight_init import update_init_info
    from mmengine.registry import MODELS
    from mmengine.runner import CheckpointLoader
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"zoo.heads.mmseg needs the package {error.name!r}; install it with pip install 'vision-ssm-zoo[seg]'",
        name=error.name,
    ) from error

__all__ = ["ZooBackbone", "allow_training_checkpoints", "replace_missing_operators"]

EXTENSION = "mmcv._ext"


def replace_missing_operators() -> bool:
    """Puts a stand-in where mmcv's compiled extension belongs if mmcv is installed without it.

    The stand-in has every function that it is asked for, and each raises ``RuntimeError`` when called. mmengine still
    sees that the extension is missing. To be called before ``mmseg`` is imported; importing this module does so.

    Returns:
        Whether a stand-in is in place.
    """
    if EXTENSION in sys.modules:
        return isinstance(sys.modules[EXTENSION], _MissingOperators)
    if importlib.util.find_spec("mmcv") is None or importlib.util.find_spec(EXTENSION) is not None:
        return False
    sys.modules[EXTENSION] = _MissingOperators()
    return True


class _MissingOperators(ModuleType):
    """A module that has any function, none of which works."""

    def __init__(self) -> None:
        super().__init__(EXTENSION, "Stands in for mmcv's compiled operators, which are not installed.")
        self.__spec__ = ModuleSpec(EXTENSION, loader=None)  # no loader: what mmengine takes for "not there"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(
                f"{name} is a compiled operator of mmcv, and the installed mmcv has none (mmcv-lite); use a layer or "
                f"loss that does without, or replace mmcv-lite by mmcv>=2.1,<2.2 built for torch {torch.__version__}"
            )

        return missing


def allow_training_checkpoints() -> None:
    """Names what mmengine's checkpoints hold besides tensors, histories of the loss, as safe for ``torch.load``.

    Since 2.6 torch refuses to load what it does not know, and mmengine cannot resume.
    """
    numbers = [np.dtype(kind) for kind in ("bool", "int32", "int64", "float32", "float64")]
    rebuild = {"_reconstruct": np.zeros(1).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")  # up to numpy 1, from numpy 2
    torch.serialization.add_safe_globals(
        [
            *(np.dtype, np.ndarray, HistoryBuffer, *{type(number) for number in numbers}),
            *((function, f"{module}.{name}") for module in modules for name, function in rebuild.items()),
            (_history_method, "builtins.getattr"),
        ]
    )


def _history_method(owner: Any, name: str) -> Any:
    """What ``getattr`` gives while a checkpoint is loaded: methods of loss histories and nothing else."""
    if owner is not HistoryBuffer or name.startswith("_"):
        raise pickle.UnpicklingError(f"a checkpoint may not ask for the attribute {name!r} of {owner!r}")
    return getattr(owner, name)


@MODELS.register_module()
class ZooBackbone(BaseModule):
    """A model of this zoo, or any of timm's with ``forward_intermediates``, as a backbone for dense prediction.

    Hierarchical models give one map per stage, mostly of strides 4, 8, 16 and 32. Columnar models give the maps after
    chosen blocks, all of the patch's stride (16 for most) and of the same width. ``channels`` and ``strides`` list what
    comes out, in the order of ``out_indices``.

    Args:
        model_name: Name of the model, with or without tag.
        pretrained: True for published weights, a file or address for others, see ``init_cfg``.
        out_indices: Stages or blocks whose features are returned, in rising order; negative ones count from the end.
            Default: all stages, or four blocks, at the end of each quarter of the column.
        feature_norms: Features that go through a layer norm of their own: True for all, else their indices. They are
            untrained unless the weights have them, and dense prediction does better with them than without.
        norm: Whether the other features go through the model's final norm, which pretrained weights have: those of all
            blocks of columnar models, the last stage's of hierarchical ones.
        in_channels: Image channels.
        grad_checkpointing: Whether blocks are recomputed in the backward, which saves memory and takes time.
        init_cfg: ``dict(type="Pretrained", checkpoint=file_or_address, prefix=None)`` for weights that mmengine asks
            for when training begins: ours, the authors', or those of a whole segmentor, where ``prefix="backbone."``
            picks the backbone's. They have to fit but for classifiers and norms of features.
        **kwargs: Further arguments of the model, ``drop_path_rate`` for example.

    Raises:
        ValueError: If an index is out of range, ``init_cfg`` is not of the kind above, or weights are given twice.
    """

    def __init__(
        self,
        model_name: str,
        pretrained: bool | str | None = False,
        out_indices: Sequence[int] | None = None,
        feature_norms: bool | Sequence[int] = True,
        norm: bool = False,
        in_channels: int = 3,
        grad_checkpointing: bool = False,
        init_cfg: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(pretrained, str):
            if init_cfg:
                raise ValueError(f"pretrained={pretrained!r} and init_cfg both name weights; drop one of them")
            pretrained, init_cfg = False, dict(type="Pretrained", checkpoint=pretrained)
        _check_init_cfg(init_cfg, bool(pretrained))
        super().__init__(dict(init_cfg) if init_cfg else None)
        self.model_name = model_name
        self.arguments = dict(num_classes=0, in_chans=in_channels, **kwargs)

        with torch.device("meta"):
            info = list(timm.create_model(model_name, **self.arguments).feature_info)
        columnar = len({level["reduction"] for level in info}) == 1
        self.out_indices = _indices("out_indices", _default_indices(len(info), columnar, out_indices), len(info))
        normed = self.out_indices if feature_norms is True else feature_norms or ()
        self.normed = [index for index in _indices("feature_norms", normed, len(info)) if index in self.out_indices]
        others = set(self.out_indices) - set(self.normed)
        self.norm = norm and bool(others if columnar else others & {len(info) - 1})

        self.model = self._create()
        info = list(self.model.feature_info)
        self.channels = [info[index]["num_chs"] for index in self.out_indices]
        self.strides = [info[index]["reduction"] for index in self.out_indices]
        behind = [index for index in self.normed if str(index) not in getattr(self.model, "feature_norms", ())]
        self.norms = nn.ModuleDict({str(index): LayerNorm2d(info[index]["num_chs"]) for index in behind})
        self.model.prune_intermediate_layers(self.out_indices, prune_norm=not self.norm)
        if grad_checkpointing:
            self.model.set_grad_checkpointing()
        if pretrained:
            self._copy_from(timm.create_model(model_name, pretrained=True, **self.arguments))
            self._is_init = True  # or mmengine would initialise the model anew

    def _create(self) -> nn.Module:
        """The whole model; with norms for features unless its family has no such argument."""
        try:
            return timm.create_model(self.model_name, feature_norms=self.normed, **self.arguments)
        except TypeError as error:
            if "feature_norms" not in str(error):
                raise
            return timm.create_model(self.model_name, **self.arguments)

    def _copy_from(self, source: nn.Module) -> None:
        """Takes over the parameters of the same model with all its blocks."""
        own = self.model.state_dict()
        given = {name: tensor for name, tensor in source.state_dict().items() if name in own}
        self.model.load_state_dict(given, strict=False)

    def init_weights(self) -> None:
        """Loads what ``init_cfg`` names; without it the model stays as its constructor initialised it.

        Raises:
            ValueError: If the weights do not fit.
        """
        if self.init_cfg and not self._is_init:
            self._load(self.init_cfg["checkpoint"], self.init_cfg.get("prefix"))
            if hasattr(self, "_params_init_info"):  # mmengine's record of what each parameter comes from
                update_init_info(self, init_info=f"ZooBackbone: loaded from {self.init_cfg['checkpoint']}")
        self._is_init = True

    def _load(self, checkpoint: str, prefix: str | None) -> None:
        weights = _read(checkpoint, prefix)
        own = self.state_dict()
        if weights.keys() & own.keys():  # of a backbone of this class
            _check_fit(weights, own, checkpoint)
            self.load_state_dict(weights)
            return
        source = self._create()
        weights = _family_filter(source)(weights, source)
        unused = tuple(
            f"feature_norms.{index}." for index in range(len(source.feature_info)) if index not in self.normed
        )
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(unused)}
        _check_fit(weights, source.state_dict(), checkpoint)
        source.load_state_dict({n: t for n, t in weights.items() if not _is_head(n)}, strict=False)
        self._copy_from(source)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, C, H, W) to one map (B, D, H / stride, W / stride) per index."""
        features = self.model.forward_intermediates(
            x, indices=self.out_indices, norm=self.norm, output_fmt="NCHW", intermediates_only=True
        )
        return tuple(
            self.norms[str(index)](feature) if str(index) in self.norms else feature
            for index, feature in zip(self.out_indices, features, strict=True)
        )


def _check_init_cfg(init_cfg: Mapping[str, Any] | None, pretrained: bool) -> None:
    if not init_cfg:
        return
    if not isinstance(init_cfg, Mapping) or init_cfg.get("type") != "Pretrained" or "checkpoint" not in init_cfg:
        raise ValueError(
            f"init_cfg={init_cfg!r} is not supported: the models initialise themselves; use None or "
            "dict(type='Pretrained', checkpoint=file)"
        )
    if pretrained:
        raise ValueError(f"pretrained=True and init_cfg={init_cfg!r} both name weights; drop one of them")


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


def _read(checkpoint: str, prefix: str | None) -> dict[str, Tensor]:
    """The weights of a checkpoint by name, or those of one of its parts."""
    try:
        if str(checkpoint).endswith(".safetensors"):
            weights = load_state_dict(checkpoint)
        else:
            weights = CheckpointLoader.load_checkpoint(checkpoint, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{checkpoint} holds more than weights, which is not loaded because it could be code; keep the weights "
            f"alone: torch.save(zoo.load_checkpoint({checkpoint!r}), new_file)"
        ) from error
    for envelope in ("state_dict", "model"):
        if isinstance(weights.get(envelope), Mapping):
            weights = weights[envelope]
    if prefix is None:
        return dict(weights)
    prefix = prefix.rstrip(".") + "."
    part = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    if not part:
        raise ValueError(f"no name in {checkpoint} starts with prefix={prefix!r}; one is {next(iter(weights), None)!r}")
    return part


def _family_filter(model: nn.Module) -> Callable[[Mapping[str, Tensor], nn.Module], dict[str, Tensor]]:
    """The ``checkpoint_filter_fn`` of the file that defines the model, which translates the authors' names."""
    module = sys.modules[type(model).__module__]
    return getattr(module, "checkpoint_filter_fn", lambda state_dict, model: dict(state_dict))


def _is_head(name: str) -> bool:
    return name.split(".")[0] in ("head", "fc", "classifier")


def _check_fit(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], checkpoint: str) -> None:
    """Raises an error unless the weights fit but for classifiers and norms."""
    optional = ("feature_norms.", "model.feature_norms.", "norms.", "norm.", "model.norm.")
    missing = [n for n in expected if n not in given and not n.startswith(optional) and not _is_head(n)]
    unexpected = [n for n in given if n not in expected and not _is_head(n)]
    reshaped = [n for n in expected if n in given and given[n].shape != expected[n].shape]
    problems = [
        f"{len(names)} {what}, for example {names[0]}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if names
    ]
    if problems:
        raise ValueError(
            f"the weights in {checkpoint} do not fit: {'; '.join(problems)}. Choose the model_name that they belong "
            "to, or set prefix to the part of the file that holds the backbone"
        )


replace_missing_operators()
allow_training_checkpoints()
