"""What columnar and hierarchical backbones share: timm's interface around the classifier, and checkpoints."""

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from timm.layers import get_device_dtype, trunc_normal_
from torch import Tensor, nn

__all__ = ["Backbone", "checkpoint_filter", "fit_channels", "fit_parts", "numbers_for_trace", "unwrap_checkpoint"]

# Last parts of the names of parameters that weight decay leaves alone.
NO_WEIGHT_DECAY = ("pos_embed", "cls_token", "A_log", "D", "dt_bias", "conv_bias", "gamma", "direction_B")


def numbers_for_trace(*sizes: int) -> tuple[int, ...]:
    """Sizes of a tensor as they are, but as numbers for torch.jit.trace, which takes them for tensors otherwise."""
    return tuple(int(size) for size in sizes) if torch.jit.is_tracing() else sizes


class Backbone(nn.Module):
    """Features, pooling, classifier; the features are a subclass's matter.

    A subclass sets ``num_classes``, ``head_hidden_size`` and ``head``, and defines ``forward_features`` and
    ``forward_head``.
    """

    global_pools: ClassVar[tuple[str, ...]]

    def _set_global_pool(self, global_pool: str) -> None:
        if global_pool not in self.global_pools:
            known = ", ".join(map(repr, self.global_pools))
            raise ValueError(f"global_pool={global_pool!r} is not known; use one of {known}")
        self.global_pool = global_pool

    def _reset_layers(self) -> None:
        """Runs the layers' own initialisation."""
        for module in self.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone."""
        return {name for name, _ in self.named_parameters() if name.split(".")[-1] in NO_WEIGHT_DECAY}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier.

        Args:
            num_classes: Classes; 0 for none.
            global_pool: New pooling; None keeps the current one.
        """
        if global_pool is not None:
            self._set_global_pool(global_pool)
        self.num_classes = num_classes
        factory = get_device_dtype(self)
        self.head = nn.Linear(self.head_hidden_size, num_classes, **factory) if num_classes else nn.Identity()
        self.head.train(self.training)
        self._init_head()

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def unwrap_checkpoint(state_dict: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The weights inside a training checkpoint; a bare state dict passes unchanged."""
    for envelope in ("model", "state_dict", "model_ema"):
        if isinstance(state_dict.get(envelope), Mapping):
            return state_dict[envelope]
    return state_dict


def checkpoint_filter(model: nn.Module) -> Callable[[Mapping[str, Tensor], nn.Module], dict[str, Tensor]]:
    """The ``checkpoint_filter_fn`` of the file that defines the model; does nothing if the file has none."""
    module = sys.modules[type(model).__module__]
    return getattr(module, "checkpoint_filter_fn", lambda state_dict, model: dict(state_dict))


def fit_parts(state_dict: Mapping[str, Tensor], model: Backbone) -> dict[str, Tensor]:
    """Leaves out a checkpoint's norm, classifier or norms of features if the model was built without.

    A checkpoint without any norms of features leaves those of the model as they were made: they are for new tasks.
    """
    built = dict(model.named_children())
    absent = [f"{part}." for part in ("norm", "head") if isinstance(built[part], nn.Identity)]
    absent += [] if built["feature_norms"] else ["feature_norms."]
    fitted = {name: tensor for name, tensor in state_dict.items() if not name.startswith(tuple(absent))}
    if not any(name.startswith("feature_norms.") for name in fitted):
        fitted |= {f"feature_norms.{name}": tensor for name, tensor in built["feature_norms"].state_dict().items()}
    return fitted


def fit_channels(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights whose first convolution is made for the image channels of the model, as timm does for pretrained ones.

    Of grey images, channels are added up; otherwise they are repeated and scaled, so that grey images in colour give
    the same.

    Args:
        weights: Tensors by the model's names.
        model: Model of this zoo or of timm, whose ``pretrained_cfg`` names the first convolution.
    """
    name = f"{model.pretrained_cfg.get('first_conv')}.weight"
    given, needed = weights.get(name), model.state_dict().get(name)
    if given is None or needed is None or given.ndim != 4 or given.shape[1] == needed.shape[1]:
        return dict(weights)
    count, wanted = given.shape[1], needed.shape[1]
    repeated = given.repeat(1, math.ceil(wanted / count), 1, 1)[:, :wanted] * (count / wanted)
    return {**weights, name: given.sum(1, keepdim=True) if wanted == 1 else repeated}
