"""LocalVim: Vim whose blocks scan along four orders of their own, chosen among rows, columns and local windows.

Paper: "LocalMamba: Visual State Space Model with Windowed Selective Scan", https://arxiv.org/abs/2403.09338.
Origin: https://github.com/hunto/LocalMamba (Apache-2.0), whose LocalVim checkpoints load here.

Differences from the original:

1. The scans read and write the tokens through index tables, worked out once per grid; rows, forwards and backwards,
   need none. Only the causal convolution along the other orders works on reordered tokens.
2. Columns come back in their own order on every grid; the original swaps height and width on the way back, which is
   the same on square grids only.
3. Any image size runs in both flavours, with the class token too.
4. Step projections and class token keep a usable initialisation, which the original overwrites with zeros.
5. A_log, D, step biases and convolution biases are all exempt from weight decay.
6. Options of later work: locally bidirectional scans (``lb_window``; LBMamba, arXiv 2506.15976) and stochastic
   shuffling of the tokens (``layer_shuffle``; ShuffleMamba, arXiv 2408.17081).
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, apply_rot_embed, calculate_drop_path_rates
from timm.models import (
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from torch import Tensor, nn

from zoo.backbones.layers.add_norm import add_norm
from zoo.backbones.layers.backbone import numbers_for_trace, unwrap_checkpoint
from zoo.backbones.layers.channel_attention import ChannelAttention
from zoo.backbones.layers.columnar import ColumnarBackbone, Stream, fit_checkpoint
from zoo.backbones.layers.layer_norm import LayerNorm
from zoo.backbones.layers.layer_shuffle import LayerShuffle, TokenOrder, restore_tokens, shuffle_tokens
from zoo.backbones.layers.patch_embed import PatchEmbed
from zoo.backbones.layers.position import resample_pos_embed, rotary_table
from zoo.backbones.layers.recurrence import check_window, init_decays, init_steps, negative_exp
from zoo.backbones.layers.stacked_linear import project_steps
from zoo.backbones.scans.local import Route, check_direction, local_routes
from zoo.kernels import causal_conv1d, is_exporting, selective_scan
from zoo.registry import build_model_with_cfg

__all__ = ["LocalVim"]

torch.fx.wrap("resample_pos_embed")  # single nodes for FX in this file too
torch.fx.wrap("rotary_table")

NORM_LAYERS = ("rmsnorm", "layernorm")


class _Direction(NamedTuple):
    """Parameters of one direction, as of :class:`LocalMixer` but for A (E, N) and the directions' own dimension."""

    conv_weight: Tensor
    conv_bias: Tensor
    A: Tensor
    D: Tensor
    dt_bias: Tensor
    x_proj_weight: Tensor  # (1, R + 2 N, E)
    dt_proj_weight: Tensor  # (1, E, R)


def _first(x: Tensor, length: int) -> Tensor:
    """The first of the tokens (B, P, E), (B, length, E)."""
    if not is_exporting() and x.shape[1] == length:  # a graph would be tied to grids that windows fit
        return x  # the gradient of a slice, even of all, is copied into zeros
    return x[:, :length]


def _crop(x: Tensor, length: int) -> Tensor:
    """As :func:`_first`, by a copy in an exported graph: strides of a slice tie it to grids that windows fit or not."""
    if is_exporting():
        return x.index_select(1, torch.arange(length, device=x.device))
    return _first(x, length)


@register_notrace_module
class LocalMixer(nn.Module):
    """Gated selective scans along K orders of the tokens, each with its own parameters, weighed and added.

    Shapes: B batch, L tokens, D = dim, E = expand * dim, N states, R rank of the step projection, W taps, K directions,
    P steps of a route: L and the zero tokens that pad the grid to whole windows, which are convolved and scanned.

    Args:
        dim: Token width D.
        directions: K orders, see :func:`~zoo.backbones.scans.local.local_order`.
        d_state: States N per channel.
        d_conv: Taps W of the convolution.
        expand: Inner width E as a multiple of ``dim``.
        dt_rank: Rank R of the step projection; default ceil(dim / 16).
        class_token: Whether a class token stands in the middle of the tokens.
        lb_window: Steps of a locally bidirectional window, a power of two up to 16; 1 for plain scans.

    Raises:
        ValueError: If a direction or ``lb_window`` is not one of the above.
    """

    def __init__(
        self,
        dim: int,
        directions: Sequence[str],
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        class_token: bool = False,
        lb_window: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        for direction in directions:
            check_direction(direction)
        check_window(lb_window)
        inner, K = expand * dim, len(directions)
        rank = dt_rank or math.ceil(dim / 16)
        self.directions = tuple(directions)
        self.class_token = class_token
        self.lb_window = lb_window
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv_weight = nn.Parameter(torch.empty(K, inner, d_conv, **dd))
        self.conv_bias = nn.Parameter(torch.empty(K, inner, **dd))
        self.x_proj_weight = nn.Parameter(torch.empty(K, rank + 2 * d_state, inner, **dd))
        self.dt_proj_weight = nn.Parameter(torch.empty(K, inner, rank, **dd))
        self.dt_bias = nn.Parameter(torch.empty(K, inner, **dd))
        self.A_log = nn.Parameter(torch.empty(K, inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(K, inner, **dd))
        self.attention = ChannelAttention(inner, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation of Mamba: steps log-uniform in [0.001, 0.1], A = -1..-N, D = 1."""
        taps, inner, rank = self.conv_weight.shape[-1], self.x_proj_weight.shape[-1], self.dt_proj_weight.shape[-1]
        nn.init.uniform_(self.conv_weight, -(taps**-0.5), taps**-0.5)
        nn.init.uniform_(self.conv_bias, -(taps**-0.5), taps**-0.5)
        nn.init.uniform_(self.x_proj_weight, -(inner**-0.5), inner**-0.5)
        nn.init.uniform_(self.dt_proj_weight, -(rank**-0.5), rank**-0.5)
        init_steps(self.dt_bias)
        init_decays(self.A_log)
        nn.init.ones_(self.D)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, L, D) of a grid (H, W), the class token in the middle if there is one, to tokens (B, L, D)."""
        (L,) = numbers_for_trace(x.shape[1])
        routes = local_routes(self.directions, *grid, self.class_token, x.device)
        padding = functools.reduce(torch.sym_max, numbers_for_trace(*(route.steps for route in routes))) - L
        if not isinstance(padding, int) or padding > 0:
            x = F.pad(x, (0, 0, 0, padding))
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (B, L + padding, E) views of one GEMM's output, zero where padded
        out = x.new_zeros(())
        for route, parameters in zip(routes, self._directions(), strict=True):
            y = _crop(self._scan(_first(x, route.steps), _first(z, route.steps), route, parameters), L)  # (B, L, E)
            out = torch.addcmul(out, y, self.attention(y))
        return self.out_proj(out)

    def _directions(self) -> Iterator[_Direction]:
        """Parameters of every direction. Their gradients are put together once, not copied into zeros one by one."""
        A = negative_exp(self.A_log)
        own = (self.conv_weight, self.conv_bias, A, self.D, self.dt_bias)
        projections = (self.x_proj_weight.split(1), self.dt_proj_weight.split(1))
        return map(_Direction, *(x.unbind() for x in own), *projections)

    def _scan(self, x: Tensor, z: Tensor, route: Route, own: _Direction) -> Tensor:
        """Input and gate (B, P, E) to the gated output of a direction, (B, P, E)."""
        u = self._convolve(x, route, own)
        delta, B, C = (t.squeeze(0) for t in project_steps(u[None], own.x_proj_weight, own.dt_proj_weight))
        return selective_scan(
            u,
            delta,
            own.A,
            B,
            C,
            own.D,
            z,
            own.dt_bias,
            delta_softplus=True,
            paths=route.order,
            reverse=route.reverse,
            window=self.lb_window,
        )

    def _convolve(self, x: Tensor, route: Route, own: _Direction) -> Tensor:
        """Causal convolution along a route: tokens (B, P, E) to tokens (B, P, E)."""
        if route.order is None:
            return causal_conv1d(x, own.conv_weight, own.conv_bias, activation="silu", reverse=route.reverse)
        order = TokenOrder(route.order, route.places)
        walked = causal_conv1d(shuffle_tokens(x, order), own.conv_weight, own.conv_bias, activation="silu")
        return restore_tokens(walked, order)


class LocalVimBlock(nn.Module):
    """Norm and mixer; the caller adds the result to the residual stream.

    Args:
        norm: Norm over the last dimension.
        mixer: Token mixer.
        drop_path: Probability that a sample skips this block during training.
    """

    def __init__(self, norm: nn.Module, mixer: LocalMixer, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(
        self,
        stream: Tensor,
        grid: tuple[int, int],
        order: TokenOrder | None = None,
        normed: Tensor | None = None,
    ) -> Tensor:
        """Stream (B, L, D) of a grid (H, W) in any float dtype to the mixer's output (B, L, D), read in order.

        ``normed`` is the stream through this block's norm, if that is known already.
        """
        if normed is None:
            _, normed = add_norm(stream, None, self.norm)
        return restore_tokens(self.mixer(shuffle_tokens(normed, order), grid), order)


class LocalVim(ColumnarBackbone):
    """LocalVim: patch tokens, position embeddings, a column of blocks that scan in local windows, mean or class token.

    Args:
        img_size: Image size (H, W) or one side that the position embedding is made for; other sizes run too.
        patch_size: Patch side in pixels. Images that patches do not cover exactly are zero-padded.
        in_chans: Image channels.
        num_classes: Classes; 0 for pooled features instead of logits.
        global_pool: ``"avg"`` mean of the patch tokens; ``"token"`` class token; ``""`` one result per token.
        embed_dim: Token width D.
        depth: Blocks.
        directions: Orders that a block scans along, see :func:`~zoo.backbones.scans.local.local_order`, one sequence
            for every block; if there are fewer sequences than blocks they repeat.
        d_state: States per channel.
        d_conv: Taps of the convolution.
        expand: Inner width as a multiple of ``embed_dim``.
        dt_rank: Rank of the step projection; default ceil(embed_dim / 16).
        lb_window: Steps of a locally bidirectional window of the scans; 1 for plain scans.
        class_token: Whether a class token stands in the middle of the tokens.
        rope: Whether 2D rotary embedding turns the residual stream before every block.
        norm_layer: ``"rmsnorm"`` or ``"layernorm"``.
        residual_in_fp32: Whether the residual stream is float32 when the model or autocast is 16-bit.
        feature_norms: Blocks whose intermediate features get a layer norm of their own, as in the authors' dense
            prediction models.
        layer_shuffle: Probability that the last block reads the tokens in a random order during training; it grows
            linearly from 0 at the first block.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the position embedding.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.

    Raises:
        ValueError: If an argument is not one of its choices or does not fit another.
    """

    feature_sources = ("stream", "mixer")

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 20,
        directions: Sequence[Sequence[str]] = (("h", "h_flip", "w2", "w2_flip"),),
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        lb_window: int = 1,
        class_token: bool = False,
        rope: bool = False,
        norm_layer: str = "rmsnorm",
        residual_in_fp32: bool = True,
        feature_norms: Sequence[int] = (),
        layer_shuffle: float = 0.0,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        if norm_layer not in NORM_LAYERS:
            raise ValueError(f"norm_layer={norm_layer!r} is not known; use one of {', '.join(NORM_LAYERS)}")
        if rope and embed_dim % 4:
            raise ValueError(f"rope needs embed_dim divisible by 4, got {embed_dim}")
        if any(not 0 <= index < depth for index in feature_norms):
            raise ValueError(f"feature_norms={tuple(feature_norms)} names a block that is not among the {depth}")
        if not directions or not all(directions) or isinstance(directions[0], str):
            raise ValueError(f"directions={directions!r} must be sequences of names, one for every block")
        super().__init__(embed_dim, in_chans, num_classes, global_pool, "middle" if class_token else None)
        self.rope = rope
        self.residual_in_fp32 = residual_in_fp32
        self.patch_embed = PatchEmbed(img_size, patch_size, None, in_chans, embed_dim, **dd)
        num_patches = self.patch_embed.grid_size[0] * self.patch_embed.grid_size[1]
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, num_patches + self.num_prefix_tokens, embed_dim, **dd))
        self.pos_drop = nn.Dropout(pos_drop_rate)

        def make_norm(narrow: bool = True) -> nn.Module:
            if norm_layer == "layernorm":
                return LayerNorm(embed_dim, narrow=narrow, **dd)
            return nn.RMSNorm(embed_dim, eps=1e-5, **dd)

        def make_block(index: int, drop_path: float) -> LocalVimBlock:
            own = directions[index % len(directions)]
            mixer = LocalMixer(embed_dim, own, d_state, d_conv, expand, dt_rank, class_token, lb_window, **dd)
            return LocalVimBlock(make_norm(), mixer, drop_path)

        rates = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(make_block(index, rate) for index, rate in enumerate(rates))
        self.depth = depth
        self.layer_shuffle = LayerShuffle(layer_shuffle, depth)
        self._set_feature_info()
        norms = {str(index): LayerNorm(embed_dim, narrow=False, **dd) for index in sorted(set(feature_norms))}
        self.feature_norms = nn.ModuleDict(norms)
        self.norm = make_norm(narrow=False)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes else nn.Identity()
        self.init_weights(needs_reset=False)

    def _stream(self, x: Tensor) -> tuple[Tensor, tuple[int, int], Any]:
        """Image to the residual stream before the first block, the patch grid, rotary table and token orders."""
        tokens, grid = self.embed(x)
        if self.residual_in_fp32:
            tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        table = None
        if self.rope:
            own_grid = self.patch_embed.grid_size
            tables = rotary_table(own_grid, self.embed_dim, 14, self.class_token, tokens.device, tokens.dtype)
            # As published, the table of the model's own grid is resampled, like its position embedding.
            table = tuple(resample_pos_embed(tables[i], own_grid, grid, self.class_token) for i in range(2))
            tokens = apply_rot_embed(tokens, *table)
        return tokens, grid, (table, self.layer_shuffle(tokens))

    def _advance(
        self, index: int, stream: Stream, grid: tuple[int, int], context: Any, run: Callable[..., Tensor]
    ) -> tuple[Stream, Tensor]:
        """Runs one block; returns the stream as the next block reads it, and the block's own output."""
        table, orders = context
        block = self.blocks[index]
        update = run(block, stream.tokens, grid, orders[index], stream.normed)
        turned = table is not None and index < self.depth - 1  # the final norm reads the stream unturned
        norm = self._next_norm(index)
        if norm is not None and not turned:
            narrow = norm is not self.norm
            return Stream(*add_norm(stream.tokens, update, norm, block.drop_path, narrow)), update
        tokens = stream.tokens + block.drop_path(update)
        return Stream(apply_rot_embed(tokens, *table) if turned else tokens), update


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: LocalVim) -> dict[str, Tensor]:
    """Converts a checkpoint to the names and the position embedding of ``model``.

    Accepts the authors' checkpoints (the weights under ``state_dict``), their bare state dicts, and ours. Rotary tables
    are dropped (they are computed), and so are keys of the norm and the head if the model has none.

    Args:
        state_dict: Checkpoint of any kind above.
        model: Model that the result is loaded into.

    Returns:
        State dict in this file's names.

    Raises:
        ValueError: If the position embedding's grid cannot be told.
    """
    state_dict = unwrap_checkpoint(state_dict)
    upstream = any(name.startswith("layers.") for name in state_dict)
    state_dict = _from_upstream_names(state_dict) if upstream else dict(state_dict)
    return fit_checkpoint(state_dict, model, "middle" if "cls_token" in state_dict else None)


def _from_upstream_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names to ours; parameters of a block's directions are stacked."""
    renamed = {
        "conv1d.weight": "conv_weight",
        "conv1d.bias": "conv_bias",
        "x_proj.weight": "x_proj_weight",
        "dt_proj.weight": "dt_proj_weight",
        "dt_proj.bias": "dt_bias",
        "A_log": "A_log",
        "D": "D",
    }
    converted, stacks = {}, {}
    for name, tensor in state_dict.items():
        if name.startswith("rope."):
            continue
        name = re.sub(r"^layers\.", "blocks.", name)
        name = re.sub(r"^norm_f\.", "norm.", name)
        name = re.sub(r"^outnorm_(\d+)\.", r"feature_norms.\1.", name)
        name = name.replace(".attn.global_reduce.", ".attention.reduce.")
        name = name.replace(".attn.channel_select.", ".attention.select.").replace(".attn.", ".attention.")
        of_direction = re.fullmatch(r"(blocks\.\d+\.mixer\.)(\w+?)_(\d+)(\.weight|\.bias|)", name)
        if of_direction is None:
            converted[name] = tensor
            continue
        prefix, layer, k, leaf = of_direction.groups()
        tensor = tensor.squeeze(1) if layer + leaf == "conv1d.weight" else tensor  # (E, 1, W) to (E, W)
        stacks.setdefault(prefix + renamed[layer + leaf], {})[int(k)] = tensor
    for name, tensors in stacks.items():
        converted[name] = torch.stack([tensors[k] for k in sorted(tensors)])
    return converted


def from_upstream(class_name: str, kwargs: Mapping[str, Any]) -> LocalVim:
    """Builds the model that the authors' code builds from the same arguments.

    Args:
        class_name: ``VisionMamba``.
        kwargs: The authors' constructor arguments. Those about training and fused kernels change nothing here.

    Raises:
        ValueError: If the class or an argument is not known, or no released model has its value.
    """
    if class_name != "VisionMamba":
        raise ValueError(f"class {class_name!r} is not known; use VisionMamba")
    args = dict(kwargs)
    class_token = args.pop("if_cls_token", False)
    rope = args.pop("if_rope", False)
    final_pool = args.pop("final_pool_type", "none")
    pools = {"mean": "avg", "all": ""}
    fixed = dict(use_middle_cls_token=class_token, if_rope_residual=rope, if_abs_pos_embed=True, bimamba_type="v2")
    for name, value in fixed.items():
        if args.pop(name, value) != value:
            raise ValueError(f"{name} must be {value!r} beside the other arguments: no released model differs")
    if not class_token and final_pool not in pools:
        raise ValueError(f"final_pool_type={final_pool!r} is not known; use one of {', '.join(pools)}")
    model_args = dict(
        img_size=args.pop("img_size", 224),
        patch_size=args.pop("patch_size", 16),
        in_chans=args.pop("channels", 3),
        num_classes=args.pop("num_classes", 1000),
        global_pool="token" if class_token else pools[final_pool],
        embed_dim=args.pop("embed_dim", 192),
        depth=args.pop("depth", 20),
        directions=args.pop("directions"),
        d_state=args.pop("d_state", 16),
        class_token=class_token,
        rope=rope,
        norm_layer="rmsnorm" if args.pop("rms_norm", False) else "layernorm",
        residual_in_fp32=args.pop("residual_in_fp32", False),
        feature_norms=args.pop("out_indices", ()),
        pos_drop_rate=args.pop("drop_rate", 0.0),
        drop_path_rate=args.pop("drop_path_rate", 0.0),
    )
    unknown = set(args) - {"fused_add_norm", "use_checkpoint", "pretrained"}
    if unknown:
        raise ValueError(f"arguments not known: {', '.join(sorted(unknown))}")
    return LocalVim(**model_args)


# Directions of the 20 blocks of LocalVim-T, as the authors' search found them.
TINY_DIRECTIONS = (
    ("h", "v_flip", "w7", "w7_flip"), ("h_flip", "w2_flip", "w7", "w7_flip"),
    ("h", "h_flip", "v", "w7"), ("h", "h_flip", "v", "v_flip"),
    ("h", "h_flip", "v", "v_flip"), ("h", "h_flip", "v", "v_flip"),
    ("h_flip", "v", "v_flip", "w7"), ("h_flip", "v", "v_flip", "w2_flip"),
    ("h", "h_flip", "v", "v_flip"), ("h", "h_flip", "v", "v_flip"),
    ("h", "v", "v_flip", "w2"), ("h", "v", "v_flip", "w2_flip"),
    ("h", "h_flip", "v_flip", "w7"), ("h_flip", "v", "v_flip", "w2"),
    ("h", "h_flip", "v", "v_flip"), ("h", "v", "w2", "w2_flip"),
    ("v", "v_flip", "w2", "w7"), ("h", "h_flip", "v", "w2"),
    ("h", "h_flip", "w2_flip", "w7"), ("v", "v_flip", "w2", "w2_flip"),
)  # fmt: skip


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
        "origin_url": "https://github.com/hunto/LocalMamba",
        "paper_ids": "arXiv:2403.09338",
        "paper_name": "LocalMamba: Visual State Space Model with Windowed Selective Scan",
        **kwargs,
    }


RELEASES = "https://github.com/hunto/LocalMamba/releases/download/v1.0.0"

default_cfgs = generate_default_cfgs(
    {
        "local_vim_tiny.in1k": _cfg(url=f"{RELEASES}/local_vim_tiny.ckpt"),
        "local_vim_tiny_middle_cls_token.in1k": _cfg(url=f"{RELEASES}/local_vim_tiny_middle_cls_token.ckpt"),
        # The authors' link for LocalVim-S leads to another model; load a copy with create_model(checkpoint_path=...).
        "local_vim_small": _cfg(),
        "local_vim_nano": _cfg(num_classes=10, input_size=(3, 32, 32), crop_pct=1.0, origin_url=None),
    }
)


def _create_local_vim(variant: str, pretrained: bool = False, **kwargs: Any) -> LocalVim:
    return build_model_with_cfg(
        LocalVim,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop("out_indices", 3), feature_cls="getter"),
        **kwargs,
    )


@register_model
def local_vim_tiny(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-T: 8.0M parameters, 76.2 top-1."""
    model_args = dict(embed_dim=192, directions=TINY_DIRECTIONS, rope=True)
    return _create_local_vim("local_vim_tiny", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def local_vim_tiny_middle_cls_token(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-T with a class token in the middle instead of rotary embedding and mean: 8.0M parameters, 77.8 top-1."""
    model_args = dict(embed_dim=192, directions=TINY_DIRECTIONS, class_token=True, global_pool="token")
    return _create_local_vim("local_vim_tiny_middle_cls_token", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def local_vim_small(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-S: 27.8M parameters, 81.1 top-1."""
    model_args = dict(embed_dim=384, rope=True)
    return _create_local_vim("local_vim_small", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def local_vim_nano(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """Ours, for 32-pixel images in 256 patches: 2.7M parameters."""
    directions = (("h", "h_flip", "w2", "w2_flip"), ("v", "v_flip", "w2", "w2_flip"))
    model_args = dict(patch_size=2, embed_dim=192, depth=7, directions=directions)
    return _create_local_vim("local_vim_nano", pretrained=pretrained, **dict(model_args, **kwargs))
