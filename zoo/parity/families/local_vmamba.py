"""LocalVMamba: classifier, dense backbone, and the mixer alone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.backbones.local_vmamba import from_upstream, rename_attention
from zoo.backbones.scans.local import local_order
from zoo.backbones.vmamba import rename_upstream
from zoo.parity.case import Case

__all__ = ["run"]


def run(case: Case) -> dict[str, Tensor]:
    """Runs a model or a mixer."""
    return {"SS2D": _mixer, "VSSM": _classifier}.get(case.class_name, _features)(case)


def _classifier(case: Case) -> dict[str, Tensor]:
    """Features, pooled feature, logits, and the image's gradient of sum(logits^2)."""
    model = case.load(from_upstream(case.class_name, case.kwargs))
    image = case.inputs()["image"]
    final, features = model.forward_intermediates(image, output_fmt="NHWC")
    outputs = {f"output.features{i}": feature for i, feature in enumerate(features)}
    outputs |= {"output.pooled": model.pool(final), "output.logits": model.forward_head(final)}
    outputs["output.logits"].square().sum().backward()
    return {**outputs, "grad.input": image.grad}


def _features(case: Case) -> dict[str, Tensor]:
    """Normed features, and the image's gradient of the sum of their squares."""
    model = case.load(from_upstream(case.class_name, case.kwargs))
    image = case.inputs()["image"]
    features = model.forward_intermediates(image, intermediates_only=True)
    sum(feature.square().sum() for feature in features).backward()
    return {**{f"output.features{i}": f for i, f in enumerate(features)}, "grad.input": image.grad}


def _mixer(case: Case) -> dict[str, Tensor]:
    """Output, what every direction reads, and the map's gradient of sum(output^2)."""
    prefix = "layers.0.blocks.0.op."
    mixer = from_upstream(case.class_name, case.kwargs)
    state_dict = rename_attention({prefix + name: tensor for name, tensor in case.group("state").items()})
    shapes = {name: tensor.shape for name, tensor in mixer.state_dict().items()}
    state_dict = {n.removeprefix("stages.0.blocks.0.mixer."): t for n, t in rename_upstream(state_dict).items()}
    mixer.load_state_dict({name: tensor.reshape(shapes[name]) for name, tensor in state_dict.items()})
    mixer.to(case.device, case.dtype).eval()
    convolved = []
    mixer.conv.register_forward_hook(lambda conv, args, output: convolved.append(output))
    x = case.inputs()["x"]
    y = mixer(x)
    y.square().sum().backward()
    return {"output.y": y, "output.xs": _walked(mixer, convolved[0]), "grad.x": x.grad}


def _walked(mixer: nn.Module, u: Tensor) -> Tensor:
    """Map (B, H, W, E) as its directions walk over it, filled up with zeros, (B, K, E, steps)."""
    orders = [local_order(direction, *u.shape[1:3]).to(u.device) for direction in mixer.directions]
    steps = max(len(order) for order in orders)
    padded = F.pad(u.flatten(1, 2), (0, 0, 0, steps - u.shape[1] * u.shape[2]))
    walked = [F.pad(padded[:, order], (0, 0, 0, steps - len(order))) for order in orders]
    return torch.stack(walked, dim=1).transpose(2, 3)
