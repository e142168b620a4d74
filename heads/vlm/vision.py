"""Vision towers of vision-language models: features of an inner layer of one model, or of several side by side.

Cobra (arXiv 2403.14520) and Prismatic VLMs (arXiv 2402.07865) concatenate DINOv2 and SigLIP by channel, both after the
second-to-last block, without the final norm and without class and register tokens.
"""

from collections.abc import Sequence

import torch
from timm.models import FeatureInfo
from torch import Tensor, nn

__all__ = ["VisionEncoder"]


class VisionEncoder(nn.Module):
    """Models of timm or of this zoo that see the same image; their features are concatenated by channel.

    What a tower has beyond the chosen layer is removed. Each tower normalises images with its own mean and standard
    deviation. Towers without trainable parameters run without recording gradients.

    Args:
        towers: Models with timm's ``forward_intermediates`` and ``prune_intermediate_layers``.
        layer: Layer whose output is taken, from the end where negative: blocks are counted in columnar models, stages
            in hierarchical ones.

    Attributes:
        num_features: Channels C of the features.
        captured: By a tower's number, its reader (see :meth:`readers`) once its training is captured in CUDA graphs,
            and the shape of the images that these take; others are read as ever.

    Raises:
        ValueError: If there is no tower, or a tower has no such layer.
    """

    def __init__(self, towers: Sequence[nn.Module], layer: int = -2) -> None:
        super().__init__()
        if not towers:
            raise ValueError("a vision encoder needs at least one tower")
        self.towers = nn.ModuleList(towers)
        self.indices = [_keep_layers(tower, layer) for tower in towers]
        self.captured: dict[int, tuple[nn.Module, torch.Size]] = {}
        self.num_features = sum(
            FeatureInfo(tower.feature_info, [index]).channels()[0]
            for tower, index in zip(towers, self.indices, strict=True)
        )
        for number, tower in enumerate(towers):
            for name in ("mean", "std"):
                values = torch.tensor(tower.pretrained_cfg[name], device=next(tower.parameters()).device)
                self.register_buffer(f"{name}{number}", values[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images (M, 3, H, W) with values from 0 to 1 to features (M, N, C), row by row, and their grid.

        Raises:
            ValueError: If the towers' features have different grids.
        """
        maps = [self._features(number, images) for number in range(len(self.towers))]
        grids = {tuple(each.shape[-2:]) for each in maps}
        if len(grids) > 1:
            raise ValueError(
                f"the towers' features have grids {', '.join(f'{h} x {w}' for h, w in sorted(grids))}; choose image "
                "sizes and towers whose patches agree"
            )
        features = [each.flatten(2).transpose(1, 2) for each in maps]  # (M, N, C_i), views
        return (features[0] if len(features) == 1 else torch.cat(features, dim=-1)), grids.pop()

    def readers(self) -> dict[int, nn.Module]:
        """Modules of the trained towers, by number, that take images to one map: tensors alone, as CUDA graphs do."""
        pairs = enumerate(zip(self.towers, self.indices, strict=True))
        return {number: _Reader(tower, index) for number, (tower, index) in pairs if _is_trained(tower)}

    def _features(self, number: int, images: Tensor) -> Tensor:
        """Map (M, C_i, h, w) of one tower."""
        tower, mean, std = self.towers[number], getattr(self, f"mean{number}"), getattr(self, f"std{number}")
        with torch.set_grad_enabled(torch.is_grad_enabled() and _is_trained(tower)):
            x = ((images - mean) / std).to(next(tower.parameters()).dtype)
            reader, shape = self.captured.get(number, (None, None))
            if not tower.training or x.shape != shape:
                return _read_layer(tower, self.indices[number], x)
            reader.training = True  # or it would not replay its graphs
            return reader(x)


class _Reader(nn.Module):
    def __init__(self, tower: nn.Module, index: int) -> None:
        super().__init__()
        self.tower, self.index = tower, index

    def forward(self, x: Tensor) -> Tensor:
        return _read_layer(self.tower, self.index, x)


def _is_trained(tower: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in tower.parameters())


def _read_layer(tower: nn.Module, index: int, x: Tensor) -> Tensor:
    options = dict(indices=[index], stop_early=True, output_fmt="NCHW", intermediates_only=True)
    return tower.forward_intermediates(x, **options)[0]


def _keep_layers(tower: nn.Module, layer: int) -> int:
    """Removes what comes after a layer and returns the layer's index from the beginning."""
    count = len(tower.feature_info)
    if not -count <= layer < count:
        raise ValueError(f"layer={layer}: {type(tower).__name__} has {count} layers to take features from")
    tower.prune_intermediate_layers([layer % count], prune_norm=True, prune_head=True)
    return layer % count
