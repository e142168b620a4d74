"""What hierarchical backbones of the VMamba kind are built of: stems, reductions, blocks and stages.

Source: Liu et al., "VMamba: Visual State Space Model", arXiv 2401.10166, section 4.3. Maps are channels-last,
(B, H, W, C).
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers import DropPath, resample_patch_embed
from timm.models import checkpoint, register_notrace_module
from torch import Tensor, nn

from zoo.backbones.layers.add_norm import add_norm
from zoo.backbones.layers.conv_norm import map_of, on_images
from zoo.backbones.layers.layer_norm import LayerNorm

__all__ = [
    "ConvReduction",
    "ConvStem",
    "NormLayer",
    "PatchMerging",
    "PatchStem",
    "Reduction",
    "Stage",
    "Stem",
    "VSSBlock",
    "VSSStage",
    "fit_patches",
    "make_norm",
    "make_reduction",
    "make_stem",
]

NormLayer = Literal["layernorm", "batchnorm"]
Stem = Literal["patch", "conv"]
Reduction = Literal["merge", "conv2x2", "conv3x3"]


@register_notrace_module  # checks the number of dimensions, which FX cannot follow
class BatchNorm(nn.BatchNorm2d):
    """Batch norm of maps (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to map (B, H, W, C)."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # channels-last views


def make_norm(
    kind: NormLayer,
    dim: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    narrow: bool = True,
) -> nn.Module:
    """Norm of maps (B, H, W, dim) by name.

    ``narrow=False`` is for layer norms whose output is not read by a linear layer or a convolution, see
    :class:`~zoo.backbones.layers.layer_norm.LayerNorm`.

    Raises:
        ValueError: If there is no such norm.
    """
    if kind not in get_args(NormLayer):
        raise ValueError(f"norm_layer={kind!r} is not known; use one of {', '.join(get_args(NormLayer))}")
    if kind == "layernorm":
        return LayerNorm(dim, narrow=narrow, device=device, dtype=dtype)
    return BatchNorm(dim, device=device, dtype=dtype)


class PatchStem(nn.Module):
    """One projection of patches; rows and columns that fill no patch are left out.

    Args:
        in_chans: Image channels.
        dim: Channels C of the map.
        patch_size: Patch side in pixels.
        norm_layer: See :func:`make_norm`.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int = 4,
        norm_layer: NormLayer = "layernorm",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim, patch_size, patch_size, **dd)
        self.norm1 = make_norm(norm_layer, dim, narrow=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, in_chans, H, W) to a map (B, H // patch, W // patch, C)."""
        return self.norm1(map_of(x, self.conv1))


def fit_patches(state_dict: Mapping[str, Tensor], stem: nn.Module) -> dict[str, Tensor]:
    """Resamples the projection of patches in a model's weights if its stem is made for patches of another size."""
    name = "stem.conv1.weight"
    weight = state_dict.get(name)
    if weight is None or not isinstance(stem, PatchStem) or weight.shape[-2:] == stem.conv1.kernel_size:
        return dict(state_dict)
    return {**state_dict, name: resample_patch_embed(weight, list(stem.conv1.kernel_size))}


class ConvStem(nn.Module):
    """Two overlapping 3x3 convolutions.

    Args:
        in_chans: Image channels.
        dim: Channels C of the map, even.
        patch_size: Pixels to a cell of the map: 4, 2 or 1.
        norm_layer: See :func:`make_norm`.

    Raises:
        ValueError: If ``patch_size`` is not one of the above.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int = 4,
        norm_layer: NormLayer = "layernorm",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if patch_size not in (1, 2, 4):
            raise ValueError(f"patch_size={patch_size} is not possible with a convolutional stem; use 4, 2 or 1")
        strides = (min(patch_size, 2), max(patch_size // 2, 1))
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, strides[0], padding=1, **dd)
        self.norm1 = make_norm(norm_layer, dim // 2, **dd)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, strides[1], padding=1, **dd)
        self.norm2 = make_norm(norm_layer, dim, narrow=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, in_chans, H, W) to a map (B, ceil(H / patch), ceil(W / patch), C)."""
        x = F.gelu(self.norm1(map_of(x, self.conv1)))
        return self.norm2(on_images(self.conv2, x))


@register_notrace_module
class PatchMerging(nn.Module):
    """Four neighbours in a row, normed and projected (Swin's reduction); odd sizes are padded.

    Args:
        dim: Channels C of the input.
        out_dim: Channels of the output.
        norm_layer: See :func:`make_norm`.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        norm_layer: NormLayer = "layernorm",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm = make_norm(norm_layer, 4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to map (B, ceil(H / 2), ceil(W / 2), out_dim)."""
        B, H, W, C = x.shape
        h, w = (H + 1) // 2, (W + 1) // 2  # not remainders: symbolic sizes would grow with every stage
        bottom, right = 2 * h - H, 2 * w - W
        if not (isinstance(bottom, int) and isinstance(right, int) and bottom == right == 0):
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        x = x.reshape(B, h, 2, w, 2, C)  # (B, h, row, w, column, C)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # neighbours in the published order: rows within columns
        return self.reduction(self.norm(x))


class ConvReduction(nn.Module):
    """Strided convolution and norm.

    Args:
        dim: Channels C of the input.
        out_dim: Channels of the output.
        size: Side of the kernel: 3, padded, so that odd sizes round up, or 2, so that they round down.
        norm_layer: See :func:`make_norm`.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        size: int = 3,
        norm_layer: NormLayer = "layernorm",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, size, 2, padding=(size - 1) // 2, **dd)
        self.norm = make_norm(norm_layer, out_dim, narrow=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to a map of half the size and ``out_dim`` channels."""
        return self.norm(on_images(self.conv, x))


def make_stem(
    kind: Stem,
    in_chans: int,
    dim: int,
    patch_size: int,
    norm_layer: NormLayer,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Stem by name: :class:`PatchStem` or :class:`ConvStem`.

    Raises:
        ValueError: If there is no such stem.
    """
    if kind not in get_args(Stem):
        raise ValueError(f"stem={kind!r} is not known; use one of {', '.join(get_args(Stem))}")
    stem = PatchStem if kind == "patch" else ConvStem
    return stem(in_chans, dim, patch_size, norm_layer, device=device, dtype=dtype)


def make_reduction(
    kind: Reduction,
    dim: int,
    out_dim: int,
    norm_layer: NormLayer,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Reduction between stages by name: :class:`PatchMerging`, or :class:`ConvReduction` of size 2 or 3.

    Raises:
        ValueError: If there is no such reduction.
    """
    if kind not in get_args(Reduction):
        raise ValueError(f"downsample={kind!r} is not known; use one of {', '.join(get_args(Reduction))}")
    if kind == "merge":
        return PatchMerging(dim, out_dim, norm_layer, device, dtype)
    return ConvReduction(dim, out_dim, 2 if kind == "conv2x2" else 3, norm_layer, device, dtype)


class VSSBlock(nn.Module):
    """Residual mixer and, if there is one, residual MLP, each on a normed map.

    Args:
        norm: Norm before the mixer.
        mixer: Mixer of maps.
        norm2: Norm before the MLP.
        mlp: Network of every cell.
        drop_path: Probability that a sample skips a residual branch during training.
    """

    def __init__(
        self,
        norm: nn.Module,
        mixer: nn.Module,
        norm2: nn.Module | None = None,
        mlp: nn.Module | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm, self.mixer, self.norm2, self.mlp = norm, mixer, norm2, mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(
        self, x: Tensor, update: Tensor | None = None, drop_path: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        """Leaves the last add to the next block, which does it together with its norm.

        Args:
            x: Residual stream (B, H, W, C).
            update: What the block before adds to it; default nothing.
            drop_path: That block's stochastic depth.

        Returns:
            The stream, and what this block adds to it.
        """
        x, normed = _add_and_norm(x, update, self.norm, drop_path)
        update = self.mix(normed)
        if self.mlp is None:
            return x, update
        x, normed = _add_and_norm(x, update, self.norm2, self.drop_path)
        return x, self.mlp(normed)

    def mix(self, normed: Tensor) -> Tensor:
        """What the normed map (B, H, W, C) adds to the stream."""
        return self.mixer(normed)


def _add_and_norm(
    x: Tensor, update: Tensor | None, norm: nn.Module, drop_path: nn.Module | None
) -> tuple[Tensor, Tensor]:
    """The new stream and its norm."""
    if update is None:
        return x, norm(x)
    if isinstance(norm, nn.LayerNorm):
        return add_norm(x, update, norm, drop_path)
    x = x + drop_path(update)
    return x, norm(x)


class Stage(nn.Module):
    """Reduction, in all stages but the first, and blocks.

    Args:
        blocks: Blocks.
        downsample: Reduction.
    """

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.downsample = nn.Identity() if downsample is None else downsample
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the stage's map."""
        x = self.downsample(x)
        for block in self.blocks:
            x = self._run(block, x)
        return x

    def _run(self, block: nn.Module, *inputs: Any) -> Any:
        recompute = self.grad_checkpointing and not torch.jit.is_scripting()
        return checkpoint(block, *inputs) if recompute else block(*inputs)


class VSSStage(Stage):
    """A stage of :class:`VSSBlock`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the stage's map."""
        x, update, drop_path = self.downsample(x), None, None
        for block in self.blocks:
            x, update = self._run(block, x, update, drop_path)
            drop_path = block.drop_path
        return x if update is None else x + drop_path(update)
