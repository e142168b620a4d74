"""What a task adds to the training loop: its data, its model, its loss, its scores, its pictures.

A task is one file in ``zoo/engine/tasks``, of the task's name, with a class that :func:`register_task` names, and its
settings in ``zoo/config``. The loop in :mod:`zoo.engine.loop` knows nothing else of it.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from zoo.config import TrainConfig
from zoo.engine.checkpoint import ModelCard

__all__ = ["Batches", "Place", "Task", "find_task", "register_task"]

TASKS: dict[str, type["Task"]] = {}


@dataclass(frozen=True)
class Place:
    """Where a process computes.

    Attributes:
        device: Its device.
        rank: Number of this process.
        world_size: Number of processes.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @cached_property
    def generator(self) -> torch.Generator:
        """Random numbers on the device that all processes draw alike; the loop seeds them before every batch."""
        return torch.Generator(self.device)

    @property
    def shares(self) -> dict[str, Any]:
        """The same as loaders take it."""
        return {"device": self.device, "rank": self.rank, "world_size": self.world_size}


class Batches(Protocol):
    """A loader of training batches on the process's device."""

    def __len__(self) -> int:
        """Batches per pass, the same in every process."""

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Chooses the order of the next pass, and the batch that it starts with."""

    def __iter__(self) -> Iterator[Any]:
        """Yields the batches of one pass."""


class Task(ABC):
    """One kind of training. The constructor opens the data and builds the model, on the CPU.

    Random numbers during training come from torch's, numpy's and Python's global generators, or, where all processes
    have to draw the same, from ``place.generator``. The loop seeds all of them before every batch; so a run can be
    continued at any update.

    Args:
        config: The complete configuration.
        place: Where this process computes.

    Attributes:
        columns: Names of what :meth:`train_scores` and :meth:`evaluate` return, as the log has them.
        goal: The one of them whose highest value makes the best weights.
        goal_label: What it is called, with its unit.
        panels: Columns that share a picture of the curves, by the label of its axis.
        loss_is_local: Whether a process computes its loss without the others.
        model: What is trained, without a wrapper.
        card: What is needed to use its weights.
        train_loader: Batches to train on.
    """

    columns: ClassVar[tuple[str, ...]]
    goal: ClassVar[str]
    goal_label: ClassVar[str]
    panels: ClassVar[Mapping[str, tuple[str, ...]]]
    loss_is_local: ClassVar[bool] = True

    model: nn.Module
    card: ModelCard
    train_loader: Batches

    def __init__(self, config: TrainConfig, place: Place) -> None:
        self.config = config
        self.place = place

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of one batch.

        Args:
            model: The task's model, perhaps compiled; under automatic mixed precision if there is any.
            batch: What the loader yielded.
        """

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Scores of the validation data over all processes, which all call this.

        Args:
            model: The task's model or the moving average of it.
        """

    @staticmethod
    @abstractmethod
    def create_model(card: ModelCard) -> nn.Module:
        """The model that a card describes, with fresh weights."""

    def begin(self, epoch: int, average: nn.Module | None) -> None:  # noqa: B027 most tasks do not care
        """Called before an epoch is trained, or the rest of one.

        Args:
            epoch: Number of finished epochs.
            average: Moving average of the model, if there is one.
        """

    def train_scores(self) -> dict[str, float]:
        """Scores of the training batches since the last reset, over all processes, which all call this."""
        return {}

    def train_state(self) -> dict[str, Tensor]:
        """Sums over processes from which :meth:`train_scores` continues after a stop within an epoch."""
        return {}

    def reset_train_scores(self, state: Mapping[str, Tensor] | None = None) -> None:  # noqa: B027 tasks may have none
        """Begins an epoch; or continues one from what :meth:`train_state` returned."""

    def explain_failure(self) -> str:
        """Says where the loss of the last batch stopped being finite."""
        return "the loss is not finite"

    def capture(self) -> None:
        """Captures the model's forward and backward in CUDA graphs.

        Raises:
            ValueError: If the task's batches have no fixed shape.
        """
        raise ValueError(f"cuda_graph=true does not work for {self.config.task}, whose batches have no fixed shape")

    def report_files(self) -> list[str]:
        """Names of what :meth:`report` makes in the run's folder."""
        return []

    def report(  # noqa: B027 a task need not show anything
        self, model: nn.Module, weights: Path, attempt: Callable[[str, Callable[[], None]], None]
    ) -> None:
        """Makes the pictures and tables of a finished run in its folder.

        Args:
            model: The model with the weights of that file loaded, on its device.
            weights: The file; its header holds the card.
            attempt: Calls a function that makes the named thing; if it fails this is reported, and the next follows.
        """

    def advice_on_waiting(self) -> str:
        """What to do when training waits for its data."""
        return f"raise data.workers (now {self.config.data.workers})"


def register_task(name: str) -> Callable[[type[Task]], type[Task]]:
    """Class decorator that names a task."""

    def register(task: type[Task]) -> type[Task]:
        TASKS[name] = task
        return task

    return register


def find_task(name: str) -> type[Task]:
    """The class of a task, as the setting ``task`` and the cards of weights name it.

    Raises:
        ValueError: If there is none of that name.
    """
    import zoo.engine.tasks as package

    if name not in TASKS:  # the others are not imported: what they need may be missing
        known = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
        if name not in known:
            raise ValueError(f"unknown task {name!r}; known are: {', '.join(known)}")
        importlib.import_module(f"{package.__name__}.{name}")
    return TASKS[name]
