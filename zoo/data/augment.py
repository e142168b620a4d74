"""Augmentation of whole batches as tensors, on the device of the model.

Every data source delivers bytes; shifting, flipping, normalising and erasing happen here for all of them. timm's Mixup
follows in the training loop. Each image of a batch has its own random numbers. They are drawn for the batch of all
processes together, of which each takes its share, so that they do not depend on the number of processes.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "BatchAugment",
    "BatchShare",
    "Normalize",
    "random_black_point",
    "random_erase",
    "random_flip",
    "random_shift",
]


@dataclass(frozen=True)
class BatchShare:
    """Which images of the batch of all processes are here, and where the random numbers of that batch come from.

    Attributes:
        rank: Number of this process: it has the images ``rank``, ``rank + world_size``, ... of the batch.
        world_size: Number of processes.
        generator: In the same state in all of them, on the device of the images; default torch's global one.
    """

    rank: int = 0
    world_size: int = 1
    generator: torch.Generator | None = None

    def rand(self, count: int, images: Tensor) -> Tensor:
        """Uniform numbers in 0..1 for the images here, (count, B, 1, 1, 1)."""
        shape = (count, len(images) * self.world_size, 1, 1, 1)
        drawn = torch.rand(shape, generator=self.generator, device=images.device)
        return drawn[:, self.rank :: self.world_size]


ALONE = BatchShare()


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
    """Random shift, flip and black point, normalisation, random erasing.

    Args:
        mean: Per-channel mean for :class:`Normalize`.
        std: Per-channel standard deviation.
        crop_padding: Largest shift in pixels; 0 is off.
        flip: Probability of a horizontal flip.
        erase: Probability of erasing a rectangle.
        black_point: Largest share of the brightness range that becomes black; 0 is off.
        share: Which images of the batch of all processes are here; default all.
    """

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        crop_padding: int = 0,
        flip: float = 0.0,
        erase: float = 0.0,
        black_point: float = 0.0,
        share: BatchShare = ALONE,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.crop_padding = crop_padding
        self.flip = flip
        self.erase = erase
        self.black_point = black_point
        self.share = share

    def forward(self, images: Tensor) -> Tensor:
        """Maps uint8 (B, C, H, W) to augmented float32 of the same shape."""
        if self.crop_padding:
            images = random_shift(images, self.crop_padding, self.share)
        if self.flip:
            images = random_flip(images, self.flip, self.share)
        if self.black_point:
            images = random_black_point(images, self.black_point, self.share)
        images = self.normalize(images)
        if self.erase:
            images = random_erase(images, self.erase, share=self.share)
        return images


def random_shift(images: Tensor, padding: int, share: BatchShare = ALONE) -> Tensor:
    """Pads by ``padding`` zeros on every side and cuts out the original size at a random place of each image.

    Args:
        images: (B, C, H, W), any type.
        padding: Pixels.
        share: Which images of the batch of all processes these are.

    Returns:
        (B, C, H, W).
    """
    top, left = (share.rand(2, images) * (2 * padding + 1)).long()  # (B, 1, 1, 1) each
    return _window(F.pad(images, [padding] * 4), top, left, images.shape[-2:])


def random_flip(images: Tensor, probability: float, share: BatchShare = ALONE) -> Tensor:
    """Mirrors each image of (B, C, H, W) left to right with the given probability."""
    return torch.where(share.rand(1, images)[0] < probability, images.flip(-1), images)


def random_black_point(images: Tensor, largest: float, share: BatchShare = ALONE) -> Tensor:
    """Makes what is darker than a random value black, and stretches the rest of the range, as a photo's levels are set.

    Args:
        images: Bytes (B, C, H, W).
        largest: Each image's value is drawn uniformly from 0 to this share of the range, below 1.
        share: Which images of the batch of all processes these are.

    Returns:
        float32 of the same shape, from 0 to 255.
    """
    black = 255 * largest * share.rand(1, images)[0]
    return (images - black).clamp_(min=0) * (255 / (255 - black))


def random_erase(
    images: Tensor,
    probability: float,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    share: BatchShare = ALONE,
) -> Tensor:
    """Replaces one rectangle of each image by normal noise (Zhong et al., arXiv 1708.04896).

    The noise of all images of a batch, in all processes, is cut out of one field at random places.

    Args:
        images: Normalised (B, C, H, W).
        probability: Share of the images that lose a rectangle.
        area: Range of the rectangle's share of the image, drawn uniformly.
        aspect: Range of height over width, drawn uniformly in the logarithm.
        share: Which images of the batch of all processes these are.

    Returns:
        (B, C, H, W).
    """
    _, C, H, W = images.shape
    chosen, size, shape, top, left, noise_top, noise_left = share.rand(7, images)  # (B, 1, 1, 1) each
    pixels = (area[0] + (area[1] - area[0]) * size) * H * W
    ratio = torch.exp(math.log(aspect[0]) + (math.log(aspect[1]) - math.log(aspect[0])) * shape)
    height = (pixels * ratio).sqrt().round().clamp(1, H)
    width = (pixels / ratio).sqrt().round().clamp(1, W)
    top = (top * (H - height + 1)).floor()
    left = (left * (W - width + 1)).floor()
    rows = torch.arange(H, device=images.device).view(1, 1, H, 1)
    columns = torch.arange(W, device=images.device).view(1, 1, 1, W)
    inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
    field = torch.randn((1, C, 2 * H, 2 * W), generator=share.generator, device=images.device, dtype=images.dtype)
    noise = _window(field, (noise_top * (H + 1)).long(), (noise_left * (W + 1)).long(), (H, W))
    return torch.where(inside & (chosen < probability), noise, images)


def _window(images: Tensor, top: Tensor, left: Tensor, size: tuple[int, int]) -> Tensor:
    """Cuts a window out of each image at its own place; of a single image, so many as there are places.

    Args:
        images: (B, C, H, W) or (1, C, H, W).
        top: First row of each window, (B, 1, 1, 1).
        left: First column likewise.
        size: Height and width of the windows.
    """
    height, width = size
    C, device = images.shape[1], images.device
    image = torch.arange(len(images), device=device).view(-1, 1, 1, 1)
    channel = torch.arange(C, device=device).view(1, C, 1, 1)
    rows = top + torch.arange(height, device=device).view(1, 1, height, 1)
    columns = left + torch.arange(width, device=device).view(1, 1, 1, width)
    return images[image, channel, rows, columns]
