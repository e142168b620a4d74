"""CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343) with state-space towers, as models of open_clip.

Importing this file registers the packaged configurations, ``open_clip.create_model("zoo-vim_small")``. Other towers are
put together by :func:`create_clip`; with those of a registered configuration, the names of the weights are the same.
"""

import difflib
import functools
import inspect
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import open_clip
import timm
import torch
from open_clip.loss import SigLipLoss
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg
from open_clip.transformer import TextTransformer
from torch import nn

from zoo.heads.text_tower import Mamba2TextTower

__all__ = [
    "MAX_LOGIT_SCALE",
    "ContrastiveLoss",
    "ContrastiveModel",
    "VisionTower",
    "create_clip",
    "create_loss",
    "register_configs",
]

ContrastiveLoss = Literal["clip", "siglip"]

TEXT_TOWERS = {"mamba2": Mamba2TextTower, "transformer": TextTransformer}
MAX_LOGIT_SCALE = math.log(100)  # both papers keep the factor of the similarities below
FIRST_SCALE_AND_BIAS = {"clip": (math.log(1 / 0.07), None), "siglip": (math.log(10), -10.0)}  # as published


@functools.cache  # open_clip would keep the folder twice
def register_configs() -> None:
    """Makes the configurations in ``configs/open_clip`` known to open_clip under their files' names."""
    open_clip.add_model_config(Path(__file__).parents[1] / "configs" / "open_clip")


register_configs()


class VisionTower(TimmModel):
    """open_clip's tower around a model of timm or of this zoo, whose constructor takes further arguments here.

    Args:
        name: Name of the model; its own pooling is kept.
        embed_dim: Width of the features.
        image_size: Height and width, or side, in pixels; default the model's own.
        pretrained: Whether to load its published weights.
        kwargs: Further arguments of the model.

    Raises:
        ValueError: If there is no such model.
    """

    def __init__(
        self,
        name: str,
        embed_dim: int,
        image_size: int | Sequence[int] | None = None,
        pretrained: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        nn.Module.__init__(self)  # TimmModel's own constructor cannot pass arguments to the model
        if ":" not in name and not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
            raise ValueError(f"there is no vision model {name!r}; did you mean {', '.join(near) or 'vim_small'}?")
        self.trunk = timm.create_model(name, pretrained=pretrained, num_classes=0, **(kwargs or {}))
        width = getattr(self.trunk, "head_hidden_size", self.trunk.num_features)
        self.head = nn.Sequential(OrderedDict(proj=nn.Linear(width, embed_dim, bias=False)))
        size = image_size or self.trunk.pretrained_cfg["input_size"][-2:]
        self.set_input_size(size if isinstance(size, int) else tuple(size))


class ContrastiveModel(open_clip.CustomTextCLIP):
    """open_clip's model of two towers, which are given.

    Called with images (B, C, H, W) and texts (B, L) it returns a dictionary with normalised ``image_features`` and
    ``text_features`` (B, D), ``logit_scale``, and ``logit_bias`` if there is one.

    Args:
        visual: Image tower.
        text: Text tower, which has ``context_length`` and ``vocab_size``.
        logit_scale: First logarithm of the factor of the similarities.
        logit_bias: What is first added to them; None for no such parameter.
    """

    def __init__(self, visual: TimmModel, text: nn.Module, logit_scale: float, logit_bias: float | None = None) -> None:
        nn.Module.__init__(self)  # CustomTextCLIP's own constructor knows no other text towers than open_clip's
        self.output_dict = True
        self.visual = visual
        self.text = text
        self.context_length, self.vocab_size = text.context_length, text.vocab_size
        self.logit_scale = nn.Parameter(torch.tensor(logit_scale))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(logit_bias))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone; TimmModel does not tell its model's."""
        tell = getattr(self.visual.trunk, "no_weight_decay", set)
        return super().no_weight_decay() | {f"visual.trunk.{name}" for name in tell()}


def create_clip(
    vision: str,
    text: str = "mamba2",
    *,
    embed_dim: int = 512,
    image_size: int | Sequence[int] | None = None,
    pretrained: bool = False,
    loss: ContrastiveLoss = "clip",
    vision_kwargs: Mapping[str, Any] | None = None,
    text_kwargs: Mapping[str, Any] | None = None,
) -> ContrastiveModel:
    """Puts a vision model and a text tower together.

    Args:
        vision: Name of a model of this zoo or of timm, with or without tag.
        text: ``"mamba2"`` for :class:`~zoo.heads.text_tower.Mamba2TextTower`, ``"transformer"`` for open_clip's.
        embed_dim: Width of the common features.
        image_size: Height and width, or side, of images in pixels; default the vision model's own.
        pretrained: Whether the vision model loads its published weights.
        loss: What it will be trained with, which decides how similarities are first scaled.
        vision_kwargs: Arguments of the vision model.
        text_kwargs: Arguments of the text tower: ``context_length``, ``vocab_size``, ``width``, ``layers``, ...

    Returns:
        The model; ``open_clip.get_model_preprocess_cfg`` says how it wants images, as its vision model does.

    Raises:
        ValueError: If there is no such model, text tower or loss.
    """
    if text not in TEXT_TOWERS:
        raise ValueError(f"text={text!r} is not known; use one of {', '.join(TEXT_TOWERS)}")
    _check_loss(loss)
    visual = VisionTower(vision, embed_dim, image_size, pretrained, vision_kwargs)
    tower = _text_tower(text, embed_dim, text_kwargs or {})
    model = ContrastiveModel(visual, tower, *FIRST_SCALE_AND_BIAS[loss])
    own = visual.trunk.pretrained_cfg
    preprocessing = PreprocessCfg(
        size=visual.image_size, mean=own["mean"], std=own["std"], interpolation=own["interpolation"]
    )
    open_clip.set_model_preprocess_cfg(model, asdict(preprocessing))
    return model


def create_loss(loss: ContrastiveLoss, rank: int = 0, world_size: int = 1) -> nn.Module:
    """open_clip's loss over the pairs of all processes, as a mean over the process's own.

    The gradient's mean over processes, as DistributedDataParallel takes it, is that of one process with all pairs.

    Args:
        loss: ``"clip"`` or ``"siglip"``.
        rank: Number of this process.
        world_size: Number of processes.

    Returns:
        A module that is called with what :class:`ContrastiveModel` returns, as keywords.

    Raises:
        ValueError: If there is no such loss.
    """
    _check_loss(loss)
    if loss == "siglip":
        return SigLipLoss(rank=rank, world_size=world_size)
    return open_clip.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)


def _text_tower(text: str, embed_dim: int, kwargs: Mapping[str, Any]) -> nn.Module:
    tower = TEXT_TOWERS[text]
    unknown = [name for name in kwargs if name not in inspect.signature(tower).parameters]
    if unknown:
        raise ValueError(f"the text tower {text!r} takes no {', '.join(unknown)}; it is a {tower.__name__}")
    return tower(output_dim=embed_dim, **kwargs)


def _check_loss(loss: str) -> None:
    if loss not in get_args(ContrastiveLoss):
        raise ValueError(f"loss={loss!r} is not known; use one of {', '.join(get_args(ContrastiveLoss))}")
