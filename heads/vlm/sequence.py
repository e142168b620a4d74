"""How text and images make one sequence of embeddings: images before the text, or in place of placeholders in it."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["IGNORED", "PADDING", "PaddingSide", "arrange"]

PaddingSide = Literal["left", "right"]
PADDING = -1  # in a table of positions
IGNORED = -100  # label of positions that the loss leaves out


def arrange(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    images: int,
    tokens_per_image: int,
    image_token_id: int | None,
    image_counts: Sequence[int] | None = None,
    padding_side: PaddingSide = "right",
) -> Tensor:
    """Where every position of the joint sequences comes from.

    Args:
        input_ids: Text, (B, L).
        attention_mask: (B, L), 0 at padding, wherever that is; best on the CPU. Default no padding.
        images: Images M of the whole batch, in the order of the rows.
        tokens_per_image: Tokens N of an image.
        image_token_id: Placeholder in the text that an image's tokens take the place of. None: a row's images come
            before its text.
        image_counts: Images of each row; default what the placeholders say, or without them one for every row (none if
            there are no images).
        padding_side: Where shorter rows are filled up.

    Returns:
        int64 table (B, T) into all B * L text positions followed by all M * N image positions; -1 is padding.

    Raises:
        ValueError: If images and placeholders do not match, or a row is empty.
    """
    B, L = input_ids.shape
    kept = torch.ones(B, L, dtype=torch.bool) if attention_mask is None else attention_mask.cpu().bool()
    is_image = torch.zeros_like(kept)
    if image_token_id is not None:  # else a GPU need not be waited for
        is_image = (input_ids.cpu() == image_token_id) & kept
    counts = _count_images(is_image, images, image_token_id, image_counts)
    is_text, leading = kept & ~is_image, 0
    if image_token_id is None:  # as if placeholders stood before the text
        leading = max(counts, default=0)
        is_image = torch.cat([torch.arange(leading) < torch.tensor(counts)[:, None], is_image], dim=1)
        is_text = torch.cat([torch.zeros(B, leading, dtype=torch.bool), is_text], dim=1)
    widths = is_text + is_image * tokens_per_image  # of every token and image, 0 for padding
    lengths = widths.sum(dim=1)
    empty = (lengths == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"rows {empty} hold neither text nor images")
    starts = widths.cumsum(dim=1) - widths
    if padding_side == "left":
        starts += (lengths.max() - lengths)[:, None]
    table = torch.full((B, int(lengths.max())), PADDING)
    rows, columns = is_text.nonzero(as_tuple=True)
    table[rows, starts[rows, columns]] = rows * L + columns - leading
    rows, columns = is_image.nonzero(as_tuple=True)
    places = starts[rows, columns, None] + torch.arange(tokens_per_image)  # (M, N)
    table[rows[:, None], places] = B * L + torch.arange(images * tokens_per_image).view_as(places)
    return table


def _count_images(
    is_image: Tensor, images: int, image_token_id: int | None, image_counts: Sequence[int] | None
) -> list[int]:
    """Images of each row, checked."""
    B = len(is_image)
    given = None if image_counts is None else [int(count) for count in image_counts]
    if given is not None and (len(given) != B or sum(given) != images or min(given) < 0):
        raise ValueError(
            f"image_counts={given} must have one number for each of {B} rows and add up to {images} images"
        )
    if image_token_id is None:
        if given is None and images not in (0, B):
            raise ValueError(f"{images} images for {B} rows: say with image_counts how many belong to each")
        return given or [int(images > 0)] * B
    placeholders = is_image.sum(dim=1).tolist()
    wanted = given or placeholders
    if images and not sum(placeholders):
        raise ValueError(
            f"the text has no image placeholder (token {image_token_id}) for the {images} images; put one where each "
            "image belongs"
        )
    if placeholders != wanted or sum(placeholders) != images:
        detail = f"rows have {placeholders} placeholders" + (f" for {given} images" if given else "")
        raise ValueError(
            f"{images} images do not match {sum(placeholders)} image placeholders (token {image_token_id}): {detail}; "
            "give one placeholder for every image"
        )
    return placeholders
