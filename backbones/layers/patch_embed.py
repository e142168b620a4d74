"""Patch embedding with overlapping or tiling patches, for images of any size."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed, to_2tuple
from timm.layers.weight_init import lecun_normal_
from timm.models import checkpoint, register_notrace_function
from torch import Tensor, nn

__all__ = ["PatchEmbed"]


@torch.fx.wrap
@register_notrace_function
def _pad_to_patches(x: Tensor, patch_size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Zero-pads an image (B, C, H, W) at the bottom and the right until patches cover it exactly."""
    bottom, right = (
        _patches_along(size, patch, step, True) * step - step + patch - size
        for size, patch, step in zip(x.shape[-2:], patch_size, stride, strict=True)
    )
    if isinstance(bottom, int) and isinstance(right, int) and bottom == right == 0:
        return x
    return F.pad(x, (0, right, 0, bottom))


def _patches_along(size: int, patch: int, stride: int, pad: bool) -> int:
    """Patches along one side; the last one may reach over the edge if the image is padded."""
    if pad:
        return (max(size - patch, 0) + stride - 1) // stride + 1
    return (size - patch) // stride + 1


@torch.fx.wrap
@register_notrace_function
def _project_tiles(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of an image (B, C, H, W) whose patches tile it, as a matrix product, (B, D, grid H, grid W).

    In 16 bits, convolutions of three channels are ten times as slow as the product.
    """
    height, width = weight.shape[-2:]
    x = x[:, :, : x.shape[2] // height * height, : x.shape[3] // width * width]
    x = x.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (B, C, grid H, height, grid W, width)
    return F.linear(x.permute(0, 2, 4, 1, 3, 5).flatten(3), weight.flatten(1), bias).permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each to a token, with one convolution.

    Args:
        img_size: Image size (H, W) or one side, used only to state ``grid_size``.
        patch_size: Side(s) of a patch in pixels.
        stride: Distance between patches in pixels; default ``patch_size`` (patches tile the image).
        in_chans: Image channels C.
        embed_dim: Token width D.
        pad_input: Whether an image that patches do not cover exactly is zero-padded at the bottom and the right.
            If not, the uncovered margin is ignored.

    Attributes:
        grad_checkpointing: Whether patches, in 16 bits half as large as the image, are cut again in the backward
            instead of kept for the gradient of the weights.

    Raises:
        ValueError: If no patch fits into ``img_size``.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        stride: int | Sequence[int] | None = None,
        in_chans: int = 3,
        embed_dim: int = 768,
        pad_input: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = to_2tuple(patch_size)
        self.stride = to_2tuple(stride or patch_size)
        self.pad_input = pad_input
        self.grad_checkpointing = False
        self.set_image_size(img_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.stride, device=device, dtype=dtype)
        self.init_weights()

    def init_weights(self) -> None:
        """LeCun normal weights, zero bias."""
        lecun_normal_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def grid_for(self, img_size: Sequence[int]) -> tuple[int, int]:
        """Patch grid (H, W) of an image of ``img_size`` pixels (H, W)."""
        height, width = (
            _patches_along(size, patch, step, self.pad_input)
            for size, patch, step in zip(img_size, self.patch_size, self.stride, strict=True)
        )
        return height, width

    def set_image_size(self, img_size: int | Sequence[int]) -> None:
        """Sets the size that ``grid_size`` refers to."""
        self.img_size = to_2tuple(img_size)
        self.grid_size = self.grid_for(self.img_size)
        if min(self.grid_size) < 1 or min(self.img_size) < 1:
            raise ValueError(f"img_size={self.img_size} has no room for a patch of {self.patch_size} pixels")

    def set_patch_size(self, patch_size: int | Sequence[int]) -> None:
        """Resamples the projection to another patch size; the stride keeps its ratio to the patch.

        Raises:
            ValueError: If the stride would not be a whole number of pixels.
        """
        new_size = to_2tuple(patch_size)
        scaled = [step * new for step, new in zip(self.stride, new_size, strict=True)]
        if any(size % old for size, old in zip(scaled, self.patch_size, strict=True)):
            raise ValueError(f"patch_size={patch_size} does not keep stride {self.stride} of {self.patch_size} whole")
        old = self.proj
        stride = tuple(size // side for size, side in zip(scaled, self.patch_size, strict=True))
        weight = resample_patch_embed(old.weight.detach(), list(new_size))
        self.proj = nn.Conv2d(
            old.in_channels, old.out_channels, new_size, stride, device=weight.device, dtype=weight.dtype
        )
        with torch.no_grad():
            self.proj.weight.copy_(weight)
            self.proj.bias.copy_(old.bias)
        self.proj.weight.requires_grad_(old.weight.requires_grad)
        self.proj.bias.requires_grad_(old.bias.requires_grad)
        self.patch_size, self.stride = new_size, stride
        self.set_image_size(self.img_size)

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W) to a token map (B, D, grid H, grid W)."""
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        return checkpoint(self._project, x, preserve_rng_state=False) if recompute else self._project(x)

    def _project(self, x: Tensor) -> Tensor:
        if self.pad_input:
            x = _pad_to_patches(x, self.patch_size, self.stride)
        if self.stride == self.patch_size and type(self.proj) is nn.Conv2d:
            return _project_tiles(x, self.proj.weight, self.proj.bias)
        return self.proj(x)
