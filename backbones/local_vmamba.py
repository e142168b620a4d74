"""LocalVMamba: VMamba whose blocks scan in four directions of their own, chosen among rows, columns and local windows.

Paper: "LocalMamba: Visual State Space Model with Windowed Selective Scan", https://arxiv.org/abs/2403.09338.
Origin: https://github.com/hunto/LocalMamba (Apache-2.0), whose checkpoints load here.

Differences from the original:

1. The scans read and write the map through index tables, worked out once per grid; rows, forwards and backwards, need
   none. Nothing is padded to the longest direction.
2. Columns come back in their own order on every grid; the original swaps height and width on the way back, which is
   the same on square grids only.
3. A_log, D and step biases are exempt from weight decay.
4. Locally bidirectional scans (``lb_window``; LBMamba, arXiv 2506.15976) are an option.

Kept, because released weights depend on it: where windows do not fill a grid, the cells that pad it are stepped too and
let the state decay.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from zoo.backbones.layers.backbone import fit_parts, unwrap_checkpoint
from zoo.backbones.layers.channel_attention import ChannelAttention
from zoo.backbones.layers.depthwise_conv import DepthwiseConv
from zoo.backbones.layers.hierarchical import HierarchicalBackbone
from zoo.backbones.layers.layer_norm import LayerNorm
from zoo.backbones.layers.ss2d import Paths, SelectivePaths
from zoo.backbones.layers.vss import PatchMerging, PatchStem, VSSBlock, VSSStage, fit_patches
from zoo.backbones.scans import scan_paths
from zoo.backbones.scans.local import check_direction
from zoo.backbones.vmamba import convert_upstream
from zoo.kernels import is_exporting
from zoo.registry import build_model_with_cfg

__all__ = ["LocalVMamba"]

ALL_DIRECTIONS = ("h", "h_flip", "v", "v_flip", "w2", "w2_flip", "w7", "w7_flip")


class Route(NamedTuple):
    """How a direction walks over a map: arguments of :func:`~zoo.kernels.selective_scan`."""

    table: Tensor | None
    reverse: bool
    complete: bool


def _route(direction: str, H: int, W: int, device: torch.device) -> Route:
    """The route of ``h``, ``v`` or ``w<size>``, from its end with ``_flip``."""
    base = direction.removesuffix("_flip")
    reverse = base != direction
    if base == "h":
        return Route(None, reverse, True)
    if base == "v":
        return Route(scan_paths("columns", H, W, device), reverse, True)
    size = int(base[1:])
    # Which grids a window fits is not asked in an exported graph, which would be tied to those or to the others.
    complete = not is_exporting() and H % size == 0 and W % size == 0
    return Route(scan_paths("window", H, W, device, size=size), reverse, complete)


@register_notrace_module
class LocalSS2D(nn.Module):
    """Gated selective scans of a map along K directions, each with its own parameters, weighed and added.

    Shapes: B batch, D = dim, E = int(ssm_ratio * dim), N states, R rank of the step projection, K directions.

    Args:
        dim: Width D of the map.
        directions: K orders: ``h`` by rows, ``v`` by columns, ``w7`` by windows of 7 x 7; with ``_flip`` from the end.
        d_state: States N per channel.
        dt_rank: Rank R of the step projection; default ceil(dim / 16).
        ssm_ratio: Inner width E as a multiple of ``dim``.
        d_conv: Side of the depth-wise convolution, odd.
        search: Whether directions are also normed, and weighed by a softmax of learned weights: the network in which
            the authors search for directions.
        lb_window: Steps of a locally bidirectional window of the scans; 1 for plain scans.

    Raises:
        ValueError: If a direction, ``d_conv`` or ``lb_window`` is not one of the above.
    """

    def __init__(
        self,
        dim: int,
        directions: Sequence[str],
        d_state: int = 16,
        dt_rank: int | None = None,
        ssm_ratio: float = 2.0,
        d_conv: int = 3,
        search: bool = False,
        lb_window: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        for direction in directions:
            check_direction(direction)
        if d_conv < 1 or d_conv % 2 == 0:
            raise ValueError(f"d_conv must be odd, got {d_conv}")
        inner = int(ssm_ratio * dim)
        self.directions = tuple(directions)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv = DepthwiseConv(inner, d_conv, activation="silu", **dd)
        self.ssm = SelectivePaths(inner, len(directions), d_state, dt_rank or -(-dim // 16), lb_window, **dd)
        self.attention = ChannelAttention(inner, **dd)
        self.direction_weight = nn.Parameter(torch.zeros(len(directions), **dd)) if search else None
        self.out_norm = LayerNorm(inner, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)

    def reset_parameters(self) -> None:
        """Directions weigh the same at the beginning of a search."""
        if self.direction_weight is not None:
            nn.init.zeros_(self.direction_weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, D) to map (B, H, W, D)."""
        H, W = x.shape[1:3]
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (B, H, W, E)
        u = self.conv(x).flatten(1, 2)  # (B, L, E)
        out = u.new_zeros(())
        for k, (direction, path) in enumerate(zip(self.directions, self.ssm.project(u).split(), strict=True)):
            y = self._scan(u, path, _route(direction, H, W, u.device))
            weight = self.attention(y)  # (B, 1, E)
            if self.direction_weight is not None:
                y = F.layer_norm(y * weight, y.shape[-1:])
                weight = self.direction_weight.softmax(0)[k].to(y.dtype)
            out = torch.addcmul(out, y, weight)
        return self.out_proj(self.out_norm.gated(out.unflatten(1, (H, W)), z, "silu"))

    def _scan(self, u: Tensor, path: Paths, route: Route) -> Tensor:
        """Tokens (B, L, E) scanned along one direction, (B, L, E)."""
        y = self.ssm.walk(u, path, route.table, (route.reverse,), route.complete)
        return y.to(self.out_proj.weight.dtype) if u.dtype == torch.float16 else y


class LocalVMamba(HierarchicalBackbone):
    """LocalVMamba: patches, four stages of blocks that scan in local windows, norm, mean, classifier.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for pooled features instead of logits.
        global_pool: ``"avg"`` mean of the map; ``""`` the map.
        patch_size: Patch side in pixels; rows and columns that fill no patch are left out, as published.
        depths: Blocks of every stage.
        dims: Channels of every stage, or of the first one; they double then.
        directions: Directions that a block scans along, see :class:`LocalSS2D`, one sequence for every block; if there
            are fewer sequences than blocks they repeat.
        d_state: States per channel.
        dt_rank: Rank of the step projection; default ceil(channels / 16).
        ssm_ratio: Inner width of the mixers as a multiple of their channels.
        d_conv: Side of the mixers' convolution, odd.
        lb_window: Steps of a locally bidirectional window of the scans; 1 for plain scans.
        feature_norms: Stages whose features get a layer norm of their own, as in the authors' dense prediction models.
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
        depths: Sequence[int] = (2, 2, 9, 2),
        dims: int | Sequence[int] = 96,
        directions: Sequence[Sequence[str]] = (("h", "h_flip", "w7", "w7_flip"),),
        d_state: int = 16,
        dt_rank: int | None = None,
        ssm_ratio: float = 2.0,
        d_conv: int = 3,
        lb_window: int = 1,
        feature_norms: Sequence[int] = (),
        drop_rate: float = 0.0,
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
        if not directions or not all(directions) or isinstance(directions[0], str):
            raise ValueError(f"directions={directions!r} must be sequences of names, one for every block")
        super().__init__(dims, [patch_size * 2**i for i in range(len(depths))], in_chans, num_classes, global_pool)
        self.stem = PatchStem(in_chans, dims[0], patch_size, **dd)

        def make_block(index: int, dim: int, drop_path: float) -> VSSBlock:
            own = directions[index % len(directions)]
            mixer = LocalSS2D(dim, own, d_state, dt_rank, ssm_ratio, d_conv, lb_window=lb_window, **dd)
            return VSSBlock(LayerNorm(dim, **dd), mixer, drop_path=drop_path)

        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(dims):
            first = sum(depths[:i])
            blocks = [make_block(first + j, dim, rate) for j, rate in enumerate(rates[i])]
            stages.append(VSSStage(blocks, PatchMerging(dims[i - 1], dim, **dd) if i else None))
        self.stages = nn.Sequential(*stages)
        self._set_feature_info()
        norms = {str(index): LayerNorm(dims[index], narrow=False, **dd) for index in sorted(set(feature_norms))}
        self.feature_norms = nn.ModuleDict(norms)
        self.norm = LayerNorm(dims[-1], narrow=False, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dims[-1], num_classes, **dd) if num_classes else nn.Identity()
        self.init_weights(needs_reset=False)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: LocalVMamba) -> dict[str, Tensor]:
    """Converts a checkpoint to the names of ``model``.

    Accepts the authors' checkpoints (the weights under ``state_dict``), their dense prediction models (names starting
    with ``backbone.``, of which only these are kept), bare state dicts, and ours. Keys of the norm and the head are
    dropped if the model has none. Directions are not in a checkpoint: they are the model's.

    Args:
        state_dict: Checkpoint of any kind above.
        model: Model that the result is loaded into.

    Returns:
        State dict in this file's names.
    """
    state_dict = rename_attention(unwrap_checkpoint(state_dict))
    return fit_parts(fit_patches(convert_upstream(state_dict, model), model.stem), model)


def rename_attention(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names of what a mixer has beside VMamba's to ours; other names are kept."""
    renamed = {
        ".multi_scan.attn.global_reduce.": ".attention.reduce.",
        ".multi_scan.attn.channel_select.": ".attention.select.",
        ".multi_scan.attn.norm.": ".attention.norm.",
        ".multi_scan.weights": ".direction_weight",
    }
    converted = {}
    for name, tensor in state_dict.items():
        for theirs, ours in renamed.items():
            name = name.replace(theirs, ours)
        converted[name] = tensor
    return converted


def from_upstream(class_name: str, kwargs: Mapping[str, Any]) -> LocalVMamba | LocalSS2D:
    """Builds the model, or the mixer alone, that the authors' code builds from the same arguments.

    Args:
        class_name: ``VSSM``, ``Backbone_LocalVSSM`` or ``SS2D``.
        kwargs: The authors' constructor arguments. Those about other forms of VMamba, which their code ignores, change
            nothing here.

    Raises:
        ValueError: If the class or an argument is not known.
    """
    args = dict(kwargs)
    if class_name == "SS2D":
        directions = args.pop("directions", None)
        model_args = dict(
            dim=args.pop("d_model"),
            directions=directions or ALL_DIRECTIONS,
            search=directions is None,
            d_state=args.pop("d_state", 16),
            ssm_ratio=args.pop("ssm_ratio", 2.0),
            d_conv=args.pop("d_conv", 3),
        )
        _refuse(args, set())
        return LocalSS2D(**model_args)
    if class_name not in ("VSSM", "Backbone_LocalVSSM"):
        raise ValueError(f"class {class_name!r} is not known; use VSSM, Backbone_LocalVSSM or SS2D")
    dense = class_name == "Backbone_LocalVSSM"
    model_args = dict(
        in_chans=args.pop("in_chans", 3),
        num_classes=args.pop("num_classes", 1000),
        patch_size=args.pop("patch_size", 4),
        depths=args.pop("depths", (2, 2, 9, 2)),
        dims=args.pop("dims", (96, 192, 384, 768)),
        directions=args.pop("directions"),
        d_state=args.pop("ssm_d_state", 16),
        ssm_ratio=args.pop("ssm_ratio", 2.0),
        d_conv=args.pop("ssm_conv", 3),
        feature_norms=args.pop("out_indices", (0, 1, 2, 3)) if dense else (),
        drop_path_rate=args.pop("drop_path_rate", 0.1),
    )
    _refuse(args, {"d_state", "mlp_ratio", "downsample_version", "patchembed_version", "use_checkpoint", "pretrained"})
    model = LocalVMamba(**model_args)
    if dense:
        model.prune_intermediate_layers(model_args["feature_norms"], prune_norm=True)
    return model


def _refuse(args: Mapping[str, Any], ignored: set[str]) -> None:
    unknown = set(args) - ignored
    if unknown:
        raise ValueError(f"arguments not known: {', '.join(sorted(unknown))}")


# Directions of the 15 blocks of LocalVMamba-T, as the authors' search found them.
TINY_DIRECTIONS = (
    ("h", "h_flip", "w7", "w7_flip"), ("h_flip", "v_flip", "w2", "w2_flip"),
    ("h_flip", "v_flip", "w2_flip", "w7"), ("h_flip", "v", "v_flip", "w2"),
    ("h", "h_flip", "v_flip", "w2_flip"), ("h_flip", "v_flip", "w2", "w2_flip"),
    ("h", "w2_flip", "w7", "w7_flip"), ("h", "h_flip", "v", "v_flip"),
    ("h", "v_flip", "w7", "w7_flip"), ("h_flip", "v", "w2", "w7_flip"),
    ("v", "v_flip", "w2", "w7_flip"), ("h", "h_flip", "v_flip", "w2_flip"),
    ("v_flip", "w2_flip", "w7", "w7_flip"), ("h_flip", "v_flip", "w2_flip", "w7_flip"),
    ("h_flip", "v", "w7", "w7_flip"),
)  # fmt: skip

# Directions of the 33 blocks of LocalVMamba-S.
SMALL_DIRECTIONS = (
    ("h", "v", "v_flip", "w7_flip"), ("h", "h_flip", "v", "w7"),
    ("h_flip", "v", "v_flip", "w7"), ("h_flip", "v", "w2_flip", "w7"),
    ("h_flip", "v", "w2_flip", "w7"), ("h_flip", "v_flip", "w2", "w7_flip"),
    ("h_flip", "v", "v_flip", "w7"), ("h", "v", "v_flip", "w7"),
    ("h", "v", "v_flip", "w7"), ("h", "v", "v_flip", "w7_flip"),
    ("h", "h_flip", "v", "v_flip"), ("h", "v", "v_flip", "w2"),
    ("v", "v_flip", "w2_flip", "w7"), ("h", "h_flip", "v", "w2"),
    ("h_flip", "v", "v_flip", "w7_flip"), ("h", "h_flip", "v", "v_flip"),
    ("h", "v", "v_flip", "w7_flip"), ("h", "v", "v_flip", "w7_flip"),
    ("h", "h_flip", "v_flip", "w7"), ("h_flip", "v_flip", "w2_flip", "w7"),
    ("h_flip", "v", "v_flip", "w7_flip"), ("v", "v_flip", "w7", "w7_flip"),
    ("h", "v", "v_flip", "w7_flip"), ("h_flip", "v", "v_flip", "w2"),
    ("h", "v", "v_flip", "w2_flip"), ("h", "h_flip", "v", "w7"),
    ("h", "h_flip", "w7", "w7_flip"), ("h", "v_flip", "w2", "w2_flip"),
    ("h", "v_flip", "w2", "w7"), ("h", "v", "v_flip", "w7_flip"),
    ("h_flip", "v", "w2_flip", "w7"), ("h_flip", "v_flip", "w7", "w7_flip"),
    ("h", "v", "w7", "w7_flip"),
)  # fmt: skip


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
        "origin_url": "https://github.com/hunto/LocalMamba",
        "paper_ids": "arXiv:2403.09338",
        "paper_name": "LocalMamba: Visual State Space Model with Windowed Selective Scan",
        **kwargs,
    }


RELEASES = "https://github.com/hunto/LocalMamba/releases/download/v1.0.0"

default_cfgs = generate_default_cfgs(
    {
        "local_vmamba_tiny": _cfg(),  # its weights were announced and never released
        "local_vmamba_small.in1k": _cfg(url=f"{RELEASES}/local_vssm_small.ckpt"),
        "local_vmamba_nano": _cfg(
            num_classes=10, input_size=(3, 32, 32), pool_size=(2, 2), crop_pct=1.0, origin_url=None
        ),
    }
)


def _create_local_vmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    return build_model_with_cfg(
        LocalVMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop("out_indices", (0, 1, 2, 3)), feature_cls="getter"),
        **kwargs,
    )


@register_model
def local_vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """LocalVMamba-T: 25.5M parameters, 82.7 top-1 as published (no weights)."""
    model_args = dict(dims=96, depths=(2, 2, 9, 2), directions=TINY_DIRECTIONS)
    return _create_local_vmamba("local_vmamba_tiny", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def local_vmamba_small(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """LocalVMamba-S: 49.7M parameters, 83.7 top-1."""
    model_args = dict(dims=96, depths=(2, 2, 27, 2), directions=SMALL_DIRECTIONS)
    return _create_local_vmamba("local_vmamba_small", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def local_vmamba_nano(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """Ours, for 32-pixel images in 256 patches: 2.5M parameters."""
    directions = (("h", "h_flip", "w2", "w2_flip"), ("v", "v_flip", "w4", "w4_flip"))
    model_args = dict(patch_size=2, dims=32, depths=(2, 2, 5, 2), directions=directions)
    return _create_local_vmamba("local_vmamba_nano", pretrained=pretrained, **dict(model_args, **kwargs))
