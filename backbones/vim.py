"""Vim: Vision Mamba, a columnar backbone that scans image tokens forwards and backwards.

Paper: "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
https://arxiv.org/abs/2401.09417. Origin: https://github.com/hustvl/Vim (Apache-2.0), whose checkpoints load here.

Differences from the original:

1. Any image size at run time: images are padded to whole patches and the position embedding is resampled, with the
   class row left out wherever the class token stands. The original takes one size only.
2. Both directions run in one convolution, one batched projection and one scan; nothing is flipped or copied.
3. Constructor arguments are typed choices (``directions``, ``class_token``, ``global_pool``) instead of flags.
4. Rotary embedding works on non-square grids and with the class token anywhere; class tokens do not turn.
   ``rope_class_first`` reproduces how the original turns tokens around a middle class token.
5. A_log, D, step biases and convolution biases are all exempt from weight decay; the original decays A_log.
6. Dense features come from ``forward_intermediates``; ``source`` says whether a feature is the residual stream or the
   output of the mixer alone (the original's two segmentation settings).
7. Options of later work: locally bidirectional scans (``lb_window``), blocks that read in alternating directions
   (``alternate``), stochastic shuffling of the tokens (``layer_shuffle``).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    apply_rot_embed,
    calculate_drop_path_rates,
    get_device_dtype,
    resample_patch_embed,
    trunc_normal_,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from zoo.backbones.layers.class_token import (
    ClassToken,
    check_class_token,
    insert_class_tokens,
    num_class_tokens,
    split_class_tokens,
)
from zoo.backbones.layers.layer_shuffle import LayerShuffle, TokenOrder, restore_tokens, shuffle_tokens
from zoo.backbones.layers.mamba import Directions, MambaMixer, Merge, stack_mixer_parameters
from zoo.backbones.layers.patch_embed import PatchEmbed
from zoo.backbones.layers.position import record_input_size, resample_pos_embed, rotary_table
from zoo.registry import packaged_weights

__all__ = ["VisionMamba"]

NORM_LAYERS = {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}
FeatureSource = Literal["stream", "mixer"]


def _turn(tokens: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Tokens (B, L, D) turned by a rotary table of sine and cosine, each (1, L, D)."""
    return apply_rot_embed(tokens, table[0], table[1])


class VimBlock(nn.Module):
    """Norm and mixer; the caller adds the result to the residual stream.

    Args:
        norm: Norm over the last dimension.
        mixer: Token mixer.
        drop_path: Probability that a sample skips this block during training.
    """

    def __init__(self, norm: nn.Module, mixer: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, stream: Tensor, order: TokenOrder | None = None) -> Tensor:
        """Residual stream (B, L, D) in any float dtype to the mixer's output (B, L, D), read in the order given."""
        tokens = shuffle_tokens(self.norm(stream.to(self.norm.weight.dtype)), order)
        return restore_tokens(self.mixer(tokens), order)

    def add(self, stream: Tensor, update: Tensor) -> Tensor:
        """The stream after this block, in the stream's dtype or wider."""
        return stream + self.drop_path(update)


class VimBlockPair(nn.Module):
    """Two blocks side by side, the second on the flipped sequence; their streams are added."""

    def __init__(self, forward_block: VimBlock, backward_block: VimBlock) -> None:
        super().__init__()
        self.forward_block = forward_block
        self.backward_block = backward_block

    def forward(self, stream: Tensor, order: TokenOrder | None = None) -> Tensor:
        """Residual stream (B, L, D) to the sum of both mixers' outputs (B, L, D)."""
        return self.forward_block(stream, order) + self.backward_block(stream, order)

    def add(self, stream: Tensor, update: Tensor) -> Tensor:
        """The stream after this pair: each block contributes its own copy of the stream."""
        return 2 * stream + self.forward_block.drop_path(update)


class VisionMamba(nn.Module):
    """Vision Mamba: patch tokens, optional class tokens and position embeddings, a column of Mamba blocks.

    Args:
        img_size: Image size (H, W) or one side that the position embedding is made for.
        patch_size: Patch side in pixels.
        stride: Distance between patches in pixels; default ``patch_size``.
        pad_input: Whether images that patches do not cover exactly are zero-padded; if not, the margin is ignored.
        dynamic_img_size: Whether images of other sizes are accepted (the position embedding is resampled).
        in_chans: Image channels.
        num_classes: Classes; 0 for pooled features instead of logits.
        global_pool: ``"token"`` class token (the mean of two); ``"avg"`` mean of the patch tokens; ``"last"`` last
            token; ``"max_logit"`` logits per token, then their maximum; ``""`` one result per token.
        embed_dim: Token width D.
        depth: Blocks.
        d_state: States per channel.
        d_conv: Taps of the convolution.
        expand: Inner width as a multiple of ``embed_dim``.
        dt_rank: Rank of the step projection; default ceil(embed_dim / 16).
        directions: What a block scans, see :class:`~zoo.backbones.layers.mamba.MambaMixer`.
        merge: Whether a block averages or adds its directions.
        paired_blocks: Whether blocks work in pairs on the same stream, the second one on the flipped sequence.
        alternate: Whether every second block reads the tokens from the last to the first.
        lb_window: Steps of a locally bidirectional window in the scans (LBMamba, arXiv 2506.15976), a power of two up
            to 32: 1 for none, None for the published choice by sequence length.
        class_token: Place of the class token(s) in the sequence, or None.
        pos_embed: Whether a learned position embedding is added.
        rope: Whether 2D rotary embedding turns the tokens before every block.
        rope_residual: Whether it turns the whole residual stream, or only what the previous block added.
        rope_reference_grid: Side of the grid that rotary coordinates are scaled to.
        rope_class_first: Turn tokens as if the class token came first although it is in the middle, as the authors do.
        norm_layer: ``"rmsnorm"`` or ``"layernorm"``.
        norm_eps: Epsilon of the norms.
        residual_in_fp32: Whether the residual stream is float32 when the model or autocast is 16-bit.
        layer_scale: Initial value of a learned factor per channel on each block's output; default none.
        layer_shuffle: Probability that the last block reads the tokens in a random order during training
            (ShuffleMamba, arXiv 2408.17081); it grows linearly from 0 at the first block.
        shuffle_per_sample: Whether every sample of a batch is shuffled in its own way.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the position embedding.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.

    Raises:
        ValueError: If an argument is not one of its choices or does not fit another.
    """

    global_pools = ("token", "avg", "last", "max_logit", "")

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        stride: int | Sequence[int] | None = None,
        pad_input: bool = True,
        dynamic_img_size: bool = True,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        directions: Directions = "bidirectional",
        merge: Merge = "mean",
        paired_blocks: bool = False,
        alternate: bool = False,
        lb_window: int | None = 1,
        class_token: ClassToken | None = "middle",
        pos_embed: bool = True,
        rope: bool = False,
        rope_residual: bool = True,
        rope_reference_grid: int = 14,
        rope_class_first: bool = False,
        norm_layer: str = "rmsnorm",
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        layer_scale: float | None = None,
        layer_shuffle: float = 0.0,
        shuffle_per_sample: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_class_token(class_token)
        if norm_layer not in NORM_LAYERS:
            raise ValueError(f"norm_layer={norm_layer!r} is not known; use one of {', '.join(NORM_LAYERS)}")
        if rope and embed_dim % 4:
            raise ValueError(f"rope needs embed_dim divisible by 4, got {embed_dim}")
        if paired_blocks and depth % 2:
            raise ValueError(f"paired_blocks needs an even depth, got {depth}")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.class_token = class_token
        self.num_prefix_tokens = num_class_tokens(class_token)
        self.dynamic_img_size = dynamic_img_size
        self.alternate = alternate
        self.residual_in_fp32 = residual_in_fp32
        self.rope = rope
        self.rope_residual = rope_residual
        self.rope_reference_grid = rope_reference_grid
        self.rope_class_token = "first" if rope_class_first and class_token == "middle" else class_token
        self.grad_checkpointing = False
        self._set_global_pool(global_pool)

        self.patch_embed = PatchEmbed(img_size, patch_size, stride, in_chans, embed_dim, pad_input, **dd)
        num_patches = self.patch_embed.grid_size[0] * self.patch_embed.grid_size[1]
        self.cls_token = self.pos_embed = None
        if class_token:
            self.cls_token = nn.Parameter(torch.empty(1, self.num_prefix_tokens, embed_dim, **dd))
        if pos_embed:
            self.pos_embed = nn.Parameter(torch.empty(1, num_patches + self.num_prefix_tokens, embed_dim, **dd))
        self.pos_drop = nn.Dropout(pos_drop_rate)

        def make_norm() -> nn.Module:
            return NORM_LAYERS[norm_layer](embed_dim, eps=norm_eps, **dd)

        def make_block(drop_path: float, flipped: bool) -> VimBlock:
            mixer = MambaMixer(
                embed_dim, d_state, d_conv, expand, dt_rank, directions, flipped, merge, layer_scale, lb_window, **dd
            )
            return VimBlock(make_norm(), mixer, drop_path)

        self.depth = depth // 2 if paired_blocks else depth
        self.blocks = nn.ModuleList()
        for index, rate in enumerate(calculate_drop_path_rates(drop_path_rate, self.depth)):
            flipped = alternate and index % 2 == 1
            block = make_block(rate, flipped)
            self.blocks.append(VimBlockPair(block, make_block(rate, not flipped)) if paired_blocks else block)
        self.layer_shuffle = LayerShuffle(layer_shuffle, self.depth, shuffle_per_sample)
        self._set_feature_info()
        self.norm = make_norm()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes else nn.Identity()
        self.init_weights(needs_reset=False)

    def _set_feature_info(self) -> None:
        self.feature_info = [
            dict(num_chs=self.embed_dim, reduction=self.patch_embed.stride[0], module=f"blocks.{i}")
            for i in range(len(self.blocks))
        ]

    def _set_global_pool(self, global_pool: str) -> None:
        if global_pool not in self.global_pools:
            raise ValueError(
                f"global_pool={global_pool!r} is not known; use one of {', '.join(map(repr, self.global_pools))}"
            )
        if global_pool == "token" and not self.num_prefix_tokens:
            raise ValueError("global_pool='token' needs a class token; use 'avg' or set class_token")
        self.global_pool = global_pool

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialises every parameter.

        Args:
            needs_reset: Whether the layers' own initialisation runs first, as after ``to_empty()``.
        """
        if needs_reset:
            for module in self.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        self.patch_embed.init_weights()
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)
        mixers = [module for module in self.modules() if isinstance(module, MambaMixer)]
        for mixer in mixers:
            nn.init.kaiming_uniform_(mixer.out_proj.weight, a=5**0.5)
            with torch.no_grad():
                mixer.out_proj.weight /= len(mixers) ** 0.5
        self._init_head()

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone."""
        exempt = ("pos_embed", "cls_token", "A_log", "D", "dt_bias", "conv_bias", "gamma")
        return {name for name, _ in self.named_parameters() if name.split(".")[-1] in exempt}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that order parameters from stem to head, for layer-wise decay and freezing."""
        blocks = r"^blocks\.(\d+)" if coarse else [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return dict(stem=r"^cls_token|^pos_embed|^patch_embed", blocks=blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks are recomputed in the backward instead of kept."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier.

        Args:
            num_classes: Classes; 0 for none.
            global_pool: New pooling; None keeps the current one.
        """
        if global_pool is not None:
            self._set_global_pool(global_pool)
        self.num_classes = num_classes
        factory = get_device_dtype(self)
        self.head = nn.Linear(self.head_hidden_size, num_classes, **factory) if num_classes else nn.Identity()
        self.head.train(self.training)
        self._init_head()

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
        if self.pos_embed is not None and self.patch_embed.grid_size != old_grid:
            resampled = resample_pos_embed(
                self.pos_embed.detach(), old_grid, self.patch_embed.grid_size, self.class_token
            )
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
        grid = (x.shape[-2], x.shape[-1]) if self.dynamic_img_size else self.patch_embed.grid_size
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

    def _stream(self, x: Tensor) -> tuple[Tensor, tuple[int, int], tuple[Tensor, Tensor] | None]:
        """Image to the residual stream before the first block, the patch grid and the rotary table."""
        tokens, grid = self.embed(x)
        if self.residual_in_fp32:
            tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        if not self.rope:
            return tokens, grid, None
        table = rotary_table(
            grid, self.embed_dim, self.rope_reference_grid, self.rope_class_token, tokens.device, tokens.dtype
        )
        return _turn(tokens, table), grid, table

    def _advance(
        self,
        index: int,
        stream: Tensor,
        table: tuple[Tensor, Tensor] | None,
        order: TokenOrder | None,
        run: Callable[..., Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Runs one block; returns the stream as the next block reads it, and the block's own output."""
        block = self.blocks[index]
        update = run(block, stream, order)
        if table is None or index == self.depth - 1:  # the final norm reads the stream unturned
            return block.add(stream, update), update
        if self.rope_residual:
            return _turn(block.add(stream, update), table), update
        return block.add(stream, _turn(update, table)), update

    def _runner(self) -> Callable[..., Tensor]:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint
        return lambda block, stream, order: block(stream, order)

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W) to normed tokens (B, L, D), class tokens in their places."""
        run = self._runner()
        stream, _, table = self._stream(x)
        orders = self.layer_shuffle(stream)
        for index in range(len(self.blocks)):
            stream, _ = self._advance(index, stream, table, orders[index], run)
        return self._final_norm(stream)

    def _final_norm(self, stream: Tensor) -> Tensor:
        """Norm over the stream, in the dtype of the model's weights."""
        return self.norm(stream.to(self.patch_embed.proj.weight.dtype))

    def pool(self, x: Tensor) -> Tensor:
        """Tokens (B, L, D) to one feature (B, D), or unchanged where the classifier runs on every token."""
        if self.global_pool in ("", "max_logit"):
            return x
        if self.global_pool == "last":
            return x[:, -1]
        patches, class_tokens = self.split_tokens(x)
        return (class_tokens if self.global_pool == "token" else patches).mean(dim=1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, L, D) to logits (B, num_classes), or to the pooled feature with ``pre_logits``."""
        x = self.head_drop(self.pool(x))
        if not pre_logits:
            x = self.head(x)
        return x.amax(dim=1) if self.global_pool == "max_logit" else x

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

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
        """Features after chosen blocks.

        Args:
            x: Image (B, C, H, W).
            indices: Blocks to take: the last n if int, all if None, else their indices.
            return_prefix_tokens: Whether each intermediate comes with its class tokens (B, T, D).
            norm: Whether the final norm is applied to the intermediates.
            stop_early: Whether blocks after the last chosen one are skipped.
            output_fmt: ``"NCHW"`` for maps (B, D, grid H, grid W), ``"NLC"`` for patch tokens (B, N, D).
            intermediates_only: Whether to return the intermediates without the final tokens.
            source: ``"stream"`` for the residual stream as the next block reads it, ``"mixer"`` for what the block
                alone computed, without the residual.

        Returns:
            Intermediates, or (final tokens as from ``forward_features``, intermediates).

        Raises:
            ValueError: If ``output_fmt`` or ``source`` is not one of the above.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} is not known; use 'NCHW' or 'NLC'")
        if source not in ("stream", "mixer"):
            raise ValueError(f"source={source!r} is not known; use 'stream' or 'mixer'")
        take_indices, last = feature_take_indices(len(self.blocks), indices)
        run = self._runner()
        stream, grid, table = self._stream(x)
        orders = self.layer_shuffle(stream)
        intermediates = []
        for index in range(last + 1 if stop_early else len(self.blocks)):
            stream, update = self._advance(index, stream, table, orders[index], run)
            if index in take_indices:
                feature = stream if source == "stream" else update
                feature = self._final_norm(feature) if norm else feature.to(self.patch_embed.proj.weight.dtype)
                patches, class_tokens = self.split_tokens(feature)
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()  # (B, D, grid H, grid W)
                intermediates.append((patches, class_tokens) if return_prefix_tokens else patches)
        if intermediates_only:
            return intermediates
        return self._final_norm(stream), intermediates

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
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: VisionMamba) -> dict[str, Tensor]:
    """Converts a checkpoint to the names and the position embedding of ``model``.

    Accepts the authors' training checkpoints (the weights under ``model``), their bare state dicts, and ours. Rotary
    tables are dropped (they are computed), and so are keys of the norm and the head if the model has none.

    Args:
        state_dict: Checkpoint of any kind above.
        model: Model that the result is loaded into.

    Returns:
        State dict in this file's names.

    Raises:
        ValueError: If the position embedding's grid cannot be told.
    """
    state_dict = rename_upstream(state_dict, isinstance(model.blocks[0], VimBlockPair))
    return fit_checkpoint(state_dict, model, "middle" if "cls_token" in state_dict else None)


def rename_upstream(state_dict: Mapping[str, Any], paired: bool = False) -> dict[str, Tensor]:
    """A checkpoint of Vim's code base, or of one built on it, to the names of this file; ours pass unchanged.

    Args:
        state_dict: State dict, or a training checkpoint that holds one.
        paired: Whether the model's blocks are pairs.
    """
    for envelope in ("model", "state_dict", "model_ema"):
        if isinstance(state_dict.get(envelope), Mapping):
            state_dict = state_dict[envelope]
            break
    if not any(name.startswith("layers.") for name in state_dict):
        return dict(state_dict)
    renamed = {}
    for name, tensor in state_dict.items():
        if name.startswith("rope."):
            continue
        if name.startswith("layers."):
            _, index, rest = name.split(".", 2)
            half = f".{('forward_block', 'backward_block')[int(index) % 2]}" if paired else ""
            name = f"blocks.{int(index) // 2 if paired else index}{half}.{rest}"
        renamed[f"norm.{name[7:]}" if name.startswith("norm_f.") else name] = tensor
    if "cls_token_head" in renamed:
        ends = [renamed.pop("cls_token_head"), renamed.pop("cls_token_tail")]
        renamed["cls_token"] = torch.cat(ends, dim=1)
    return stack_mixer_parameters(renamed)


def fit_checkpoint(
    state_dict: dict[str, Tensor], model: VisionMamba, class_token: ClassToken | None
) -> dict[str, Tensor]:
    """Fits a checkpoint in our names to the model's image size, patch size, class token and missing parts.

    Args:
        state_dict: Weights by our names.
        model: Model that the result is loaded into.
        class_token: Place of the checkpoint's class row in its position embedding, should the model have none.

    Raises:
        ValueError: If the position embedding's grid cannot be told.
    """
    for part in ("norm", "head"):
        if isinstance(getattr(model, part), nn.Identity):
            state_dict = {name: t for name, t in state_dict.items() if not name.startswith(f"{part}.")}
    if "pos_embed" in state_dict and model.pos_embed is not None:
        place = class_token and (model.class_token or class_token)
        state_dict["pos_embed"] = _fit_pos_embed(state_dict["pos_embed"], place, model)
    if model.cls_token is None:
        state_dict.pop("cls_token", None)
    kernel = model.patch_embed.proj.weight.shape[-2:]
    if "patch_embed.proj.weight" in state_dict and state_dict["patch_embed.proj.weight"].shape[-2:] != kernel:
        weight = resample_patch_embed(state_dict["patch_embed.proj.weight"], list(kernel))
        state_dict["patch_embed.proj.weight"] = weight
    return state_dict


def _fit_pos_embed(pos_embed: Tensor, place: ClassToken | None, model: VisionMamba) -> Tensor:
    """Resamples a position embedding to the model's grid, and drops class rows the model has no token for."""
    grid = model.patch_embed.grid_size
    if model.class_token is None:
        pos_embed, place = split_class_tokens(pos_embed, place)[0], None
    num_patches = pos_embed.shape[1] - num_class_tokens(place)
    if num_patches == grid[0] * grid[1]:
        return pos_embed
    side = round(num_patches**0.5)
    if side * side != num_patches:
        raise ValueError(
            f"pos_embed has {num_patches} patch rows, neither the model's {grid[0]}x{grid[1]} nor a square grid; "
            "build the model with the checkpoint's img_size, load, then call set_input_size()"
        )
    return resample_pos_embed(pos_embed, (side, side), grid, place)


def from_upstream(class_name: str, kwargs: Mapping[str, Any]) -> VisionMamba:
    """Builds the model that a class of the authors' code builds from the same arguments.

    Args:
        class_name: ``VisionMamba``, ``VisionMambaSeg`` or ``VisionMambaDet``; of the last two, the backbone.
        kwargs: The authors' constructor arguments. Those about training, fused kernels or the neck change nothing here.

    Raises:
        ValueError: If the class or an argument is not known.
    """
    if class_name not in ("VisionMamba", "VisionMambaSeg", "VisionMambaDet"):
        raise ValueError(f"class {class_name!r} is not known; use VisionMamba, VisionMambaSeg or VisionMambaDet")
    args = dict(kwargs)
    ssm = dict(args.pop("ssm_cfg", None) or {})
    scan = "v1" if args.pop("if_bimamba", False) else args.pop("bimamba_type", "none")
    args.pop("bimamba_type", None)
    class_token = None
    if args.pop("if_cls_token", False):
        class_token = "middle" if args.pop("use_middle_cls_token", False) else "first"
        class_token = "both" if args.pop("use_double_cls_token", False) else class_token
    final_pool = args.pop("final_pool_type", "none")
    pools = {"none": "last", "mean": "avg", "max": "max_logit", "all": ""}
    dense = class_name != "VisionMamba"
    model_args = dict(
        img_size=args.pop("img_size", 224),
        patch_size=args.pop("patch_size", 16),
        stride=args.pop("stride", 16),
        pad_input=False,
        in_chans=args.pop("channels", args.pop("in_chans", 3)),
        num_classes=0 if dense else args.pop("num_classes", 1000),
        global_pool="token" if class_token else pools[final_pool],
        embed_dim=args.pop("embed_dim", 192),
        depth=args.pop("depth", 24),
        d_state=ssm.pop("d_state", args.pop("d_state", 16)),
        directions={"v2": "bidirectional", "v1": "shared", "none": "forward"}[scan],
        merge="mean" if scan == "v2" and args.pop("if_divide_out", True) else "sum",
        paired_blocks=args.pop("if_bidirectional", False),
        class_token=class_token,
        pos_embed=args.pop("if_abs_pos_embed", False),
        rope=args.pop("if_rope", False),
        rope_residual=args.pop("if_rope_residual", False),
        rope_reference_grid=args.pop("pt_hw_seq_len", 14),
        rope_class_first=True,
        norm_layer="rmsnorm" if args.pop("rms_norm", False) else "layernorm",
        norm_eps=args.pop("norm_epsilon", 1e-5),
        residual_in_fp32=args.pop("residual_in_fp32", False),
        layer_scale=args.pop("init_layer_scale", None),
        pos_drop_rate=args.pop("drop_rate", 0.0),
        drop_path_rate=args.pop("drop_path_rate", 0.1),
        **ssm,
    )
    no_norm = class_name == "VisionMambaDet" and args.get("last_layer_process", "none") != "add & norm"
    inert = {"if_divide_out", "use_middle_cls_token", "use_double_cls_token", "fused_add_norm", "use_checkpoint"}
    inert |= {"pretrained", "num_classes", "initializer_cfg", "flip_img_sequences_ratio", "ft_seq_len", "if_fpn"}
    inert |= {"out_indices", "use_residual_as_feature", "last_layer_process", "device", "dtype"}
    unknown = sorted(set(args) - inert)
    if unknown:
        raise ValueError(f"{class_name} arguments {', '.join(unknown)} are not known")
    model = VisionMamba(**model_args)
    if no_norm:
        model.prune_intermediate_layers(None, prune_norm=True)
    return model


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "origin_url": "https://github.com/hustvl/Vim",
        "paper_ids": "arXiv:2401.09417",
        "paper_name": "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
        **kwargs,
    }


def _small_cfg(**kwargs: Any) -> dict[str, Any]:
    """Config of our own small variants, for 32-pixel images."""
    return _cfg(
        **{
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "crop_pct": 1.0,
            "origin_url": None,
            **kwargs,
        }
    )


default_cfgs = generate_default_cfgs(
    {
        "vim_tiny_patch16_224.in1k": _cfg(
            hf_hub_id="hustvl/Vim-tiny-midclstok",
            hf_hub_filename="vim_t_midclstok_76p1acc.pth",
        ),
        "vim_tiny_patch16_stride8_224.in1k": _cfg(
            hf_hub_id="hustvl/Vim-tiny-midclstok",
            hf_hub_filename="vim_t_midclstok_ft_78p3acc.pth",
        ),
        "vim_small_patch16_224.in1k": _cfg(
            hf_hub_id="hustvl/Vim-small-midclstok",
            hf_hub_filename="vim_s_midclstok_80p5acc.pth",
        ),
        "vim_small_patch16_stride8_224.in1k": _cfg(
            hf_hub_id="hustvl/Vim-small-midclstok",
            hf_hub_filename="vim_s_midclstok_ft_81p6acc.pth",
        ),
        # The authors name no file for Vim-B; load a copy with create_model(..., checkpoint_path=...).
        "vim_base_patch16_224": _cfg(),
        "vim_nano.untrained*": _small_cfg(),
        "vim_nano.fashion_mnist": _small_cfg(
            **packaged_weights("vim_nano.fashion_mnist"),
            input_size=(1, 28, 28),
            mean=(0.286,),
            std=(0.353,),
        ),
        "vim_micro": _small_cfg(),
    }
)


def _create_vim(variant: str, pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    return build_model_with_cfg(
        VisionMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop("out_indices", 3), feature_cls="getter"),
        **kwargs,
    )


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti: 7.1M parameters, 76.1 top-1."""
    model_args = dict(embed_dim=192, depth=24)
    return _create_vim("vim_tiny_patch16_224", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti+, patches overlap by half: 7.3M parameters, 78.3 top-1."""
    model_args = dict(embed_dim=192, depth=24, stride=8)
    return _create_vim("vim_tiny_patch16_stride8_224", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S: 25.8M parameters, 80.5 top-1."""
    model_args = dict(embed_dim=384, depth=24)
    return _create_vim("vim_small_patch16_224", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S+, patches overlap by half: 26.0M parameters, 81.6 top-1."""
    model_args = dict(embed_dim=384, depth=24, stride=8)
    return _create_vim("vim_small_patch16_stride8_224", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-B: 97.6M parameters, 81.9 top-1."""
    model_args = dict(embed_dim=768, depth=24)
    return _create_vim("vim_base_patch16_224", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim_nano(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Ours, for 32-pixel images in 256 patches: 2.8M parameters."""
    model_args = dict(patch_size=2, embed_dim=192, depth=10, class_token=None, global_pool="avg")
    return _create_vim("vim_nano", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vim_micro(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Ours, for 32-pixel images in 64 patches: 0.7M parameters."""
    model_args = dict(patch_size=4, embed_dim=96, depth=8, class_token=None, global_pool="avg")
    return _create_vim("vim_micro", pretrained=pretrained, **dict(model_args, **kwargs))
