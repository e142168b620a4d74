"""VMamba: a hierarchical backbone whose blocks scan a map by rows and columns, each from both ends.

Paper: "VMamba: Visual State Space Model", https://arxiv.org/abs/2401.10166.
Origin: https://github.com/MzeroMiko/VMamba (MIT), whose checkpoints load here: of both generations, with the names of
early 2024 and of the single-file version too.

Differences from the original:

1. The four scans are one kernel launch that reads and writes the map through index tables. Everything is channels-last;
   the second generation's channels-first weights compute the same.
2. The suffixes of ``forward_type`` are options of their own, checked when a model is built.
3. Position embeddings are resampled to images of other sizes.
4. A_log, D and step biases are exempt from weight decay, as the original intends; its optimiser decays all but D.
5. Locally bidirectional scans (``lb_window``; LBMamba, arXiv 2506.15976) are an option.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import GluMlp, calculate_drop_path_rates, to_2tuple, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.backbones.layers.backbone import fit_parts, unwrap_checkpoint
from zoo.backbones.layers.hierarchical import HierarchicalBackbone
from zoo.backbones.layers.layer_norm import LayerNorm
from zoo.backbones.layers.mlp import Mlp
from zoo.backbones.layers.position import record_input_size, resample_pos_embed
from zoo.backbones.layers.ss2d import SS2D, Gate, OutputNorm, Recurrence, from_authors_name
from zoo.backbones.layers.vss import (
    NormLayer,
    PatchStem,
    Reduction,
    Stem,
    VSSBlock,
    VSSStage,
    fit_patches,
    make_norm,
    make_reduction,
    make_stem,
)
from zoo.registry import build_model_with_cfg

__all__ = ["VMamba"]

torch.fx.wrap("resample_pos_embed")  # a single node for FX in this file too


class VMamba(HierarchicalBackbone):
    """VMamba: stem, four stages of VSS blocks, norm, mean, classifier.

    Args:
        img_size: Image size (H, W) or one side that the position embedding, if any, is made for; other sizes run too.
        in_chans: Image channels.
        num_classes: Classes; 0 for pooled features instead of logits.
        global_pool: ``"avg"`` mean of the map; ``""`` the map.
        patch_size: Pixels to a cell of the first stage.
        depths: Blocks of every stage.
        dims: Channels of every stage, or of the first one; they double then.
        stem: ``"patch"`` (first generation) or ``"conv"``, see :mod:`~zoo.backbones.layers.vss`.
        downsample: ``"merge"`` (first generation), ``"conv2x2"`` or ``"conv3x3"``.
        norm_layer: ``"layernorm"`` or ``"batchnorm"``, of stem, reductions, blocks and head.
        pos_embed: Whether a position embedding is added after the stem.
        d_state: States per channel.
        dt_rank: Rank of the step projection; default ceil(channels / 16).
        ssm_ratio: Inner width of the mixers as a multiple of their channels.
        d_conv: Side of the mixers' convolution, odd; 1 for none.
        conv_bias: Whether it has a bias.
        scan: Paths, see :class:`~zoo.backbones.layers.ss2d.SS2D`, as the next six.
        recurrence: ``"selective_scan"`` or ``"ssd"``.
        gate: ``"activated"``, ``"plain"`` or None.
        activation: ``"silu"`` or ``"gelu"``.
        output_norm: Norm of the scans' sum.
        output_activation: Whether GELU follows that norm.
        lb_window: Steps of a locally bidirectional window of the scans; 1 for plain scans.
        mlp_ratio: Hidden width of the MLPs as a multiple of their channels; 0 for no MLPs.
        gated_mlp: Whether the MLPs are gated.
        feature_norms: Stages whose features get a layer norm of their own, as in the authors' dense prediction models.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout of mixers and MLPs.
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
        patch_size: int = 4,
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: int | Sequence[int] = 96,
        stem: Stem = "conv",
        downsample: Reduction = "conv3x3",
        norm_layer: NormLayer = "layernorm",
        pos_embed: bool = False,
        d_state: int = 1,
        dt_rank: int | None = None,
        ssm_ratio: float = 1.0,
        d_conv: int = 3,
        conv_bias: bool = False,
        scan: str = "cross",
        recurrence: Recurrence = "selective_scan",
        gate: Gate | None = None,
        activation: str = "silu",
        output_norm: OutputNorm | None = "layernorm",
        output_activation: bool = False,
        lb_window: int = 1,
        mlp_ratio: float = 4.0,
        gated_mlp: bool = False,
        feature_norms: Sequence[int] = (),
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        dims = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        if len(dims) != len(depths):
            raise ValueError(f"dims={tuple(dims)} and depths={tuple(depths)} must be of the same number of stages")
        if any(not 0 <= index < len(depths) for index in feature_norms):
            raise ValueError(f"feature_norms={tuple(feature_norms)} names a stage that is not among the {len(depths)}")
        strides = [patch_size * 2**i for i in range(len(depths))]
        super().__init__(dims, strides, in_chans, num_classes, global_pool)
        self.stem = make_stem(stem, in_chans, dims[0], patch_size, norm_layer, **dd)
        self.pos_embed = None
        if pos_embed:
            self._set_image_size(img_size)
            self.pos_embed = nn.Parameter(torch.empty(1, self.grid_size[0] * self.grid_size[1], dims[0], **dd))

        mixer_args = dict(
            d_state=d_state,
            dt_rank=dt_rank,
            ssm_ratio=ssm_ratio,
            d_conv=d_conv,
            conv_bias=conv_bias,
            scan=scan,
            recurrence=recurrence,
            gate=gate,
            activation=activation,
            output_norm=output_norm,
            output_activation=output_activation,
            lb_window=lb_window,
            drop_rate=proj_drop_rate,
        )

        def make_block(dim: int, drop_path: float) -> VSSBlock:
            mixer, norm = SS2D(dim, **mixer_args, **dd), make_norm(norm_layer, dim, **dd)
            if mlp_ratio <= 0:
                return VSSBlock(norm, mixer, drop_path=drop_path)
            hidden = int(dim * mlp_ratio)
            if gated_mlp:
                mlp = GluMlp(dim, 2 * hidden, act_layer=nn.GELU, drop=proj_drop_rate, **dd)
            else:
                mlp = Mlp(dim, hidden, drop=proj_drop_rate, **dd)
            return VSSBlock(norm, mixer, make_norm(norm_layer, dim, **dd), mlp, drop_path)

        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            reduction = make_reduction(downsample, dims[i - 1], dim, norm_layer, **dd) if i else None
            stages.append(VSSStage([make_block(dim, rate) for rate in rates[i]], reduction))
        self.stages = nn.Sequential(*stages)
        self._set_feature_info()
        norms = {str(index): LayerNorm(dims[index], narrow=False, **dd) for index in sorted(set(feature_norms))}
        self.feature_norms = nn.ModuleDict(norms)
        self.norm = make_norm(norm_layer, dims[-1], narrow=False, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dims[-1], num_classes, **dd) if num_classes else nn.Identity()
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialises every parameter.

        Args:
            needs_reset: Whether the layers' own initialisation runs first, as after ``to_empty()``.
        """
        super().init_weights(needs_reset)
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)

    def _set_image_size(self, img_size: int | Sequence[int]) -> None:
        """Sets ``grid_size``, the grid of the stem's map that the position embedding is made for."""
        height, width = to_2tuple(img_size)
        rounding = 0 if isinstance(self.stem, PatchStem) else self.strides[0] - 1
        self.grid_size = ((height + rounding) // self.strides[0], (width + rounding) // self.strides[0])
        if min(self.grid_size) < 1:
            raise ValueError(f"img_size={(height, width)} is smaller than a cell of {self.strides[0]} pixels")

    @torch.jit.ignore
    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Remakes the position embedding, if there is one, for another image size (H, W) or one side."""
        if self.pos_embed is not None:
            old_grid = self.grid_size
            self._set_image_size(img_size)
            resampled = resample_pos_embed(self.pos_embed.detach(), old_grid, self.grid_size, None)
            self.pos_embed = nn.Parameter(resampled.clone(), requires_grad=self.pos_embed.requires_grad)
        record_input_size(self, to_2tuple(img_size))

    def embed(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W) to the map that enters the first stage, (B, H', W', D)."""
        x = self.stem(x)
        if self.pos_embed is None:
            return x
        grid = (x.shape[1], x.shape[2])
        return x + resample_pos_embed(self.pos_embed, self.grid_size, grid, None).unflatten(1, grid)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: VMamba) -> dict[str, Tensor]:
    """Converts a checkpoint to the names and the position embedding of ``model``.

    Accepts the authors' checkpoints (the weights under ``model``) of both generations, with the names of early 2024 or
    of the single-file version, their dense prediction models (names starting with ``backbone.``, of which only these
    are kept), bare state dicts, and ours. Keys of the norm and the head are dropped if the model has none.

    Args:
        state_dict: Checkpoint of any kind above.
        model: Model that the result is loaded into.

    Returns:
        State dict in this file's names.

    Raises:
        ValueError: If the position embedding's grid cannot be told.
    """
    state_dict = convert_upstream(unwrap_checkpoint(state_dict), model)
    if "pos_embed" in state_dict and model.pos_embed is not None:
        state_dict["pos_embed"] = _fit_pos_embed(state_dict["pos_embed"], model)
    return fit_parts(fit_patches(state_dict, model.stem), model)


def convert_upstream(state_dict: Mapping[str, Tensor], model: HierarchicalBackbone) -> dict[str, Tensor]:
    """The authors' names and shapes to those of ``model``; of a dense prediction model, the backbone's only."""
    backbone = {name.removeprefix("backbone."): t for name, t in state_dict.items() if name.startswith("backbone.")}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    renamed = rename_upstream(backbone or state_dict)
    return {name: _in_shape(name, tensor, shapes.get(name)) for name, tensor in renamed.items()}


def rename_upstream(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names, of any time, to ours; ours are kept. Shapes stay."""
    patterns = (
        (r"^patch_embed\.(0|proj)\.", "stem.conv1."),
        (r"^patch_embed\.(2|norm)\.", "stem.norm1."),
        (r"^patch_embed\.5\.", "stem.conv2."),
        (r"^patch_embed\.7\.", "stem.norm2."),
        (r"^layers\.(\d+)\.blocks\.(\d+)\.ln_1\.", r"stages.\1.blocks.\2.norm."),
        (r"^layers\.(\d+)\.blocks\.(\d+)\.(op|self_attention)\.", r"stages.\1.blocks.\2.mixer."),
        (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
        (r"^classifier\.", ""),
        (r"^outnorm(\d+)\.", r"feature_norms.\1."),
    )
    renamed = {}
    for name, tensor in state_dict.items():
        reduction = re.fullmatch(r"layers\.(\d+)\.downsample\.(\w+)(\.\w+)", name)
        if reduction is not None:  # theirs ends a stage, ours begins the next one
            stage, layer, leaf = reduction.groups()
            merging = f"layers.{stage}.downsample.2.weight" in state_dict  # of the single-file version
            layer = {"1": "norm" if merging else "conv", "2": "reduction", "3": "norm"}.get(layer, layer)
            renamed[f"stages.{int(stage) + 1}.downsample.{layer}{leaf}"] = tensor
            continue
        for pattern, replacement in patterns:
            name, changed = re.subn(pattern, replacement, name)
            if changed:
                break
        prefix, found, leaf = name.partition(".mixer.")
        renamed[f"{prefix}.mixer.{from_authors_name(leaf)}" if found else name] = tensor
    return renamed


def _in_shape(name: str, tensor: Tensor, shape: torch.Size | None) -> Tensor:
    """Unfolds the paths of stacked parameters, and 1x1 convolutions into linear layers."""
    fits = shape is not None and tensor.shape != shape and tensor.numel() == shape.numel()
    pointwise = tensor.dim() == 4 and tensor.shape[2:] == (1, 1)
    return tensor.reshape(shape) if fits and (".mixer.ssm." in name or pointwise) else tensor


def _fit_pos_embed(pos_embed: Tensor, model: VMamba) -> Tensor:
    """Position embedding (1, D, H, W) as the authors keep it, or (1, L, D) as we do, on the model's grid."""
    if pos_embed.dim() == 4:
        old_grid = (pos_embed.shape[2], pos_embed.shape[3])
        pos_embed = pos_embed.flatten(2).transpose(1, 2)
    elif pos_embed.shape[1] == model.pos_embed.shape[1]:
        return pos_embed
    else:
        side = math.isqrt(pos_embed.shape[1])
        old_grid = (side, side)
        if side * side != pos_embed.shape[1]:
            raise ValueError(
                f"pos_embed has {pos_embed.shape[1]} rows, neither the model's {model.grid_size[0]}x"
                f"{model.grid_size[1]} nor a square grid; build the model with the checkpoint's img_size, load, then "
                "call set_input_size()"
            )
    return resample_pos_embed(pos_embed, old_grid, model.grid_size, None)


# The authors' suffixes of forward_type, in the order in which they are taken off its end, and what each sets.
FORWARD_SUFFIXES = (
    ("_no32", {}),
    ("_oact", dict(output_activation=True)),
    ("_noz", dict(gate=None)),
    ("_nozact", dict(gate="plain")),
    ("_onnone", dict(output_norm=None)),
    ("_ondwconv3", dict(output_norm="dwconv")),
    ("_oncnorm", dict(output_norm="layernorm_dwconv")),
    ("_onsoftmax", dict(output_norm="softmax")),
    ("_onsigmoid", dict(output_norm="sigmoid")),
)
FORWARD_CORES = {
    **{core: {} for core in ("v0", "v01", "v02", "v03", "v04", "v05", "v2", "v3")},  # one function, many kernels
    "v051d": dict(scan="unidi"),
    "v052d": dict(scan="bidi"),
    "v052dc": dict(scan="cascade"),
    "m0": dict(recurrence="ssd"),
}


def options_of_forward_type(forward_type: str) -> dict[str, Any]:
    """Arguments of :class:`~zoo.backbones.layers.ss2d.SS2D` that the authors' ``forward_type`` stands for.

    Raises:
        ValueError: If it is not known.
    """
    core, options = forward_type, dict(gate="activated")
    for suffix, option in FORWARD_SUFFIXES:
        if core.endswith(suffix):
            core = core.removesuffix(suffix)
            options |= option
    if core not in FORWARD_CORES:
        raise ValueError(f"forward_type={forward_type!r} is not known, or its suffixes are not in the authors' order")
    return {**options, **FORWARD_CORES[core]}


def from_upstream(class_name: str, kwargs: Mapping[str, Any]) -> VMamba | SS2D:
    """Builds the model, or the mixer alone, that the authors' code builds from the same arguments.

    Args:
        class_name: ``VSSM``, ``Backbone_VSSM`` or ``SS2D``.
        kwargs: The authors' constructor arguments. Those about initialisation and memory layout change nothing here.

    Raises:
        ValueError: If the class or an argument is not known.
    """
    args = dict(kwargs)
    if class_name == "SS2D":
        return _mixer_from_upstream(args)
    if class_name not in ("VSSM", "Backbone_VSSM"):
        raise ValueError(f"class {class_name!r} is not known; use VSSM, Backbone_VSSM or SS2D")
    for name in ("ssm_drop_rate", "mlp_drop_rate"):
        if args.pop(name, 0.0) != 0.0:
            raise ValueError(f"{name} must be 0: no released model has dropout in its blocks")
    for name, required in (("patch_norm", True), ("mlp_act_layer", "gelu")):
        if args.pop(name, required) != required:
            raise ValueError(f"{name} must be {required!r}: no released model differs")
    dt_rank = args.pop("ssm_dt_rank", "auto")
    norms = {"ln": "layernorm", "ln2d": "layernorm", "bn": "batchnorm"}
    model_args = dict(
        img_size=args.pop("imgsize", 224),
        in_chans=args.pop("in_chans", 3),
        num_classes=args.pop("num_classes", 1000),
        patch_size=args.pop("patch_size", 4),
        depths=args.pop("depths", (2, 2, 9, 2)),
        dims=args.pop("dims", 96),
        stem=_choose(args, "patchembed_version", "v1", {"v1": "patch", "v2": "conv"}),
        downsample=_choose(args, "downsample_version", "v2", {"v1": "merge", "v2": "conv2x2", "v3": "conv3x3"}),
        norm_layer=_choose(args, "norm_layer", "ln", norms),
        pos_embed=args.pop("posembed", False),
        d_state=args.pop("ssm_d_state", 16),
        dt_rank=None if dt_rank == "auto" else dt_rank,
        ssm_ratio=args.pop("ssm_ratio", 2.0),
        d_conv=max(args.pop("ssm_conv", 3), 1),
        conv_bias=args.pop("ssm_conv_bias", True),
        activation=args.pop("ssm_act_layer", "silu"),
        mlp_ratio=args.pop("mlp_ratio", 4.0),
        gated_mlp=args.pop("gmlp", False),
        drop_path_rate=args.pop("drop_path_rate", 0.1),
        **options_of_forward_type(args.pop("forward_type", "v2")),
    )
    if class_name == "Backbone_VSSM":
        model_args["feature_norms"] = args.pop("out_indices", (0, 1, 2, 3))
        model_args["num_classes"] = 0
    unknown = set(args) - {"ssm_init", "use_checkpoint", "pretrained"}
    if unknown:
        raise ValueError(f"arguments not known: {', '.join(sorted(unknown))}")
    model = VMamba(**model_args)
    if class_name == "Backbone_VSSM":
        model.prune_intermediate_layers(model_args["feature_norms"], prune_norm=True)
    return model


def _choose(args: dict[str, Any], name: str, default: str, choices: Mapping[str, str]) -> str:
    """Takes an argument out of the authors' and translates its value."""
    value = args.pop(name, default)
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(choices)}")
    return choices[value]


def _mixer_from_upstream(args: dict[str, Any]) -> SS2D:
    dt_rank = args.pop("dt_rank", "auto")
    model_args = dict(
        dim=args.pop("d_model"),
        d_state=args.pop("d_state", 16),
        dt_rank=None if dt_rank == "auto" else dt_rank,
        ssm_ratio=args.pop("ssm_ratio", 2.0),
        d_conv=max(args.pop("d_conv", 3), 1),
        conv_bias=args.pop("conv_bias", True),
        activation=args.pop("act_layer", "SiLU").lower(),
        drop_rate=args.pop("dropout", 0.0),
        **options_of_forward_type(args.pop("forward_type", "v2")),
    )
    unknown = set(args) - {"initialize", "channel_first"}
    if unknown:
        raise ValueError(f"arguments not known: {', '.join(sorted(unknown))}")
    return SS2D(**model_args)


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
        "license": "mit",
        "origin_url": "https://github.com/MzeroMiko/VMamba",
        "paper_ids": "arXiv:2401.10166",
        "paper_name": "VMamba: Visual State Space Model",
        **kwargs,
    }


FIRST = "https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls"
SECOND = "https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls"

default_cfgs = generate_default_cfgs(
    {
        "vmamba_tiny.in1k": _cfg(url=f"{SECOND}/vssm1_tiny_0230s_ckpt_epoch_264.pth"),
        "vmamba_small.in1k": _cfg(url=f"{SECOND}/vssm1_small_0229s_ckpt_epoch_240.pth"),
        "vmamba_base.in1k": _cfg(url=f"{SECOND}/vssm1_base_0229s_ckpt_epoch_225.pth"),
        "vmamba_tiny_s1l8.in1k": _cfg(url=f"{SECOND}/vssm1_tiny_0230s_ckpt_epoch_264.pth"),
        "vmamba_small_s1l20.in1k": _cfg(url=f"{SECOND}/vssm1_small_0229s_ckpt_epoch_240.pth"),
        "vmamba_base_s1l20.in1k": _cfg(url=f"{SECOND}/vssm1_base_0229s_ckpt_epoch_225.pth"),
        "vmamba_tiny_s2l5.in1k": _cfg(url=f"{SECOND}/vssm_tiny_0230_ckpt_epoch_262.pth"),
        "vmamba_small_s2l15.in1k": _cfg(url=f"{SECOND}/vssm_small_0229_ckpt_epoch_222.pth"),
        "vmamba_base_s2l15.in1k": _cfg(url=f"{SECOND}/vssm_base_0229_ckpt_epoch_237.pth"),
        "vmamba_vanilla_tiny.in1k": _cfg(url=f"{FIRST}/vssmtiny_dp01_ckpt_epoch_292.pth"),
        "vmamba_vanilla_small.in1k": _cfg(url=f"{FIRST}/vssmsmall_dp03_ckpt_epoch_238.pth"),
        "vmamba_vanilla_base.in1k": _cfg(url=f"{FIRST}/vssmbase_dp06_ckpt_epoch_241.pth"),
        "vmamba_nano": _cfg(
            num_classes=10,
            input_size=(3, 32, 32),
            pool_size=(2, 2),
            crop_pct=1.0,
            license="apache-2.0",
            origin_url=None,
        ),
    }
)


def _create_vmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> VMamba:
    return build_model_with_cfg(
        VMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop("out_indices", (0, 1, 2, 3)), feature_cls="getter"),
        **kwargs,
    )


FIRST_GENERATION = dict(
    stem="patch", downsample="merge", d_state=16, ssm_ratio=2.0, conv_bias=True, gate="activated", mlp_ratio=0.0
)


@register_model
def vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T as last released, of half the inner width and more blocks: 30.2M parameters, 82.6 top-1."""
    model_args = dict(dims=96, depths=(2, 2, 8, 2))
    return _create_vmamba("vmamba_tiny", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_small(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S as last released: 49.0M parameters, 83.3 top-1."""
    model_args = dict(dims=96, depths=(2, 2, 20, 2))
    return _create_vmamba("vmamba_small", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_base(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B as last released: 86.6M parameters, 83.8 top-1."""
    model_args = dict(dims=128, depths=(2, 2, 20, 2))
    return _create_vmamba("vmamba_base", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T[s1l8], the same as ``vmamba_tiny``: 30.2M parameters, 82.6 top-1."""
    model_args = dict(dims=96, depths=(2, 2, 8, 2))
    return _create_vmamba("vmamba_tiny_s1l8", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S[s1l20], the same as ``vmamba_small``: 49.0M parameters, 83.3 top-1."""
    model_args = dict(dims=96, depths=(2, 2, 20, 2))
    return _create_vmamba("vmamba_small_s1l20", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B[s1l20], the same as ``vmamba_base``: 86.6M parameters, 83.8 top-1."""
    model_args = dict(dims=128, depths=(2, 2, 20, 2))
    return _create_vmamba("vmamba_base_s1l20", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T[s2l5]: 30.7M parameters, 82.5 top-1."""
    model_args = dict(dims=96, depths=(2, 2, 5, 2), ssm_ratio=2.0)
    return _create_vmamba("vmamba_tiny_s2l5", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S[s2l15]: 50.1M parameters, 83.6 top-1."""
    model_args = dict(dims=96, depths=(2, 2, 15, 2), ssm_ratio=2.0)
    return _create_vmamba("vmamba_small_s2l15", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B[s2l15]: 88.6M parameters, 83.9 top-1."""
    model_args = dict(dims=128, depths=(2, 2, 15, 2), ssm_ratio=2.0)
    return _create_vmamba("vmamba_base_s2l15", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_vanilla_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T of the first generation: 22.9M parameters, 82.2 top-1."""
    model_args = dict(dims=96, depths=(2, 2, 9, 2), **FIRST_GENERATION)
    return _create_vmamba("vmamba_vanilla_tiny", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_vanilla_small(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S of the first generation: 44.4M parameters, 83.5 top-1."""
    model_args = dict(dims=96, depths=(2, 2, 27, 2), **FIRST_GENERATION)
    return _create_vmamba("vmamba_vanilla_small", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_vanilla_base(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B of the first generation: 76.3M parameters, 83.7 top-1."""
    model_args = dict(dims=128, depths=(2, 2, 27, 2), **FIRST_GENERATION)
    return _create_vmamba("vmamba_vanilla_base", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_nano(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Ours, for 32-pixel images in 256 cells, with batch norms: 2.8M parameters."""
    model_args = dict(patch_size=2, dims=32, depths=(2, 3, 6, 1), ssm_ratio=2.0, norm_layer="batchnorm")
    return _create_vmamba("vmamba_nano", pretrained=pretrained, **dict(model_args, **kwargs))
