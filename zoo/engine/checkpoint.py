"""What a run leaves on disk: weights that describe themselves, and the state from which training continues.

A run's folder holds::

    config.yaml                     the complete configuration
    log.csv                         one row per epoch
    best.safetensors                weights of the highest validation score (their moving average, if there is one)
    last.safetensors                the same of the last epoch
    checkpoints/epoch-0007/         the two newest states: model.safetensors and training.pt
    checkpoints/epoch-0007+00000300/    such a state within an epoch, 300 updates after the seventh

Pictures and tables are listed in :mod:`zoo.engine.report`.

Everything is written under a temporary name, through to the disk, and then renamed, so that a run killed at any moment
leaves whole files, and so does a machine. What several processes have divided is gathered and written by the main one:
a state depends neither on their number nor on the strategy. The header of every ``.safetensors`` file names the model,
its arguments, the classes and the preprocessing.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from zoo.data import Preprocessing
from zoo.files import replacing

__all__ = ["Checkpoint", "ModelCard", "find_checkpoint", "load_trained", "read_card", "save_checkpoint", "save_weights"]

_logger = logging.getLogger(__name__)

KEPT = 2
HEADER_KEY = "vision_ssm_zoo"


@dataclass(frozen=True)
class ModelCard:
    """What is needed to use a weight file: stored in its header.

    Attributes:
        model: Name for ``zoo.create_model``.
        kwargs: Its keyword arguments, ``num_classes`` and ``in_chans`` among them.
        class_names: Names in label order, as the data's folders are called.
        preprocessing: How images become inputs.
        data: Name of the data that it was trained on.
        epoch: Number of epochs trained.
        scores: Of the validation data after that epoch, by the names of the log's columns.
        descriptions: Readable names in label order, if ``class_names`` are codes; else empty.
        task: What it was trained for, see :mod:`zoo.engine.task`.
    """

    model: str
    kwargs: Mapping[str, Any]
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    data: str
    epoch: int = 0
    scores: Mapping[str, float] = field(default_factory=dict)
    descriptions: tuple[str, ...] = ()
    task: str = "classification"

    @property
    def shown_names(self) -> tuple[str, ...]:
        """Names in label order for people to read."""
        return self.descriptions or self.class_names

    def to_header(self) -> dict[str, str]:
        """Returns the card as safetensors header fields."""
        return {"format": "pt", HEADER_KEY: json.dumps(asdict(self))}

    @classmethod
    def from_header(cls, header: Mapping[str, str]) -> "ModelCard":
        """Reads what :meth:`to_header` made."""
        values = json.loads(header[HEADER_KEY])
        preprocessing = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values["preprocessing"].items()
        }
        values["preprocessing"] = Preprocessing(**preprocessing)
        values["class_names"] = tuple(values["class_names"])
        values["descriptions"] = tuple(values["descriptions"])
        known = {entry.name for entry in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})  # others are of other versions


@dataclass(frozen=True)
class Checkpoint:
    """A state to continue from.

    Attributes:
        path: Its folder.
        weights: The model's state dictionary.
        training: ``epoch`` (number of finished epochs), ``update`` (updates after them) and the loop's own state.
    """

    path: Path
    weights: dict[str, Tensor]
    training: dict[str, Any]


def save_weights(path: str | Path, weights: Mapping[str, Tensor], card: ModelCard) -> None:
    """Writes a ``.safetensors`` file with the card in its header, replacing an older one in a single step."""
    path = Path(path)
    # Cloned, as safetensors refuses tensors that share memory (tied weights).
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in weights.items()}
    with replacing(path) as temporary:
        temporary.write_bytes(save(tensors, card.to_header()))
        _write_through(temporary)


def load_trained(path: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, ModelCard]:
    """Loads a model that this package trained.

    Args:
        path: A ``.safetensors`` file, or a run's folder for its best weights.
        device: Where the model goes.

    Returns:
        The model in evaluation mode, and its card.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or has no card because something else wrote it.
    """
    from zoo.engine.task import find_task  # tasks are built on this module

    path = Path(path)
    file = path / "best.safetensors" if path.is_dir() else path
    card = read_card(file)
    model = find_task(card.task).create_model(card)
    model.load_state_dict(load_file(file))
    return model.to(device).eval(), card


def read_card(file: str | Path) -> ModelCard:
    """Reads the card of a ``.safetensors`` file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or has no card because something else wrote it.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"no weights at {file}")
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error})") from error
    if HEADER_KEY not in header:
        raise ValueError(
            f"{file} does not say which model it belongs to; give the model's name and the file separately"
        )
    return ModelCard.from_header(header)


def save_checkpoint(
    output: str | Path,
    epoch: int,
    update: int,
    weights: Mapping[str, Tensor],
    training: Mapping[str, Any],
    card: ModelCard,
) -> Path:
    """Writes ``checkpoints/epoch-NNNN`` or ``checkpoints/epoch-NNNN+UUUUUUUU`` and removes all but the two newest.

    Args:
        output: The run's folder.
        epoch: Number of finished epochs.
        update: Number of updates after them; 0 at the end of an epoch.
        weights: The model's state dictionary (not its moving average).
        training: What else is needed to continue; plain values and tensors only.
        card: Goes into the header of the weights.

    Returns:
        The new folder.

    Raises:
        OSError: If there is no room; the earlier checkpoints stay.
    """
    folder = Path(output) / "checkpoints"
    temporary = folder / ".writing"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_weights(temporary / "model.safetensors", weights, replace(card, epoch=epoch))
        torch.save({"epoch": epoch, "update": update, **training}, temporary / "training.pt")
        _write_through(temporary / "training.pt")
        _write_through(temporary)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"cannot write a checkpoint into {folder} ({error}); the earlier ones are whole") from error
    final = folder / (f"epoch-{epoch:04d}+{update:08d}" if update else f"epoch-{epoch:04d}")
    shutil.rmtree(final, ignore_errors=True)  # left by a run that went further and was taken back
    os.replace(temporary, final)
    _write_through(folder)
    for old in _newest_first(folder)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def find_checkpoint(path: str | Path) -> Checkpoint | None:
    """Reads the newest readable checkpoint.

    Args:
        path: A run's folder, or one ``epoch-NNNN`` folder of it.

    Returns:
        The checkpoint, or None if the folder holds none. An unreadable one is reported and the one before it is used.

    Raises:
        ValueError: If there are checkpoints and none can be read.
    """
    path = Path(path)
    candidates = [path] if (path / "training.pt").exists() else _newest_first(path / "checkpoints")
    for candidate in candidates:
        try:
            training = torch.load(candidate / "training.pt", map_location="cpu", weights_only=True)
            return Checkpoint(candidate, load_file(candidate / "model.safetensors"), training)
        except Exception as error:  # a damaged file can raise nearly anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            _logger.warning("The checkpoint %s cannot be read (%s); trying the one before it", candidate, reason)
    if candidates:
        raise ValueError(f"none of the checkpoints in {path} can be read; remove them to start anew")
    return None


def _write_through(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _newest_first(folder: Path) -> list[Path]:
    """Checkpoints by what their names say: epoch, then update."""
    return sorted(
        folder.glob("epoch-*"),
        key=lambda path: [int(number) for number in path.name.removeprefix("epoch-").split("+")],
        reverse=True,
    )
