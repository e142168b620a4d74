"""A2Mamba: the maps of sliding attention at two scales also gather the hidden states of a state-space model.

Paper: "A2Mamba: Attention-augmented State Space Models for Visual Recognition", https://arxiv.org/abs/2507.16624.
Origin: https://github.com/LMMMEng/A2Mamba, which comes without a licence; this file holds none of its code. Its
checkpoints load here.

Everything between the stem and the pooling works on (B, H, W, C): scans, norms and products over channels want
channels last, attention takes the heads as strided views, and PyTorch's convolutions and batch norms read and write
that layout too, so no layout is ever changed. Only the stem's output is copied once, where images come as (B, C, H, W).

Differences from the original:

1. Neighbourhood attention is our own, see ``layers/neighborhood.py``, and runs without natten.
2. The two branches share one table of position biases, of which released checkpoints hold two copies. The frequencies
   of the rotary embedding, constants in the authors' state dicts, are not kept.
3. Scales of layers and shortcuts are vectors and therefore, like A_log and D, exempt from weight decay.
4. ``clamp_windows`` lets small images run, with windows as large as their maps allow; the authors' model fails there.

Kept, because released weights depend on it: the position bias of the last stage's attention over all tokens is resized
to other image sizes as if its tokens x tokens entries were a picture; dilations follow from the map's actual size; with
scaled shortcuts it is the shortcut that is scaled, not the branch.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, calculate_drop_path_rates, to_2tuple, trunc_normal_
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
from zoo.backbones.layers.conv_norm import map_of
from zoo.backbones.layers.depthwise_conv import DepthwiseConv
from zoo.backbones.layers.hierarchical import HierarchicalBackbone
from zoo.backbones.layers.layer_norm import LayerNorm
from zoo.backbones.layers.multi_scale import MultiScaleMixer, resize_global_bias
from zoo.backbones.layers.position import record_input_size
from zoo.backbones.layers.vss import make_norm
from zoo.registry import build_model_with_cfg

__all__ = ["A2Mamba"]


class AffineScale(nn.Module):
    """Factor and offset per channel (..., C).

    Args:
        dim: Channels C.
        init_value: Initial factor; offsets start at 0.
    """

    def __init__(self, dim: int, init_value: float = 1.0, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.init_value = init_value
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.init_value)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class ConvMlp(nn.Module):
    """Two products over channels with a depth-wise convolution added between them, (B, H, W, C) to the same.

    Args:
        dim: Channels C.
        hidden: Channels between the products.
    """

    def __init__(self, dim: int, hidden: int, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.dwconv = DepthwiseConv(hidden, 3, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        return self.fc2(x + self.dwconv(x))


class A2MambaBlock(nn.Module):
    """Mixer and MLP, each after a depth-wise convolution for position and a norm, (B, H, W, C) to the same.

    Args:
        dim: Channels C.
        mixer: Token mixer.
        hidden: Inner channels of the MLP.
        drop_path: Probability that a sample skips a branch during training.
        layer_scale: Initial factor of the branches; None for none.
        shortcut_scale: Whether shortcuts are scaled, by 1 at first.

    Raises:
        ValueError: If both branches and shortcuts are to be scaled.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        hidden: int,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        shortcut_scale: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if shortcut_scale and layer_scale is not None:
            raise ValueError(f"a stage has either layer_scale={layer_scale} or shortcut_scale, not both")
        self.scales_shortcut = shortcut_scale
        init_value = 1.0 if shortcut_scale else layer_scale

        def scale() -> nn.Module:
            return nn.Identity() if init_value is None else AffineScale(dim, init_value, **dd)

        self.cpe1 = DepthwiseConv(dim, 3, **dd)
        self.norm1 = LayerNorm(dim, eps=1e-6, **dd)
        self.mixer = mixer
        self.scale1 = scale()
        self.cpe2 = DepthwiseConv(dim, 3, **dd)
        self.norm2 = LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = ConvMlp(dim, hidden, **dd)
        self.scale2 = scale()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x, normed = add_norm(x, self.cpe1(x), self.norm1)
        x = self._add(x, self.mixer(normed), self.scale1)
        x, normed = add_norm(x, self.cpe2(x), self.norm2)
        return self._add(x, self.mlp(normed), self.scale2)

    def _add(self, x: Tensor, update: Tensor, scale: nn.Module) -> Tensor:
        if self.scales_shortcut:
            return scale(x) + self.drop_path(update)
        return x + self.drop_path(scale(update))


class Stem(nn.Sequential):
    """Four 3x3 convolutions: image (B, in_chans, H, W) to (B, H / stride, W / stride, dim), rounded up.

    Args:
        in_chans: Image channels.
        dim: Channels of the output.
        stride: 4, or 2, in which case only the first convolution is strided.
    """

    def __init__(self, in_chans: int, dim: int, stride: int = 4, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}

        def conv(channels: int, out_channels: int, stride: int) -> list[nn.Module]:
            layer = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False, **dd)
            return [layer, nn.BatchNorm2d(out_channels, **dd), nn.GELU()]

        narrow = dim // 2
        layers = [*conv(in_chans, narrow, 2), *conv(narrow, narrow, 1), *conv(narrow, dim, stride // 2)]
        super().__init__(*layers, *conv(dim, dim, 1)[:2])

    def forward(self, x: Tensor) -> Tensor:
        return map_of(x, super().forward).contiguous()


@register_notrace_module
class Projection(nn.Sequential):
    """Product over channels, batch norm and SiLU: (B, H, W, C) to (B, H, W, C')."""

    def __init__(self, dim: int, out_dim: int, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(nn.Linear(dim, out_dim, **dd), make_norm("batchnorm", out_dim, **dd), nn.SiLU())


class Downsample(nn.Sequential):
    """Strided 3x3 convolution and batch norm: (B, H, W, C) to (B, H / 2, W / 2, C'), rounded up."""

    def __init__(self, dim: int, out_dim: int, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(nn.Conv2d(dim, out_dim, 3, 2, padding=1, bias=False, **dd), nn.BatchNorm2d(out_dim, **dd))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@torch.fx.wrap
@register_notrace_function
def _check_map_size(x: Tensor, kernel_size: int, smallest_side: int) -> Tensor:
    """Returns a stage's map if windows fit into it, else raises ValueError."""
    if min(x.shape[1], x.shape[2]) < kernel_size:
        raise ValueError(
            f"a map of {x.shape[1]} x {x.shape[2]} is too small for windows of {kernel_size} x {kernel_size}: the "
            f"image's sides must be at least {smallest_side} pixels; clamp_windows=True lets windows shrink instead, "
            "with which no weights were trained"
        )
    return x


class A2MambaStage(nn.Module):
    """Downsampling, then blocks, (B, H, W, C) to (B, H', W', C').

    Args:
        downsample: Module that reduces the resolution.
        blocks: Blocks.
        min_grid: Side that maps must have.
        min_side: Side that images must have for all stages of the model, for the message if they are too small.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], min_grid: int, min_side: int) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.min_grid, self.min_side = min_grid, min_side
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = _check_map_size(self.downsample(x), self.min_grid, self.min_side)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class A2Mamba(HierarchicalBackbone):
    """A2Mamba: convolutional stem, stages of multi-scale attention mixers, projection, mean, classifier.

    The last stage's mixers attend to all tokens, the others' hold state-space models.

    Args:
        img_size: Image size (H, W) or one side that the last stage's position biases are made for; others run too.
        in_chans: Image channels.
        num_classes: Classes; 0 for pooled features instead of logits.
        global_pool: ``"avg"``, or ``""`` for one result per cell.
        dims: Channels of every stage.
        depths: Blocks of every stage.
        num_heads: Heads of every stage, even.
        mlp_ratios: Inner width of every stage's MLPs as a multiple of its channels.
        kernel_sizes: Window side of every stage, odd. Maps must be at least that large: with the default sizes the
            smallest image has 193 x 193 pixels.
        layer_scale: Initial factor of every stage's branches, None for none; or None for no factors at all.
        shortcut_scale: Whether every stage's shortcuts are scaled; or one flag for all.
        projection_dim: Channels that the last map is projected to before it is pooled.
        stem_stride: Pixels to a cell of the first stage, 4 or 2.
        clamp_windows: Whether windows shrink to the largest odd side that fits into maps smaller than ``kernel_sizes``,
            each then using the middle of its position biases. Not part of the original.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.

    Raises:
        ValueError: If an argument is not one of its choices or does not fit another.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (48, 96, 256, 448),
        depths: Sequence[int] = (2, 2, 10, 2),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratios: Sequence[float] = (4, 4, 3, 3),
        kernel_sizes: Sequence[int] = (11, 9, 7, 7),
        layer_scale: Sequence[float | None] | None = None,
        shortcut_scale: Sequence[bool] | bool = False,
        projection_dim: int = 1024,
        stem_stride: int = 4,
        clamp_windows: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        stages = len(dims)
        layer_scale = (None,) * stages if layer_scale is None else layer_scale
        shortcut_scale = (shortcut_scale,) * stages if isinstance(shortcut_scale, bool) else shortcut_scale
        options = dict(
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            kernel_sizes=kernel_sizes,
            layer_scale=layer_scale,
            shortcut_scale=shortcut_scale,
        )
        for name, values in options.items():
            if len(values) != stages:
                raise ValueError(f"{name}={tuple(values)} must have {stages} values, one for each stage of dims")
        if stem_stride not in (2, 4):
            raise ValueError(f"stem_stride={stem_stride} is not known; use 2 or 4")
        strides = [stem_stride * 2**i for i in range(stages)]
        super().__init__(dims, strides, in_chans, num_classes, global_pool)
        self.head_hidden_size = projection_dim
        min_side = max((size - 1) * stride + 1 for size, stride in zip(kernel_sizes, strides, strict=True))
        self.min_side = 1 if clamp_windows else min_side  # of images, in pixels

        self.stem = Stem(in_chans, dims[0], stem_stride, **dd)
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))

        def make_block(i: int) -> A2MambaBlock:
            grid = self._last_grid(img_size) if i == stages - 1 else None
            mixer = MultiScaleMixer(dims[i], num_heads[i], kernel_sizes[i], grid, clamp_windows, **dd)
            hidden = int(mlp_ratios[i] * dims[i])
            return A2MambaBlock(dims[i], mixer, hidden, next(rates), layer_scale[i], shortcut_scale[i], **dd)

        def make_stage(i: int) -> A2MambaStage:
            downsample = Downsample(dims[i - 1], dims[i], **dd) if i else nn.Identity()
            min_grid = 1 if clamp_windows else kernel_sizes[i]
            return A2MambaStage(downsample, [make_block(i) for _ in range(depths[i])], min_grid, self.min_side)

        self.stages = nn.Sequential(*(make_stage(i) for i in range(stages)))
        self._set_feature_info()
        self.norm, self.feature_norms = nn.Identity(), nn.ModuleDict()  # the authors norm no features
        self.projection = Projection(dims[-1], projection_dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(projection_dim, num_classes, **dd) if num_classes else nn.Identity()
        self.init_weights(needs_reset=False)

    def _last_grid(self, img_size: int | Sequence[int]) -> tuple[int, int]:
        height, width = (-(-size // self.strides[-1]) for size in to_2tuple(img_size))
        return height, width

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialises every parameter: truncated normal weights, zero biases, scans as in Mamba.

        Args:
            needs_reset: Whether the layers' own initialisation runs first, as after ``to_empty()``.
        """
        super().init_weights(needs_reset)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Remakes the last stage's position biases for another image size (H, W) or one side.

        Raises:
            ValueError: If windows do not fit into that size.
        """
        size = to_2tuple(img_size)
        if min(size) < self.min_side:
            raise ValueError(f"img_size={size} is too small for this model's windows; it needs {self.min_side} pixels")
        height, width = self._last_grid(size)
        for mixer in self.modules():
            if isinstance(mixer, MultiScaleMixer) and mixer.global_bias is not None:
                mixer.set_global_tokens(height * width)
        record_input_size(self, size)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map (B, H, W, D) to logits (B, num_classes), or to the projected and pooled feature with ``pre_logits``."""
        return super().forward_head(self.projection(x), pre_logits)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As in the base class; the projection belongs to the head, and reads the last stage."""
        stages = len(self.stages)
        take_indices = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head or len(self.stages) < stages:
            self.projection = nn.Identity()
            self.num_features = self.head_hidden_size = self.dims[-1]
        return take_indices


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: A2Mamba) -> dict[str, Tensor]:
    """Converts a checkpoint to the names and the last stage's number of tokens of ``model``.

    Accepts the authors' checkpoints and ours. Keys of the head are dropped if the model has none.

    Args:
        state_dict: Checkpoint of any kind above.
        model: Model that the result is loaded into.

    Returns:
        State dict in this file's names.

    Raises:
        ValueError: If the two copies of a table of position biases, which are one parameter, differ.
    """
    state_dict = unwrap_checkpoint(state_dict)
    if any(name.startswith(("patch_embed.", "layers.", "classifier.")) for name in state_dict):
        state_dict = rename_upstream(state_dict)
    expected = model.state_dict()
    resized = {
        name: resize_global_bias(tensor, expected[name].shape[-1])
        for name, tensor in state_dict.items()
        if name.endswith(".global_bias") and name in expected
    }
    return fit_parts({**state_dict, **resized}, model)


def rename_upstream(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names to ours, and products over channels, which are 1x1 convolutions there, to matrices.

    Raises:
        ValueError: If the two copies of a table of position biases differ.
    """
    renamed = {
        r"^patch_embed\.": "stem.",
        r"^classifier\.4\.": "head.",
        r"^classifier\.": "projection.",
        r"^layers\.(\d*[02468])\.": lambda m: f"stages.{int(m[1]) // 2}.",
        r"^layers\.(\d*[13579])\.": lambda m: f"stages.{int(m[1]) // 2 + 1}.downsample.",
        r"\.token_mixer\.": ".mixer.",
        r"\.layer_scale([12])\.": r".scale\1.",
        r"\.rpb\.0$": ".bias_table",
        r"\.rpb\.2$": ".global_bias",
        r"\.ssm\.conv2d\.": ".ssm.conv.",
        r"\.ssm\.x_proj_weight$": ".ssm.x_proj.weight",
        r"\.ssm\.dt_projs_weight$": ".ssm.dt_proj.weight",
        r"\.ssm\.dt_projs_bias$": ".ssm.dt_bias",
        r"\.ssm\.A_logs$": ".ssm.A_log",
        r"\.ssm\.Ds$": ".ssm.D",
    }
    converted = {}
    for name, tensor in state_dict.items():
        if name.endswith(".rope.angle"):
            continue
        if name.endswith(".rpb.1"):
            _check_copy(name, tensor, state_dict.get(f"{name[:-1]}0"))
            continue
        if tensor.dim() == 4 and tensor.shape[2:] == (1, 1) and ".rpb." not in name:
            tensor = tensor.flatten() if ".layer_scale" in name else tensor.flatten(1)
        for theirs, ours in renamed.items():
            name = re.sub(theirs, ours, name)
        converted[name] = tensor
    return converted


def _check_copy(name: str, tensor: Tensor, original: Tensor | None) -> None:
    if original is None or original.is_meta or tensor.is_meta:  # nothing to compare
        return
    if not torch.equal(tensor, original):
        raise ValueError(f"{name} differs from {name[:-1]}0, but the two are one parameter: the checkpoint is damaged")


def from_upstream(class_name: str, kwargs: Mapping[str, Any]) -> A2Mamba:
    """Builds the model that the authors' code builds from the same arguments.

    Args:
        class_name: ``A2Mamba``.
        kwargs: The authors' constructor arguments.

    Raises:
        ValueError: If the class or an argument is not known.
    """
    if class_name != "A2Mamba":
        raise ValueError(f"no builder for {class_name!r}; use A2Mamba")
    args = dict(kwargs)
    if not args.pop("use_rpb", False):
        raise ValueError("use_rpb must be True: no released model differs")
    if set(args.pop("window_dilation", [1])) != {1}:
        raise ValueError("window_dilation must be 1: no released model differs")
    scaled, init_values = args.pop("layerscales", [False] * 4), args.pop("layer_init_values", [1] * 4)
    model_args = dict(
        img_size=args.pop("image_size", 224),
        num_classes=args.pop("num_classes", 1000),
        dims=args.pop("embed_dims"),
        depths=args.pop("depths"),
        num_heads=args.pop("num_heads"),
        mlp_ratios=args.pop("mlp_ratios"),
        kernel_sizes=args.pop("window_size"),
        layer_scale=[value if wanted else None for wanted, value in zip(scaled, init_values, strict=True)],
        shortcut_scale=args.pop("resscales", False),
        projection_dim=args.pop("projection", 1024),
        drop_path_rate=args.pop("drop_path_rate", 0.0),
    )
    if args:
        raise ValueError(f"arguments not known: {', '.join(sorted(args))}")
    return A2Mamba(**model_args)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "min_input_size": (3, 193, 193),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head",
        "license": "unknown",  # neither the repository nor the weights name one
        "origin_url": "https://github.com/LMMMEng/A2Mamba",
        "paper_ids": "arXiv:2507.16624",
        "paper_name": "A2Mamba: Attention-augmented State Space Models for Visual Recognition",
        **kwargs,
    }


def _released_cfg(size: str, **kwargs: Any) -> dict[str, Any]:
    """Config of weights that the authors publish."""
    filename = f"a2mamba_pretrained_weights/a2mamba_{size}.pth"
    return _cfg(hf_hub_id="LMMM2025/A2Mamba", hf_hub_filename=filename, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "a2mamba_nano.in1k": _released_cfg("nano"),
        "a2mamba_tiny.in1k": _released_cfg("tiny"),
        "a2mamba_small.in1k": _released_cfg("small"),
        "a2mamba_base.in1k": _released_cfg("base", crop_pct=0.95),
        "a2mamba_large.in1k": _released_cfg("large", crop_pct=0.975),
        "a2mamba_pico": _cfg(
            num_classes=10,
            input_size=(3, 32, 32),
            min_input_size=(3, 17, 17),
            pool_size=(4, 4),
            crop_pct=1.0,
            license="apache-2.0",
            origin_url=None,
        ),
    }
)


def _create_a2mamba(variant: str, pretrained: bool = False, **kwargs: Any) -> A2Mamba:
    out_indices = kwargs.pop("out_indices", tuple(range(len(kwargs["dims"]))))
    return build_model_with_cfg(
        A2Mamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )


@register_model
def a2mamba_nano(pretrained: bool = False, **kwargs: Any) -> A2Mamba:
    """A2Mamba-N: 4.2M parameters, 78.7 top-1."""
    model_args = dict(dims=(32, 64, 128, 192), depths=(2, 2, 8, 2), num_heads=(2, 2, 4, 8))
    return _create_a2mamba("a2mamba_nano", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def a2mamba_tiny(pretrained: bool = False, **kwargs: Any) -> A2Mamba:
    """A2Mamba-T: 15.4M parameters, 83.0 top-1."""
    model_args = dict(dims=(48, 96, 256, 448), depths=(2, 2, 10, 2), num_heads=(2, 4, 8, 16))
    return _create_a2mamba("a2mamba_tiny", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def a2mamba_small(pretrained: bool = False, **kwargs: Any) -> A2Mamba:
    """A2Mamba-S: 30.7M parameters, 84.7 top-1."""
    model_args = dict(
        dims=(64, 128, 320, 512),
        depths=(2, 4, 12, 4),
        num_heads=(2, 4, 10, 16),
        shortcut_scale=(False, False, True, True),
    )
    return _create_a2mamba("a2mamba_small", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def a2mamba_base(pretrained: bool = False, **kwargs: Any) -> A2Mamba:
    """A2Mamba-B: 51.1M parameters, 85.7 top-1."""
    model_args = dict(
        dims=(96, 192, 384, 512),
        depths=(4, 6, 12, 6),
        num_heads=(4, 8, 12, 16),
        mlp_ratios=(4, 4, 3.75, 3.75),
        layer_scale=(1, 1, 1e-6, 1e-6),
    )
    return _create_a2mamba("a2mamba_base", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def a2mamba_large(pretrained: bool = False, **kwargs: Any) -> A2Mamba:
    """A2Mamba-L: 93.7M parameters, 86.1 top-1."""
    model_args = dict(
        dims=(96, 192, 448, 672),
        depths=(4, 6, 18, 6),
        num_heads=(4, 8, 16, 24),
        mlp_ratios=(4, 4, 4, 4),
        layer_scale=(1, 1, 1e-6, 1e-6),
    )
    return _create_a2mamba("a2mamba_large", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def a2mamba_pico(pretrained: bool = False, **kwargs: Any) -> A2Mamba:
    """Ours, for 32-pixel images on maps of 16, 8 and 4 cells: 1.8M parameters."""
    model_args = dict(
        dims=(48, 96, 192),
        depths=(2, 4, 2),
        num_heads=(2, 4, 8),
        mlp_ratios=(4, 4, 3),
        kernel_sizes=(7, 5, 3),
        projection_dim=512,
        stem_stride=2,
    )
    return _create_a2mamba("a2mamba_pico", pretrained=pretrained, **dict(model_args, **kwargs))
