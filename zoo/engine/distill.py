"""Knowledge distillation: a model learns from the logits of others besides the labels.

* Logits of a teacher, softened (Hinton et al., arXiv 1503.02531), its first guess (DeiT, arXiv 2012.12877), or the
  logits themselves.
* The moving average of the model itself as the teacher (MESA, arXiv 2205.14083).
* Progressive distillation into a series of students (arXiv 2503.01727): each is added to the sum of the earlier ones,
  which stay as they are, and so learns what these leave of the teacher. A run trains one student; the next run names
  it in ``distill.previous``; :func:`load_series` sums them. Any number of first students is a model of its own.

Who teaches sees the images that the model sees, augmented and mixed alike, in its own normalisation. It is evaluated
without gradients, is not optimised, and is in no checkpoint: a continued run loads it from where it came.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import DistillConfig
from zoo.data import Preprocessing
from zoo.engine.checkpoint import ModelCard, load_trained
from zoo.engine.predict import load_any

__all__ = ["Distillation", "FrozenModel", "Series", "load_frozen", "load_series", "teacher_loss"]

AVERAGE = "ema"


class FrozenModel(nn.Module):
    """A trained model that gives logits for another model's inputs and does not change.

    Args:
        model: Maps (B, C, H, W) to logits (B, classes).
        own: The inputs that it was trained with.
        given: The inputs that it gets. Grey ones become those of a model of colour.

    Raises:
        ValueError: If the model is of grey images and the inputs are not.
    """

    def __init__(self, model: nn.Module, own: Preprocessing, given: Preprocessing) -> None:
        super().__init__()
        if own.in_chans < given.in_chans:
            raise ValueError(f"a model of grey images cannot see images of {given.in_chans} channels")
        self.model = model.requires_grad_(False)
        own_mean, own_std, their_mean, their_std = (
            torch.tensor(values).view(1, -1, 1, 1) for values in (own.mean, own.std, given.mean, given.std)
        )
        self.register_buffer("scale", their_std / own_std, persistent=False)
        self.register_buffer("shift", (their_mean - own_mean) / own_std, persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenModel":
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Tensor:
        """Maps inputs (B, C, H, W) of the other model to float32 logits (B, classes)."""
        return self.model(inputs * self.scale + self.shift).float()


class Series(nn.Module):
    """Models whose logits are added.

    Args:
        members: Models of the same inputs and classes.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        """Maps (B, C, H, W) to logits (B, classes)."""
        logits = self.members[0](images)
        for member in self.members[1:]:
            logits = logits + member(images)
        return logits


class Distillation:
    """What a classifier learns from others.

    Args:
        config: The section ``distill``.
        card: The classifier: its classes and inputs.
        device: Where it is trained.

    Raises:
        FileNotFoundError: If a run is not there.
        ValueError: If a teacher or an earlier student knows other classes or cannot see the classifier's images.
    """

    def __init__(self, config: DistillConfig, card: ModelCard, device: torch.device) -> None:
        self.config = config
        self.label_weight = 1 - config.weight if config.label_weight is None else config.label_weight
        self.previous = [load_frozen(source, card).to(device) for source in config.previous]
        self.teacher: nn.Module | None = None
        if config.teacher and config.teacher != AVERAGE:
            self.teacher = load_frozen(config.teacher, card).to(device)
        self.active = False

    def begin(self, epoch: int, average: nn.Module | None) -> None:
        """Begins an epoch.

        Args:
            epoch: Number of finished epochs.
            average: Moving average of the classifier, if there is one.
        """
        if self.config.teacher == AVERAGE:
            self.teacher = average
        self.active = self.teacher is not None and epoch >= self.config.start_epoch

    def complete(self, model: nn.Module) -> nn.Module:
        """The classifier with the earlier students of its series, if it has any: what is evaluated."""
        return Series([*self.previous, model]) if self.previous else model

    def add_previous(self, logits: Tensor, inputs: Tensor) -> Tensor:
        """Logits (B, classes) of the classifier with those of the earlier students."""
        for student in self.previous:
            logits = logits + student(inputs)
        return logits

    def loss(self, label_loss: Tensor, logits: Tensor, inputs: Tensor) -> Tensor:
        """The whole loss.

        Args:
            label_loss: That of the labels.
            logits: Logits (B, classes), those of earlier students included.
            inputs: What the classifier saw (B, C, H, W).
        """
        if not self.active:
            return label_loss
        with torch.no_grad():
            target = self.teacher(inputs).float()
        taught = teacher_loss(logits, target, self.config.kind, self.config.temperature)
        return self.label_weight * label_loss + self.config.weight * taught


def teacher_loss(logits: Tensor, target: Tensor, kind: str = "soft", temperature: float = 1.0) -> Tensor:
    """How far a student is from its teacher, the mean over the images.

    Args:
        logits: The student's (B, classes).
        target: The teacher's (B, classes).
        kind: ``soft``, ``hard`` or ``logits``, see :class:`zoo.config.DistillConfig`.
        temperature: Of ``soft``.
    """
    if kind == "hard":
        return F.cross_entropy(logits, target.argmax(-1))
    if kind == "logits":
        return F.mse_loss(logits, target)
    student, teacher = ((values / temperature).log_softmax(-1) for values in (logits, target))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def load_frozen(source: str | Path, card: ModelCard) -> FrozenModel:
    """Loads a trained classifier that sees another one's inputs.

    Args:
        source: A run's folder, a ``.safetensors`` file of one, or the name of a model with weights.
        card: The other one: its classes and inputs.

    Raises:
        FileNotFoundError: If there is no such run.
        ValueError: If there is no such model, or it knows other classes or cannot see these images.
    """
    model, own = load_any(str(source))
    if Path(source).exists() and own.class_names != card.class_names:  # published models may name theirs otherwise
        raise ValueError(
            f"{source} knows other classes ({', '.join(own.class_names[:5])}, ...) than the data "
            f"({', '.join(card.class_names[:5])}, ...); train it on the same data first"
        )
    frozen = FrozenModel(model, own.preprocessing, card.preprocessing)
    _check_outputs(str(source), frozen, card)
    return frozen


def load_series(sources: Sequence[str | Path], device: torch.device | str = "cpu") -> tuple[Series, ModelCard]:
    """Loads the students of a progressive distillation as one model.

    Args:
        sources: Their runs' folders or files, the first student first; the first ones alone are a model too.
        device: Where it goes.

    Returns:
        The model in evaluation mode, and the card of the first student, whose inputs it takes.

    Raises:
        FileNotFoundError: If there is no such run.
        ValueError: If no source is given, or they do not know the same classes.
    """
    if not sources:
        raise ValueError("a series needs at least one run")
    first, card = load_trained(sources[0])
    members = [first, *(load_frozen(source, card) for source in sources[1:])]
    return Series(members).requires_grad_(False).to(device).eval(), card


def _check_outputs(source: str, frozen: FrozenModel, card: ModelCard) -> None:
    """Runs one empty image through the model."""
    preprocessing = card.preprocessing
    size = "x".join(map(str, preprocessing.size))
    try:
        logits = frozen(torch.zeros(1, preprocessing.in_chans, *preprocessing.size))
    except (AssertionError, RuntimeError, ValueError) as error:  # what models raise for a size they are not made for
        raise ValueError(
            f"{source} cannot see images of {size} pixels ({error}); choose another data.img_size"
        ) from error
    if logits.shape != (1, len(card.class_names)):
        raise ValueError(
            f"{source} has {logits.shape[-1]} classes and the data {len(card.class_names)}; fine-tune it on the data "
            "first and give the folder of that run"
        )
