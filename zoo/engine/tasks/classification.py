"""Image classification."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

import zoo
from zoo.config import ClassificationConfig
from zoo.data import BatchAugment, BatchShare, make_loader, open_split
from zoo.data.loaders import IN_MEMORY
from zoo.engine.build import build_loss, build_model
from zoo.engine.checkpoint import ModelCard
from zoo.engine.class_balance import ClassBalance
from zoo.engine.class_report import ClassReport
from zoo.engine.distill import Distillation
from zoo.engine.evaluate import evaluate, explain_nonfinite
from zoo.engine.graph import capture_training
from zoo.engine.task import Place, Task, register_task
from zoo.optional import require

__all__ = ["Classification"]

BALANCED = ("balanced_accuracy", "macro_f1", "auroc")


@register_task("classification")
class Classification(Task):
    """Trains a classifier of ours or of timm on labels, and on the logits of others if there are any."""

    columns = ("train_top1", "val_loss", "top1", "top5")
    goal = "top1"
    goal_label = "validation accuracy (%)"
    panels: ClassVar = {"cross-entropy loss": ("train_loss", "val_loss"), "top-1 accuracy (%)": ("train_top1", "top1")}

    def __init__(self, config: ClassificationConfig, place: Place) -> None:
        super().__init__(config, place)
        data = config.data
        self.train_data, class_names = open_split(data, data.train_split, training=True)
        self.val_data, _ = open_split(data, data.val_split, class_names=class_names)
        self.model, self.card = build_model(config, self.train_data, class_names)
        preprocessing, shares = self.card.preprocessing, {"seed": config.seed, **place.shares}
        self.train_loader = make_loader(self.train_data, preprocessing, data, augment=config.augment, **shares)
        self.val_loader = make_loader(self.val_data, preprocessing, data, **shares)
        self.augment = BatchAugment(
            preprocessing.mean,
            preprocessing.std,
            crop_padding=config.augment.crop_padding,
            flip=config.augment.flip,
            erase=config.augment.erase,
            share=BatchShare(place.rank, place.world_size, place.generator),
        ).to(place.device)
        self.num_classes = self.card.kwargs["num_classes"]
        self.mixup, self.criterion = build_loss(config, self.num_classes)
        self.distillation = Distillation(config.distill, self.card, place.device)
        self.balance = ClassBalance(self.num_classes, place.device) if config.scores == "balanced" else None
        if self.balance:
            self.columns = (*self.columns, *BALANCED)
            self.goal, self.goal_label = BALANCED[0], "balanced validation accuracy (%)"
            self.panels = {**self.panels, "scores that weigh classes alike (%)": BALANCED}
        self.reset_train_scores()

    @staticmethod
    def create_model(card: ModelCard) -> nn.Module:
        return zoo.create_model(card.model, pretrained=False, **card.kwargs)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = self.augment(batch[0]), batch[1]
        if self.mixup:
            inputs, targets = self.mixup(inputs, targets)
        self.inputs = inputs
        logits = self.distillation.add_previous(model(inputs).float(), inputs)
        self._count(logits, targets)
        return self.distillation.loss(self.criterion(logits, targets), logits, inputs)

    def begin(self, epoch: int, average: nn.Module | None) -> None:
        self.distillation.begin(epoch, average)

    def _count(self, logits: Tensor, targets: Tensor) -> None:
        """Of mixed images, the class with the larger share counts as the right one."""
        labels = targets if targets.ndim == 1 else targets.argmax(-1)
        self.counts += torch.stack([(logits.detach().argmax(-1) == labels).sum(), labels.new_tensor(len(labels))])

    def reset_train_scores(self, state: Mapping[str, Tensor] | None = None) -> None:
        self.counts = torch.zeros(2, dtype=torch.long, device=self.place.device)  # right answers, images
        if state and self.place.rank == 0:
            self.counts += state["counts"].to(self.place.device)

    def train_state(self) -> dict[str, Tensor]:
        return {"counts": _total(self.counts)}

    def train_scores(self) -> dict[str, float]:
        right, images = _total(self.counts).tolist()
        return {"train_top1": 100 * right / images}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        if self.balance:
            self.balance.reset()
        scores = evaluate(
            self.distillation.complete(model),
            self.val_loader,
            self.augment.normalize,
            self.num_classes,
            precision=self.config.precision,
            balance=self.balance,
        )
        balanced = self.balance.compute() if self.balance else {}
        return {
            **{"val_loss": scores.loss, "top1": scores.top1, "top5": scores.top5},
            **{name: 100 * balanced[name] for name in balanced},
        }

    def explain_failure(self) -> str:
        return explain_nonfinite(self.model, self.inputs)

    def capture(self) -> None:
        preprocessing = self.card.preprocessing
        shape = (self.config.data.batch_size, preprocessing.in_chans, *preprocessing.size)
        capture_training(self.model, shape, self.config.precision)

    def report_files(self) -> list[str]:
        return ClassReport(self.config, self.card).files()

    def report(self, model: nn.Module, weights: Path, attempt: Callable[[str, Callable[[], None]], None]) -> None:
        loader = make_loader(self.val_data, self.card.preprocessing, self.config.data, self.place.device)  # all images
        ClassReport(self.config, self.card).make(self.distillation.complete(model), loader, weights, attempt)

    def advice_on_waiting(self) -> str:
        data = self.config.data
        workers = f"data.workers (now {data.workers}; this machine has {os.cpu_count()} cores)"
        if data.name in IN_MEMORY:
            return f"these images are in memory, where {workers} has no effect; raise data.batch_size"
        return f"raise {workers}, or store smaller images"


def _total(tensor: Tensor) -> Tensor:
    """The sum over all processes."""
    return require("accelerate.utils").reduce(tensor, "sum")
