"""Scores of a vision-language model: loss on true answers, and whether its own answers are right, also without seeing.

Every question is asked twice, the second time with a blank image of one colour: what is right then is right by
language alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from zoo.config import VlmConfig
from zoo.data import image_transform
from zoo.data.conversation_loader import ChatEncoder, ConversationLoader, TokenTable
from zoo.data.conversations import CAPTION, PLACEHOLDER, Conversation, Conversations
from zoo.data.vqa.answers import short_answer
from zoo.engine.checkpoint import ModelCard
from zoo.engine.evaluate import autocast
from zoo.heads.vlm import VisionLanguageModel
from zoo.heads.vlm.sequence import IGNORED
from zoo.optional import require

__all__ = [
    "Answer",
    "OfImages",
    "Questions",
    "VlmValidation",
    "answer_questions",
    "answer_scores",
    "inputs_of",
    "mean_color",
    "token_scores",
]

COLORED = 64  # images whose mean colour the blank one has


@dataclass(frozen=True)
class Answer:
    """What a model says to a question.

    Attributes:
        question: The question, without placeholders for images.
        truth: The true answer.
        seeing: The model's answer.
        blank: Its answer to a blank image.
        kind: What is asked; empty if it is not known.
        row: Number of the question.
    """

    question: str
    truth: str
    seeing: str
    blank: str
    kind: str
    row: int

    @property
    def right(self) -> bool:
        """Whether the answer is the true one but for case, space around it and a period at its end."""
        return short_answer(self.seeing) == short_answer(self.truth)

    @property
    def blank_right(self) -> bool:
        """The same of the answer to a blank image."""
        return short_answer(self.blank) == short_answer(self.truth)


class Questions:
    """Questions for which the answer is generated: the last ones of conversations, after true answers to those before.

    Args:
        data: Conversations; captions are left out.
        encoder: Encodes them.
        count: Most questions, evenly spread over the data.
        max_new_tokens: Most tokens of an answer; default as many as the longest true one has.

    Attributes:
        data: The chosen conversations.
        prompts: Their tokens without the last answer.
        longest: Tokens to generate.
        kinds: What is asked, sorted; without an empty kind.
    """

    def __init__(
        self, data: Conversations, encoder: ChatEncoder, count: int, max_new_tokens: int | None = None
    ) -> None:
        asked = [number for number, sample in enumerate(data.samples) if sample.kind != CAPTION]
        count = min(count, len(asked))
        self.data = data.take(asked[number * len(asked) // count] for number in range(count))
        prompts = [encoder.encode(sample, answered=False) for sample in self.data.samples]
        self.prompts = TokenTable.of(prompts)
        whole = (len(encoder.encode(sample)["input_ids"]) for sample in self.data.samples)
        answers = [length - len(prompt["input_ids"]) for length, prompt in zip(whole, prompts, strict=True)]
        self.longest = max_new_tokens or max(answers, default=0)
        self.kinds = tuple(sorted({sample.kind for sample in self.data.samples} - {""}))

    def __len__(self) -> int:
        return len(self.data)


class VlmValidation:
    """The validation data of a run, and what is measured on them.

    Args:
        config: The complete configuration.
        card: Of the model: how it wants images.
        encoder: How conversations become its tokens.
        data: The conversations.

    Attributes:
        columns: Names of the scores.
        questions: The questions for which answers are generated.
        transform: Maps a PIL image to a uint8 tensor (C, H, W).

    Raises:
        ValueError: If conversations cannot be encoded.
    """

    def __init__(self, config: VlmConfig, card: ModelCard, encoder: ChatEncoder, data: Conversations) -> None:
        self.config, self.encoder = config, encoder
        self.transform = image_transform(card.preprocessing)
        self.data, self.table = encoder.encode_all(data, config.data.bad_files)
        self.questions = Questions(self.data, encoder, config.evaluation.questions, config.evaluation.max_new_tokens)
        self.blank = mean_color(self.data, self.transform)
        self.columns = ("val_loss", "token_accuracy")
        if len(self.questions):
            self.columns = (*self.columns, "accuracy", "blank_accuracy", "margin", *self.kind_columns)

    @property
    def kind_columns(self) -> tuple[str, ...]:
        """Those of the scores that are about one kind of questions."""
        return tuple(f"{kind}_accuracy" for kind in self.questions.kinds)

    def _loader(self, data: Conversations, table: TokenTable, **shares: Any) -> ConversationLoader:
        given = self.config.data
        batch_size = given.val_batch_size or given.batch_size
        return ConversationLoader(data, table, self.encoder, self.transform, batch_size, given.workers, **shares)

    def scores(self, model: VisionLanguageModel, **shares: Any) -> dict[str, float]:
        """All scores over all processes, which all call this; ``shares`` are the device and this process's place."""
        scores = token_scores(model, self._loader(self.data, self.table, **shares), self.config.precision)
        if len(self.questions):
            scores |= answer_scores(self.answers(model, **shares), self.questions.kinds, shares["device"])
        return scores

    def answers(self, model: VisionLanguageModel, **shares: Any) -> list[Answer]:
        """Answers to this process's share of the questions."""
        loader = self._loader(self.questions.data, self.questions.prompts, **shares)
        return answer_questions(model, loader, self.questions, self.encoder, self.blank, self.config.precision)


def inputs_of(batch: Mapping[str, Any], change: Callable[[Tensor], Tensor] | None = None) -> dict[str, Any]:
    """Arguments of the model for a batch of :class:`ConversationLoader`, but for the labels.

    Args:
        batch: The batch.
        change: What is done to the images (M, 3, H, W), which are bytes; default nothing.

    Returns:
        ``input_ids``, ``attention_mask``, ``images`` from 0 to 1, ``image_counts``.
    """
    images, counts = batch["images"], batch["image_counts"]
    width = images.shape[1]
    if min(counts) == width:
        images = images.flatten(0, 1)
    else:
        places = [row * width + number for row, count in enumerate(counts) for number in range(count)]
        images = images.flatten(0, 1)[torch.tensor(places, dtype=torch.long, device=images.device)]
    images = images if change is None else change(images)
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return {**text, "images": images.float() / 255, "image_counts": counts}


@torch.no_grad()
def token_scores(model: VisionLanguageModel, loader: ConversationLoader, precision: str = "fp32") -> dict[str, float]:
    """Scores of the next tokens of true answers, over all processes, which all call this.

    Args:
        model: The model.
        loader: Conversations.
        precision: ``fp32``, ``bf16`` or ``fp16``.

    Returns:
        ``val_loss``, the mean cross-entropy, and ``token_accuracy``, how often the most likely token is the true one,
        in percent.
    """
    metrics = require("torchmetrics")
    device = next(model.parameters()).device
    loss, right = metrics.MeanMetric().to(device), metrics.MeanMetric().to(device)
    model.eval()
    for batch in loader:
        with autocast(device, precision):
            output = model(**inputs_of(batch), labels=batch["labels"])
        last = output.labels.shape[1] - 1
        columns = torch.arange(last, device=device) if output.columns is None else output.columns
        targets, found = output.labels[:, columns + 1], output.logits[:, : len(columns)].argmax(dim=-1)
        answers = targets != IGNORED
        loss.update(output.loss, weight=answers.sum())
        right.update((found == targets)[answers].float())
    return {"val_loss": loss.compute().item(), "token_accuracy": 100 * right.compute().item()}


@torch.no_grad()
def answer_questions(
    model: VisionLanguageModel,
    loader: ConversationLoader,
    questions: Questions,
    encoder: ChatEncoder,
    blank: Tensor,
    precision: str = "fp32",
) -> list[Answer]:
    """Answers of the questions of this process, the most likely token each time.

    Args:
        model: The model.
        loader: Of the questions' prompts.
        questions: The questions.
        encoder: Encoded them.
        blank: Colour of the blank image, (3,) from 0 to 1.
        precision: ``fp32``, ``bf16`` or ``fp16``.
    """
    model.eval()
    samples = questions.data.samples
    return [
        Answer(_shown(sample), sample.turns[-1][1], seeing, without, sample.kind, row)
        for row, seeing, without in _answers(model, loader, questions, encoder, blank, precision)
        for sample in [samples[row]]
    ]


def _answers(
    model: VisionLanguageModel,
    loader: ConversationLoader,
    questions: Questions,
    encoder: ChatEncoder,
    blank: Tensor,
    precision: str,
) -> Iterator[tuple[int, str, str]]:
    """Yields number, answer and answer to a blank image of every question."""
    device = next(model.parameters()).device
    tokenizer = encoder.tokenizer
    for batch in loader:
        inputs, counts = inputs_of(batch), batch["image_counts"]
        most = questions.longest
        if encoder.limit is not None:
            lengths = zip(batch["attention_mask"].sum(1).tolist(), counts, strict=True)
            most = min(most, encoder.limit - max(encoder.length(*each) for each in lengths))
        texts = []
        for images in (inputs["images"], blank.to(device)[:, None, None].expand_as(inputs["images"])):
            with autocast(device, precision):
                tokens = model.generate(
                    **{**inputs, "images": images}, max_new_tokens=most, stop_tokens=[tokenizer.eos_token_id]
                )
            texts.append([_decoded(tokenizer, row) for row in tokens.tolist()])
        yield from zip(batch["rows"], *texts, strict=True)


def _decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Text up to the first end."""
    end = tokenizer.eos_token_id
    kept = tokens[: tokens.index(end)] if end in tokens else tokens
    return tokenizer.decode(kept, skip_special_tokens=True).strip()


def _shown(sample: Conversation) -> str:
    return sample.turns[-1][0].replace(PLACEHOLDER, "").strip()


def answer_scores(answers: Sequence[Answer], kinds: Sequence[str], device: torch.device) -> dict[str, float]:
    """Shares of right answers in percent, over all processes, which all call this.

    Args:
        answers: Of this process.
        kinds: What is asked, in all processes.
        device: Where sums are exchanged.

    Returns:
        ``accuracy``; ``blank_accuracy`` with a blank image; ``margin``, the difference; ``<kind>_accuracy``.
    """
    mean = require("torchmetrics").MeanMetric

    def share(right: Sequence[bool]) -> float:
        metric = mean().to(device)
        if right:
            metric.update(torch.tensor(right, dtype=torch.float, device=device))
        return 100 * metric.compute().item()

    seeing, blank = share([answer.right for answer in answers]), share([answer.blank_right for answer in answers])
    by_kind = {f"{kind}_accuracy": share([answer.right for answer in answers if answer.kind == kind]) for kind in kinds}
    return {"accuracy": seeing, "blank_accuracy": blank, "margin": seeing - blank, **by_kind}


def mean_color(data: Conversations, transform: Callable[[Image.Image], Tensor]) -> Tensor:
    """Mean colour of some of the images, (3,) from 0 to 1; grey if there are none."""
    total = len(data.images)
    numbers = sorted({number * total // COLORED for number in range(COLORED)}) if total else []
    colors = [_read(data.images[number], transform).float().mean(dim=(1, 2)) / 255 for number in numbers]
    return torch.stack(colors).mean(dim=0) if colors else torch.full((3,), 0.5)


def _read(image: Any, transform: Callable[[Image.Image], Tensor]) -> Tensor:
    if isinstance(image, Tensor):
        return image
    with Image.open(image) as opened:
        return transform(opened)


class OfImages(nn.Module):
    """A model as a function of a batch's images alone.

    Args:
        model: The model.
        inputs: Its other arguments.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.inputs = dict(inputs)

    def forward(self, images: Tensor) -> Any:
        """Images (M, 3, H, W) to what the model returns."""
        return self.model(**self.inputs, images=images)
