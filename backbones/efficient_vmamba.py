"""EfficientVMamba: early stages that scan every second cell beside a convolution, late stages of inverted residuals.

Paper: "EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba", https://arxiv.org/abs/2403.09977.
Origin: https://github.com/TerryPei/EfficientVMamba (Apache-2.0), whose checkpoints load here.

Differences from the original:

1. The scans of all sub-grids are one kernel launch that reads and writes the map through index tables. A cell's step
   size is worked out for the one path that visits it, inside one product for all paths.
2. ``rate`` may be anything from 1; the original scans four sub-grids whatever its ``step_size`` is.
3. ``d_state`` and ``dt_rank`` are obeyed; the original ignores them.
4. A_log, D and step biases are exempt from weight decay.
5. Locally bidirectional scans (``lb_window``; LBMamba, arXiv 2506.15976) are an option.
6. Evaluated batch norms are folded into the convolutions before them, so that hooks on either run in training only.

Kept, because released weights depend on it: the cells that pad a grid which ``rate`` does not divide are steps of the
scans, both branches of a block share one squeeze-and-excitation, and all scans run forwards.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from torch import Tensor, nn

from zoo.backbones.layers.backbone import fit_parts, unwrap_checkpoint
from zoo.backbones.layers.channel_attention import ChannelAttention
from zoo.backbones.layers.conv_norm import conv_norm, convolve
from zoo.backbones.layers.hierarchical import HierarchicalBackbone
from zoo.backbones.layers.layer_norm import LayerNorm
from zoo.backbones.layers.mlp import Mlp
from zoo.backbones.layers.ss2d import SS2D, Paths, from_authors_name
from zoo.backbones.layers.vss import PatchStem, Reduction, Stage, VSSBlock, VSSStage, fit_patches, make_reduction
from zoo.backbones.scans import scan_paths
from zoo.backbones.scans.memory import remember_tables
from zoo.registry import build_model_with_cfg

__all__ = ["EfficientVMamba"]


@remember_tables
def _subgrids(H: int, W: int, rate: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The atrous paths (K, P), and whether path k visits a cell, (H * W, K, 1)."""
    rows, columns = (torch.arange(side, device=device) % rate for side in (H, W))
    path = (columns * rate + rows.unsqueeze(1)).flatten()  # of every cell
    visited = path.unsqueeze(1) == torch.arange(rate * rate, device=device)
    return scan_paths("atrous", H, W, device, rate=rate), visited.unsqueeze(-1)


@register_notrace_module
class AtrousSS2D(SS2D):
    """SS2D whose K = rate^2 paths walk one sub-grid of skipped cells each (ES2D, section 4.1).

    A cell belongs to one path, so its step size (B, L, E) is computed for that path alone. B and C, which are narrow,
    are computed for all paths.

    Args:
        dim: Width D of the map.
        rate: Cells from one to the next of a sub-grid, along rows and columns.
        d_state: States N per channel.
        dt_rank: Rank R of the step projection; default ceil(dim / 16).
        ssm_ratio: Inner width E as a multiple of ``dim``.
        lb_window: Steps of a locally bidirectional window of the scans; 1 for plain scans.

    Raises:
        ValueError: If ``rate`` is less than 1 or ``lb_window`` is not one of :class:`SS2D`'s.
    """

    def __init__(
        self,
        dim: int,
        rate: int = 2,
        d_state: int = 16,
        dt_rank: int | None = None,
        ssm_ratio: float = 2.0,
        lb_window: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = dict(scan="atrous", scan_options={"rate": rate}, lb_window=lb_window)
        super().__init__(dim, d_state, dt_rank, ssm_ratio, **options, device=device, dtype=dtype)
        self.rate = rate

    def _scan(self, u: Tensor) -> Tensor:
        """Map (B, H, W, E) to what the one path that visits a cell puts there, (B, H, W, E)."""
        H, W = u.shape[1:3]
        table, visited = _subgrids(H, W, self.rate, u.device)
        tokens = u.flatten(1, 2)
        y = self.ssm.walk(tokens, self._project(tokens, visited), table, self.reverse, partition=True)
        return y.unflatten(1, (H, W))

    def _project(self, u: Tensor, visited: Tensor) -> Paths:
        """Tokens (B, L, E) to what steps the states; ``visited`` (L, K, 1) tells the path of every token."""
        K = len(self.reverse)
        projected = F.linear(u, self.ssm.x_proj_weight.flatten(0, 1)).unflatten(2, (K, -1))  # (B, L, K, R + 2N)
        dt, B, C = projected.split(self.ssm.splits, dim=-1)
        # Zeros for the other paths make the sum over paths and ranks, one product, the projection of a token's own.
        delta = F.linear((dt * visited).flatten(2), self.ssm.dt_proj_weight.transpose(0, 1).flatten(1))  # (B, L, E)
        return self.ssm.paths(delta.unsqueeze(1).expand(-1, K, -1, -1), B.transpose(1, 2), C.transpose(1, 2))


class ConvBranch(nn.Sequential):
    """Depth-wise convolution, batch norm, GELU and 1 x 1 convolution of maps (B, H, W, C).

    Args:
        dim: Channels C.
    """

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd),
            nn.BatchNorm2d(dim, **dd),
            nn.GELU(),
            nn.Conv2d(dim, dim, 1, **dd),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to map (B, H, W, C)."""
        return convolve(conv_norm(x, self[0], self[1], "gelu"), self[3])


class EVSSBlock(VSSBlock):
    """A scan and a convolution of the same normed map, weighed by one gate and added (section 4.2).

    Args:
        dim: Channels C, at least 8.
        mixer: Mixer of maps, the scan.
        mlp_ratio: Hidden width of a residual MLP as a multiple of ``dim``; 0 for none.
        drop_path: Probability that a sample skips a residual branch during training.

    Raises:
        ValueError: If ``dim`` is too small for the gate.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        if dim < 8:
            raise ValueError(f"a block needs at least 8 channels, got {dim}")
        super().__init__(LayerNorm(dim, **dd), mixer, drop_path=drop_path)
        self.conv_branch = ConvBranch(dim, **dd)
        self.gate = ChannelAttention(dim, **dd)
        if mlp_ratio > 0:
            self.norm2, self.mlp = LayerNorm(dim, **dd), Mlp(dim, int(dim * mlp_ratio), **dd)

    def mix(self, normed: Tensor) -> Tensor:
        """Both branches of a normed map (B, H, W, C), (B, H, W, C)."""
        scanned, convolved = self.mixer(normed), self.conv_branch(normed)
        return torch.addcmul(scanned * self.gate(scanned), convolved, self.gate(convolved))


class InvertedResidualBlock(InvertedResidual):
    """MobileNet's inverted residual with squeeze-and-excitation, of maps (B, H, W, C).

    Args:
        dim: Channels C, even.
        drop_path: Probability that a sample skips the block during training.
    """

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        squeeze = partial(SqueezeExcite, rd_ratio=0.125)
        super().__init__(
            dim, dim, exp_ratio=4.0, se_layer=squeeze, drop_path_rate=drop_path, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to map (B, H, W, C)."""
        y = conv_norm(x, self.conv_pw, self.bn1, "relu")
        y = conv_norm(y, self.conv_dw, self.bn2, "relu")
        return x + self.drop_path(conv_norm(self._excite(y), self.conv_pwl, self.bn3))

    def _excite(self, x: Tensor) -> Tensor:
        """Weighs the channels of a map (B, H, W, C) by what its cells are on average."""
        squeezed = convolve(x.mean((1, 2), keepdim=True), self.se.conv_reduce)
        return x * self.se.gate(convolve(self.se.act1(squeezed), self.se.conv_expand))


class EfficientVMamba(HierarchicalBackbone):
    """EfficientVMamba: patches, two stages of atrous scans, two of inverted residuals, norm, mean, classifier.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for pooled features instead of logits.
        global_pool: ``"avg"`` mean of the map; ``""`` the map.
        patch_size: Pixels to a cell of the first stage; rows and columns that fill no patch are left out.
        depths: Blocks of the four stages.
        dims: Channels of the four stages, even, or of the first one; they double then.
        downsample: ``"merge"``, ``"conv2x2"`` (odd sizes round down) or ``"conv3x3"``, see
            :mod:`~zoo.backbones.layers.vss`.
        rate: Cells from one to the next of a scan's sub-grid.
        d_state: States per channel.
        dt_rank: Rank of the step projection; default ceil(channels / 16).
        ssm_ratio: Inner width of the mixers as a multiple of their channels.
        lb_window: Steps of a locally bidirectional window of the scans; 1 for plain scans.
        mlp_ratio: Hidden width of MLPs in the scanning stages as a multiple of their channels; 0 for no MLPs.
        feature_norms: Stages whose intermediate features get a layer norm of their own, as in the authors' dense
            prediction models.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.

    Raises:
        ValueError: If an argument is not one of its choices or does not fit another.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 4,
        depths: Sequence[int] = (2, 2, 4, 2),
        dims: int | Sequence[int] = 48,
        downsample: Reduction = "merge",
        rate: int = 2,
        d_state: int = 16,
        dt_rank: int | None = None,
        ssm_ratio: float = 2.0,
        lb_window: int = 1,
        mlp_ratio: float = 0.0,
        feature_norms: Sequence[int] = (),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        dims = [dims * 2**i for i in range(4)] if isinstance(dims, int) else list(dims)
        for name, values in (("dims", dims), ("depths", depths)):
            if len(values) != 4 or min(values) < 1:
                raise ValueError(f"{name}={tuple(values)} must be 4 positive numbers")
        if any(dim % 2 for dim in dims):
            raise ValueError(f"dims={tuple(dims)} must be even")
        if any(not 0 <= index < 4 for index in feature_norms):
            raise ValueError(f"feature_norms={tuple(feature_norms)} names a stage that is not among the 4")
        super().__init__(dims, [patch_size * 2**i for i in range(4)], in_chans, num_classes, global_pool)
        self.stem = PatchStem(in_chans, dims[0], patch_size, **dd)

        def make_block(stage: int, drop_path: float) -> nn.Module:
            dim = dims[stage]
            if stage >= 2:
                return InvertedResidualBlock(dim, drop_path, **dd)
            mixer = AtrousSS2D(dim, rate, d_state, dt_rank, ssm_ratio, lb_window, **dd)
            return EVSSBlock(dim, mixer, mlp_ratio, drop_path, **dd)

        def make_stage(stage: int, rates: Sequence[float]) -> Stage:
            reduction = make_reduction(downsample, dims[stage - 1], dims[stage], "layernorm", **dd) if stage else None
            kind = VSSStage if stage < 2 else Stage
            return kind([make_block(stage, drop_path) for drop_path in rates], reduction)

        rates = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        self.stages = nn.Sequential(*(make_stage(stage, rates[stage]) for stage in range(4)))
        self._set_feature_info()
        norms = {str(index): LayerNorm(dims[index], narrow=False, **dd) for index in sorted(set(feature_norms))}
        self.feature_norms = nn.ModuleDict(norms)
        self.norm = LayerNorm(dims[-1], narrow=False, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dims[-1], num_classes, **dd) if num_classes else nn.Identity()
        self.init_weights(needs_reset=False)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Converts a checkpoint to the names of ``model``.

    Accepts the authors' checkpoints (the weights under ``state_dict``, ``model`` or ``ema_model``, names that may all
    start with ``module.`` or ``module.module.``), their bare state dicts, and ours. Keys of the norm and the head are
    dropped if the model has none.

    Args:
        state_dict: Checkpoint of any kind above.
        model: Model that the result is loaded into.

    Returns:
        State dict in this file's names.
    """
    state_dict = unwrap_checkpoint(state_dict)
    state_dict = dict(state_dict.get("ema_model", state_dict))
    first_layer = next((name for name in state_dict if name.endswith("patch_embed.0.weight")), None)
    if first_layer is not None:
        prefix = first_layer.removesuffix("patch_embed.0.weight")
        state_dict = upstream_names_to_ours({n.removeprefix(prefix): t for n, t in state_dict.items()})
    return fit_parts(fit_patches(state_dict, model.stem), model)


# The authors' names of layers, and ours.
LAYERS = {
    "patch_embed.0": "stem.conv1",
    "patch_embed.2": "stem.norm1",
    "classifier.norm": "norm",
    "classifier.head": "head",
    "se.norm": "gate.norm",
    "se.global_reduce": "gate.reduce",
    "se.channel_select": "gate.select",
    "conv_pw.0": "conv_pw",
    "conv_pw.1": "bn1",
    "conv_dw.0": "conv_dw",
    "conv_dw.1": "bn2",
    "conv_pw2.0": "conv_pwl",
    "conv_pw2.1": "bn3",
}
REDUCTION_LAYERS = {"norm": "norm", "reduction": "reduction", "1": "conv", "3": "norm"}


def upstream_names_to_ours(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names, of a model, a block or a mixer alone (``op.``), to ours; A and D get a dimension of paths."""
    converted = {}
    for name, tensor in state_dict.items():
        prefix, of_mixer, leaf = name.rpartition("op.")
        if of_mixer:
            name = f"{prefix}mixer.{from_authors_name(leaf)}"
        if of_mixer and leaf in ("A_logs", "Ds"):  # (K * E, N) and (K * E,)
            tensor = tensor.unflatten(0, (len(state_dict[f"{prefix}op.dt_projs_bias"]), -1))
        converted[_rename(name)] = tensor
    return converted


def _rename(name: str) -> str:
    """The authors' name of a parameter outside of mixers to ours."""
    name = re.sub(r"^outnorm(\d)\.", r"feature_norms.\1.", name)
    # Late stages are sequences: a permutation, blocks, a permutation, the reduction that our next stage begins with.
    reduction = re.match(r"layers\.(\d)\.(?:downsample|\d+)\.(norm|reduction|1|3)\.", name)
    if reduction is not None:
        stage, layer = int(reduction[1]) + 1, REDUCTION_LAYERS[reduction[2]]
        return f"stages.{stage}.downsample.{layer}.{name[reduction.end() :]}"
    name = re.sub(r"^layers\.(\d)\.(\d+)\.", lambda m: f"stages.{m[1]}.blocks.{int(m[2]) - 1}.", name)
    name = re.sub(r"^layers\.", "stages.", name)
    for theirs, ours in LAYERS.items():
        name = re.sub(rf"(^|\.){re.escape(theirs)}\.", rf"\1{ours}.", name)
    return name


def from_upstream(class_name: str, kwargs: Mapping[str, Any]) -> EfficientVMamba:
    """Builds the model that the authors' code builds from the same arguments.

    Args:
        class_name: ``EfficientVSSM``, or ``Backbone_EfficientVSSM`` for the backbone of dense prediction.
        kwargs: The authors' constructor arguments. Those that their code ignores change nothing here.

    Raises:
        ValueError: If the class or an argument is not known.
    """
    if class_name not in ("EfficientVSSM", "Backbone_EfficientVSSM"):
        raise ValueError(f"no builder for {class_name!r}; use EfficientVSSM or Backbone_EfficientVSSM")
    args = dict(kwargs)
    if not args.pop("patch_norm", True):
        raise ValueError("patch_norm must be True: no released model differs")
    dense = class_name == "Backbone_EfficientVSSM"
    model_args = dict(
        in_chans=args.pop("in_chans", 3),
        num_classes=0 if dense else args.pop("num_classes", 1000),
        patch_size=args.pop("patch_size", 4),
        depths=args.pop("depths"),
        dims=args.pop("dims"),
        downsample="conv2x2" if args.pop("downsample_version") == "v2" else "merge",
        rate=args.pop("step_size", 2),
        ssm_ratio=args.pop("ssm_ratio", 2.0),
        mlp_ratio=args.pop("mlp_ratio"),
        feature_norms=args.pop("out_indices", (0, 1, 2, 3)) if dense else (),
        drop_path_rate=args.pop("drop_path_rate", 0.1),
    )
    ignored = {"d_state", "dt_rank", "attn_drop_rate", "drop_rate", "softmax_version", "shared_ssm", "window_size"}
    unknown = set(args) - ignored
    if unknown:
        raise ValueError(f"arguments not known: {', '.join(sorted(unknown))}")
    model = EfficientVMamba(**model_args)
    if dense:
        model.norm = nn.Identity()
    return model


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head",
        "license": "apache-2.0",
        "origin_url": "https://github.com/TerryPei/EfficientVMamba",
        "paper_ids": "arXiv:2403.09977",
        "paper_name": "EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba",
        **kwargs,
    }


def _released_cfg(size: str) -> dict[str, Any]:
    """Config of weights that the authors publish; the file's name is the one in their configurations."""
    return _cfg(
        hf_hub_id=f"TerryPei/EfficientVMamba-{size.capitalize()}", hf_hub_filename=f"efficient_vmamba_{size}.ckpt"
    )


default_cfgs = generate_default_cfgs(
    {
        "efficient_vmamba_tiny.in1k": _released_cfg("tiny"),
        "efficient_vmamba_small.in1k": _released_cfg("small"),
        "efficient_vmamba_base.in1k": _released_cfg("base"),
        "efficient_vmamba_nano": _cfg(
            num_classes=10, input_size=(3, 32, 32), pool_size=(2, 2), crop_pct=1.0, origin_url=None
        ),
    }
)


def _create_efficient_vmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    return build_model_with_cfg(
        EfficientVMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop("out_indices", (0, 1, 2, 3)), feature_cls="getter"),
        **kwargs,
    )


@register_model
def efficient_vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-T: 6.5M parameters, 76.5 top-1."""
    return _create_efficient_vmamba("efficient_vmamba_tiny", pretrained=pretrained, **kwargs)


@register_model
def efficient_vmamba_small(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-S: 11.3M parameters, 78.7 top-1."""
    return _create_efficient_vmamba("efficient_vmamba_small", pretrained=pretrained, **dict(dict(dims=64), **kwargs))


@register_model
def efficient_vmamba_base(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-B: 33.7M parameters, 81.8 top-1."""
    model_args = dict(dims=96, depths=(2, 2, 9, 2))
    return _create_efficient_vmamba("efficient_vmamba_base", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def efficient_vmamba_nano(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """Ours, for 32-pixel images, which are scanned in 16 x 16 and 8 x 8 cells: 2.8M parameters."""
    model_args = dict(patch_size=2, dims=32)
    return _create_efficient_vmamba("efficient_vmamba_nano", pretrained=pretrained, **dict(model_args, **kwargs))
