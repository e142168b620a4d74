"""Augmentation of whole batches as tensors, on the device of the model.

Every data source delivers bytes; shifting, flipping, normalising and erasing happen here for all of them. timm's Mixup
follows in the training loop. Each image of a batch draws its own random numbers, all from torch's global generator.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BatchAugment", "Normalize", "random_erase", "random_flip", "random_shift"]


class Normalize(nn.Module):
    """Turns bytes into normalised float32 images: ``(x / 255 - mean) / std``.

    Args:
        mean: One value per channel, for images in 0..1.
        std: One value per channel.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Maps uint8 (B, C, H, W) to float32 of the same shape."""
        return (images.float() / 255 - self.mean) / self.std


class BatchAugment(nn.Module):
    """Random shift and flip, normalisation, random erasing.

    Args:
        mean: Per-channel mean for :class:`Normalize`.
        std: Per-channel standard deviation.
        crop_padding: Largest shift in pixels; 0 is off.
        flip: Probability of a horizontal flip.
        erase: Probability of erasing a rectangle.
    """

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        crop_padding: int = 0,
        flip: float = 0.0,
        erase: float = 0.0,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.crop_padding = crop_padding
        self.flip = flip
        self.erase = erase

    def forward(self, images: Tensor) -> Tensor:
        """Maps uint8 (B, C, H, W) to augmented float32 of the same shape."""
        if self.crop_padding:
            images = random_shift(images, self.crop_padding)
        if self.flip:
            images = random_flip(images, self.flip)
        images = self.normalize(images)
        if self.erase:
            images = random_erase(images, self.erase)
        return images


def random_shift(images: Tensor, padding: int) -> Tensor:
    """Pads by ``padding`` zeros on every side and cuts out the original size at a random place of each image.

    Args:
        images: (B, C, H, W), any type.
        padding: Pixels.

    Returns:
        (B, C, H, W).
    """
    B, C, H, W = images.shape
    device = images.device
    padded = F.pad(images, [padding] * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, B, 1), device=device)  # (B, 1) each
    rows = (top + torch.arange(H, device=device)).view(B, 1, H, 1)
    columns = (left + torch.arange(W, device=device)).view(B, 1, 1, W)
    image = torch.arange(B, device=device).view(B, 1, 1, 1)
    channel = torch.arange(C, device=device).view(1, C, 1, 1)
    return padded[image, channel, rows, columns]


def random_flip(images: Tensor, probability: float) -> Tensor:
    """Mirrors each image of (B, C, H, W) left to right with the given probability."""
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < probability
    return torch.where(chosen, images.flip(-1), images)


def random_erase(
    images: Tensor,
    probability: float,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Tensor:
    """Replaces one rectangle of each image by normal noise (Zhong et al., arXiv 1708.04896).

    Args:
        images: Normalised (B, C, H, W).
        probability: Share of the images that lose a rectangle.
        area: Range of the rectangle's share of the image, drawn uniformly.
        aspect: Range of height over width, drawn uniformly in the logarithm.

    Returns:
        (B, C, H, W).
    """
    B, _, H, W = images.shape
    chosen, size, shape, top, left = torch.rand(5, B, 1, 1, 1, device=images.device)  # (B, 1, 1, 1) each
    pixels = (area[0] + (area[1] - area[0]) * size) * H * W
    ratio = torch.exp(math.log(aspect[0]) + (math.log(aspect[1]) - math.log(aspect[0])) * shape)
    height = (pixels * ratio).sqrt().round().clamp(1, H)
    width = (pixels / ratio).sqrt().round().clamp(1, W)
    top = (top * (H - height + 1)).floor()
    left = (left * (W - width + 1)).floor()
    rows = torch.arange(H, device=images.device).view(1, 1, H, 1)
    columns = torch.arange(W, device=images.device).view(1, 1, 1, W)
    inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
    return torch.where(inside & (chosen < probability), torch.randn_like(images), images)
