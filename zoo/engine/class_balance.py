"""Scores of a classifier that weigh every class alike, however rare it is."""

import warnings

import torch
from torch import Tensor

from zoo.optional import require

__all__ = ["ClassBalance"]


class ClassBalance:
    """Balanced accuracy, macro F1 and AUROC, gathered batch by batch; under several processes, over all of them.

    Args:
        num_classes: Number of classes, at least 2.
        device: Where logits and labels are.

    Raises:
        ValueError: If there are fewer than two classes.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes} leaves nothing to balance; there must be at least 2 classes")
        self.num_classes = num_classes
        classification = require("torchmetrics.classification")
        settings = {"num_classes": num_classes, "validate_args": False}
        self.confusion = classification.MulticlassConfusionMatrix(**settings).to(device)
        self.auroc = classification.MulticlassAUROC(average="none", **settings).to(device)
        self.reset()

    def reset(self) -> None:
        """Forgets everything that was added."""
        self.confusion.reset()
        self.auroc.reset()
        # Processes exchange what they gathered, and one that gets no batch must know how many columns that has.
        device = self.auroc.device
        self.update(torch.empty(0, self.num_classes, device=device), torch.empty(0, dtype=torch.long, device=device))

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds logits (B, num_classes) of any float dtype and labels (B,)."""
        scores = logits.detach().float().softmax(-1)
        self.confusion.update(scores, labels)
        self.auroc.update(scores, labels)

    def compute(self) -> dict[str, float]:
        """Returns the scores, each in 0..1, by name.

        * ``balanced_accuracy``: mean recall of the classes that have samples;
        * ``macro_f1``: mean F1 of the classes that have samples or were predicted;
        * ``auroc``: area under the ROC curve, of class 1 if there are two classes, else the mean over classes against
          the rest. A class without samples, or with all of them, has no curve and is left out; NaN if none is left.

        Raises:
            ValueError: If nothing was added.
        """
        confusion = self.confusion.compute().cpu().double()  # a row per true class
        found, predicted, right = confusion.sum(1), confusion.sum(0), confusion.diagonal()
        if not found.any():
            raise ValueError("there are no samples to score")
        recall = (right / found)[found > 0]
        f1 = (2 * right / (found + predicted))[found + predicted > 0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of classes without a curve, which are left out
            auroc = self.auroc.compute().cpu().double()
        has_curve = (found > 0) & (found < found.sum())
        if self.num_classes == 2:
            has_curve[0] = False  # it is that of class 1 mirrored
        return {
            "balanced_accuracy": recall.mean().item(),
            "macro_f1": f1.mean().item(),
            "auroc": auroc[has_curve].mean().item(),
        }
