"""Conversations as tokens, and batches of them with their images: rows of similar length share a batch.

Rows are not packed into longer ones: a recurrent decoder would carry its state from one conversation into the next,
and our kernels have no place where it could be set back. With rows of similar length in a batch hardly anything is
padding.
"""

import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from zoo.data.conversations import PLACEHOLDER, Conversation, Conversations
from zoo.data.files import report_bad_files
from zoo.heads.vlm.prompts import ChatFormat, encode_conversation, padding_token
from zoo.heads.vlm.sequence import IGNORED
from zoo.optional import require

__all__ = ["ChatEncoder", "ConversationLoader", "TokenTable", "pick_images"]

_logger = logging.getLogger(__name__)

GROUPED = 50  # batches whose rows are sorted by length together
EASIEST = 0.08  # share of the rows that a curriculum begins with: the scenes of one item are about as many
HELD = 1 / 3  # part of a curriculum in which it stays there


@dataclass(frozen=True)
class ChatEncoder:
    """How conversations become tokens.

    Attributes:
        tokenizer: Of the decoder, see :mod:`zoo.data.chat_tokenizers`.
        chat_format: How turns are written.
        image_token_id: Token where images stand in the text; None: they come before it.
        image_tokens: Tokens that an image becomes.
        limit: Most tokens of a conversation, images included; None for no limit.
    """

    tokenizer: Any
    chat_format: ChatFormat
    image_token_id: int | None
    image_tokens: int
    limit: int | None = None

    @property
    def pad_token(self) -> int:
        """What fills rows up."""
        return padding_token(self.tokenizer)

    def encode(self, sample: Conversation, answered: bool = True) -> dict[str, Tensor]:
        """``input_ids`` and ``labels``, (L,) each.

        Args:
            sample: The conversation.
            answered: Whether with its last answer.

        Raises:
            ValueError: If the tokenizer lacks a word, or the conversation exceeds the limit.
        """
        turns = [(self._question(question), answer) for question, answer in sample.turns]
        if not answered:
            turns[-1] = turns[-1][0], None
        placeholder = None if self.image_token_id is None else PLACEHOLDER
        example = encode_conversation(self.tokenizer, turns, self.chat_format, placeholder, self.image_token_id)
        count = self.length(len(example["input_ids"]), len(sample.images))
        if self.limit is not None and count > self.limit:
            raise ValueError(f"has {count} tokens with its images, more than the {self.limit} that are allowed")
        return example

    def length(self, tokens: int, images: int) -> int:
        """Tokens of a row for the decoder."""
        return tokens + images * (self.image_tokens - (self.image_token_id is not None))

    def _question(self, text: str) -> str:
        if self.image_token_id is not None:
            return text
        return text.replace(f"{PLACEHOLDER}\n", "").replace(f"\n{PLACEHOLDER}", "").replace(PLACEHOLDER, "")

    def encode_all(self, data: Conversations, bad_files: str = "error") -> tuple[Conversations, "TokenTable"]:
        """Encodes conversations, with a progress bar on a terminal.

        Args:
            data: The conversations.
            bad_files: What to do with those that cannot be encoded: ``error``, or ``skip`` with a report.

        Returns:
            Those that can, and their tokens.

        Raises:
            ValueError: If one cannot, under ``error``, or none can.
        """
        good: list[int] = []
        bad: dict[str, str] = {}
        table = TokenTable.of(self._encoded(data, good, bad))
        report_bad_files(bad, len(data), data.place, bad_files, "conversations", "cannot be used")
        if not good:
            raise ValueError(f"{data.place} has no conversation that can be used")
        return (data if len(good) == len(data) else data.take(good)), table

    def _encoded(self, data: Conversations, good: list[int], bad: dict[str, str]) -> Iterator[dict[str, Tensor]]:
        """Yields what can be encoded, and notes which numbers these are, and the reasons of the others."""
        _logger.info("reading %d conversations of %s", len(data), data.place)
        bar = require("tqdm").tqdm(data.samples, "reading conversations", disable=None, leave=False)
        for number, sample in enumerate(bar):
            try:
                example = self.encode(sample)
            except ValueError as error:
                bad[sample.name] = str(error)
            else:
                good.append(number)
                yield example


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Tokens of N rows, one after the other.

    Attributes:
        tokens: int32 (T,).
        answers: Which of them are answers, bool (T,).
        lengths: Tokens of every row, int64 (N,), on the CPU.
        starts: Where rows begin, int64 (N,), likewise.
    """

    tokens: Tensor
    answers: Tensor
    lengths: Tensor
    starts: Tensor

    @classmethod
    def of(cls, examples: Iterable[dict[str, Tensor]]) -> "TokenTable":
        """The table of examples as :func:`zoo.heads.vlm.encode_conversation` makes them, millions of them too."""
        tokens, answers, lengths = array("i"), array("b"), array("q")
        for example in examples:
            tokens.extend(example["input_ids"].tolist())
            answers.extend((example["labels"] != IGNORED).tolist())
            lengths.append(len(example["input_ids"]))
        count = torch.from_numpy(np.array(lengths, np.int64))
        flat = (torch.from_numpy(np.array(*each)) for each in ((tokens, np.int32), (answers, np.bool_)))
        return cls(*flat, count, count.cumsum(0) - count)

    def to(self, device: torch.device | str) -> "TokenTable":
        """The same with its tokens on a device."""
        return TokenTable(self.tokens.to(device), self.answers.to(device), self.lengths, self.starts)

    def batch(self, rows: Tensor, pad_token: int) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels`` (B, L) of rows (B,), which are on the CPU; padded right.

        The mask stays on the CPU, where the model makes the order of its tokens from it without waiting for a GPU.
        """
        lengths, device = self.lengths[rows], self.tokens.device
        columns = torch.arange(int(lengths.max()))
        kept = columns < lengths[:, None]
        places = torch.where(kept, self.starts[rows, None] + columns, 0)
        mask, places, kept = kept.long(), places.to(device), kept.to(device)
        ids = self.tokens[places].long()
        labels = torch.where(self.answers[places] & kept, ids, IGNORED)
        return {"input_ids": ids.where(kept, pad_token), "attention_mask": mask, "labels": labels}

    def answer_counts(self) -> Tensor:
        """Tokens of answers in every row, int64 (N,)."""
        counts = torch.zeros(len(self.lengths) + 1, dtype=torch.long)
        counts[1:] = self.answers.cpu().long().cumsum(0)[self.starts + self.lengths - 1]
        return counts.diff()


class ConversationLoader:
    """Iterates over batches of conversations on one device.

    The order depends on seed and epoch alone. Of a batch over all processes each takes every ``world_size``-th row. A
    batch is a dictionary of ``input_ids``, ``attention_mask`` and ``labels`` (B, L), ``images`` uint8 (B, n, 3, H, W),
    ``image_counts`` (how many of the n a row has), ``rows`` (their numbers) and ``weight``: by which the mean loss of
    the batch is multiplied to have, in the mean over processes, the mean over the tokens of all of them.

    Args:
        data: The conversations.
        table: Their tokens.
        encoder: What encoded them.
        transform: Maps a PIL image to a uint8 tensor (C, H, W); for images in files.
        batch_size: Rows per batch and process.
        workers: Processes that read image files.
        device: Where batches go; images in memory and tokens are kept there.
        training: Shuffle, and leave out the incomplete last batch. Otherwise each row comes once, sorted by length.
        seed: Seed of the order.
        rank: Number of this process.
        world_size: Number of processes.
        curriculum: Passes, or parts of one, in which rows are drawn from the easiest ones only, a share that stays
            small at first and then grows evenly to all of them; easy are those of few items, or with few tokens where
            items are not known. Such a pass does not have every row once. Default 0.

    Raises:
        ValueError: If training and there are fewer rows than one batch per process needs.
    """

    def __init__(
        self,
        data: Conversations,
        table: TokenTable,
        encoder: ChatEncoder,
        transform: Callable[[Image.Image], Tensor],
        batch_size: int,
        workers: int = 0,
        device: torch.device | str = "cpu",
        training: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        curriculum: float = 0.0,
    ) -> None:
        self.device = torch.device(device)
        self.table = table.to(device)
        self.pad_token = encoder.pad_token
        images = torch.tensor([len(sample.images) for sample in data.samples])
        lengths = table.lengths + images * encoder.image_tokens
        self.batches = _Batches(lengths, table.answer_counts(), batch_size, training, seed, rank, world_size)
        if curriculum:
            difficulty = torch.tensor([sample.difficulty for sample in data.samples])
            self.batches.curriculum = curriculum
            self.batches.ranking = (difficulty if difficulty.any() else lengths).argsort(stable=True)
        self.in_memory = isinstance(data.images, Tensor)
        self.samples = data.samples
        if self.in_memory:
            self.images = data.images.to(device)
            return
        self.loader = DataLoader(
            _ImagesOfRows(data, transform),
            batch_sampler=self.batches,
            num_workers=workers,
            collate_fn=_padded,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else every pass draws a number from the global one
        )

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Chooses the order of the next pass, and the batch that it starts with."""
        self.batches.epoch, self.batches.first = epoch, first_batch

    def __len__(self) -> int:
        """Batches of a whole pass."""
        return self.batches.count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields the batches of one pass."""
        images = map(self._picked, self.batches) if self.in_memory else self.loader
        for (rows, weight), (pixels, counts) in zip(self.batches.whole_pass(), images, strict=True):
            yield {
                **self.table.batch(rows, self.pad_token),
                "images": pixels.to(self.device, non_blocking=True),
                "image_counts": counts,
                "rows": rows.tolist(),
                "weight": weight,
            }

    def _picked(self, rows: Sequence[int]) -> tuple[Tensor, list[int]]:
        return pick_images(self.images, [self.samples[row].images for row in rows])


def pick_images(images: Tensor, numbers: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
    """The images of B rows, (B, n, C, H, W) with n as many as the fullest row has, and how many each row has."""
    counts = [len(row) for row in numbers]
    most = max(counts)
    table = torch.tensor([[*row, *[0] * (most - len(row))] for row in numbers], dtype=torch.long)
    return images[table.to(images.device)], counts


class _Batches(Sampler[list[int]]):
    """The rows of every batch of one process, from a certain batch on.

    Attributes:
        count: How many batches a whole pass has.
        epoch: Number of the pass.
        first: The batch that it starts with.
        curriculum: Passes that prefer easy rows.
        ranking: Rows from easy to difficult, for a curriculum.
    """

    def __init__(
        self, lengths: Tensor, answers: Tensor, batch_size: int, training: bool, seed: int, rank: int, world_size: int
    ) -> None:
        self.lengths, self.answers, self.batch_size = lengths, answers, batch_size
        self.training, self.seed, self.rank, self.world_size = training, seed, rank, world_size
        self.epoch, self.first = 0, 0
        self.curriculum, self.ranking = 0.0, torch.arange(len(lengths))
        together, rows = batch_size * world_size, len(lengths)
        if training and rows < together:
            raise ValueError(
                f"{rows} training conversations do not fill one batch of {batch_size} on each of {world_size} "
                "processes; lower data.batch_size"
            )
        self.count = rows // together if training else -(-len(range(rank, rows, world_size)) // batch_size)

    def __len__(self) -> int:
        return self.count - self.first

    def __iter__(self) -> Iterator[list[int]]:
        return (rows.tolist() for rows, _ in self.whole_pass())

    def whole_pass(self) -> list[tuple[Tensor, float]]:
        """Rows and weights of the batches from the first one on."""
        if not self.training:
            share = self.lengths.argsort(stable=True)[self.rank :: self.world_size]
            return [(rows, 1.0) for rows in share.split(self.batch_size)[self.first :]] if len(share) else []
        batches = self._shuffled()[self.first :]
        shares = batches[:, self.rank :: self.world_size]
        weights = self.answers[shares].sum(1) * self.world_size / self.answers[batches].sum(1)
        return list(zip(shares, weights.tolist(), strict=True))

    def _shuffled(self) -> Tensor:
        """Rows of the batches of all processes, (batches, rows): at random, but those of a batch of similar length."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        together = self.batch_size * self.world_size
        order = torch.randperm(len(self.lengths), generator=generator)[: self.count * together]
        batches = []
        for number, group in enumerate(order.split(GROUPED * together)):
            easy = self._easy(number, together)
            if easy < len(self.lengths):
                group = self.ranking[_drawn_below(easy, len(group), generator)]
            ordered = group[self.lengths[group].argsort(stable=True)].view(-1, together)
            batches.append(ordered[torch.randperm(len(ordered), generator=generator)])
        return torch.cat(batches)

    def _easy(self, group: int, together: int) -> int:
        """From how many of the easiest rows a group of batches is drawn."""
        done = (self.epoch + group * GROUPED / self.count) / self.curriculum if self.curriculum else 1.0
        share = EASIEST + (1 - EASIEST) * min(max(done - HELD, 0.0) / (1 - HELD), 1.0)
        return min(max(together, round(share * len(self.lengths))), len(self.lengths))


def _drawn_below(limit: int, count: int, generator: torch.Generator) -> Tensor:
    """Numbers from 0 to ``limit - 1`` at random, (count,), each as often as the others or once more."""
    rounds = -(-count // limit)
    return torch.cat([torch.randperm(limit, generator=generator) for _ in range(rounds)])[:count]


class _ImagesOfRows(Dataset):
    """The images of a conversation, read from their files."""

    def __init__(self, data: Conversations, transform: Callable[[Image.Image], Tensor]) -> None:
        self.data = data
        self.transform = transform

    def __getitem__(self, row: int) -> list[Tensor]:
        pixels = []
        for number in self.data.samples[row].images:
            with Image.open(self.data.images[number]) as image:
                pixels.append(self.transform(image))
        return pixels


def _padded(rows: Sequence[Sequence[Tensor]]) -> tuple[Tensor, list[int]]:
    """Images of B rows, (B, n, C, H, W), and how many each has."""
    counts = [len(row) for row in rows]
    every = [image for row in rows for image in row]
    if not every:
        return torch.empty(len(rows), 0, 3, 1, 1, dtype=torch.uint8), counts
    images = every[0].new_zeros((len(rows), max(counts), *every[0].shape))
    for place, row in zip(images, rows, strict=True):
        for number, image in enumerate(row):
            place[number] = image
    return images, counts
