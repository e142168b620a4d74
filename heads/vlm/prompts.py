"""Text for vision-language models: conversations as tokens with labels on the answers, and batches of them.

Works with tokenizers of transformers, and any object with their ``__call__`` and token ids. The parts of a conversation
are tokenized one by one, so that answers begin and end at tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.heads.vlm.sequence import IGNORED, PaddingSide

__all__ = ["CHAT_FORMATS", "ChatFormat", "chat_format_ending_with", "collate", "encode_conversation", "padding_token"]

END = "<|endoftext|>"  # in the formats below


@dataclass(frozen=True)
class ChatFormat:
    """How a conversation is written.

    Attributes:
        question: A turn of the user, up to where the answer begins; ``{text}`` is the message.
        answer: What is learned of a turn of the model; ``{text}`` is the message.
        between: Before every turn of the user but the first.
    """

    question: str
    answer: str
    between: str = ""


CHAT_FORMATS: Mapping[str, ChatFormat] = {
    # Zephyr's, which Cobra is trained with
    "zephyr": ChatFormat("<|user|>\n{text}<|endoftext|>\n<|assistant|>\n", "{text}<|endoftext|>", "\n"),
    # for decoders that have not been tuned to chat
    "plain": ChatFormat("In: {text}\nOut: ", "{text}<|endoftext|>"),
}


def chat_format_ending_with(name: str, end: str) -> ChatFormat:
    """A chat format for tokenizers with another end of text.

    Args:
        name: One of :data:`CHAT_FORMATS`.
        end: What takes the place of ``<|endoftext|>``, a tokenizer's ``eos_token``.

    Raises:
        ValueError: If the format is not known.
    """
    chat_format = _find_format(name)
    return ChatFormat(*(text.replace(END, end) for text in astuple(chat_format)))


def encode_conversation(
    tokenizer: Any,
    turns: Sequence[tuple[str, str | None]],
    chat_format: ChatFormat | str = "zephyr",
    image_placeholder: str | None = None,
    image_token_id: int | None = None,
) -> dict[str, Tensor]:
    """Tokens of a conversation.

    Args:
        tokenizer: Tokenizer of the decoder.
        turns: Pairs of question and answer; None for the last answer if it is to be generated.
        chat_format: How turns are written, or a name of :data:`CHAT_FORMATS`.
        image_placeholder: Text in questions that stands for an image, ``"<image>"`` for example.
        image_token_id: The token that takes its place.

    Returns:
        ``input_ids`` and ``labels``, (L,) each; labels are -100 but for answers.

    Raises:
        ValueError: If the format is not known, an answer before the last is missing, or only one of the two image
            arguments is given.
    """
    if (image_placeholder is None) != (image_token_id is None):
        raise ValueError("image_placeholder and image_token_id belong together; give both or none")
    if isinstance(chat_format, str):
        chat_format = _find_format(chat_format)
    ids, labels = [], []
    for number, (question, answer) in enumerate(turns):
        if answer is None and number < len(turns) - 1:
            raise ValueError(f"turn {number} of {len(turns)} has no answer; only the last may lack one")
        text = (chat_format.between if number else "") + chat_format.question.replace("{text}", question)
        asked = _encode(tokenizer, text, image_placeholder, image_token_id)
        answered = [] if answer is None else _encode(tokenizer, chat_format.answer.replace("{text}", answer))
        ids += asked + answered
        labels += [IGNORED] * len(asked) + answered
    return {"input_ids": torch.tensor(ids, dtype=torch.int64), "labels": torch.tensor(labels, dtype=torch.int64)}


def collate(
    examples: Sequence[Mapping[str, Tensor]], pad_token: int, padding_side: PaddingSide = "right"
) -> dict[str, Tensor]:
    """A batch of examples as of :func:`encode_conversation`, and of their images.

    Args:
        examples: Each with ``input_ids`` (L,), and all or none with ``labels`` (L,) and ``images`` (n, 3, H, W), of
            which there may be none (n = 0).
        pad_token: Fills up ``input_ids``; see :func:`padding_token`.
        padding_side: Where.

    Returns:
        ``input_ids`` and ``attention_mask`` (B, L); ``labels`` (B, L), -100 at padding; ``images`` (M, 3, H, W) and
        ``image_counts`` (B,).

    Raises:
        ValueError: If there are no examples, or some lack what others have.
    """
    keys = {frozenset(example) for example in examples}
    if len(keys) != 1:
        raise ValueError("examples must all have the same entries" if keys else "there are no examples to collate")
    length = max(len(example["input_ids"]) for example in examples)

    def fill(tensor: Tensor, value: int) -> Tensor:
        missing = length - len(tensor)
        ends = (missing, 0) if padding_side == "left" else (0, missing)
        return torch.nn.functional.pad(tensor, ends, value=value)

    batch = {
        "input_ids": torch.stack([fill(example["input_ids"], pad_token) for example in examples]),
        "attention_mask": torch.stack([fill(torch.ones_like(example["input_ids"]), 0) for example in examples]),
    }
    if "labels" in examples[0]:
        batch["labels"] = torch.stack([fill(example["labels"], IGNORED) for example in examples])
    if "images" in examples[0]:
        batch["images"] = torch.cat([example["images"] for example in examples])
        batch["image_counts"] = torch.tensor([len(example["images"]) for example in examples])
    return batch


def padding_token(tokenizer: Any) -> int:
    """The token to pad with: the tokenizer's own, or its end of text where it has none, as attention masks tell them
    apart.

    Raises:
        ValueError: If the tokenizer has neither.
    """
    for name in ("pad_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return token
    raise ValueError(
        f"{type(tokenizer).__name__} has neither a padding token nor an end-of-text token; set tokenizer.pad_token"
    )


def _find_format(name: str) -> ChatFormat:
    if name not in CHAT_FORMATS:
        raise ValueError(f"there is no chat format {name!r}; there are {', '.join(CHAT_FORMATS)}")
    return CHAT_FORMATS[name]


def _encode(
    tokenizer: Any, text: str, image_placeholder: str | None = None, image_token_id: int | None = None
) -> list[int]:
    """Tokens of a piece of text, without those that tokenizers add at its ends."""
    ids: list[int] = []
    for number, piece in enumerate(text.split(image_placeholder) if image_placeholder else [text]):
        ids += [image_token_id] if number else []
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
    return ids
