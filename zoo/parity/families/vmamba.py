"""VMamba: classifier, dense backbone, the mixer in all its forms, and the tables of its scans."""

import torch
from torch import Tensor, nn

from zoo.backbones.layers.ss2d import FULL_SCANS
from zoo.backbones.scans import scan_paths
from zoo.backbones.vmamba import from_upstream, rename_upstream
from zoo.parity.case import Case

__all__ = ["run"]


def run(case: Case) -> dict[str, Tensor]:
    """Runs a model or a mixer, or makes the tables that a case names."""
    runs = {"SS2D": _mixer, "CrossScanF": _tables, "Backbone_VSSM": _features}
    return runs.get(case.class_name, _classifier)(case)


def _classifier(case: Case) -> dict[str, Tensor]:
    """Stem, features, logits, and the image's gradient of sum(logits^2)."""
    model = case.load(from_upstream(case.class_name, case.kwargs))
    outputs = {}
    model.stem.register_forward_hook(lambda stem, args, output: outputs.update({"output.patch_embed": output}))
    image = case.inputs()["image"]
    final, features = model.forward_intermediates(image)
    outputs |= {f"output.features{i}": feature for i, feature in enumerate(features)}
    outputs["output.logits"] = model.forward_head(final)
    outputs["output.logits"].square().sum().backward()
    if case.kwargs["norm_layer"] != "ln":  # the authors' maps are channels-first then
        outputs["output.patch_embed"] = outputs["output.patch_embed"].permute(0, 3, 1, 2)
    return {**outputs, "grad.input": image.grad}


def _features(case: Case) -> dict[str, Tensor]:
    """Normed features and the image's gradient of the sum of their squares."""
    model = case.load(from_upstream(case.class_name, case.kwargs))
    image = case.inputs()["image"]
    features = model.forward_intermediates(image, case.kwargs["out_indices"], intermediates_only=True)
    sum(feature.square().sum() for feature in features).backward()
    return {**{f"output.features{i}": f for i, f in enumerate(features)}, "grad.input": image.grad}


def _mixer(case: Case) -> dict[str, Tensor]:
    """Output, what enters and leaves the norm inside, and the map's gradient of sum(output^2)."""
    kwargs = case.kwargs
    mixer = from_upstream(case.class_name, kwargs)
    state_dict = rename_upstream({f"layers.0.blocks.0.op.{name}": t for name, t in case.group("state").items()})
    shapes = {name: tensor.shape for name, tensor in mixer.state_dict().items()}
    state_dict = {name.removeprefix("stages.0.blocks.0.mixer."): t for name, t in state_dict.items()}
    mixer = case.load(mixer, {name: tensor.reshape(shapes[name]) for name, tensor in state_dict.items()})
    outputs = {}

    def record(norm: nn.Module, args: tuple, output: Tensor) -> None:
        outputs["output.merged"], outputs["output.normed"] = args[0], output

    mixer.out_norm.register_forward_hook(record)
    x = case.inputs()["x"]
    channels_first = kwargs.get("channel_first", False)
    outputs["output.y"] = mixer(x.permute(0, 2, 3, 1) if channels_first else x)
    outputs["output.y"].square().sum().backward()
    if channels_first:
        outputs = {name: tensor.permute(0, 3, 1, 2) for name, tensor in outputs.items()}
    outputs = {n: t.flatten(1, 2) if case.expected[n].dim() == 3 else t for n, t in outputs.items()}
    return {**outputs, "grad.input": x.grad}


def _four_paths(scan: str, H: int, W: int) -> Tensor:
    """Cells on all four paths, (4, H * W)."""
    if scan == "cross":
        return scan_paths("cross", H, W).long()
    rows = torch.arange(H * W)
    return torch.stack([rows.flip(0) if backwards else rows for backwards in FULL_SCANS[scan]])


def _tables(case: Case) -> dict[str, Tensor]:
    """Tables of every grid and mode in the case; for one grid what they read and write, with gradients."""
    outputs, inputs = {}, case.inputs()
    H, W = case.kwargs["numeric_size"]
    for mode in case.kwargs["scans"]:
        scan = {"cross2d": "cross"}.get(mode, mode)
        for height, width in case.kwargs["index_sizes"]:
            outputs[f"output.index_{mode}_{height}x{width}"] = _four_paths(scan, height, width)
        table = _four_paths(scan, H, W).to(case.device)
        x, ys = inputs["x"].flatten(2), inputs["ys"].flatten(3)
        xs = x[:, :, table].transpose(1, 2)  # (B, K, C, L)
        y = sum(torch.zeros_like(ys[:, k]).index_add(2, table[k], ys[:, k]) for k in range(4))
        (grad_x,) = torch.autograd.grad((xs * inputs["xs_cotangent"]).sum(), inputs["x"])
        (grad_ys,) = torch.autograd.grad((y * inputs["y_cotangent"]).sum(), inputs["ys"])
        outputs |= {f"output.xs_{mode}": xs, f"output.y_{mode}": y}
        outputs |= {f"grad.x_{mode}": grad_x, f"grad.ys_{mode}": grad_ys}
    return outputs
