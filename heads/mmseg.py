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
import torch
from timm.models import load_state_dict
from torch import Tensor

from zoo.heads.dense_backbone import DenseBackbone

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
class ZooBackbone(DenseBackbone, BaseModule):
    """:class:`~zoo.heads.dense_backbone.DenseBackbone` with the arguments and the initialisation of mmengine.

    Args:
        model_name: Name of the model, with or without tag.
        pretrained: True for published weights, a file or address for others, see ``init_cfg``.
        out_indices: As of ``DenseBackbone``.
        feature_norms: As of ``DenseBackbone``, but all features have a norm of their own by default.
        norm: As of ``DenseBackbone``.
        in_channels: Image channels.
        grad_checkpointing: As of ``DenseBackbone``.
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
        super().__init__(
            model_name,
            pretrained=bool(pretrained),
            out_indices=out_indices,
            norm=norm,
            feature_norms=feature_norms,
            grad_checkpointing=grad_checkpointing,
            in_chans=in_channels,
            **kwargs,
        )
        self.init_cfg = dict(init_cfg) if init_cfg else None
        self._is_init = bool(pretrained)  # or mmengine would initialise the model anew

    def init_weights(self) -> None:
        """Loads what ``init_cfg`` names; without it the model stays as its constructor initialised it.

        Raises:
            ValueError: If the weights do not fit.
        """
        if self.init_cfg and not self._is_init:
            checkpoint = self.init_cfg["checkpoint"]
            self.load(_read(checkpoint, self.init_cfg.get("prefix")), str(checkpoint))
            if hasattr(self, "_params_init_info"):  # mmengine's record of what each parameter comes from
                update_init_info(self, init_info=f"ZooBackbone: loaded from {checkpoint}")
        self._is_init = True


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


replace_missing_operators()
allow_training_checkpoints()
