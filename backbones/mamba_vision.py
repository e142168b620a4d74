"""MambaVision: two convolutional stages, then two stages of windowed tokens that are scanned first and attended last.

Paper: "MambaVision: A Hybrid Mamba-Transformer Vision Backbone", https://arxiv.org/abs/2407.08083.
Origin: https://github.com/NVlabs/MambaVision, which is licensed for research only; this file holds none of its code.
Its checkpoints load here. They are licensed CC-BY-NC-SA-4.0: not for commercial use, and what is derived from them
keeps the licence.

Differences from the original:

1. The two branches of a mixer share one product and one convolution over channels-last tokens.
2. The authors' code adds the bias of the step projection twice, and released weights depend on it; here ``dt_bias``
   holds the doubled value.
3. Steps start log-uniform in [0.001, 0.1] as in Mamba; the original overwrites this with softplus(0) = 0.69.
4. A_log, D and step biases are exempt from weight decay.
5. Option of later work: locally bidirectional scans (``lb_window``; LBMamba, arXiv 2506.15976).

Kept, because released weights depend on it: the zeros that fill up the last windows are tokens like others (norms give
them a value, they are scanned and attended to), and a stage cuts its map into windows once, without shifting them.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention, DropPath, LayerNorm2d, LayerScale, LayerScale2d, calculate_drop_path_rates
from timm.models import (
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
    register_notrace_module,
)
from torch import Tensor, nn

from zoo.backbones.layers.add_norm import add_norm
from zoo.backbones.layers.backbone import fit_parts, unwrap_checkpoint
from zoo.backbones.layers.hierarchical import HierarchicalBackbone
from zoo.backbones.layers.layer_norm import LayerNorm
from zoo.backbones.layers.mlp import Mlp
from zoo.backbones.layers.recurrence import check_window, init_decays, init_steps, negative_exp
from zoo.kernels import causal_conv1d, is_exporting, selective_scan
from zoo.registry import build_model_with_cfg

__all__ = ["MambaVision"]


@register_notrace_module
class MambaVisionMixer(nn.Module):
    """Half of the channels are convolved and scanned, the other half only convolved (section 3.2 of the paper).

    Shapes: B batch, L tokens, D = dim, E = expand * dim / 2 channels of a half, N states, R rank of the step
    projection, W taps.

    Args:
        dim: Token width D.
        d_state: States N per channel.
        d_conv: Taps W of the convolutions, up to 4, which reach as far back as ahead (one token further ahead if even).
        expand: Width of both halves together as a multiple of ``dim``.
        dt_rank: Rank R of the step projection; default ceil(dim / 16).
        lb_window: Steps of a locally bidirectional window, a power of two up to 16; 1 for plain scans.

    Raises:
        ValueError: If ``lb_window`` is not one of the above or the width cannot be halved.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 8,
        d_conv: int = 3,
        expand: int = 1,
        dt_rank: int | None = None,
        lb_window: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_window(lb_window)
        if expand * dim % 2:
            raise ValueError(f"dim={dim} times expand={expand} must be even, to be halved")
        half = expand * dim // 2
        rank = dt_rank or math.ceil(dim / 16)
        self.splits = [rank, d_state, d_state]
        self.ahead = d_conv // 2  # tokens that the convolution reads after its own
        self.lb_window = lb_window
        self.in_proj = nn.Linear(dim, 2 * half, bias=False, **dd)
        self.conv_weight = nn.Parameter(torch.empty(2 * half, d_conv, **dd))
        self.x_proj = nn.Linear(half, rank + 2 * d_state, bias=False, **dd)
        self.dt_proj = nn.Linear(rank, half, bias=False, **dd)
        self.dt_bias = nn.Parameter(torch.empty(half, **dd))
        self.A_log = nn.Parameter(torch.empty(half, d_state, **dd))
        self.D = nn.Parameter(torch.empty(half, **dd))
        self.out_proj = nn.Linear(2 * half, dim, bias=False, **dd)
        self.reset_parameters()
        self.init_special()

    def reset_parameters(self) -> None:
        """Steps log-uniform in [0.001, 0.1], A = -1..-N, D = 1; taps as torch's convolutions."""
        taps = self.conv_weight.shape[-1]
        nn.init.uniform_(self.conv_weight, -(taps**-0.5), taps**-0.5)
        init_steps(self.dt_bias)
        init_decays(self.A_log)
        nn.init.ones_(self.D)

    def init_special(self) -> None:
        """The step projection as in Mamba."""
        bound = self.dt_proj.in_features**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, L, D) to tokens (B, L, D)."""
        # Zero tokens at the end let the causal convolution, read that much later, see as far ahead as back.
        x = self.in_proj(F.pad(x, (0, 0, 0, self.ahead)))
        x = causal_conv1d(x, self.conv_weight, activation="silu")[:, self.ahead :]
        u, z = x.chunk(2, dim=-1)  # (B, L, E), views
        dt, B, C = self.x_proj(u).split(self.splits, dim=-1)  # (B, L, R or N)
        y = selective_scan(
            u,
            self.dt_proj(dt),
            negative_exp(self.A_log),
            B,
            C,
            self.D,
            delta_bias=self.dt_bias,
            delta_softplus=True,
            window=self.lb_window,
        )
        return self.out_proj(torch.cat([y, z], dim=-1))


class TokenBlock(nn.Module):
    """Mixer and MLP, each after a norm and inside a residual connection.

    Args:
        dim: Token width D.
        mixer: Token mixer, tokens (B, L, D) to tokens (B, L, D).
        mlp_ratio: Hidden width of the MLP as a multiple of ``dim``.
        layer_scale: Initial value of learned factors per channel on both branches; default none.
        drop_path: Probability that a sample skips a branch during training.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()

        def make_scale() -> nn.Module:
            return nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)

        self.norm1 = LayerNorm(dim, **dd)
        self.mixer = mixer
        self.ls1 = make_scale()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.ls2 = make_scale()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, L, D) to tokens (B, L, D)."""
        x, normed = add_norm(x, self.ls1(self.mixer(self.norm1(x))), self.norm2, self.drop_path1)
        return x + self.drop_path2(self.ls2(self.mlp(normed)))


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with batch norms inside a residual connection.

    Args:
        dim: Channels C.
        layer_scale: Initial value of a learned factor per channel on the branch; default none.
        drop_path: Probability that a sample skips the branch during training.
    """

    def __init__(
        self,
        dim: int,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.act = nn.GELU(approximate="tanh")
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.ls = nn.Identity() if layer_scale is None else LayerScale2d(dim, layer_scale, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to map (B, C, H, W)."""
        update = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        return x + self.drop_path(self.ls(update))


def _windows_across(side: int, size: int) -> int:
    """Windows that cover one side of a map."""
    return (side + size - 1) // size


@torch.fx.wrap
@register_notrace_function
def cut_windows(x: Tensor, size: int) -> Tensor:
    """Map (B, C, H, W) to the tokens of its windows (B * windows, size * size, C), zero-padded bottom and right."""
    x = x.permute(0, 2, 3, 1)
    rows, columns = (_windows_across(side, size) for side in x.shape[1:3])
    bottom, right = rows * size - x.shape[1], columns * size - x.shape[2]
    if not isinstance(bottom, int) or not isinstance(right, int) or bottom or right:
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    x = x.reshape(x.shape[0], rows, size, columns, size, x.shape[3]).transpose(2, 3)
    return x.reshape(-1, size * size, x.shape[5]).contiguous()


@torch.fx.wrap
@register_notrace_function
def join_windows(windows: Tensor, size: int, height: int, width: int) -> Tensor:
    """Tokens of windows (B * windows, size * size, C) to the map they were cut from, (B, C, height, width)."""
    rows, columns = _windows_across(height, size), _windows_across(width, size)
    x = windows.reshape(-1, rows, columns, size, size, windows.shape[2]).transpose(2, 3)
    x = x.reshape(-1, rows * size, columns * size, windows.shape[2])  # (B, padded height, padded width, C)
    return _crop(x, height, width).permute(0, 3, 1, 2)


def _crop(x: Tensor, height: int, width: int) -> Tensor:
    """The top left of a map (B, H, W, C), (B, height, width, C)."""
    if is_exporting():  # strides of a slice tie a graph to grids that windows fit, or to others
        rows, columns = (torch.arange(side, device=x.device) for side in (height, width))
        return x.index_select(1, rows).index_select(2, columns)
    return x[:, :height, :width]


class MambaVisionStage(nn.Module):
    """Halves the resolution, unless it is the first stage, and runs blocks.

    Args:
        blocks: Blocks over maps (B, C, H, W), or over tokens (B, L, C) if there is a window.
        downsample: Reduces the resolution before the blocks; default nothing.
        window_size: Side of the windows that tokens are kept in for the whole stage; None for blocks over maps.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], downsample: nn.Module | None = None, window_size: int | None = None
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.grad_checkpointing = False
        self.downsample = nn.Identity() if downsample is None else downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to map (B, C', H', W'), half as large but in the first stage."""
        x = self.downsample(x)
        if self.window_size is None:
            return self._run_blocks(x)
        windows = self._run_blocks(cut_windows(x, self.window_size))
        return join_windows(windows, self.window_size, x.shape[2], x.shape[3])

    def _run_blocks(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


STEM_STRIDES = {1: (1, 1), 2: (2, 1), 4: (2, 2)}


class MambaVision(HierarchicalBackbone):
    """MambaVision: convolutional stem, two convolutional and two token stages, batch norm, mean, classifier.

    A stage of n token blocks scans in the first ceil(n / 2) and attends in the others. Weights do not depend on
    ``window_size``; the authors enlarge it for larger images, so that one window covers the map.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for pooled features instead of logits.
        global_pool: ``"avg"``, or ``""`` for the map itself.
        stem_width: Channels between the two convolutions of the stem.
        stem_stride: Pixels to a cell of the first stage, 1, 2 or 4.
        dim: Channels of the first stage; every later stage has twice as many.
        depths: Blocks of every stage.
        num_heads: Attention heads of the two token stages.
        window_size: Sides of the windows of the two token stages.
        mlp_ratio: Hidden width of the MLPs as a multiple of their width.
        d_state: States per channel of the scans.
        d_conv: Taps of the mixers' convolutions.
        lb_window: Steps of a locally bidirectional window of the scans; 1 for plain scans.
        qk_norm: Whether attention normalises queries and keys.
        layer_scale: Initial value of learned factors on the branches of token blocks; default none.
        layer_scale_conv: The same for convolutional blocks.
        feature_norms: Stages whose intermediate features get a layer norm of their own, as in the authors' dense
            prediction models.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.

    Raises:
        ValueError: If an argument is not one of its choices or does not fit another.
    """

    channels_last = False

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_width: int = 64,
        stem_stride: int = 4,
        dim: int = 96,
        depths: Sequence[int] = (3, 3, 7, 5),
        num_heads: Sequence[int] = (8, 16),
        window_size: Sequence[int] = (14, 7),
        mlp_ratio: float = 4.0,
        d_state: int = 8,
        d_conv: int = 3,
        lb_window: int = 1,
        qk_norm: bool = False,
        layer_scale: float | None = None,
        layer_scale_conv: float | None = None,
        feature_norms: Sequence[int] = (),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        if stem_stride not in STEM_STRIDES:
            raise ValueError(f"stem_stride={stem_stride} is not known; use one of {', '.join(map(str, STEM_STRIDES))}")
        for name, values, count in (
            ("depths", depths, 4),
            ("num_heads", num_heads, 2),
            ("window_size", window_size, 2),
        ):
            if len(values) != count or min(values) < 1:
                raise ValueError(f"{name}={tuple(values)} must be {count} positive numbers")
        if any(not 0 <= index < 4 for index in feature_norms):
            raise ValueError(f"feature_norms={tuple(feature_norms)} names a stage that is not among the 4")
        dims = [dim * 2**i for i in range(4)]
        for width, heads in zip(dims[2:], num_heads, strict=True):
            if width % heads:
                raise ValueError(f"num_heads={tuple(num_heads)} do not divide the widths {tuple(dims[2:])}")
        super().__init__(dims, [stem_stride * 2**i for i in range(4)], in_chans, num_classes, global_pool)
        first, second = STEM_STRIDES[stem_stride]
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, stem_width, 3, first, padding=1, bias=False, **dd),
            nn.BatchNorm2d(stem_width, eps=1e-4, **dd),
            nn.ReLU(),
            nn.Conv2d(stem_width, dim, 3, second, padding=1, bias=False, **dd),
            nn.BatchNorm2d(dim, eps=1e-4, **dd),
            nn.ReLU(),
        )

        def make_token_block(stage: int, index: int, drop_path: float) -> TokenBlock:
            width = dims[stage]
            if index < math.ceil(depths[stage] / 2):
                mixer = MambaVisionMixer(width, d_state, d_conv, lb_window=lb_window, **dd)
            else:
                heads = num_heads[stage - 2]
                mixer = Attention(width, heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm, **dd)
            return TokenBlock(width, mixer, mlp_ratio, layer_scale, drop_path, **dd)

        def make_stage(stage: int, rates: Sequence[float]) -> MambaVisionStage:
            downsample = None
            if stage > 0:
                downsample = nn.Conv2d(dims[stage - 1], dims[stage], 3, 2, padding=1, bias=False, **dd)
            if stage < 2:
                blocks = [ConvBlock(dims[stage], layer_scale_conv, rate, **dd) for rate in rates]
                return MambaVisionStage(blocks, downsample)
            blocks = [make_token_block(stage, index, rate) for index, rate in enumerate(rates)]
            return MambaVisionStage(blocks, downsample, window_size[stage - 2])

        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        self.stages = nn.Sequential(*(make_stage(stage, rates[stage]) for stage in range(4)))
        self._set_feature_info()
        norms = {str(index): LayerNorm2d(dims[index], eps=1e-5, **dd) for index in sorted(set(feature_norms))}
        self.feature_norms = nn.ModuleDict(norms)
        self.norm = nn.BatchNorm2d(dims[-1], **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dims[-1], num_classes, **dd) if num_classes else nn.Identity()
        self.init_weights(needs_reset=False)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Converts a checkpoint to the names of ``model``.

    Accepts the authors' checkpoints (the weights under ``state_dict`` or ``model``, names that may all start with
    ``module.``, ``model.`` or ``encoder.``), their bare state dicts, and ours. Keys of the norm and the head are
    dropped if the model has none.

    Args:
        state_dict: Checkpoint of any kind above.
        model: Model that the result is loaded into.

    Returns:
        State dict in this file's names.
    """
    state_dict = dict(unwrap_checkpoint(state_dict))
    first_layer = next((name for name in state_dict if name.endswith("patch_embed.conv_down.0.weight")), None)
    if first_layer is not None:
        prefix = first_layer.removesuffix("patch_embed.conv_down.0.weight")
        state_dict = {n.removeprefix(prefix): t for n, t in state_dict.items() if n.startswith(prefix)}
        state_dict = upstream_names_to_ours(state_dict)
    return fit_parts(state_dict, model)


def upstream_names_to_ours(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names, of a model or of a mixer alone, to ours.

    The bias of the step projection is doubled, as their code adds it twice; the two convolutions become one.
    """
    state_dict = dict(state_dict)
    for name in [name for name in state_dict if name.endswith("conv1d_x.weight")]:
        prefix = name.removesuffix("conv1d_x.weight")
        taps = [state_dict.pop(f"{prefix}conv1d_{branch}.weight").squeeze(1) for branch in "xz"]  # (E, W) each
        state_dict[f"{prefix}conv_weight"] = torch.cat(taps)
        state_dict[f"{prefix}dt_bias"] = 2 * state_dict.pop(f"{prefix}dt_proj.bias")

    def rename(name: str) -> str:
        name = re.sub(r"^patch_embed\.conv_down\.", "stem.", name)
        name = re.sub(
            r"^levels\.(\d+)\.downsample\.reduction\.0\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.", name
        )
        name = re.sub(r"^levels\.", "stages.", name)
        name = re.sub(r"\.gamma(?:_(\d))?$", r".ls\1.gamma", name)
        return re.sub(r"^outnorm(\d)\.", r"feature_norms.\1.", name)

    return {rename(name): tensor for name, tensor in state_dict.items()}


def from_upstream(class_name: str, kwargs: Mapping[str, Any]) -> MambaVision:
    """Builds the model that the authors' code builds from the same arguments.

    Args:
        class_name: ``MambaVision``, or ``MM_mamba_vision`` for the backbone of dense prediction.
        kwargs: The authors' constructor arguments.

    Raises:
        ValueError: If the class or an argument is not known.
    """
    if class_name not in ("MambaVision", "MM_mamba_vision"):
        raise ValueError(f"no builder for {class_name!r}; use MambaVision or MM_mamba_vision")
    args = dict(kwargs)
    for name, required in (("qkv_bias", True), ("drop_rate", 0.0), ("attn_drop_rate", 0.0), ("norm_layer", "ln2d")):
        if args.pop(name, required) != required:
            raise ValueError(f"{name} must be {required!r}: no released model differs")
    out_indices = args.pop("out_indices", None)
    layer_scales = {name: args.pop(name, None) for name in ("layer_scale", "layer_scale_conv")}
    model_args = dict(
        in_chans=args.pop("in_chans", 3),
        num_classes=args.pop("num_classes", 1000) if out_indices is None else 0,
        stem_width=args.pop("in_dim"),
        dim=args.pop("dim"),
        depths=args.pop("depths"),
        num_heads=args.pop("num_heads")[2:],
        window_size=args.pop("window_size")[2:],
        mlp_ratio=args.pop("mlp_ratio"),
        qk_norm=bool(args.pop("qk_scale", False)),
        feature_norms=out_indices or (),
        drop_path_rate=args.pop("drop_path_rate", 0.2),
        **layer_scales,
    )
    unknown = set(args) - {"resolution", "pretrained"}
    if unknown:
        raise ValueError(f"arguments not known: {', '.join(sorted(unknown))}")
    model = MambaVision(**model_args)
    if out_indices is not None:
        model.norm = nn.Identity()
    return model


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head",
        "license": "cc-by-nc-sa-4.0",
        "origin_url": "https://github.com/NVlabs/MambaVision",
        "paper_ids": "arXiv:2407.08083",
        "paper_name": "MambaVision: A Hybrid Mamba-Transformer Vision Backbone",
        **kwargs,
    }


def _released_cfg(name: str, filename: str, img_size: int = 224, **kwargs: Any) -> dict[str, Any]:
    """Config of weights that the authors publish, for non-commercial use only."""
    return _cfg(
        hf_hub_id=f"nvidia/MambaVision-{name}",
        hf_hub_filename=f"mambavision_{filename}.pth.tar",
        input_size=(3, img_size, img_size),
        pool_size=(img_size // 32, img_size // 32),
        **kwargs,
    )


LARGE_IMAGES = dict(img_size=512, crop_pct=0.93, crop_mode="squash")

default_cfgs = generate_default_cfgs(
    {
        "mamba_vision_t.in1k": _released_cfg("T-1K", "tiny_1k"),
        "mamba_vision_t2.in1k": _released_cfg("T2-1K", "tiny2_1k", crop_pct=0.98),
        "mamba_vision_s.in1k": _released_cfg("S-1K", "small_1k", crop_pct=0.93),
        "mamba_vision_b.in1k": _released_cfg("B-1K", "base_1k"),
        "mamba_vision_l.in1k": _released_cfg("L-1K", "large_1k"),
        "mamba_vision_l2.in1k": _released_cfg("L2-1K", "large2_1k"),
        "mamba_vision_b_21k.in21k_ft_in1k": _released_cfg("B-21K", "base_21k"),
        "mamba_vision_l_21k.in21k_ft_in1k": _released_cfg("L-21K", "large_21k"),
        "mamba_vision_l2_512_21k.in21k_ft_in1k": _released_cfg("L2-512-21K", "L2_21k_240m_512", **LARGE_IMAGES),
        "mamba_vision_l3_256_21k.in21k_ft_in1k": _released_cfg("L3-256-21K", "L3_21k_740m_256", 256),
        "mamba_vision_l3_512_21k.in21k_ft_in1k": _released_cfg("L3-512-21K", "L3_21k_740m_512", **LARGE_IMAGES),
        "mamba_vision_nano": _cfg(
            num_classes=10, input_size=(3, 32, 32), pool_size=(4, 4), license="apache-2.0", origin_url=None
        ),
    }
)


def _create_mamba_vision(variant: str, pretrained: bool = False, **kwargs: Any) -> MambaVision:
    return build_model_with_cfg(
        MambaVision,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop("out_indices", (0, 1, 2, 3)), feature_cls="getter"),
        **kwargs,
    )


@register_model
def mamba_vision_t(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-T: 31.8M parameters, 82.3 top-1."""
    model_args = dict(stem_width=32, dim=80, depths=(1, 3, 8, 4))
    return _create_mamba_vision("mamba_vision_t", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def mamba_vision_t2(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-T2: 35.1M parameters, 82.7 top-1."""
    model_args = dict(stem_width=32, dim=80, depths=(1, 3, 11, 4))
    return _create_mamba_vision("mamba_vision_t2", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def mamba_vision_s(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-S: 50.1M parameters, 83.3 top-1."""
    return _create_mamba_vision("mamba_vision_s", pretrained=pretrained, **kwargs)


BASE = dict(dim=128, depths=(3, 3, 10, 5), layer_scale=1e-5)
LARGE = dict(dim=196, depths=(3, 3, 10, 5), num_heads=(16, 32), layer_scale=1e-5)
LARGE2 = dict(LARGE, depths=(3, 3, 12, 5))
LARGE3 = dict(dim=256, depths=(3, 3, 20, 10), num_heads=(16, 32), layer_scale=1e-5)


@register_model
def mamba_vision_b(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-B: 97.7M parameters, 84.2 top-1."""
    return _create_mamba_vision("mamba_vision_b", pretrained=pretrained, **dict(BASE, **kwargs))


@register_model
def mamba_vision_l(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L: 228.0M parameters, 85.0 top-1."""
    return _create_mamba_vision("mamba_vision_l", pretrained=pretrained, **dict(LARGE, **kwargs))


@register_model
def mamba_vision_l2(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L2: 241.6M parameters, 85.3 top-1."""
    return _create_mamba_vision("mamba_vision_l2", pretrained=pretrained, **dict(LARGE2, **kwargs))


@register_model
def mamba_vision_b_21k(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-B pre-trained on ImageNet-21K: 97.7M parameters, 84.9 top-1."""
    return _create_mamba_vision("mamba_vision_b_21k", pretrained=pretrained, **dict(BASE, **kwargs))


@register_model
def mamba_vision_l_21k(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L pre-trained on ImageNet-21K: 228.0M parameters, 86.1 top-1."""
    return _create_mamba_vision("mamba_vision_l_21k", pretrained=pretrained, **dict(LARGE, **kwargs))


@register_model
def mamba_vision_l2_512_21k(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L2 pre-trained on ImageNet-21K, for 512-pixel images: 241.6M parameters, 87.3 top-1."""
    model_args = dict(LARGE2, window_size=(32, 16))
    return _create_mamba_vision("mamba_vision_l2_512_21k", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def mamba_vision_l3_256_21k(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L3 pre-trained on ImageNet-21K, for 256-pixel images: 739.6M parameters, 87.3 top-1."""
    model_args = dict(LARGE3, window_size=(16, 8))
    return _create_mamba_vision("mamba_vision_l3_256_21k", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def mamba_vision_l3_512_21k(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L3 pre-trained on ImageNet-21K, for 512-pixel images: 739.6M parameters, 88.1 top-1."""
    model_args = dict(LARGE3, window_size=(32, 16))
    return _create_mamba_vision("mamba_vision_l3_512_21k", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def mamba_vision_nano(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """Ours, for 32-pixel images, whose token stages see 8 x 8 and 4 x 4 cells: 2.7M parameters."""
    model_args = dict(stem_width=16, stem_stride=1, dim=32, depths=(1, 1, 4, 2), num_heads=(4, 8), window_size=(8, 4))
    return _create_mamba_vision("mamba_vision_nano", pretrained=pretrained, **dict(model_args, **kwargs))
