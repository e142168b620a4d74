"""What all hierarchical backbones share: a stem and stages of falling resolution, with timm's interface around them.

A family derives from :class:`HierarchicalBackbone` and builds its layers in the constructor. A stage is a module that
first reduces the resolution (but for the first stage) and then runs its blocks, so that what leaves it is a feature.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from timm.layers import trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from zoo.backbones.layers.backbone import Backbone

__all__ = ["HierarchicalBackbone"]


class HierarchicalBackbone(Backbone):
    """Stem, stages, norm, pooling, classifier.

    A family's constructor sets ``stem``, ``stages`` (``nn.Sequential``; every stage has ``blocks`` and a flag
    ``grad_checkpointing`` that it obeys), ``norm`` (of the last stage's output), ``feature_norms`` (``ModuleDict`` of
    norms for single stages' features, by index), ``head_drop`` and ``head``, then calls ``_set_feature_info`` and
    ``init_weights(needs_reset=False)``.

    Args:
        dims: Channels of every stage's output.
        strides: Pixels of the image to a cell of every stage's output.
        in_chans: Image channels.
        num_classes: Classes; 0 for pooled features instead of logits.
        global_pool: ``"avg"``, or ``""`` for the map itself.

    Raises:
        ValueError: If ``global_pool`` is not one of these.
    """

    global_pools: ClassVar[tuple[str, ...]] = ("avg", "")
    channels_last: ClassVar[bool] = True  # whether stages work on (B, H, W, C); else on (B, C, H, W)

    def __init__(
        self,
        dims: Sequence[int],
        strides: Sequence[int] = (4, 8, 16, 32),
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        self.dims, self.strides = tuple(dims), tuple(strides)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.output_fmt = "NHWC" if self.channels_last else "NCHW"  # of the map that ``forward_features`` returns
        self.num_features = self.head_hidden_size = self.dims[-1]
        self._set_global_pool(global_pool)

    def _set_feature_info(self) -> None:
        self.feature_info = [
            dict(num_chs=dim, reduction=stride, module=f"stages.{i}")
            for i, (dim, stride) in enumerate(zip(self.dims, self.strides, strict=True))
        ]

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialises every parameter: linear layers as timm's vision transformers do, the rest as the layers say.

        Args:
            needs_reset: Whether the layers' own initialisation runs first, as after ``to_empty()``.
        """
        if needs_reset:
            self._reset_layers()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if hasattr(module, "init_special"):  # parameters that must not start like others, such as dt_proj
                module.init_special()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that order parameters from stem to head, for layer-wise decay and freezing."""
        fine = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm|^feature_norms", (99999,)),
        ]
        return dict(stem=r"^stem|^pos_embed", blocks=r"^stages\.(\d+)" if coarse else fine)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks are recomputed in the backward instead of kept."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def embed(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W) to the map that enters the first stage."""
        return self.stem(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W) to the normed map of the last stage, (B, H', W', D) or (B, D, H', W') as stages work."""
        return self.norm(self.stages(self.embed(x)))

    def pool(self, x: Tensor) -> Tensor:
        """Map to one feature (B, D), or unchanged with ``global_pool=""``."""
        if self.global_pool == "":
            return x
        return x.mean((1, 2) if self.channels_last else (2, 3))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map to logits (B, num_classes), or to the pooled feature with ``pre_logits``."""
        x = self.head_drop(self.pool(x))
        if pre_logits or self.num_classes == 0:
            return x
        if self.global_pool == "" and not self.channels_last:
            return self.head(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # the logits of every cell
        return self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of chosen stages; those of stages in ``feature_norms`` go through their own norm.

        Args:
            x: Image (B, C, H, W).
            indices: Stages to take: the last n if int, all if None, else their indices.
            norm: Whether the final norm is applied to the last stage's feature if it has no norm of its own.
            stop_early: Whether stages after the last chosen one are skipped.
            output_fmt: ``"NCHW"`` for (B, D, H, W), ``"NHWC"`` for (B, H, W, D).
            intermediates_only: Whether to return the intermediates without the final map.

        Returns:
            Intermediates, or (final map as from ``forward_features``, intermediates); the final map is that of the last
            chosen stage, without norm, if ``stop_early`` skipped stages.

        Raises:
            ValueError: If ``output_fmt`` is not one of the above.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r} is not known; use 'NCHW' or 'NHWC'")
        take_indices, last = feature_take_indices(len(self.stages), indices)
        x = self.embed(x)
        intermediates = []
        for index, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if index in take_indices:
                feature = self._normed_feature(index, x, norm)
                intermediates.append(self._in_format(feature, output_fmt))
        if intermediates_only:
            return intermediates
        complete = not stop_early or last == len(self.stages) - 1
        return (self.norm(x) if complete else x), intermediates

    def _normed_feature(self, index: int, feature: Tensor, norm: bool) -> Tensor:
        if str(index) in self.feature_norms:
            return self.feature_norms[str(index)](feature)
        return self.norm(feature) if norm and index == len(self.dims) - 1 else feature

    def _in_format(self, feature: Tensor, output_fmt: str) -> Tensor:
        if self.channels_last and output_fmt == "NCHW":
            return feature.permute(0, 3, 1, 2)  # a view, channels-last in memory
        if not self.channels_last and output_fmt == "NHWC":
            return feature.permute(0, 2, 3, 1)
        return feature

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what the intermediates at ``indices`` do not need.

        Args:
            indices: As in :meth:`forward_intermediates`.
            prune_norm: Whether the final norm goes too; it does if the last stage goes.
            prune_head: Whether the classifier goes too; it does if the last stage goes.

        Returns:
            The indices of the chosen stages.
        """
        take_indices, last = feature_take_indices(len(self.stages), indices)
        cut = last < len(self.stages) - 1  # norm and classifier have the width of a stage that goes
        self.stages = self.stages[: last + 1]
        self.dims, self.strides = self.dims[: last + 1], self.strides[: last + 1]
        self._set_feature_info()
        for index in set(self.feature_norms) - {str(index) for index in take_indices}:
            del self.feature_norms[index]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if cut:
            self.num_features = self.head_hidden_size = self.dims[-1]
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take_indices
