"""Position embeddings for token sequences with class tokens: resampling of learned ones, and 2D rotary ones."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import build_rotary_pos_embed
from timm.models import register_notrace_function
from torch import Tensor, nn

from zoo.backbones.layers.class_token import ClassToken, insert_class_tokens, num_class_tokens, split_class_tokens
from zoo.kernels import is_exporting

__all__ = ["record_input_size", "resample_pos_embed", "rotary_table"]


@torch.fx.wrap
@register_notrace_function
def resample_pos_embed(
    pos_embed: Tensor, old_grid: Sequence[int], new_grid: Sequence[int], class_token: ClassToken | None
) -> Tensor:
    """Resamples a learned position embedding to another grid; the rows of class tokens are kept as they are.

    Args:
        pos_embed: (1, old_H * old_W + T, D), class rows standing where the class tokens stand.
        old_grid: Patch grid the embedding was learned on, (old_H, old_W).
        new_grid: Patch grid wanted, (H, W).
        class_token: Place of the class tokens in both.

    Returns:
        (1, H * W + T, D); bicubic, corners not aligned, no antialiasing, as the authors of Vim fine-tune.
    """
    if not is_exporting() and tuple(old_grid) == tuple(new_grid):
        return pos_embed
    patches, class_rows = split_class_tokens(pos_embed, class_token)
    dtype = torch.promote_types(pos_embed.dtype, torch.float32)  # 16 bits are too coarse to interpolate
    image = patches.unflatten(1, tuple(old_grid)).permute(0, 3, 1, 2).to(dtype)  # (1, D, old H, old W)
    image = F.interpolate(image, size=tuple(new_grid), mode="bicubic", align_corners=False)
    patches = image.flatten(2).transpose(1, 2).to(pos_embed.dtype)  # (1, H * W, D)
    return insert_class_tokens(patches, class_rows, class_token)


@torch.fx.wrap
@register_notrace_function
def rotary_table(
    grid: Sequence[int],
    dim: int,
    reference_grid: int,
    class_token: ClassToken | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Sine and cosine of 2D rotary embedding (EVA-02, arXiv 2303.11331), one row per token.

    The first half of the channels turns with the row, the second half with the column; coordinates are scaled to
    ``reference_grid``. Class tokens do not turn.

    Args:
        grid: Patch grid (H, W).
        dim: Channels D, a multiple of 4.
        reference_grid: Side of the grid that coordinates are expressed in.
        class_token: Place of the class tokens.
        device: Device of the table.
        dtype: Dtype of the table.

    Returns:
        Sine and cosine, each (1, H * W + T, D).
    """
    sin, cos = build_rotary_pos_embed(
        list(grid), dim=dim, in_pixels=False, ref_feat_shape=[reference_grid, reference_grid], device=device
    )
    still = sin.new_zeros(1, num_class_tokens(class_token), dim)
    sin = insert_class_tokens(sin.unsqueeze(0), still, class_token)
    cos = insert_class_tokens(cos.unsqueeze(0), still + 1, class_token)
    return sin.to(dtype), cos.to(dtype)


def record_input_size(model: nn.Module, img_size: Sequence[int], **model_args: object) -> None:
    """Tells timm (1.0.31 and later) that the model was resized, so that exports rebuild it at its new size."""
    try:
        from timm.models._input import update_model_input_size
    except ImportError:  # older timm keeps no such record
        return
    update_model_input_size(model, img_size, **model_args)
