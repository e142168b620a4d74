"""Adventurer: a causal Mamba-2 backbone that starts every block from the mean of its tokens.

Paper: "Adventurer: Optimizing Vision Mamba Architecture Designs for Efficiency", https://arxiv.org/abs/2410.07599.
Origin: https://github.com/wangf3014/Adventurer (no licence file), whose checkpoints load here.

A block reads [mean of all tokens, patches, class token] in one direction, so the class token comes last and has seen
everything; in some blocks the patches are read in reverse.

Differences from the original:

1. Any image size at run time: images are padded to whole patches and the position embedding is resampled. The original
   takes one square size only.
2. A reversed block flips nothing: it reads [class token, patches, mean] from the end to the beginning.
3. Which blocks are reversed is an argument. The paper reverses every other pair; the released code and weights reverse
   blocks 2 and 3 only, which is the default here.
4. A_log, D, step and convolution biases are exempt from weight decay, as in Mamba-2.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    SwiGLU,
    calculate_drop_path_rates,
)
from timm.models import (
    generate_default_cfgs,
    register_model,
)
from torch import Tensor, nn

from zoo.backbones.layers.add_norm import add_norm
from zoo.backbones.layers.backbone import unwrap_checkpoint
from zoo.backbones.layers.columnar import ColumnarBackbone, Stream, fit_checkpoint
from zoo.backbones.layers.patch_embed import PatchEmbed
from zoo.backbones.layers.ssd import SSDMixer, stack_ssd_parameters
from zoo.registry import build_model_with_cfg, packaged_weights

__all__ = ["Adventurer"]


class AdventurerBlock(nn.Module):
    """Mixer and MLP, each with its norm, added to the stream.

    Args:
        dim: Token width D.
        mixer: Mixer over a token sequence that reads it in one direction.
        reverse: Whether the patches are read from the last to the first.
        mlp_ratio: Hidden width of the MLP as a multiple of ``dim``.
        norm_eps: Epsilon of the norms.
        drop_path: Probability that a sample skips each half of this block during training.
    """

    def __init__(
        self,
        dim: int,
        mixer: SSDMixer,
        reverse: bool = False,
        mlp_ratio: float = 2.5,
        norm_eps: float = 1e-5,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.reverse = reverse
        self.norm = nn.RMSNorm(dim, eps=norm_eps, **dd)
        self.mixer = mixer
        self.norm_mlp = nn.RMSNorm(dim, eps=norm_eps, **dd)
        self.mlp = SwiGLU(dim, int(mlp_ratio * dim), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def mix(self, tokens: Tensor) -> Tensor:
        """Normed tokens (B, N + 1, D), the class token last, through the mixer."""
        mean = tokens.mean(dim=1, keepdim=True)
        if self.reverse:  # the mixer reads from the end
            mixed = self.mixer(torch.cat([tokens[:, -1:], tokens[:, :-1], mean], dim=1))
            return torch.cat([mixed[:, 1:-1], mixed[:, :1]], dim=1)
        return self.mixer(torch.cat([mean, tokens], dim=1))[:, 1:]

    def forward(self, x: Tensor) -> Tensor:
        """Stream (B, N + 1, D) to stream (B, N + 1, D)."""
        x, normed = add_norm(x, self.mix(self.norm(x)), self.norm_mlp, self.drop_path)
        return x + self.drop_path(self.mlp(normed))


class Adventurer(ColumnarBackbone):
    """Patch tokens with position embeddings and a class token at the end, through a column of Mamba-2 blocks.

    Args:
        img_size: Image size (H, W) or one side that the position embedding is made for.
        patch_size: Patch side in pixels.
        in_chans: Image channels.
        num_classes: Classes; 0 for pooled features instead of logits.
        global_pool: ``"token"`` class token; ``"avg"`` mean of the patch tokens; ``""`` one result per token.
        embed_dim: Token width D.
        depth: Blocks.
        d_state: States per channel.
        head_dim: Width of a mixer's heads.
        d_conv: Taps of the convolution.
        expand: Inner width of the mixer as a multiple of ``embed_dim``.
        mlp_ratio: Hidden width of the MLP as a multiple of ``embed_dim``.
        reversed_blocks: Indices of the blocks that read the patches in reverse.
        norm_eps: Epsilon of the norms.
        dynamic_img_size: Whether images of other sizes are accepted (the position embedding is resampled).
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the position embedding.
        drop_path_rate: Stochastic depth; as released, block i has the rate of block i - 1 of the usual linear ramp.

    Raises:
        ValueError: If an argument is not one of its choices or does not fit another.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 256,
        depth: int = 12,
        d_state: int = 64,
        head_dim: int = 64,
        d_conv: int = 4,
        expand: int = 2,
        mlp_ratio: float = 2.5,
        reversed_blocks: Sequence[int] = (2, 3),
        norm_eps: float = 1e-5,
        dynamic_img_size: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(embed_dim, in_chans, num_classes, global_pool, "last", dynamic_img_size)
        self.patch_embed = PatchEmbed(img_size, patch_size, None, in_chans, embed_dim, **dd)
        num_patches = self.patch_embed.grid_size[0] * self.patch_embed.grid_size[1]
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, num_patches + 1, embed_dim, **dd))
        self.pos_drop = nn.Dropout(pos_drop_rate)

        def make_block(index: int, drop_path: float) -> AdventurerBlock:
            reverse = index in reversed_blocks
            mixer = SSDMixer(embed_dim, d_state, head_dim, expand, d_conv=d_conv, reverse=reverse, **dd)
            return AdventurerBlock(embed_dim, mixer, reverse, mlp_ratio, norm_eps, drop_path, **dd)

        rates = [0.0, *calculate_drop_path_rates(drop_path_rate, depth)]
        self.blocks = nn.ModuleList(make_block(index, rates[index]) for index in range(depth))
        self._set_feature_info()
        self.feature_norms = nn.ModuleDict()
        self.norm = nn.RMSNorm(embed_dim, eps=norm_eps, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes else nn.Identity()
        self.init_weights(needs_reset=False)

    def _advance(
        self, index: int, stream: Stream, grid: tuple[int, int], context: None, run: Callable[..., Tensor]
    ) -> tuple[Stream, Tensor]:
        """Runs one block, which adds to the stream by itself."""
        tokens = run(self.blocks[index], stream.tokens)
        return Stream(tokens), tokens


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Adventurer) -> dict[str, Tensor]:
    """Converts a checkpoint to the names and the position embedding of ``model``.

    Accepts the authors' training checkpoints (the weights under ``model``), their bare state dicts, and ours. Keys of
    the norm and the head are dropped if the model has none.

    Args:
        state_dict: Checkpoint of any kind above.
        model: Model that the result is loaded into.

    Returns:
        State dict in this file's names.

    Raises:
        ValueError: If the position embedding's grid cannot be told.
    """
    state_dict = unwrap_checkpoint(state_dict)
    if any(name.startswith("layers.") for name in state_dict):
        state_dict = _from_upstream_names(state_dict)
    return fit_checkpoint(dict(state_dict), model, "last")


def _from_upstream_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names to ours."""
    places = {"layers.": "blocks.", "norm_f.": "norm."}
    parts = {".mlp.w1.": ".mlp.fc1_g.", ".mlp.w2.": ".mlp.fc1_x.", ".mlp.w3.": ".mlp.fc2."}
    renamed = {}
    for name, tensor in state_dict.items():
        for theirs, ours in places.items():
            name = ours + name.removeprefix(theirs) if name.startswith(theirs) else name
        for theirs, ours in parts.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return stack_ssd_parameters(renamed)


def from_upstream(kwargs: Mapping[str, Any]) -> Adventurer:
    """Builds the model that the authors' ``Adventurer`` builds from the same arguments.

    Args:
        kwargs: The authors' constructor arguments. Those about training or fused kernels change nothing here.

    Raises:
        ValueError: If an argument is not known, or asks for what no released model uses.
    """
    args = dict(kwargs)
    if not args.pop("rms_norm", True):
        raise ValueError("Adventurer with rms_norm=False is not supported; the released models use RMS norms")
    mixer = dict(args.pop("ssm_cfg", None) or {})
    model_args = dict(
        img_size=args.pop("img_size", 224),
        patch_size=args.pop("patch_size", 16),
        in_chans=args.pop("channels", 3),
        num_classes=args.pop("num_classes", 1000),
        embed_dim=args.pop("embed_dim", 192),
        depth=args.pop("depth", 24),
        d_state=mixer.pop("d_state", args.pop("mamba_d_state", 64)),
        head_dim=mixer.pop("headdim", args.pop("headdim", 64)),
        expand=mixer.pop("expand", args.pop("mamba_expand", 2)),
        norm_eps=args.pop("norm_epsilon", 1e-5),
        pos_drop_rate=args.pop("drop_rate", 0.0),
        drop_path_rate=args.pop("drop_path_rate", 0.1),
    )
    unknown = sorted(set(args) | set(mixer))
    if unknown:
        raise ValueError(f"Adventurer arguments {', '.join(unknown)} are not known")
    return Adventurer(**model_args)


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
        "license": "unknown",  # neither the repository nor the weights name one
        "origin_url": "https://github.com/wangf3014/Adventurer",
        "paper_ids": "arXiv:2410.07599",
        "paper_name": "Adventurer: Optimizing Vision Mamba Architecture Designs for Efficiency",
        **kwargs,
    }


def _released_cfg(variant: str, img_size: int = 224, crop_pct: float = 0.875) -> dict[str, Any]:
    """Config of a variant whose weights the authors publish."""
    return _cfg(
        hf_hub_id="Wangf3014/Adventurer",
        hf_hub_filename=f"{variant}.pth",
        input_size=(3, img_size, img_size),
        crop_pct=crop_pct,
    )


def _small_cfg(**kwargs: Any) -> dict[str, Any]:
    """Config of our own small variant, for 32-pixel images."""
    return _cfg(
        **{
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "crop_pct": 1.0,
            "license": "apache-2.0",
            "origin_url": None,
            **kwargs,
        }
    )


default_cfgs = generate_default_cfgs(
    {
        "adventurer_tiny_patch16_224.in1k": _released_cfg("adventurer_tiny_patch16_224"),
        "adventurer_small_patch16_224.in1k": _released_cfg("adventurer_small_patch16_224"),
        "adventurer_base_patch16_224.in1k": _released_cfg("adventurer_base_patch16_224"),
        "adventurer_base_patch16_384.in1k": _released_cfg("adventurer_base_patch16_384", 384, 1.0),
        "adventurer_base_patch16_448.in1k": _released_cfg("adventurer_base_patch16_448", 448, 1.0),
        "adventurer_base_patch8_224.in1k": _released_cfg("adventurer_base_patch8_224", 224, 1.0),
        "adventurer_base_patch8_448.in1k": _released_cfg("adventurer_base_patch8_448", 448, 1.0),
        "adventurer_large_patch16_224.in1k": _released_cfg("adventurer_large_patch16_224"),
        "adventurer_nano.untrained*": _small_cfg(),
        "adventurer_nano.fashion_mnist": _small_cfg(
            **packaged_weights("adventurer_nano.fashion_mnist"),
            input_size=(1, 28, 28),
            mean=(0.286,),
            std=(0.353,),
        ),
    }
)


def _create_adventurer(variant: str, pretrained: bool = False, **kwargs: Any) -> Adventurer:
    return build_model_with_cfg(
        Adventurer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop("out_indices", 3), feature_cls="getter"),
        **kwargs,
    )


@register_model
def adventurer_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Adventurer:
    """Adventurer-Tiny: 11.6M parameters, 78.2 top-1."""
    model_args = dict(embed_dim=256)
    return _create_adventurer("adventurer_tiny_patch16_224", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def adventurer_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Adventurer:
    """Adventurer-Small: 44.5M parameters, 81.8 top-1."""
    model_args = dict(embed_dim=512)
    return _create_adventurer("adventurer_small_patch16_224", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def adventurer_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Adventurer:
    """Adventurer-Base: 98.7M parameters, 82.6 top-1."""
    model_args = dict(embed_dim=768)
    return _create_adventurer("adventurer_base_patch16_224", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def adventurer_base_patch16_384(pretrained: bool = False, **kwargs: Any) -> Adventurer:
    """Adventurer-Base at 384 pixels: 98.9M parameters, 84.2 top-1."""
    model_args = dict(embed_dim=768)
    return _create_adventurer("adventurer_base_patch16_384", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def adventurer_base_patch16_448(pretrained: bool = False, **kwargs: Any) -> Adventurer:
    """Adventurer-Base at 448 pixels: 99.1M parameters, 84.3 top-1."""
    model_args = dict(embed_dim=768)
    return _create_adventurer("adventurer_base_patch16_448", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def adventurer_base_patch8_224(pretrained: bool = False, **kwargs: Any) -> Adventurer:
    """Adventurer-Base with 8-pixel patches: 98.7M parameters, 83.9 top-1."""
    model_args = dict(embed_dim=768, patch_size=8)
    return _create_adventurer("adventurer_base_patch8_224", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def adventurer_base_patch8_448(pretrained: bool = False, **kwargs: Any) -> Adventurer:
    """Adventurer-Base with 8-pixel patches at 448 pixels: 100.5M parameters, 84.8 top-1."""
    model_args = dict(embed_dim=768, patch_size=8)
    return _create_adventurer("adventurer_base_patch8_448", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def adventurer_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> Adventurer:
    """Adventurer-Large: 346.2M parameters, 83.4 top-1."""
    model_args = dict(embed_dim=1024, depth=24)
    return _create_adventurer("adventurer_large_patch16_224", pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def adventurer_nano(pretrained: bool = False, **kwargs: Any) -> Adventurer:
    """Ours, for 32-pixel images in 256 patches: 2.6M parameters, every other block reversed."""
    model_args = dict(
        patch_size=2, embed_dim=160, depth=7, d_state=32, head_dim=32, reversed_blocks=(1, 3, 5), global_pool="avg"
    )
    return _create_adventurer("adventurer_nano", pretrained=pretrained, **dict(model_args, **kwargs))
