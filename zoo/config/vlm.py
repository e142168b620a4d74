"""Settings of training generative vision-language models on conversations about images."""

from dataclasses import dataclass, field
from typing import Any

from zoo.config.checks import require_choice, require_range, require_that
from zoo.config.settings import ModelConfig, OptimConfig, TrainConfig

__all__ = [
    "LoraConfig",
    "VlmAugmentConfig",
    "VlmConfig",
    "VlmDataConfig",
    "VlmEvaluationConfig",
    "VlmModelConfig",
    "VlmOptimConfig",
]

SCENE_SIZE = 64
PARTS = ("vision", "connector", "language_model")
ADAPTED = ("vision", "language_model")


@dataclass
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685), which are trained instead of the weights of their part.

    Attributes:
        rank: Rank of the adapters; default 0, none.
        alpha: What they add is multiplied by ``alpha / rank``; default twice the rank.
        dropout: Dropout before them, 0 to 1.
        parts: Which parts get them: ``vision``, ``language_model``.
        layers: Last names of the linear layers that get them, for example ``[in_proj, out_proj]``; default all linear
            layers of these parts but the output layer and the step sizes' projection of Mamba-1.
    """

    rank: int = 0
    alpha: float | None = None
    dropout: float = 0.0
    parts: list[str] = field(default_factory=lambda: ["language_model"])
    layers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        require_range("model.lora.rank", self.rank, 0)
        require_range("model.lora.alpha", self.alpha or 0, 0)
        require_range("model.lora.dropout", self.dropout, 0, 1)
        require_that(bool(self.parts), "model.lora.parts names no part; model.lora.rank=0 means no adapters")
        for part in self.parts:
            require_choice("model.lora.parts", part, ADAPTED)


@dataclass
class VlmModelConfig(ModelConfig):
    """Vision models, a connector and a language model, see :func:`zoo.vlm.create_vlm`.

    ``name``, ``pretrained``, ``checkpoint``, ``drop_path`` and ``kwargs`` are those of the vision model; its classifier
    is left out, so ``num_classes`` has no meaning. ``checkpoint`` may be the weights of a classifier or of a CLIP run.

    Attributes:
        more_vision: Further vision models that see the same image; features are concatenated by channel. ``pretrained``
            is meant for them too.
        vision_layer: Block (or stage) of the vision models whose features are taken.
        connector: One of ``zoo.list_heads("connector")``.
        connector_kwargs: Further arguments of the connector.
        language: Repository on the Hugging Face hub or folder of a pretrained language model.
        language_kwargs: Instead, fields of transformers' configuration, from which a new language model is made:
            ``{model_type: mamba2, hidden_size: 256, num_hidden_layers: 4, ...}``. The size of the vocabulary and the
            end of text follow from the tokenizer.
        tokenizer: Repository or folder of a tokenizer of transformers, or ``words`` for the words of the training
            texts; default that of ``language``, and ``words`` for a new language model.
        chat_format: How conversations are written, see ``zoo.heads.vlm.CHAT_FORMATS``.
        images_in_text: Images stand where the text has ``<image>``; default before the text.
        freeze: Parts that are not trained: ``vision``, ``connector``, ``language_model``.
        weights: Start from the weights of a whole model: of another run (its folder or a file), an earlier stage for
            example, or a released file of Cobra or ML-Mamba.
        lora: Low-rank adapters.
    """

    name: str = "vim_nano"
    more_vision: list[str] = field(default_factory=list)
    vision_layer: int = -2
    connector: str = "mlp_connector"
    connector_kwargs: dict[str, Any] = field(default_factory=dict)
    language: str | None = None
    language_kwargs: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    chat_format: str = "zephyr"
    images_in_text: bool = False
    freeze: list[str] = field(default_factory=list)
    weights: str | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in self.freeze:
            require_choice("model.freeze", part, PARTS)
        require_that(set(self.freeze) != set(PARTS), "model.freeze names all parts: there is nothing to train")
        adapted = [part for part in self.lora.parts if self.lora.rank and part in self.freeze]
        require_that(
            not adapted,
            f"model.freeze names {', '.join(adapted)}, whose adapters model.lora trains; leave it out: with adapters "
            "its own weights stay as they are",
        )

    @property
    def tokenizer_name(self) -> str:
        """``tokenizer`` with its default."""
        return self.tokenizer or self.language or "words"


@dataclass
class VlmDataConfig:
    """Which conversations about images are used and how they are read.

    Attributes:
        name: ``fashion_scenes`` (composed of Fashion-MNIST), or ``llava`` for ``root/<split>.json``, a list of
            conversations in the format of LLaVA's instruction data.
        root: Folder of the data; of ``fashion_scenes`` that of Fashion-MNIST's files, if they are not found.
        images: Folder of the images, which ``llava`` names by their path from there; default ``root/images``.
        train_split: Name of the training split.
        val_split: Name of the split that is evaluated after every epoch; null keeps ``val_samples`` conversations of
            the training split apart (``llava`` only).
        train_samples: Use this many training conversations, or scenes; default all, and 8,000 scenes.
        val_samples: Number for validation, likewise; default all, and 1,000 scenes.
        texts: What is said about ``fashion_scenes``: ``all``, ``captions`` or ``questions``.
        turns: Questions of a scene in one training conversation, at most, its caption included. With several the image
            is read once for all of them, but earlier answers help with later ones. Validation asks each alone.
        all_questions: Whether training asks all that is known of the colours and places of items in a scene; default
            one question of a kind, as validation does.
        curriculum: Passes over the training conversations, or parts of one, in which only the easiest are drawn: for a
            third of the time 8 %, then more and more of them. Easy are scenes of few items, or short conversations of
            ``llava``. A new language model learns to look much sooner this way; default 0, none.
        download: Fetch Fashion-MNIST if it is not on this machine.
        bad_files: What to do with conversations that cannot be used, those that are too long among them: ``error``, or
            ``skip`` with a report.
        max_tokens: Most tokens of a conversation, images included; default what the language model can hold.
        img_size: Side of the square images that the model sees, in pixels; default the vision model's, and 64 of
            ``fashion_scenes``.
        crop_mode: How images that are not square become so: ``squash`` regardless of their shape, ``center`` cuts off
            what is beyond the middle, ``border`` pads.
        batch_size: Conversations per step and process.
        val_batch_size: The same for evaluation; default ``batch_size``.
        workers: Processes that read images or draw scenes.
    """

    name: str = "fashion_scenes"
    root: str | None = None
    images: str | None = None
    train_split: str = "train"
    val_split: str | None = "val"
    train_samples: int | None = None
    val_samples: int | None = None
    texts: str = "all"
    turns: int = 1
    all_questions: bool = False
    curriculum: float = 0.0
    download: bool = True
    bad_files: str = "error"
    max_tokens: int | None = None
    img_size: int | None = None
    crop_mode: str = "squash"
    batch_size: int = 32
    val_batch_size: int | None = None
    workers: int = 4

    def __post_init__(self) -> None:
        require_choice("data.name", self.name, ("fashion_scenes", "llava"))
        require_choice("data.texts", self.texts, ("all", "captions", "questions"))
        require_choice("data.bad_files", self.bad_files, ("error", "skip"))
        require_choice("data.crop_mode", self.crop_mode, ("squash", "center", "border"))
        for name in ("train_samples", "val_samples", "max_tokens", "img_size", "val_batch_size"):
            value = getattr(self, name)
            require_range(f"data.{name}", 1 if value is None else value, 1)
        require_range("data.turns", self.turns, 1)
        require_range("data.curriculum", self.curriculum, 0)
        require_range("data.batch_size", self.batch_size, 1)
        require_range("data.workers", self.workers, 0)
        if self.val_split is None:
            require_that(self.name == "llava", f"data.val_split cannot be null for {self.name}")
            require_that(
                self.val_samples is not None,
                "without data.val_split, data.val_samples has to say how many conversations are kept for validation",
            )

    @property
    def image_size(self) -> int | None:
        """``img_size`` with its default; None for the vision model's."""
        return self.img_size or (SCENE_SIZE if self.name == "fashion_scenes" else None)


@dataclass
class VlmAugmentConfig:
    """What is done to training images. Conversations stay as they are, so what they tell must stay true.

    Attributes:
        crop_padding: Shift by up to this many pixels in each direction, filled with zeros.
    """

    crop_padding: int = 0

    def __post_init__(self) -> None:
        require_range("augment.crop_padding", self.crop_padding, 0)


@dataclass
class VlmEvaluationConfig:
    """What is measured after every epoch besides the loss.

    Attributes:
        questions: Validation questions that are answered, each twice: with its image and with a blank one. An answer is
            right if it is the true one but for case, spaces and the full stop. With 0 none is, and the best weights are
            those whose next tokens are most often right.
        max_new_tokens: Most tokens of an answer; default as many as the longest true answer has.
    """

    questions: int = 1000
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        require_range("evaluation.questions", self.questions, 0)
        require_range("evaluation.max_new_tokens", 1 if self.max_new_tokens is None else self.max_new_tokens, 1)


@dataclass
class VlmOptimConfig(OptimConfig):
    """Optimiser and learning rate; the log shows that of the first part that is trained.

    Attributes:
        vision_lr: Peak learning rate of the vision models; default ``lr``.
        connector_lr: Of the connector, likewise.
        language_lr: Of the language model, likewise.
    """

    vision_lr: float | None = None
    connector_lr: float | None = None
    language_lr: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vision_lr", "connector_lr", "language_lr"):
            require_range(f"optim.{name}", getattr(self, name) or 0, 0)
        require_that(
            not self.part_lr or self.lr > 0, "learning rates of parts are set in proportion to optim.lr, which is 0"
        )
        require_that(self.layer_decay is None, "optim.layer_decay does not go through three parts; use optim.vision_lr")

    @property
    def part_lr(self) -> dict[str, float]:
        rates = dict(zip(PARTS, (self.vision_lr, self.connector_lr, self.language_lr), strict=True))
        if set(rates.values()) == {None}:
            return {}
        return {part: self.lr if rate is None else rate for part, rate in rates.items()}


@dataclass
class VlmConfig(TrainConfig):
    """Settings of a run that trains a vision-language model, or some of its parts.

    Attributes:
        data: The conversations and their images.
        augment: What is done to training images.
        evaluation: What is measured after every epoch.
    """

    task: str = "vlm"
    model: VlmModelConfig = field(default_factory=VlmModelConfig)
    data: VlmDataConfig = field(default_factory=VlmDataConfig)
    augment: VlmAugmentConfig = field(default_factory=VlmAugmentConfig)
    optim: VlmOptimConfig = field(default_factory=VlmOptimConfig)
    evaluation: VlmEvaluationConfig = field(default_factory=VlmEvaluationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        model = self.model
        require_that(
            (model.language is None) == bool(model.language_kwargs),
            "give either model.language, a pretrained language model, or model.language_kwargs for a new one",
        )
        require_that(
            model.language is not None or "model_type" in model.language_kwargs,
            "model.language_kwargs needs model_type, the kind of language model: mamba, mamba2, bamba, ...",
        )
