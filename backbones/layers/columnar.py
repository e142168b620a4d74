"""What all backbones of one column share: equal blocks over one sequence of tokens, with timm's interface around them.

A family derives from :class:`ColumnarBackbone`, builds its layers in the constructor and says how one block is run.
Checkpoints of all families are fitted to a model by :func:`fit_checkpoint`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from timm.layers import resample_patch_embed, trunc_normal_
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from zoo.backbones.layers.backbone import Backbone, fit_parts, numbers_for_trace
from zoo.backbones.layers.class_token import (
    ClassToken,
    insert_class_tokens,
    num_class_tokens,
    split_class_tokens,
)
from zoo.backbones.layers.position import record_input_size, resample_pos_embed

__all__ = ["ColumnarBackbone", "FeatureSource", "Stream", "fit_checkpoint"]

for _function in ("insert_class_tokens", "resample_pos_embed", "split_class_tokens"):
    torch.fx.wrap(_function)  # a single node for FX in this file too

CheckpointScope = Literal["block", "scan"]
FeatureSource = Literal["stream", "mixer"]


class Stream(NamedTuple):
    """The residual stream between two blocks.

    Attributes:
        tokens: (B, L, D).
        normed: The tokens through the norm that reads them next, where it was computed along with them; else None.
    """

    tokens: Tensor
    normed: Tensor | None = None


class ColumnarBackbone(Backbone):
    """Patch tokens with positions and class tokens, blocks, norm, pooling, classifier.

    A family's constructor sets ``patch_embed``, ``cls_token`` and ``pos_embed`` (parameters or None), ``pos_drop``,
    ``blocks``, ``feature_norms`` (norms of single blocks' features, by index), ``norm``, ``head_drop`` and ``head``,
    then calls ``_set_feature_info`` and ``init_weights(needs_reset=False)``. It defines ``_advance``, and ``_stream``
    if more than the tokens enters the first block.

    Args:
        embed_dim: Token width D.
        in_chans: Image channels.
        num_classes: Classes; 0 for pooled features instead of logits.
        global_pool: One of the family's ``global_pools``.
        class_token: Place of the class token(s) in the sequence, or None.
        dynamic_img_size: Whether images of other sizes are accepted (the position embedding is resampled).

    Raises:
        ValueError: If ``global_pool`` is not known or needs a class token that is not there.
    """

    global_pools: ClassVar[tuple[str, ...]] = ("token", "avg", "")
    feature_sources: ClassVar[tuple[str, ...]] = ("stream",)

    def __init__(
        self,
        embed_dim: int,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        class_token: ClassToken | None = None,
        dynamic_img_size: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.class_token = class_token
        self.num_prefix_tokens = num_class_tokens(class_token)
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False
        self._set_global_pool(global_pool)

    def _set_feature_info(self) -> None:
        self.feature_info = [
            dict(num_chs=self.embed_dim, reduction=self.patch_embed.stride[0], module=f"blocks.{i}")
            for i in range(len(self.blocks))
        ]

    def _set_global_pool(self, global_pool: str) -> None:
        super()._set_global_pool(global_pool)
        if global_pool == "token" and not self.num_prefix_tokens:
            raise ValueError("global_pool='token' needs a class token; use 'avg' or set class_token")

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialises every parameter.

        Args:
            needs_reset: Whether the layers' own initialisation runs first, as after ``to_empty()``.
        """
        if needs_reset:
            self._reset_layers()
        self.patch_embed.init_weights()
        for embedding in (self.cls_token, self.pos_embed):
            if embedding is not None:
                trunc_normal_(embedding, std=0.02)
        projections = [module.out_proj for module in self.blocks.modules() if hasattr(module, "out_proj")]
        for projection in projections:
            nn.init.kaiming_uniform_(projection.weight, a=5**0.5)
            with torch.no_grad():
                projection.weight /= len(projections) ** 0.5
        self._init_head()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that order parameters from stem to head, for layer-wise decay and freezing."""
        norms = r"^norm|^feature_norms"
        blocks = r"^blocks\.(\d+)" if coarse else [(r"^blocks\.(\d+)", None), (norms, (99999,))]
        return dict(stem=r"^cls_token|^pos_embed|^patch_embed", blocks=blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True, scope: CheckpointScope = "block") -> None:
        """Whether activations are computed again in the backward instead of kept.

        Args:
            enable: Whether any are.
            scope: ``"block"`` for whole blocks, of which only the input is kept; ``"scan"`` for what lies between the
                projections of a mixer, most of the memory but a part of the work, in families that can. Either way
                patches are cut again instead of kept.

        Raises:
            ValueError: If the family knows no such scope.
        """
        mixers = [module for module in self.blocks.modules() if hasattr(module, "grad_checkpointing")]
        if scope not in ("block", "scan") or (scope == "scan" and not mixers):
            known = "'block' or 'scan'" if mixers else "'block'"
            raise ValueError(f"scope={scope!r} is not known to {type(self).__name__}; use {known}")
        self.grad_checkpointing = enable and scope == "block"
        if hasattr(self.patch_embed, "grad_checkpointing"):  # a stem with batch norms has none: it would count twice
            self.patch_embed.grad_checkpointing = enable
        for mixer in mixers:
            mixer.grad_checkpointing = enable and scope == "scan"

    @torch.jit.ignore
    def set_input_size(
        self, img_size: int | Sequence[int] | None = None, patch_size: int | Sequence[int] | None = None
    ) -> None:
        """Remakes the position embedding, and the patch projection if asked, for another size.

        Args:
            img_size: New image size (H, W) or one side; None keeps it.
            patch_size: New patch side; None keeps it.
        """
        old_grid = self.patch_embed.grid_size
        if patch_size is not None:
            self.patch_embed.set_patch_size(patch_size)
            self._set_feature_info()
        if img_size is not None:
            self.patch_embed.set_image_size(img_size)
        grid = self.patch_embed.grid_size
        if self.pos_embed is not None and grid != old_grid:
            resampled = resample_pos_embed(self.pos_embed.detach(), old_grid, grid, self.class_token)
            self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)
        record_input_size(self, self.patch_embed.img_size, patch_size=patch_size)

    def embed_patches(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image (B, C, H, W) to patch tokens (B, N, D) without positions, and their grid."""
        if not self.dynamic_img_size:
            torch._assert(
                (x.shape[-2], x.shape[-1]) == self.patch_embed.img_size,
                "the image is not of the model's img_size; use dynamic_img_size=True or set_input_size()",
            )
        x = self.patch_embed(x)  # (B, D, grid H, grid W)
        grid = numbers_for_trace(x.shape[-2], x.shape[-1]) if self.dynamic_img_size else self.patch_embed.grid_size
        return x.flatten(2).transpose(1, 2), grid

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image (B, C, H, W) to tokens (B, L, D) with class tokens and positions, and their patch grid."""
        tokens, grid = self.embed_patches(x)
        class_tokens = tokens[:, :0] if self.cls_token is None else self.cls_token.expand(x.shape[0], -1, -1)
        tokens = insert_class_tokens(tokens, class_tokens, self.class_token)
        if self.pos_embed is not None:
            tokens = tokens + resample_pos_embed(self.pos_embed, self.patch_embed.grid_size, grid, self.class_token)
        return self.pos_drop(tokens), grid

    def split_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, L, D) to patch tokens (B, N, D) and class tokens (B, T, D)."""
        return split_class_tokens(tokens, self.class_token)

    def _stream(self, x: Tensor) -> tuple[Tensor, tuple[int, int], Any]:
        """Image to what the first block reads, the patch grid, and whatever else ``_advance`` wants to know."""
        return *self.embed(x), None

    def _advance(
        self, index: int, stream: Stream, grid: tuple[int, int], context: Any, run: Callable[..., Tensor]
    ) -> tuple[Stream, Tensor]:
        """Runs one block; returns the stream as the next block reads it, and the block's own output.

        Args:
            index: Which block.
            stream: What the block before has left.
            grid: Patch grid.
            context: The last thing that ``_stream`` returned.
            run: Calls a block with arguments, recomputing it in the backward if asked.
        """
        raise NotImplementedError

    def _runner(self) -> Callable[..., Tensor]:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint
        return lambda block, *args: block(*args)

    def _in_weight_dtype(self, stream: Tensor) -> Tensor:
        """The stream, which may be wider, in the dtype of the model's weights."""
        return stream.to(self.patch_embed.proj.weight.dtype)

    def _next_norm(self, index: int) -> nn.Module | None:
        """The norm that reads the stream after a block; None where there is none that the kernel knows."""
        last = index == len(self.blocks) - 1
        norm = self.norm if last else getattr(self.blocks[index + 1], "norm", None)
        return norm if isinstance(norm, (nn.RMSNorm, nn.LayerNorm)) else None

    def _final(self, stream: Stream) -> Tensor:
        return self.norm(self._in_weight_dtype(stream.tokens)) if stream.normed is None else stream.normed

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W) to normed tokens (B, L, D), class tokens in their places."""
        run = self._runner()
        tokens, grid, context = self._stream(x)
        stream = Stream(tokens)
        for index in range(len(self.blocks)):
            stream, _ = self._advance(index, stream, grid, context, run)
        return self._final(stream)

    def pool(self, x: Tensor) -> Tensor:
        """Tokens (B, L, D) to one feature (B, D), or unchanged with ``global_pool=""``."""
        if self.global_pool == "":
            return x
        patches, class_tokens = self.split_tokens(x)
        return (class_tokens if self.global_pool == "token" else patches).mean(dim=1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, L, D) to logits (B, num_classes), or to the pooled feature with ``pre_logits``."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        source: FeatureSource = "stream",
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features after chosen blocks; those of blocks in ``feature_norms`` go through their own norm.

        Args:
            x: Image (B, C, H, W).
            indices: Blocks to take: the last n if int, all if None, else their indices.
            return_prefix_tokens: Whether each intermediate comes with its class tokens (B, T, D).
            norm: Whether the final norm is applied to features without a norm of their own.
            stop_early: Whether blocks after the last chosen one are skipped.
            output_fmt: ``"NCHW"`` for maps (B, D, grid H, grid W), ``"NLC"`` for patch tokens (B, N, D).
            intermediates_only: Whether to return the intermediates without the final tokens.
            source: ``"stream"`` for the residual stream as the next block reads it, or, in families whose
                ``feature_sources`` have it, ``"mixer"`` for what the block alone computed, without the residual.

        Returns:
            Intermediates, or (final tokens as from ``forward_features``, intermediates).

        Raises:
            ValueError: If ``output_fmt`` or ``source`` is not one of the above.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} is not known; use 'NCHW' or 'NLC'")
        if source not in self.feature_sources:
            raise ValueError(f"source={source!r} is not known; use {' or '.join(map(repr, self.feature_sources))}")
        take_indices, last = feature_take_indices(len(self.blocks), indices)
        run = self._runner()
        tokens, grid, context = self._stream(x)
        stream = Stream(tokens)
        intermediates = []
        for index in range(last + 1 if stop_early else len(self.blocks)):
            stream, update = self._advance(index, stream, grid, context, run)
            if index in take_indices:
                feature = self._normed_feature(index, stream.tokens if source == "stream" else update, norm)
                patches, class_tokens = self.split_tokens(feature)
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, grid)  # (B, D, grid H, grid W), a view
                intermediates.append((patches, class_tokens) if return_prefix_tokens else patches)
        if intermediates_only:
            return intermediates
        return self._final(stream), intermediates

    def _normed_feature(self, index: int, feature: Tensor, norm: bool) -> Tensor:
        """The feature of a block through its own norm or, if asked, the final one."""
        feature = self._in_weight_dtype(feature)
        if str(index) in self.feature_norms:
            return self.feature_norms[str(index)](feature)
        return self.norm(feature) if norm else feature

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what the intermediates at ``indices`` do not need.

        Args:
            indices: As in :meth:`forward_intermediates`.
            prune_norm: Whether the final norm goes too.
            prune_head: Whether the classifier goes too.

        Returns:
            The indices of the chosen blocks.
        """
        take_indices, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        self._set_feature_info()
        for index in set(self.feature_norms) - {str(index) for index in take_indices}:
            del self.feature_norms[index]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices


def fit_checkpoint(
    state_dict: dict[str, Tensor], model: ColumnarBackbone, class_token: ClassToken | None
) -> dict[str, Tensor]:
    """Fits a checkpoint in our names to the model's image size, patch size, class token and missing parts.

    Args:
        state_dict: Weights by our names.
        model: Model that the result is loaded into.
        class_token: Place of the checkpoint's class row in its position embedding, should the model have none.

    Raises:
        ValueError: If the position embedding's grid cannot be told.
    """
    state_dict = fit_parts(state_dict, model)
    if "pos_embed" in state_dict and model.pos_embed is not None:
        place = class_token and (model.class_token or class_token)
        state_dict["pos_embed"] = _fit_pos_embed(state_dict["pos_embed"], place, model)
    if model.cls_token is None:
        state_dict.pop("cls_token", None)
    weight, kernel = state_dict.get("patch_embed.proj.weight"), model.patch_embed.proj.weight.shape[-2:]
    if weight is not None and weight.shape[-2:] != kernel and hasattr(model.patch_embed, "set_patch_size"):
        state_dict["patch_embed.proj.weight"] = resample_patch_embed(weight, list(kernel))
    return state_dict


def _fit_pos_embed(pos_embed: Tensor, place: ClassToken | None, model: ColumnarBackbone) -> Tensor:
    """Resamples a position embedding to the model's grid, and drops class rows the model has no token for."""
    grid = model.patch_embed.grid_size
    if model.class_token is None:
        pos_embed, place = split_class_tokens(pos_embed, place)[0], None
    num_patches = pos_embed.shape[1] - num_class_tokens(place)
    if num_patches == grid[0] * grid[1]:
        return pos_embed
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(
            f"pos_embed has {num_patches} patch rows ({pos_embed.shape[1]} rows in all), neither the model's "
            f"{grid[0]}x{grid[1]} nor a square grid; "
            "build the model with the checkpoint's img_size, load, then call set_input_size()"
        )
    return resample_pos_embed(pos_embed, (side, side), grid, place)
