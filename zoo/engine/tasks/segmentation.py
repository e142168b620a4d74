"""Semantic segmentation."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from zoo.config import SegmentationConfig
from zoo.data import Normalize
from zoo.engine.checkpoint import ModelCard, read_card
from zoo.engine.dense_build import build_segmentor, mask_loader, open_masks
from zoo.engine.dense_evaluate import Gallery, evaluate_segmentation
from zoo.engine.dense_report import attempt, class_iou_rows, draw_mask_sheet, write_rows
from zoo.engine.evaluate import explain_nonfinite
from zoo.engine.figures import can_draw, draw_confusion
from zoo.engine.graph import capture_training
from zoo.engine.task import Place, Task, register_task
from zoo.heads.segmentor import check_masks
from zoo.segmentor import create_segmentor

__all__ = ["Segmentation"]


@register_task("segmentation")
class Segmentation(Task):
    """Trains a segmentor on masks. Under several processes, batch norms see the images of all of them."""

    columns = ("val_loss", "miou", "macc", "aacc")
    goal = "miou"
    goal_label = "validation mIoU (%)"
    panels: ClassVar = {"loss": ("train_loss", "val_loss"), "pixels (%)": ("miou", "macc", "aacc")}

    def __init__(self, config: SegmentationConfig, place: Place) -> None:
        super().__init__(config, place)
        self.captured = False
        self.train_data = open_masks(config, training=True)
        self.val_data = open_masks(config, training=False, class_names=self.train_data.class_names)
        self.model, self.card = build_segmentor(config, self.train_data.class_names)
        if place.world_size > 1 and place.device.type == "cuda":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.normalize = Normalize(self.model.mean, self.model.std).to(place.device)
        self.train_loader = mask_loader(self.train_data, self.card.preprocessing, config, training=True, **place.shares)
        self.val_loader = mask_loader(self.val_data, self.card.preprocessing, config, training=False, **place.shares)

    @staticmethod
    def create_model(card: ModelCard) -> nn.Module:
        return create_segmentor(card.model, **card.kwargs)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.inputs = self.normalize(batch[0])
        if self.captured:
            check_masks(self.inputs, batch[1], self.model.num_classes)  # which a graph cannot
        return model(self.inputs, batch[1])

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        gallery = None
        if self.place.rank == 0:
            gallery = Gallery(len(range(0, len(self.val_data), self.place.world_size)))
        scores, _ = evaluate_segmentation(model, self.card, self.val_loader, self.config, gallery)
        if gallery is not None:
            self._draw(gallery, f"{self.card.model} on {self.card.data}, mIoU {scores['miou']:.2f} %")
        return scores

    def _draw(self, gallery: Gallery, title: str) -> None:
        path = Path(self.config.output) / "predictions.png"
        attempt(path.name, lambda: draw_mask_sheet(gallery, self.card.shown_names, path, title))

    def capture(self) -> None:
        shape = (self.config.data.batch_size, self.card.preprocessing.in_chans, *self.config.crop_size)
        masks = torch.zeros(shape[0], *shape[2:], dtype=torch.int64, device=self.place.device)
        capture_training(self.model, shape, self.config.precision, masks)
        self.captured = True

    def explain_failure(self) -> str:
        return explain_nonfinite(self.model, self.inputs)

    def report_files(self) -> list[str]:
        return ["classes.csv", "predictions.png", *(["confusion.png"] if can_draw() else [])]

    def report(self, model: nn.Module, weights: Path, attempt: Callable[[str, Callable[[], None]], None]) -> None:
        every, preprocessing = {"training": False, "device": self.place.device}, self.card.preprocessing
        loader = mask_loader(self.val_data, preprocessing, self.config, **every)  # all images, not a share of them
        gallery = Gallery(len(self.val_data))
        found, scores = evaluate_segmentation(model, self.card, loader, self.config, gallery)
        card, names, output = read_card(weights), self.card.shown_names, Path(self.config.output)
        which = f"{card.model} on {card.data}, {weights.stem} weights (epoch {card.epoch})"
        title = f"{which}, mIoU {found['miou']:.2f} %"
        attempt("classes.csv", lambda: write_rows(class_iou_rows(scores, names), output / "classes.csv"))
        attempt("predictions.png", lambda: draw_mask_sheet(gallery, names, output / "predictions.png", title))
        if can_draw():
            confusion = scores.confusion.compute().cpu()
            attempt("confusion.png", lambda: draw_confusion(confusion, names, output / "confusion.png", title))
