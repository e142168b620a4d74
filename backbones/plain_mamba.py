"""PlainMamba: a columnar backbone whose four scans run through the image without jumps and know their direction.

Paper: "PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition", https://arxiv.org/abs/2403.17695.
Origin: https://github.com/ChenhongyiYang/PlainMamba (Apache-2.0), whose checkpoints load here.

Differences from the original:

1. The four scans are one kernel launch that reads the map through index tables, worked out once per grid; activations
   are neither permuted nor copied. Any image size runs, non-square ones included.
2. The original permutes only the scan's input: step p of a scan takes the step size, B and C of the p-th token in
   raster order, whatever token the scan visits. ``pairing="position"`` does so, as released weights need it;
   ``pairing="token"`` gives every token its own parameters on all four paths, as the paper writes it.
3. The original adds the bias of the step projection twice; here ``dt_bias`` holds the doubled value.
4. Step projections keep the initialisation of Mamba (steps log-uniform in [0.001, 0.1]), which the original overwrites.
5. Options of later work: locally bidirectional scans (``lb_window``; LBMamba, arXiv 2506.15976) and stochastic
   shuffling of the tokens (``layer_shuffle``; ShuffleMamba, arXiv 2408.17081).
6. Evaluated batch norms are folded into the convolutions before them, so that hooks on either run in training only.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, calculate_drop_path_rates, to_2tuple, trunc_normal_
from timm.models import (
    generate_default_cfgs,
    register_model,
    register_notrace_function,
    register_notrace_module,
)
from torch import Tensor, nn

from zoo.backbones.layers.backbone import unwrap_checkpoint
from zoo.backbones.layers.columnar import ColumnarBackbone, Stream, fit_checkpoint
from zoo.backbones.layers.conv_norm import conv_norm
from zoo.backbones.layers.depthwise_conv import DepthwiseConv
from zoo.backbones.layers.layer_norm import LayerNorm
from zoo.backbones.layers.layer_shuffle import LayerShuffle, TokenOrder, restore_tokens, shuffle_tokens
from zoo.backbones.layers.recurrence import check_window, init_decays, init_steps, negative_exp
from zoo.backbones.scans.memory import remember_tables
from zoo.backbones.scans.snake import SNAKE_MOVES, snake, snake_moves
from zoo.kernels import selective_scan
from zoo.registry import build_model_with_cfg

__all__ = ["PlainMamba"]

Pairing = Literal["position", "token"]


@remember_tables
def _snake_tables(H: int, W: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What the mixer looks up, each (4, H * W): the paths, the step at which a cell is visited, and the move to it."""
    paths = snake(H, W, device)
    steps = paths.argsort(dim=1)
    moves = snake_moves(H, W, device).gather(1, steps)
    return paths.to(torch.int32), steps, moves


@register_notrace_module
class SnakeMixer(nn.Module):
    """Gated selective scan of a map along four continuous paths that share all parameters.

    Shapes: B batch, L = H * W tokens, D = dim, E = expand * dim, N states, R rank of the step projection, K = 4 paths.

    Args:
        dim: Token width D.
        d_state: States N per channel.
        conv_size: Side of the depth-wise convolution, odd.
        expand: Inner width E as a multiple of ``dim``.
        dt_rank: Rank R of the step projection; default ceil(dim / 16).
        pairing: Whether step p of every path takes step size, B and C of token p in raster order (``"position"``, as
            released) or those of the token it visits (``"token"``).
        lb_window: Steps of a locally bidirectional window, a power of two up to 16; 1 for plain scans.

    Raises:
        ValueError: If ``pairing`` or ``lb_window`` is not one of the above.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        conv_size: int = 7,
        expand: int = 2,
        dt_rank: int | None = None,
        pairing: Pairing = "position",
        lb_window: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if pairing not in get_args(Pairing):
            raise ValueError(f"pairing={pairing!r} is not known; use one of {', '.join(get_args(Pairing))}")
        check_window(lb_window)
        inner = expand * dim
        rank = dt_rank or math.ceil(dim / 16)
        self.splits = [rank, d_state, d_state]
        self.pairing = pairing
        self.lb_window = lb_window
        self.in_proj = nn.Linear(dim, 2 * inner, **dd)
        self.conv = DepthwiseConv(inner, conv_size, activation="silu", **dd)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False, **dd)
        self.dt_proj = nn.Linear(rank, inner, bias=False, **dd)
        self.dt_bias = nn.Parameter(torch.empty(inner, **dd))
        self.A_log = nn.Parameter(torch.empty(inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(inner, **dd))
        self.direction_B = nn.Parameter(torch.empty(len(SNAKE_MOVES), d_state, **dd))
        self.out_proj = nn.Linear(inner, dim, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal projections; step sizes, A and D as in Mamba."""
        for layer in (self.in_proj, self.x_proj, self.out_proj):
            trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        bound = self.dt_proj.in_features**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        init_steps(self.dt_bias)
        init_decays(self.A_log)
        nn.init.ones_(self.D)
        trunc_normal_(self.direction_B, std=0.02)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, H * W, D) of a grid (H, W) to tokens (B, H * W, D)."""
        paths, steps, moves = _snake_tables(*grid, x.device)
        K = len(paths)
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (B, L, E) views of one GEMM's output
        u = self.conv(x.unflatten(1, grid)).flatten(1, 2)  # (B, L, E)
        # Where steps and tokens are paired by position, the few numbers a step's parameters are made of are looked up.
        parameters = self.x_proj(u)
        parameters = parameters[:, steps] if self.pairing == "position" else parameters.unsqueeze(1)
        dt, B, C = parameters.split(self.splits, dim=-1)  # (B, K or 1, L, R or N)
        B = B + self.direction_B.to(B.dtype)[moves]  # (B, K, L, N)
        y = selective_scan(
            u,
            self.dt_proj(dt).expand(-1, K, -1, -1),
            negative_exp(self.A_log).expand(K, -1, -1),
            B,
            C.expand(-1, K, -1, -1),
            self.D.expand(K, -1),
            z,
            self.dt_bias.expand(K, -1),
            delta_softplus=True,
            paths=paths,
            window=self.lb_window,
        )
        return self.out_proj(y)


class ConvPatchEmbed(nn.Module):
    """Convolutional stem at half resolution, then patches of the stem's map.

    Args:
        img_size: Image size (H, W) or one side, used only to state ``grid_size``.
        patch_size: Side of a patch in pixels, even.
        in_chans: Image channels.
        embed_dim: Token width D.
        stem_width: Channels of the stem.
        stem_convs: 3x3 convolutions after the first, 7x7 one.

    Raises:
        ValueError: If ``patch_size`` is odd or the image has no pixels.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 192,
        stem_width: int = 64,
        stem_convs: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if patch_size < 2 or patch_size % 2:
            raise ValueError(f"patch_size must be even, because the stem halves the image, got {patch_size}")
        self.patch_size = patch_size
        self.stride = (patch_size, patch_size)
        self.set_image_size(img_size)

        def conv(channels: int, kernel: int, stride: int) -> list[nn.Module]:
            layer = nn.Conv2d(channels, stem_width, kernel, stride, padding=kernel // 2, bias=False, **dd)
            return [layer, nn.BatchNorm2d(stem_width, **dd), nn.ReLU()]

        self.stem = nn.Sequential(*conv(in_chans, 7, 2))
        self.convs = nn.Sequential(*(layer for _ in range(stem_convs) for layer in conv(stem_width, 3, 1)))
        self.proj = nn.Conv2d(stem_width, embed_dim, patch_size // 2, patch_size // 2, **dd)

    def set_image_size(self, img_size: int | Sequence[int]) -> None:
        """Sets the size that ``grid_size`` refers to."""
        self.img_size = to_2tuple(img_size)
        if min(self.img_size) < 1:
            raise ValueError(f"img_size={self.img_size} has no pixels")
        height, width = (-(-size // self.patch_size) for size in self.img_size)
        self.grid_size = (height, width)

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W) to a token map (B, D, ceil(H / patch), ceil(W / patch))."""
        return self.proj(_pad_to_multiple(self.convs(self.stem(x)), self.patch_size // 2))


@torch.fx.wrap
@register_notrace_function
def _pad_to_multiple(x: Tensor, size: int) -> Tensor:
    """Zero-pads a map (B, C, H, W) at the bottom and the right to multiples of ``size``."""
    bottom, right = -x.shape[-2] % size, -x.shape[-1] % size
    if isinstance(bottom, int) and isinstance(right, int) and bottom == right == 0:
        return x
    return F.pad(x, (0, right, 0, bottom))


class PlainMambaBlock(nn.Module):
    """Norm, mixer and residual, optionally followed by a depth-wise convolution.

    Args:
        dim: Token width D.
        mixer: Token mixer for maps.
        drop_path: Probability that a sample skips the mixer during training.
        dwconv: Whether a 3x3 depth-wise convolution with batch norm and GELU follows, without a residual around it.
    """

    def __init__(
        self,
        dim: int,
        mixer: SnakeMixer,
        drop_path: float = 0.0,
        dwconv: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = LayerNorm(dim, **dd)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.dwconv = None
        if dwconv:
            conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False, **dd)
            self.dwconv = nn.Sequential(conv, nn.BatchNorm2d(dim, **dd), nn.GELU())

    def forward(self, x: Tensor, grid: tuple[int, int], order: TokenOrder | None = None) -> Tensor:
        """Tokens (B, H * W, D) of a grid (H, W) to tokens (B, H * W, D); the mixer reads them in order."""
        update = self.mixer(shuffle_tokens(self.norm(x), order), grid)
        x = x + self.drop_path(restore_tokens(update, order))
        if self.dwconv is None:
            return x
        conv, norm, _ = self.dwconv
        return conv_norm(x.unflatten(1, grid), conv, norm, "gelu").flatten(1, 2)


class PlainMamba(ColumnarBackbone):
    """PlainMamba: convolutional stem, position embedding, a column of snake-scanning blocks, mean, classifier.

    Args:
        img_size: Image size (H, W) or one side that the position embedding is made for; other sizes run too.
        patch_size: Patch side in pixels, even.
        in_chans: Image channels.
        num_classes: Classes; 0 for pooled features instead of logits.
        global_pool: ``"avg"`` mean of the tokens; ``""`` one result per token.
        embed_dim: Token width D.
        depth: Blocks.
        stem_width: Channels of the stem.
        stem_convs: 3x3 convolutions in the stem.
        dwconv_blocks: Blocks that are followed by a depth-wise convolution.
        d_state: States per channel.
        conv_size: Side of the mixers' depth-wise convolution.
        expand: Inner width as a multiple of ``embed_dim``.
        dt_rank: Rank of the step projection; default ceil(embed_dim / 16).
        pairing: How steps get their parameters, see :class:`SnakeMixer`.
        lb_window: Steps of a locally bidirectional window of the scans; 1 for plain scans.
        feature_norms: Blocks whose intermediate features get a layer norm of their own, as in the authors' dense
            prediction models.
        layer_shuffle: Probability that the last block's mixer reads the tokens in a random order during training; it
            grows linearly from 0 at the first block.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the position embedding.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.

    Raises:
        ValueError: If an argument is not one of its choices or does not fit another.
    """

    global_pools = ("avg", "")

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 24,
        stem_width: int = 64,
        stem_convs: int = 1,
        dwconv_blocks: Sequence[int] = (),
        d_state: int = 16,
        conv_size: int = 7,
        expand: int = 2,
        dt_rank: int | None = None,
        pairing: Pairing = "position",
        lb_window: int = 1,
        feature_norms: Sequence[int] = (),
        layer_shuffle: float = 0.0,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(embed_dim, in_chans, num_classes, global_pool)
        for name, indices in (("dwconv_blocks", dwconv_blocks), ("feature_norms", feature_norms)):
            if any(not 0 <= index < depth for index in indices):
                raise ValueError(f"{name}={tuple(indices)} names a block that is not among the {depth}")
        self.patch_embed = ConvPatchEmbed(img_size, patch_size, in_chans, embed_dim, stem_width, stem_convs, **dd)
        num_patches = self.patch_embed.grid_size[0] * self.patch_embed.grid_size[1]
        self.cls_token = None
        self.pos_embed = nn.Parameter(torch.empty(1, num_patches, embed_dim, **dd))
        self.pos_drop = nn.Dropout(pos_drop_rate)

        def make_block(index: int, drop_path: float) -> PlainMambaBlock:
            mixer = SnakeMixer(embed_dim, d_state, conv_size, expand, dt_rank, pairing, lb_window, **dd)
            return PlainMambaBlock(embed_dim, mixer, drop_path, index in dwconv_blocks, **dd)

        rates = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(make_block(index, rate) for index, rate in enumerate(rates))
        self.layer_shuffle = LayerShuffle(layer_shuffle, depth)
        self._set_feature_info()
        norms = {str(i): LayerNorm(embed_dim, eps=1e-6, narrow=False, **dd) for i in sorted(set(feature_norms))}
        self.feature_norms = nn.ModuleDict(norms)
        self.norm = LayerNorm(embed_dim, eps=1e-6, narrow=False, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes else nn.Identity()
        self.init_weights(needs_reset=False)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialises every parameter.

        Args:
            needs_reset: Whether the layers' own initialisation runs first, as after ``to_empty()``.
        """
        if needs_reset:
            self._reset_layers()
            for block in self.blocks:
                block.mixer.init_weights()
        trunc_normal_(self.pos_embed, std=0.02)
        self._init_head()

    @torch.jit.ignore
    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Remakes the position embedding for another image size (H, W) or one side."""
        super().set_input_size(img_size)

    def _stream(self, x: Tensor) -> tuple[Tensor, tuple[int, int], Any]:
        """Image to tokens before the first block, their grid and their orders in every block."""
        tokens, grid = self.embed(x)
        return tokens, grid, self.layer_shuffle(tokens)

    def _advance(
        self, index: int, stream: Stream, grid: tuple[int, int], context: Any, run: Callable[..., Tensor]
    ) -> tuple[Stream, Tensor]:
        """Runs one block, which adds to the stream by itself."""
        tokens = run(self.blocks[index], stream.tokens, grid, context[index])
        return Stream(tokens), tokens

    def _in_weight_dtype(self, stream: Tensor) -> Tensor:
        """The stream as it is: blocks may end in a convolution, whose output autocast narrows."""
        return stream


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: PlainMamba) -> dict[str, Tensor]:
    """Converts a checkpoint to the names and the position embedding of ``model``.

    Accepts the authors' checkpoints (the weights under ``state_dict``, names starting with ``backbone.`` and
    ``head.fc.``), their bare state dicts, and ours. Keys of the norm and the head are dropped if the model has none.

    Args:
        state_dict: Checkpoint of any kind above.
        model: Model that the result is loaded into.

    Returns:
        State dict in this file's names.

    Raises:
        ValueError: If the position embedding's grid cannot be told.
    """
    state_dict = unwrap_checkpoint(state_dict)
    if any(name.startswith(("backbone.", "layers.")) for name in state_dict):
        state_dict = _from_upstream_names(state_dict)
    return fit_checkpoint(dict(state_dict), model, None)


def _from_upstream_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names to ours; the bias of the step projection is doubled, as their code adds it twice."""
    renamed = {
        "patch_embed.projection.": "patch_embed.proj.",
        "ln1.": "norm.",
        "head.fc.": "head.",
        ".mamba.dt_proj.bias": ".mixer.dt_bias",
        ".mamba.direction_Bs": ".mixer.direction_B",
        ".mamba.conv2d.": ".mixer.conv.",
        ".mamba.": ".mixer.",
        ".dw.": ".dwconv.",
    }
    converted = {}
    for name, tensor in state_dict.items():
        if name.endswith("dt_proj.bias"):
            tensor = 2 * tensor
        name = name.removeprefix("backbone.")
        if name.startswith("layers."):
            name = name.replace("layers.", "blocks.", 1)
        elif name.startswith("norm_layer"):
            name = name.replace("norm_layer", "feature_norms.", 1)
        for theirs, ours in renamed.items():
            name = name.replace(theirs, ours, 1)
        converted[name] = tensor
    return converted


def from_upstream(class_name: str, kwargs: Mapping[str, Any], num_classes: int = 0) -> PlainMamba:
    """Builds the model that the authors' code builds from the same arguments.

    Args:
        class_name: ``PlainMamba``.
        kwargs: The authors' constructor arguments.
        num_classes: Classes of their linear head.

    Raises:
        ValueError: If the class or an argument is not known.
    """
    if class_name != "PlainMamba":
        raise ValueError(f"class {class_name!r} is not known; use PlainMamba")
    args = dict(kwargs)
    layer = dict(args.pop("layer_cfgs", {}))
    mamba = {**layer.pop("mamba_cfg", {})}
    args = {**args, **layer, **mamba}
    for name, required in (("use_rms_norm", False), ("bias", True), ("conv_bias", True)):
        if args.pop(name, required) != required:
            raise ValueError(f"{name}={not required} is not supported: no released model has it")
    depth = args.pop("num_layers", 24)
    out_indices = [index % depth for index in args.pop("out_indices", ())]
    model_args = dict(
        img_size=args.pop("img_size", 224),
        patch_size=args.pop("patch_size", 16),
        in_chans=args.pop("in_channels", 3),
        num_classes=num_classes,
        embed_dim=args.pop("embed_dims", 192),
        depth=depth,
        stem_convs=args.pop("num_convs_patch_embed", 1),
        dwconv_blocks=args.pop("layers_with_dwconv", ()),
        d_state=args.pop("d_state", 16),
        conv_size=args.pop("conv_size", 7),
        expand=args.pop("expand", 2),
        feature_norms=[index for index in out_indices if index != depth - 1],
        pos_drop_rate=args.pop("drop_rate", 0.0),
        drop_path_rate=args.pop("drop_path_rate", 0.0),
    )
    inert = {"arch", "dt_init", "dt_scale", "dt_min", "dt_max", "dt_init_floor", "default_hw_shape", "out_type"}
    unknown = set(args) - inert
    if unknown:
        raise ValueError(f"arguments not known: {', '.join(sorted(unknown))}")
    return PlainMamba(**model_args)


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
        "first_conv": "patch_embed.stem.0",
        "classifier": "head",
        "license": "apache-2.0",
        "origin_url": "https://github.com/ChenhongyiYang/PlainMamba",
        "paper_ids": "arXiv:2403.17695",
        "paper_name": "PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "plainmamba_l1.in1k": _cfg(hf_hub_id="ChenhongyiYang/PlainMamba", hf_hub_filename="l1.pth"),
        "plainmamba_l2.in1k": _cfg(hf_hub_id="ChenhongyiYang/PlainMamba", hf_hub_filename="l2.pth"),
        "plainmamba_l3.in1k": _cfg(hf_hub_id="ChenhongyiYang/PlainMamba", hf_hub_filename="l3.pth"),
        "plain_mamba_nano": _cfg(num_classes=10, input_size=(3, 32, 32), crop_pct=1.0, origin_url=None),
    }
)


def _create_plain_mamba(variant: str, pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    return build_model_with_cfg(
        PlainMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop("out_indices", 3), feature_cls="getter"),
        **kwargs,
    )


@register_model
def plainmamba_l1(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L1: 7.6M parameters, 77.9 top-1."""
    model_args = dict(embed_dim=192, depth=24, stem_convs=1, dwconv_blocks=(0,))
    return _create_plain_mamba("plainmamba_l1", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def plainmamba_l2(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L2: 26.1M parameters, 81.6 top-1."""
    model_args = dict(embed_dim=384, depth=24, stem_convs=2)
    return _create_plain_mamba("plainmamba_l2", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def plainmamba_l3(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L3: 51.0M parameters, 82.3 top-1."""
    model_args = dict(embed_dim=448, depth=36, stem_convs=2)
    return _create_plain_mamba("plainmamba_l3", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def plain_mamba_nano(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """Ours, for 32-pixel images in 256 patches, every token with its own parameters: 2.8M parameters."""
    model_args = dict(patch_size=2, embed_dim=192, depth=10, pairing="token")
    return _create_plain_mamba("plain_mamba_nano", pretrained=pretrained, **dict(model_args, **kwargs))
