"""Contrastive training of an image tower and a text tower on images with captions."""

import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import zoo
from zoo.config import ClipConfig, ClipModelConfig
from zoo.data import BatchAugment, Preprocessing
from zoo.data.captions import Tokenizer, build_tokenizer, caption_loader, open_captions, words_of
from zoo.engine.build import recompute
from zoo.engine.checkpoint import ModelCard, read_card
from zoo.engine.evaluate import evaluate, explain_nonfinite
from zoo.engine.figures import can_draw
from zoo.engine.graph import capture_training
from zoo.engine.task import Place, Task, register_task
from zoo.files import replacing
from zoo.optional import require
from zoo.plots import plot_images
from zoo.weights import load_features
from zoo.zero_shot import RANKS, ZeroShotClassifier, embed_pairs, open_classes, pair_recall

__all__ = ["Clip"]

SHEET = "captions.png"
SHOWN, SHEET_COLUMNS, CAPTION_WIDTH = 24, 6, 22  # images on the sheet, in a row; characters in a line above one


@register_task("clip")
class Clip(Task):
    """Trains two towers to give an image and its caption the same feature."""

    goal = "recall1"
    goal_label = "validation recall@1 (%), mean of both ways"
    panels: ClassVar = {"contrastive loss": ("train_loss", "val_loss")}
    loss_is_local = False  # images and captions of all processes are compared

    def __init__(self, config: ClipConfig, place: Place) -> None:
        super().__init__(config, place)
        require("open_clip", "vlm")  # before the data is read
        if config.data.batch_size * place.world_size < 2:
            raise ValueError("a batch of one pair has nothing to be told apart from; raise data.batch_size")
        self.train_data = open_captions(config.data, training=True)
        self.val_data = open_captions(config.data, training=False)
        words = None
        if config.model.tokenizer == "words":
            words = self.train_data.words or words_of(self.train_data.captions)
        self.tokenizer = build_tokenizer(config.model.context_length, words)
        self.train_tokens, self.val_tokens = (
            self.tokenizer(list(data.captions)).int().to(place.device) for data in (self.train_data, self.val_data)
        )
        self.model, self.card = _build(config, self.tokenizer, words)
        preprocessing, augment = self.card.preprocessing, config.augment
        shares = {"seed": config.seed, **place.shares}
        self.train_loader = caption_loader(self.train_data, preprocessing, config.data, augment, **shares)
        self.val_loader = caption_loader(self.val_data, preprocessing, config.data, **shares)
        self.augment = BatchAugment(
            preprocessing.mean,
            preprocessing.std,
            crop_padding=augment.crop_padding,
            flip=augment.flip,
            erase=augment.erase,
            black_point=augment.black_point,
        ).to(place.device)
        self.criterion = _loss(config, place.rank, place.world_size)
        self._open_classes()
        recalls = {way: tuple(f"{way}_recall{k}" for k in RANKS) for way in ("i2t", "t2i")}
        classes = ("zero_shot_top1",) if self.classes else ()
        self.columns = ("val_loss", "recall1", *recalls["i2t"], *recalls["t2i"], *classes)
        self.panels = {
            **self.panels,
            "captions found by image (%)": recalls["i2t"],
            "images found by caption (%)": recalls["t2i"],
            **({"zero-shot accuracy (%)": classes} if classes else {}),
        }

    def _open_classes(self) -> None:
        config, data = self.config.zero_shot, self.config.data
        self.classes = None
        if config.data is None:
            return
        options = {"workers": data.workers, "bad_files": data.bad_files, "download": data.download}
        self.classes = open_classes(config, self.card.preprocessing, data.batch_size, **options, **self.place.shares)
        names = self.classes[2]
        self.tokenizer([template.format(name) for template in config.templates for name in names])  # unknown words

    @staticmethod
    def create_model(card: ModelCard) -> nn.Module:
        require("open_clip", "vlm")
        from zoo.heads.clip import create_clip

        kwargs = {name: value for name, value in card.kwargs.items() if name != "tokenizer"}
        return create_clip(card.model, **kwargs)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.inputs = self.augment(batch[0]), self.train_tokens[batch[1]].long()
        _clamp_scale(self.model)
        output = model(*self.inputs)
        with torch.autocast(self.place.device.type, enabled=False):  # differences of similarities are small
            return self.criterion(**{name: value.float() for name, value in output.items()})

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        _clamp_scale(model)
        precision = self.config.precision
        images, texts = embed_pairs(model, self.val_loader, self.val_tokens, self.augment.normalize, precision)
        scores = {"val_loss": self._mean_loss(model, images, texts)}
        scores |= pair_recall(images, texts, self.val_data.image_ids, self.val_data.caption_ids)
        scores["recall1"] = (scores["i2t_recall1"] + scores["t2i_recall1"]) / 2
        if self.classes:
            loader, present, names = self.classes
            classifier = ZeroShotClassifier(model, self.tokenizer, names, self.config.zero_shot.templates)
            scores["zero_shot_top1"] = evaluate(classifier, loader, present, len(names), precision).top1
        return scores

    def _mean_loss(self, model: nn.Module, images: Tensor, texts: Tensor) -> float:
        """Over batches of as many pairs as training has, whatever the number of processes; a smaller rest is left."""
        size = min(self.config.data.batch_size * self.place.world_size, len(images))
        criterion = _loss(self.config)
        rest = {"logit_scale": model.logit_scale.exp()}
        rest |= {} if model.logit_bias is None else {"logit_bias": model.logit_bias}
        whole = len(images) // size * size
        batches = zip(images[:whole].split(size), texts[:whole].split(size), strict=True)
        losses = [criterion(image_features=image, text_features=text, **rest) for image, text in batches]
        return torch.stack(losses).mean().item()

    def explain_failure(self) -> str:
        images, tokens = self.inputs
        towers = (("image", self.model.visual, images), ("text", self.model.text, tokens))
        return "; ".join(f"{name} tower: {explain_nonfinite(tower, inputs)}" for name, tower, inputs in towers)

    def capture(self) -> None:
        preprocessing = self.card.preprocessing
        shape = (self.config.data.batch_size, preprocessing.in_chans, *preprocessing.size)
        capture_training(self.model.visual, shape, self.config.precision)  # which is most of the work

    def report_files(self) -> list[str]:
        return [SHEET] if can_draw() else []

    def report(self, model: nn.Module, weights: Path, attempt: Callable[[str, Callable[[], None]], None]) -> None:
        if can_draw():
            attempt(SHEET, lambda: self._draw_sheet(model, weights))

    @torch.no_grad()
    def _draw_sheet(self, model: nn.Module, weights: Path) -> None:
        """Shows the first validation images and which caption fits each best of all."""
        loader = caption_loader(self.val_data, self.card.preprocessing, self.config.data, device=self.place.device)
        images, texts = embed_pairs(model, loader, self.val_tokens, self.augment.normalize, self.config.precision)
        best = (images[:SHOWN] @ texts.T).argmax(dim=1).tolist()
        ids, captions = self.val_data.caption_ids.tolist(), self.val_data.captions
        own = [{ids[other] for other in _pairs_of(self.val_data.image_ids, number)} for number in range(len(best))]
        shown = torch.cat([batch for batch, _ in _until(loader, SHOWN)])[:SHOWN].permute(0, 2, 3, 1).cpu().numpy()
        card = read_card(weights)
        title = f"{card.model} on {card.data}, {weights.stem} weights (epoch {card.epoch}): the best of all captions"
        with replacing(Path(self.config.output) / SHEET) as path:
            plot_images(
                list(shown),
                [textwrap.fill(captions[index], CAPTION_WIDTH) for index in best],
                [ids[index] in right for index, right in zip(best, own, strict=True)],
                path,
                title,
                SHEET_COLUMNS,
            )

    def advice_on_waiting(self) -> str:
        data = self.config.data
        workers = f"data.workers (now {data.workers}; this machine has {os.cpu_count()} cores)"
        if data.name == "fashion_scenes":
            return f"these images are in memory, where {workers} has no effect; raise data.batch_size"
        return f"raise {workers}, or store smaller images"


def _build(config: ClipConfig, tokenizer: Tokenizer, words: tuple[str, ...] | None) -> tuple[nn.Module, ModelCard]:
    """Creates the model for a tokenizer and writes down how."""
    open_clip = require("open_clip", "vlm")
    from zoo.heads.clip import create_clip

    model_config, data = config.model, config.data
    context = {"context_length": model_config.context_length}
    kwargs: dict[str, Any] = {
        "text": model_config.text,
        "embed_dim": model_config.embed_dim,
        "image_size": data.image_size,
        "loss": config.loss,
        "vision_kwargs": {"drop_path_rate": model_config.drop_path, **model_config.kwargs},
        "text_kwargs": {"vocab_size": tokenizer.vocab_size, **context, **model_config.text_kwargs},
    }
    model = create_clip(model_config.name, **kwargs, pretrained=model_config.pretrained)
    _prepare_vision(model, model_config)
    if config.grad_checkpointing:
        recompute(model, config.grad_checkpointing)
    wanted = open_clip.get_model_preprocess_cfg(model)
    preprocessing = Preprocessing(
        size=tuple(model.visual.image_size),
        in_chans=3,
        mean=tuple(data.mean or wanted["mean"]),
        std=tuple(data.std or wanted["std"]),
        interpolation=wanted["interpolation"],
        crop_pct=data.crop_pct,
    )
    kwargs["tokenizer"] = {**context, "words": words and list(words)}
    names = tuple(config.zero_shot.class_names or ())
    return model, ModelCard(model_config.name, kwargs, names, preprocessing, data=data.name, task="clip")


def _prepare_vision(model: nn.Module, config: ClipModelConfig) -> None:
    """Loads the vision model's weights, if a file is given, and freezes it, if asked."""
    trunk = model.visual.trunk
    if config.checkpoint:
        load_features(trunk, zoo.load_checkpoint(config.checkpoint))
    if config.lock_vision:
        model.lock_image_tower(config.unlocked_groups)


def _loss(config: ClipConfig, rank: int = 0, world_size: int = 1) -> nn.Module:
    from zoo.heads.clip import create_loss

    return create_loss(config.loss, rank, world_size)


@torch.no_grad()
def _clamp_scale(model: nn.Module) -> None:
    """Takes back what the last update has raised the factor of the similarities beyond its limit."""
    from zoo.heads.clip import MAX_LOGIT_SCALE

    model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)


def _pairs_of(ids: Tensor, number: int) -> list[int]:
    """The pairs with the same image as a given pair."""
    return (ids == ids[number]).nonzero().flatten().tolist()


def _until(loader: Any, count: int) -> Any:
    """The first batches that hold so many images."""
    seen = 0
    for images, numbers in loader:
        if seen >= count:
            return
        seen += len(images)
        yield images, numbers
