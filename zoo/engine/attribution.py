"""Where in an image the evidence for a class lies: gradients with respect to pixels, and class activation maps.

Gradient x input (arXiv 1605.01713) and SmoothGrad (arXiv 1706.03825) have a value of their own for every pixel, and
need no other package. Class activation maps come from pytorch-grad-cam and weigh the channels of a model's last
features: Grad-CAM (arXiv 1610.02391), HiResCAM (arXiv 2011.08891), Layer-CAM (Jiang et al., IEEE TIP 2021). They are as
coarse as these features, and show where a feature is, which is where it came from only as far as the model kept it in
its place. Deep in a column of scans every token has read the whole image: there, trust the gradients more.

Which features an activation map is of depends on what the classifier reads:

* a mean over the map, or over the patch tokens: what ``forward_features`` returns, after the last norm;
* class or register tokens: the patch tokens that enter the last block, which is the last to carry anything from them
  to the tokens that are read. Class and register tokens are left out of the map.
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor, nn

from zoo.optional import require

__all__ = ["METHODS", "attribute", "overlay"]

CAMS = {"grad_cam": "GradCAM", "hires_cam": "HiResCAM", "layer_cam": "LayerCAM"}  # pytorch-grad-cam's names
METHODS = ("input_gradient", "smooth_grad", *CAMS)
SMOOTH_SAMPLES = 25  # noisy copies of an image
SMOOTH_NOISE = 0.15  # standard deviation of the noise as a share of the image's range
CAP = 0.99  # share of the pixels of a gradient's map that are as they are
PIXEL_METHODS = "use method='input_gradient' or 'smooth_grad'"
HEAT = 0.9  # share of the colour where a map is 1
DIMMED = 0.5  # brightness of the image below


def attribute(
    model: nn.Module, images: Tensor, target: int | Sequence[int] | Tensor | None = None, method: str = "input_gradient"
) -> Tensor:
    """Maps of how much each place of an image speaks for a class.

    The model runs in evaluation mode and is left as it was found: modes, gradients, hooks.

    Args:
        model: A classifier with timm's interface, ours or timm's.
        images: Normalised images (B, C, H, W), on the model's device.
        target: Class of all images, or one per image; default what the model predicts.
        method: ``"input_gradient"`` for the gradient of the class's logit times the input, summed over channels,
            without its sign; ``"smooth_grad"`` for the gradient's magnitude, averaged over noisy copies of the image;
            ``"grad_cam"``, ``"hires_cam"`` or ``"layer_cam"`` for activation maps.

    Returns:
        float32 maps (B, H, W) on the CPU, each from 0 to 1; all 0 where nothing speaks for the class.

    Raises:
        ValueError: For another method, a class that the model does not have, or a model that is no classifier or, for
            activation maps, whose features are no map.
        ModuleNotFoundError: If an activation map is asked for and pytorch-grad-cam is not installed.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; use one of {', '.join(METHODS)}")
    if images.dim() != 4:
        raise ValueError(f"images must have the shape (B, C, H, W), got {tuple(images.shape)}")
    with _left_as_found(model), torch.inference_mode(False), torch.enable_grad():
        images = images.detach().clone()  # a plain tensor even where inference mode made it
        labels = _labels(model, images, target)
        if method == "input_gradient":
            maps = _capped((_input_gradient(model, images, labels) * images).sum(1).abs())
        elif method == "smooth_grad":
            maps = _capped(_smooth_gradient(model, images, labels))
        else:
            maps = _activation_maps(model, images, labels, CAMS[method])
    return _to_unit_range(maps.float().cpu())


def overlay(image: Tensor, heat: Tensor) -> np.ndarray:
    """Lays a map over a dimmed image as colour: dark violet for low values, then red, bright yellow for high ones.

    Args:
        image: uint8 (C, H, W), grey or RGB.
        heat: Map (H, W) in 0..1.

    Returns:
        uint8 array (H, W, 3).
    """
    colors = require("matplotlib").colormaps["inferno"](heat.numpy())[..., :3]  # (H, W, 3) in 0..1
    share = HEAT * heat.unsqueeze(-1).numpy()
    picture = image.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy() / 255
    return (255 * ((1 - share) * DIMMED * picture + share * colors)).round().astype(np.uint8)


@contextlib.contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, frozen weights and no recomputation for a while; then everything is as before."""
    modules = [(module, module.training, getattr(module, "grad_checkpointing", None)) for module in model.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        for module, _, recomputing in modules:
            if recomputing:
                module.grad_checkpointing = False
        yield
    finally:
        for module, training, recomputing in modules:
            module.training = training
            if recomputing:
                module.grad_checkpointing = recomputing
        for parameter, requires_grad, grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


def _labels(model: nn.Module, images: Tensor, target: int | Sequence[int] | Tensor | None) -> Tensor:
    """The class of every image, (B,): what was asked for, or what the model predicts."""
    with torch.no_grad():
        logits = model(images)
    if not torch.is_tensor(logits) or logits.dim() != 2 or getattr(model, "num_classes", None) == 0:
        found = f"shape {tuple(logits.shape)}" if torch.is_tensor(logits) else type(logits).__name__
        raise ValueError(
            f"the output of {type(model).__name__} is no logit per image and class (found: {found}); attribution needs "
            "a model with a classifier and pooled features"
        )
    if target is None:
        return logits.argmax(-1)
    labels = torch.as_tensor(target, device=logits.device)
    if labels.dim() > 1 or (labels.dim() == 1 and len(labels) != len(images)):
        raise ValueError(
            f"target has the shape {tuple(labels.shape)}; give one class, or one for each of {len(images)}"
        )
    if labels.is_floating_point() or labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"target={target} is not among the classes 0 to {logits.shape[1] - 1}")
    return labels.long().expand(len(images))


def _input_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Gradients (B, C, H, W) of the labels' logits."""
    images = images.detach().requires_grad_()
    scores = model(images).gather(1, labels.unsqueeze(1))
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    return gradient


def _smooth_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Magnitudes (B, H, W) of gradients, the mean over noisy images; the noise is always the same."""
    generator = torch.Generator(images.device).manual_seed(0)
    noise_level = SMOOTH_NOISE * (images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True))
    total = torch.zeros_like(images[:, 0], dtype=torch.float32)
    for _ in range(SMOOTH_SAMPLES):
        noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
        total += _input_gradient(model, images + noise_level * noise, labels).float().abs().sum(1)
    return total / SMOOTH_SAMPLES


def _capped(maps: Tensor) -> Tensor:
    """Lowers the highest values of every map (B, H, W) to a percentile: a few outliers would hide all others."""
    pixels = maps.flatten(1).float()
    highest = torch.quantile(pixels, CAP, dim=1)
    highest = highest.where(highest > 0, pixels.amax(1))  # unless they are all that there is
    return maps.minimum(highest.to(maps.dtype)[:, None, None])


def _activation_maps(model: nn.Module, images: Tensor, labels: Tensor, cam: str) -> Tensor:
    """Maps (B, H, W) of a class of pytorch-grad-cam."""
    if not all(hasattr(model, name) for name in ("forward_features", "forward_head", "forward_intermediates")):
        raise ValueError(f"{type(model).__name__} does not give its features as timm's models do; {PIXEL_METHODS}")
    grid = _grid(model, images)
    if grid == (1, 1):
        raise ValueError(
            f"the last features of {type(model).__name__} for {tuple(images.shape[-2:])} pixels are a single cell; "
            f"give larger images, or {PIXEL_METHODS}"
        )
    probed = _Probed(model)
    to_map = partial(_to_map, model, grid)
    method = getattr(require("pytorch_grad_cam", "explain"), cam)(probed, [probed.probe], reshape_transform=to_map)
    return torch.from_numpy(method(images, [itemgetter(label) for label in labels.tolist()]))


class _Leaf(nn.Module):
    """Passes features on as the start of the graph, so that the backward ends here."""

    def forward(self, features: Tensor) -> Tensor:
        if not torch.is_tensor(features):
            raise ValueError(f"the model's features are a {type(features).__name__}, not one map; {PIXEL_METHODS}")
        return features.detach().requires_grad_()


class _Probed(nn.Module):
    """A model whose features go through ``probe``, a module whose output can be watched in every model alike.

    Args:
        model: The model, with frozen weights.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.probe = _Leaf()

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, classes)."""
        if getattr(self.model, "global_pool", None) not in ("token", "last"):
            return self.model.forward_head(self.probe(self.model.forward_features(images)))
        last_block = self.model.get_submodule(self.model.feature_info[-1]["module"])
        with last_block.register_forward_pre_hook(self._watch_input):
            return self.model(images)

    def _watch_input(self, block: nn.Module, args: tuple) -> tuple:
        """Sends a block's tokens through the probe; what came along already normed, the block norms anew."""
        tokens, *others = args
        normed = [torch.is_tensor(other) and other.shape == tokens.shape for other in others]
        return self.probe(tokens), *(None if again else other for other, again in zip(others, normed, strict=True))


def _grid(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """Rows and columns of the last features."""
    with torch.no_grad():
        (last,) = model.forward_intermediates(images[:1], indices=1, intermediates_only=True)
    return tuple(last.shape[-2:])


def _to_map(model: nn.Module, grid: tuple[int, int], features: Tensor) -> Tensor:
    """Features or their gradients, tokens or a map, as float32 (B, D, rows, columns)."""
    if features.dim() == 3:
        features = _patches(model, features, grid).transpose(1, 2).unflatten(2, grid)
    elif getattr(model, "output_fmt", "NCHW") == "NHWC":
        features = features.permute(0, 3, 1, 2)
    return features.float()


def _patches(model: nn.Module, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Takes the patch tokens (B, N, D) of a grid out of all tokens (B, L, D)."""
    count = grid[0] * grid[1]
    if hasattr(model, "split_tokens"):  # the class tokens of our models have many places
        tokens, _ = model.split_tokens(tokens)
    elif tokens.shape[1] != count:  # some models add theirs after the last block
        tokens = tokens[:, getattr(model, "num_prefix_tokens", 0) :]
    if tokens.shape[1] != count:
        raise ValueError(
            f"{type(model).__name__} has {tokens.shape[1]} tokens for {grid[0]} x {grid[1]} patches, "
            f"which make no map; {PIXEL_METHODS}"
        )
    return tokens


def _to_unit_range(maps: Tensor) -> Tensor:
    """Every map (B, H, W) from its lowest value at 0 to its highest at 1; a constant one is 0."""
    maps = maps - maps.amin((1, 2), keepdim=True)
    highest = maps.amax((1, 2), keepdim=True)
    return maps / highest.where(highest > 0, 1)
