"""Training of generative vision-language models on conversations about images."""

import csv
import logging
import os
import textwrap
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zoo.config import VlmConfig
from zoo.data import BatchShare
from zoo.data.augment import random_shift
from zoo.data.conversation_loader import ConversationLoader
from zoo.data.conversations import open_conversations
from zoo.engine.checkpoint import ModelCard, read_card
from zoo.engine.evaluate import explain_nonfinite
from zoo.engine.figures import can_draw
from zoo.engine.graph import capture_training
from zoo.engine.task import Place, Task, register_task
from zoo.engine.vlm_build import build_vlm, create_from_card, encoder_of
from zoo.engine.vlm_evaluate import Answer, OfImages, VlmValidation, inputs_of
from zoo.files import replacing
from zoo.optional import require
from zoo.plots import plot_images

__all__ = ["Vlm"]

_logger = logging.getLogger(__name__)

SHEET, TABLE = "answers.png", "answers.csv"
SHOWN, SHEET_COLUMNS, CAPTION_WIDTH = 24, 6, 26  # questions on the sheet, in a row; characters in a line above one


@register_task("vlm")
class Vlm(Task):
    """Trains a vision-language model, or some of its parts, to give the answers of conversations."""

    panels: ClassVar = {"loss": ("train_loss", "val_loss")}

    def __init__(self, config: VlmConfig, place: Place) -> None:
        super().__init__(config, place)
        require("transformers", "vlm")  # before the data is read
        train, val = open_conversations(config.data, config.seed)
        self.model, self.card = build_vlm(config, train)
        self.encoder = encoder_of(self.model, self.card, config.data.max_tokens)
        self.validation = VlmValidation(config, self.card, self.encoder, val)
        train, table = self.encoder.encode_all(train, config.data.bad_files)
        self.train_loader = ConversationLoader(
            *(train, table, self.encoder, self.validation.transform, config.data.batch_size, config.data.workers),
            training=True,
            seed=config.seed,
            curriculum=config.data.curriculum,
            **place.shares,
        )
        share = BatchShare(place.rank, place.world_size, place.generator)
        self.shift = partial(random_shift, padding=config.augment.crop_padding, share=share)
        self._choose_goal()
        size = f"{len(self.train_loader.samples)} conversations in batches of {config.data.batch_size}"
        _logger.info("training on %s; on a GPU kernels are compiled first", size)

    def _choose_goal(self) -> None:
        self.columns = self.validation.columns
        self.goal, self.goal_label = "token_accuracy", "validation tokens (%)"
        self.panels = {**self.panels, "right (%)": ("token_accuracy",)}
        if "accuracy" in self.columns:
            self.goal, self.goal_label = "accuracy", "validation answers (%)"
            kinds = self.validation.kind_columns
            self.panels["right (%)"] = ("accuracy", "blank_accuracy", "token_accuracy")
            self.panels |= {"right answers by kind (%)": kinds} if kinds else {}

    @staticmethod
    def create_model(card: ModelCard) -> nn.Module:
        return create_from_card(card)

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        self.batch = inputs_of(batch, self.shift if self.config.augment.crop_padding else None)
        loss = model(**self.batch, labels=batch["labels"]).loss * batch["weight"]
        if not len(self.batch["images"]):  # others have images, and processes have to do the same
            blank = torch.zeros(1, 3, *self.card.preprocessing.size, device=loss.device)
            loss = loss + 0 * model.encode_images(blank).sum()
        return loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return self.validation.scores(model, **self.place.shares)

    def capture(self) -> None:
        """Captures the towers that are trained, for batches of one image a row; texts are of any length."""
        vision, preprocessing = self.model.vision, self.card.preprocessing
        shape = torch.Size((self.config.data.batch_size, preprocessing.in_chans, *preprocessing.size))
        for number, reader in vision.readers().items():
            capture_training(reader, shape, self.config.precision)
            vision.captured[number] = reader, shape
        if not vision.captured:
            raise ValueError("cuda_graph=true captures vision towers that are trained; these are frozen")

    def explain_failure(self) -> str:
        others = {name: value for name, value in self.batch.items() if name != "images"}
        return explain_nonfinite(OfImages(self.model, others), self.batch["images"])

    def report_files(self) -> list[str]:
        asked = self.validation.questions.data.samples
        can_show = can_draw() and any(sample.images for sample in asked)
        return [*([TABLE] if asked else []), *([SHEET] if can_show else [])]

    def report(self, model: nn.Module, weights: Path, attempt: Callable[[str, Callable[[], None]], None]) -> None:
        made, output = self.report_files(), Path(self.config.output)
        if made:
            answers = sorted(self.validation.answers(model, device=self.place.device), key=lambda answer: answer.row)
            attempt(TABLE, lambda: _write_table(answers, output / TABLE))
        if SHEET in made:
            attempt(SHEET, lambda: self._draw_sheet(answers, weights, output / SHEET))

    def _draw_sheet(self, answers: list[Answer], weights: Path, path: Path) -> None:
        """Shows questions about different images, with the answer, and the true one where it is another."""
        samples = self.validation.questions.data.samples
        of_image: dict[int, list[Answer]] = {}
        for answer in answers:
            for image in samples[answer.row].images[:1]:  # none for text alone
                of_image.setdefault(image, []).append(answer)
        groups, count = list(of_image.values()), min(SHOWN, len(of_image))
        groups = [groups[number * len(groups) // count] for number in range(count)]
        chosen = [group[number % len(group)] for number, group in enumerate(groups)]  # another kind each time
        images = [self._image(samples[answer.row].images[0]) for answer in chosen]
        card = read_card(weights)
        title = f"{card.model} on {card.data}, {weights.stem} weights (epoch {card.epoch})"
        with replacing(path) as temporary:
            plot_images(
                images,
                [_caption(answer) for answer in chosen],
                [answer.right for answer in chosen],
                temporary,
                title,
                SHEET_COLUMNS,
            )

    def _image(self, number: int) -> np.ndarray:
        images = self.validation.data.images
        if isinstance(images, Tensor):
            return images[number].permute(1, 2, 0).numpy()
        with Image.open(images[number]) as image:
            return self.validation.transform(image).permute(1, 2, 0).numpy()

    def advice_on_waiting(self) -> str:
        data = self.config.data
        workers = f"data.workers (now {data.workers}; this machine has {os.cpu_count()} cores)"
        if data.name == "fashion_scenes":
            return f"these images are in memory, where {workers} has no effect; raise data.batch_size"
        return f"raise {workers}, or store smaller images"


def _caption(answer: Answer) -> str:
    lines = textwrap.wrap(answer.question, CAPTION_WIDTH)[:3]
    said = answer.seeing or "(nothing)"
    lines += textwrap.wrap(said if answer.right else f"{said} (not {answer.truth})", CAPTION_WIDTH)[:2]
    return "\n".join(line.replace("$", r"\$") for line in lines)


def _write_table(answers: list[Answer], path: Path) -> None:
    """Writes question, true answer, the model's, and the one to a blank image."""
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", "question", "truth", "answer", "right", "answer_to_blank", "right_to_blank"])
        for answer in answers:
            right = [int(answer.right), answer.blank, int(answer.blank_right)]
            writer.writerow([answer.kind, answer.question, answer.truth, answer.seeing, *right])
