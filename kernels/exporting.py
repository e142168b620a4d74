"""Whether a model is being exported."""

import torch

__all__ = ["is_exporting"]


def is_exporting() -> bool:
    """Whether ``torch.export`` traces the model, to a graph that shall hold for other sizes too.

    What ``torch.compiler.is_exporting`` returns, to which torch 2.11 makes ``torch.compile`` say yes too.
    """
    return torch.compiler._is_exporting_flag
