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
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    apply_rot_embed,
    calculate_drop_path_rates,
)
from timm.models import (
    generate_default_cfgs,
    register_model,
)
from torch import Tensor, nn

from zoo.backbones.layers.add_norm import add_norm
from zoo.backbones.layers.backbone import unwrap_checkpoint
from zoo.backbones.layers.class_token import (
    ClassToken,
    check_class_token,
)
from zoo.backbones.layers.columnar import ColumnarBackbone, Stream, fit_checkpoint
from zoo.backbones.layers.layer_shuffle import LayerShuffle, TokenOrder, restore_tokens, shuffle_tokens
from zoo.backbones.layers.mamba import Directions, MambaMixer, Merge, stack_mixer_parameters
from zoo.backbones.layers.patch_embed import PatchEmbed
from zoo.backbones.layers.position import rotary_table
from zoo.registry import build_model_with_cfg, packaged_weights

__all__ = ["VisionMamba"]

torch.fx.wrap("rotary_table")  # a single node for FX in this file too

NORM_LAYERS = {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}


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

    def forward(self, stream: Tensor, order: TokenOrder | None = None, normed: Tensor | None = None) -> Tensor:
        """Runs the mixer on the residual stream.

        Args:
            stream: (B, L, D) in any float dtype.
            order: In which order the mixer reads the tokens.
            normed: The stream through this block's norm, if that is known already.

        Returns:
            The mixer's output (B, L, D), tokens in their places.
        """
        if normed is None:
            _, normed = add_norm(stream, None, self.norm)
        return restore_tokens(self.mixer(shuffle_tokens(normed, order)), order)

    def add(self, stream: Tensor, update: Tensor) -> Tensor:
        """The stream after this block, in the stream's dtype or wider."""
        return stream + self.drop_path(update)


class VimBlockPair(nn.Module):
    """Two blocks side by side, the second on the flipped sequence; their streams are added."""

    def __init__(self, forward_block: VimBlock, backward_block: VimBlock) -> None:
        super().__init__()
        self.forward_block = forward_block
        self.backward_block = backward_block

    def forward(self, stream: Tensor, order: TokenOrder | None = None, normed: None = None) -> Tensor:
        """Residual stream (B, L, D) to the sum of both mixers' outputs (B, L, D)."""
        return self.forward_block(stream, order) + self.backward_block(stream, order)

    def add(self, stream: Tensor, update: Tensor) -> Tensor:
        """The stream after this pair: each block contributes its own copy of the stream."""
        return 2 * stream + self.forward_block.drop_path(update)


class VisionMamba(ColumnarBackbone):
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
            to 16: 1 for none, None for the published choice by sequence length.
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
    feature_sources = ("stream", "mixer")

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
        check_class_token(class_token)
        if norm_layer not in NORM_LAYERS:
            raise ValueError(f"norm_layer={norm_layer!r} is not known; use one of {', '.join(NORM_LAYERS)}")
        if rope and embed_dim % 4:
            raise ValueError(f"rope needs embed_dim divisible by 4, got {embed_dim}")
        if paired_blocks and depth % 2:
            raise ValueError(f"paired_blocks needs an even depth, got {depth}")
        super().__init__(embed_dim, in_chans, num_classes, global_pool, class_token, dynamic_img_size)
        self.alternate = alternate
        self.residual_in_fp32 = residual_in_fp32
        self.rope = rope
        self.rope_residual = rope_residual
        self.rope_reference_grid = rope_reference_grid
        self.rope_class_token = "first" if rope_class_first and class_token == "middle" else class_token

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
        self.feature_norms = nn.ModuleDict()
        self.norm = make_norm()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes else nn.Identity()
        self.init_weights(needs_reset=False)

    def _stream(self, x: Tensor) -> tuple[Tensor, tuple[int, int], Any]:
        """Image to the residual stream before the first block, the patch grid, rotary table and token orders."""
        tokens, grid = self.embed(x)
        if self.residual_in_fp32:
            tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        table = None
        if self.rope:
            table = rotary_table(
                grid, self.embed_dim, self.rope_reference_grid, self.rope_class_token, tokens.device, tokens.dtype
            )
            tokens = _turn(tokens, table)
        return tokens, grid, (table, self.layer_shuffle(tokens))

    def _advance(
        self, index: int, stream: Stream, grid: tuple[int, int], context: Any, run: Callable[..., Tensor]
    ) -> tuple[Stream, Tensor]:
        """Runs one block; returns the stream as the next block reads it, and the block's own output."""
        table, orders = context
        block = self.blocks[index]
        update = run(block, stream.tokens, orders[index], stream.normed)
        tokens = stream.tokens
        if table is None or index == self.depth - 1:  # the final norm reads the stream unturned
            norm = self._next_norm(index)
            if isinstance(block, VimBlock) and norm is not None:
                return Stream(*add_norm(tokens, update, norm, block.drop_path, narrow=norm is not self.norm)), update
            return Stream(block.add(tokens, update)), update
        if self.rope_residual:
            return Stream(_turn(block.add(tokens, update), table)), update
        return Stream(block.add(tokens, _turn(update, table))), update

    def pool(self, x: Tensor) -> Tensor:
        """Tokens (B, L, D) to one feature (B, D), or unchanged where the classifier runs on every token."""
        if self.global_pool == "max_logit":
            return x
        return x[:, -1] if self.global_pool == "last" else super().pool(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, L, D) to logits (B, num_classes), or to the pooled feature with ``pre_logits``."""
        x = super().forward_head(x, pre_logits)
        return x.amax(dim=1) if self.global_pool == "max_logit" else x


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
    state_dict = unwrap_checkpoint(state_dict)
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
            label_names=(
                *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
                *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
            ),
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
