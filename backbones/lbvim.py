"""LBVim: Vim with one locally bidirectional scan instead of two scans, read in alternating directions.

Paper: "LBMamba: Locally Bi-directional Mamba", https://arxiv.org/abs/2506.15976. Origin:
https://github.com/cvlab-stonybrook/LBMamba; its authors have published no weights and no licence.

Differences from the original:

1. The window is an argument. In the original it follows from the launch of the kernel, hence from the sequence length
   (and the GPU's maker): ``window=None`` keeps that, a number keeps the function the same at any image size.
2. Nothing is flipped: every second block reads the tokens from their end, and tokens stay in raster order. The original
   flips both streams after every layer, so that an odd number of layers leaves them reversed.
3. 16-bit floats work; the original trains in float32 only.
4. Images that whole patches do not cover are padded; the original fails on them.
5. Dense features come from ``forward_intermediates``, in raster order, for any grid. ``feature_norms``, ``feature_dim``
   and ``feature_source`` make them those of the authors' segmentation backbone.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import AttentionPoolLatent, get_device_dtype
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.backbones.layers.class_token import ClassToken
from zoo.backbones.layers.columnar import FeatureSource, fit_checkpoint
from zoo.backbones.vim import VisionMamba, rename_upstream
from zoo.registry import build_model_with_cfg

__all__ = ["LBVim"]

# The authors' head is a sequence of an attention pool, with a norm of its own, and a linear layer.
HEAD_NAMES = {"head.0.post_norm.": "pool_norm.", "head.0.": "attn_pool.", "head.1.": "head."}


class LBVim(VisionMamba):
    """A column of Mamba blocks with locally bidirectional scans; every second one reads from the last token on.

    Args:
        img_size: Image size (H, W) or one side that the position embedding is made for.
        patch_size: Patch side in pixels.
        stride: Distance between patches in pixels; default ``patch_size``.
        pad_input: Whether images that patches do not cover exactly are zero-padded; if not, the margin is ignored.
        dynamic_img_size: Whether images of other sizes are accepted (the position embedding is resampled).
        in_chans: Image channels.
        num_classes: Classes; 0 for pooled features instead of logits.
        global_pool: ``"avg"`` mean of the patch tokens; ``"attn"`` attention of a learned query over them, and a norm;
            or another pooling of :class:`~zoo.backbones.vim.VisionMamba`.
        pool_heads: Heads of the attention pool.
        embed_dim: Token width D.
        depth: Blocks.
        d_state: States per channel.
        d_conv: Taps of the convolution.
        expand: Inner width as a multiple of ``embed_dim``.
        dt_rank: Rank of the step projection; default ceil(embed_dim / 16).
        window: Steps of a window of the scan, a power of two up to 16: a token also sees the later ones of its window.
            None for the published choice by sequence length: 4 up to 128 tokens, 8 up to 256, else 16; 1 for plain
            scans. Windows start where a block starts to read.
        alternate: Whether every second block reads the tokens from the last to the first.
        class_token: Place of the class token(s) in the sequence; default none.
        norm_layer: ``"rmsnorm"`` or ``"layernorm"``.
        norm_eps: Epsilon of the norms.
        residual_in_fp32: Whether the residual stream is float32 when the model or autocast is 16-bit.
        layer_shuffle: Probability that the last block reads the tokens in a random order during training.
        shuffle_per_sample: Whether every sample of a batch is shuffled in its own way.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the position embedding.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.
        feature_norms: Blocks whose intermediate features get a layer norm of their own, as in the authors' dense
            models (5, 11, 17 and 23); default none.
        feature_dim: Channels that a linear layer brings these features to before their norm; None leaves them
            ``embed_dim`` wide, without such a layer. The authors take 192 for a width of 300, 384 for 528.
        feature_source: What features are, ``"stream"`` or ``"mixer"`` (see :meth:`forward_intermediates`), where
            ``forward_intermediates`` is not told; the authors' dense models use ``"mixer"``.

    Raises:
        ValueError: If an argument is not one of its choices or does not fit another.
    """

    global_pools = (*VisionMamba.global_pools, "attn")

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        stride: int | Sequence[int] | None = None,
        pad_input: bool = True,
        dynamic_img_size: bool = True,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        pool_heads: int = 6,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        window: int | None = None,
        alternate: bool = True,
        class_token: ClassToken | None = None,
        norm_layer: str = "rmsnorm",
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        layer_shuffle: float = 0.0,
        shuffle_per_sample: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        feature_norms: Sequence[int] = (),
        feature_dim: int | None = None,
        feature_source: FeatureSource = "stream",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            stride=stride,
            pad_input=pad_input,
            dynamic_img_size=dynamic_img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depth=depth,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            dt_rank=dt_rank,
            directions="forward",
            alternate=alternate,
            lb_window=window,
            class_token=class_token,
            norm_layer=norm_layer,
            norm_eps=norm_eps,
            residual_in_fp32=residual_in_fp32,
            layer_shuffle=layer_shuffle,
            shuffle_per_sample=shuffle_per_sample,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            drop_path_rate=drop_path_rate,
            device=device,
            dtype=dtype,
        )
        if embed_dim % pool_heads and global_pool == "attn":
            raise ValueError(f"pool_heads={pool_heads} does not divide embed_dim={embed_dim}")
        if any(not 0 <= index < depth for index in feature_norms):
            raise ValueError(f"feature_norms={tuple(feature_norms)} names a block that is not among the {depth}")
        if feature_source not in self.feature_sources:
            raise ValueError(f"feature_source={feature_source!r} is not known; use 'stream' or 'mixer'")
        self.feature_source = feature_source
        for index in sorted(set(feature_norms)):
            self.feature_norms[str(index)] = _feature_norm(embed_dim, feature_dim, device, dtype)
            self.feature_info[index]["num_chs"] = feature_dim or embed_dim
        self.pool_heads = pool_heads
        self._make_pool(device, dtype)

    def _make_pool(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Adds the attention pool and its norm, or removes them where ``global_pool`` is another."""
        self.attn_pool = self.pool_norm = None
        if self.global_pool == "attn":
            dd = {"device": device, "dtype": dtype}
            self.attn_pool = AttentionPoolLatent(
                self.embed_dim, out_features=0, num_heads=self.pool_heads, q_proj=False, **dd
            )
            self.pool_norm = nn.LayerNorm(self.embed_dim, eps=1e-5, **dd)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialises every parameter, as :meth:`VisionMamba.init_weights`."""
        super().init_weights(needs_reset)
        attn_pool = getattr(self, "attn_pool", None)  # the base class calls this before there is one
        if attn_pool is not None:
            attn_pool.init_weights()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone."""
        return super().no_weight_decay() | ({"attn_pool.latent"} if self.attn_pool is not None else set())

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier, and the pooling if asked.

        Args:
            num_classes: Classes; 0 for none.
            global_pool: New pooling; None keeps the current one, with its weights.
        """
        super().reset_classifier(num_classes, global_pool)
        if global_pool is not None and (global_pool == "attn") != (self.attn_pool is not None):
            self._make_pool(**get_device_dtype(self))

    def _set_feature_info(self) -> None:
        widths = [info["num_chs"] for info in getattr(self, "feature_info", [])]
        super()._set_feature_info()
        for info, width in zip(self.feature_info, widths, strict=False):  # blocks may have been removed
            info["num_chs"] = width

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        source: FeatureSource | None = None,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features after chosen blocks, as :meth:`VisionMamba.forward_intermediates`.

        Features of blocks in ``feature_norms`` have ``feature_dim`` channels. ``source`` defaults to the model's
        ``feature_source``.
        """
        source = source or self.feature_source
        return super().forward_intermediates(
            x, indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only, source
        )

    def pool(self, x: Tensor) -> Tensor:
        """Tokens (B, L, D) to one feature (B, D), or unchanged where the classifier runs on every token."""
        if self.global_pool != "attn":
            return super().pool(x)
        patches, _ = self.split_tokens(x)
        return self.pool_norm(self.attn_pool(patches))


def _feature_norm(
    width: int, feature_dim: int | None, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Sequential:
    """Layer norm of a block's features, after a linear layer if they are to have another width."""
    dd = {"device": device, "dtype": dtype}
    linear = [] if feature_dim is None else [("map", nn.Linear(width, feature_dim, **dd))]
    return nn.Sequential(OrderedDict([*linear, ("norm", nn.LayerNorm(feature_dim or width, **dd))]))


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: LBVim) -> dict[str, Tensor]:
    """Converts a checkpoint to the names and the position embedding of ``model``.

    Args:
        state_dict: The authors' training checkpoint or bare state dict, or ours.
        model: Model that the result is loaded into.

    Returns:
        State dict in this file's names.

    Raises:
        ValueError: If the position embedding's grid cannot be told.
    """
    converted = {}
    for name, tensor in rename_upstream(state_dict).items():
        prefix = next((theirs for theirs in HEAD_NAMES if name.startswith(theirs)), None)
        name = name if prefix is None else HEAD_NAMES[prefix] + name.removeprefix(prefix)
        name = re.sub(r"^out_map_(\d+)\.", r"feature_norms.\1.map.", name)
        name = re.sub(r"^outnorm_(\d+)\.", r"feature_norms.\1.norm.", name)
        if model.attn_pool is not None or not name.startswith(("attn_pool.", "pool_norm.")):
            converted[name] = tensor
    return fit_checkpoint(converted, model, "middle" if "cls_token" in converted else None)


def from_upstream(kwargs: Mapping[str, Any]) -> LBVim:
    """Builds the model that the authors' ``BiVisionMamba`` builds from the same arguments.

    With ``out_indices`` it is their segmentation backbone: no classifier and no final norm, and features of these
    blocks with norms, and linear layers to ``out_dim``, of their own.

    Args:
        kwargs: The authors' constructor arguments. Those about training or fused kernels change nothing here.

    Raises:
        ValueError: If an argument is not known, or asks for what the published models do not have.
    """
    args = dict(kwargs)
    if args.pop("if_cls_token", False):
        raise ValueError(
            "if_cls_token=True: BiVisionMamba's class tokens are in no published model (lbvim_tiny, lbvim_300, "
            "lbvim_small and lbvim_528_atthead have none); for Vim's use zoo.backbones.vim.VisionMamba"
        )
    scan = args.pop("bimamba_type", "none")
    if scan != "none":
        raise ValueError(
            f"bimamba_type={scan!r}: two-way scans of BiVisionMamba are in no published model, and the authors scan "
            "only the forward direction in windows, which is no option of this mixer; for plain two-way scans use "
            "zoo.backbones.vim.VisionMamba"
        )
    if args.pop("last_n_layer_vim", 0):
        raise ValueError("last_n_layer_vim: blocks with Vim's two-way scans are in no published BiVisionMamba")
    if not args.pop("if_abs_pos_embed", False):
        raise ValueError("BiVisionMamba without position embedding is no published model; use VisionMamba")
    dense = "out_indices" in args
    if args.pop("final_pool_type", "none") != "mean" and not dense:
        raise ValueError("of BiVisionMamba's poolings only 'mean' is published")
    head_type = args.pop("head_type", None)
    if head_type not in (None, "linear", "att_qkv_onlyatt_pnorm_nomapq"):
        raise ValueError(f"head_type={head_type!r} of BiVisionMamba is no published head")
    heads = args.pop("head_n_heads", 6)
    embed_dim, out_dim = args.pop("embed_dim", 192), args.pop("out_dim", None)
    model_args = dict(
        img_size=args.pop("img_size", 224),
        patch_size=args.pop("patch_size", 16),
        stride=args.pop("stride", None),
        pad_input=False,
        in_chans=args.pop("channels", args.pop("in_chans", 3)),
        num_classes=0 if dense else args.pop("num_classes", 1000),
        global_pool="attn" if head_type == "att_qkv_onlyatt_pnorm_nomapq" else "avg",
        pool_heads=heads,
        embed_dim=embed_dim,
        depth=args.pop("depth", 24),
        d_state=args.pop("d_state", 16),
        window=None if args.pop("lbm", False) else 1,
        alternate=args.pop("layerwise_reverse_sq", False),
        norm_layer="rmsnorm" if args.pop("rms_norm", False) else "layernorm",
        norm_eps=args.pop("norm_epsilon", 1e-5),
        residual_in_fp32=args.pop("residual_in_fp32", False),
        pos_drop_rate=args.pop("drop_rate", 0.0),
        drop_path_rate=args.pop("drop_path_rate", 0.1),
        feature_norms=args.pop("out_indices", ()),
        feature_dim=None if out_dim == embed_dim else out_dim,
        feature_source="mixer" if dense else "stream",
    )
    inert = {"if_divide_out", "use_middle_cls_token", "fused_add_norm", "num_classes"}
    unknown = sorted(set(args) - inert)
    if unknown:
        raise ValueError(f"BiVisionMamba arguments {', '.join(unknown)} are not known")
    model = LBVim(**model_args)
    if dense:
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
        "origin_url": "https://github.com/cvlab-stonybrook/LBMamba",
        "paper_ids": "arXiv:2506.15976",
        "paper_name": "LBMamba: Locally Bi-directional Mamba",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "lbvim_tiny_patch16_224": _cfg(),
        "lbvim_300_patch16_224": _cfg(),
        "lbvim_small_patch16_224": _cfg(),
        "lbvim_528_patch16_224_atthead": _cfg(),
        "lbvim_nano": _cfg(num_classes=10, input_size=(3, 32, 32), crop_pct=1.0, license="apache-2.0", origin_url=None),
    }
)


def _create_lbvim(variant: str, pretrained: bool = False, **kwargs: Any) -> LBVim:
    return build_model_with_cfg(
        LBVim,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop("out_indices", 3), feature_cls="getter"),
        **kwargs,
    )


@register_model
def lbvim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> LBVim:
    """LBVim-Ti: 6.4M parameters."""
    return _create_lbvim("lbvim_tiny_patch16_224", pretrained=pretrained, **dict(dict(embed_dim=192), **kwargs))


@register_model
def lbvim_300_patch16_224(pretrained: bool = False, **kwargs: Any) -> LBVim:
    """LBVim-300: 14.9M parameters."""
    return _create_lbvim("lbvim_300_patch16_224", pretrained=pretrained, **dict(dict(embed_dim=300), **kwargs))


@register_model
def lbvim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> LBVim:
    """LBVim-S: 23.9M parameters."""
    return _create_lbvim("lbvim_small_patch16_224", pretrained=pretrained, **dict(dict(embed_dim=384), **kwargs))


@register_model
def lbvim_528_patch16_224_atthead(pretrained: bool = False, **kwargs: Any) -> LBVim:
    """LBVim-528, with an attention pool: 44.8M parameters."""
    model_args = dict(embed_dim=528, global_pool="attn", pool_heads=6)
    return _create_lbvim("lbvim_528_patch16_224_atthead", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def lbvim_nano(pretrained: bool = False, **kwargs: Any) -> LBVim:
    """Ours, for 32-pixel images in 256 patches: 2.6M parameters."""
    model_args = dict(patch_size=2, embed_dim=192, depth=10)
    return _create_lbvim("lbvim_nano", pretrained=pretrained, **dict(model_args, **kwargs))
