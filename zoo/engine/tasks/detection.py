"""Object detection and instance segmentation."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from zoo.config import DetectionConfig
from zoo.detector import create_detector
from zoo.engine.checkpoint import ModelCard, read_card
from zoo.engine.dense_build import box_loader, build_detector, open_boxes
from zoo.engine.dense_evaluate import Gallery, evaluate_detection
from zoo.engine.dense_report import attempt, class_ap_rows, draw_box_sheet, write_rows
from zoo.engine.evaluate import explain_nonfinite
from zoo.engine.graph import capture_training
from zoo.engine.task import Place, Task, register_task

__all__ = ["Detection"]

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


@register_task("detection")
class Detection(Task):
    """Trains a detector on boxes and, if its head predicts them, masks."""

    columns = ("box_ap", "box_ap50", "box_ap75")
    goal = "box_ap"
    goal_label = "validation box AP (%)"
    panels: ClassVar = {"loss": ("train_loss",), "average precision of boxes (%)": columns}

    def __init__(self, config: DetectionConfig, place: Place) -> None:
        super().__init__(config, place)
        self.train_data = open_boxes(config, training=True)
        self.val_data = open_boxes(config, training=False, class_names=self.train_data.class_names)
        self.model, self.card = build_detector(config, self.train_data.class_names)
        if self.model.predicts_masks:
            columns = ("mask_ap", "mask_ap50", "mask_ap75")
            self.columns = (*self.columns, *columns)
            self.panels = {**self.panels, "average precision of masks (%)": columns}
        self.train_loader = box_loader(self.train_data, self.card.preprocessing, config, training=True, **place.shares)
        self.val_loader = box_loader(self.val_data, self.card.preprocessing, config, training=False, **place.shares)

    @staticmethod
    def create_model(card: ModelCard) -> nn.Module:
        return create_detector(card.model, **card.kwargs)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.images = [image.float() / 255 for image in batch[0]]
        self.losses = model(self.images, batch[1])
        return torch.stack(list(self.losses.values())).sum()

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        gallery = None
        if self.place.rank == 0:
            gallery = Gallery(len(range(0, len(self.val_data), self.place.world_size)))
        scores, _ = evaluate_detection(model, self.val_loader, self.config.precision, gallery)
        if gallery is not None:
            path = Path(self.config.output) / "predictions.png"
            title = f"{self.card.model} on {self.card.data}, {_summary(scores)}"
            attempt(path.name, lambda: draw_box_sheet(gallery, self.card.shown_names, path, title))
        return scores

    def capture(self) -> None:
        """Captures the backbone, if all batches are squares of one size."""
        config, data, size = self.config, self.config.data, self.config.data.max_size
        if not config.augment.jitter and (data.name != "fashion_scenes" or data.min_size != [size]):
            super().capture()
        shape = (data.batch_size, self.card.preprocessing.in_chans, size, size)
        capture_training(self.model.backbone.body, shape, config.precision)

    def explain_failure(self) -> str:
        names = [name for name, value in self.losses.items() if not value.isfinite().all()]
        images, _ = self.model.transform(self.images)
        reason = explain_nonfinite(self.model.backbone, images.tensors)
        return f"not finite are {', '.join(names)}; in the backbone, {reason}"

    def report_files(self) -> list[str]:
        return ["classes.csv", "predictions.png"]

    def report(self, model: nn.Module, weights: Path, attempt: Callable[[str, Callable[[], None]], None]) -> None:
        every, preprocessing = {"training": False, "device": self.place.device}, self.card.preprocessing
        loader = box_loader(self.val_data, preprocessing, self.config, **every)  # all images, not a share of them
        gallery = Gallery(len(self.val_data))
        found, scores = evaluate_detection(model, loader, self.config.precision, gallery)
        card, names, output = read_card(weights), self.card.shown_names, Path(self.config.output)
        title = f"{card.model} on {card.data}, {weights.stem} weights (epoch {card.epoch}), {_summary(found)}"
        attempt("classes.csv", lambda: write_rows(class_ap_rows(scores, names), output / "classes.csv"))
        attempt("predictions.png", lambda: draw_box_sheet(gallery, names, output / "predictions.png", title))


def _summary(scores: dict[str, float]) -> str:
    kinds = [kind for kind in ("box", "mask") if f"{kind}_ap" in scores]
    return ", ".join(f"{kind} AP {scores[f'{kind}_ap']:.2f} %" for kind in kinds)
