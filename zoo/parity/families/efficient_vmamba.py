"""EfficientVMamba: the tables of its scans, mixer, block, classifier, and the backbone of dense prediction."""

import torch
from torch import Tensor, nn

from zoo.backbones.efficient_vmamba import AtrousSS2D, EVSSBlock, from_upstream, upstream_names_to_ours
from zoo.backbones.scans import scan_paths
from zoo.parity.case import Case

__all__ = ["run"]


def run(case: Case) -> dict[str, Tensor]:
    """Runs a case of any of the authors' classes, or makes the tables that it names."""
    runners = {"EfficientScan": _tables, "SS2D": _mixer, "VSSBlock": _block}
    return runners.get(case.class_name, _model)(case)


def _tables(case: Case) -> dict[str, Tensor]:
    """Paths of every grid, where merging finds every cell, and one scan and merge by table with their gradients."""
    outputs = {}
    for H, W in case.kwargs["sizes"]:
        paths = scan_paths("atrous", H, W, case.device, rate=case.kwargs["step_size"])
        outputs[f"output.scan_index_{H}x{W}"] = paths
        outputs[f"output.merge_source_{H}x{W}"] = _step_of_cells(paths, H * W)
    inputs = case.inputs()
    padded = nn.functional.pad(inputs["x"].flatten(2), (1, 0))  # what padding cells read comes first
    outputs["output.xs"] = padded[..., paths.long() + 1].transpose(1, 2)  # (B, C, K, P) to (B, K, C, P)
    outputs["output.y"] = inputs["ys"].transpose(1, 2).flatten(2)[..., _step_of_cells(paths, H * W)]
    (outputs["output.xs"] * inputs["xs_cotangent"]).sum().backward()
    (outputs["output.y"] * inputs["y_cotangent"]).sum().backward()
    return {**outputs, "grad.x": inputs["x"].grad, "grad.ys": inputs["ys"].grad}


def _step_of_cells(paths: Tensor, cells: int) -> Tensor:
    """Which of the K * P steps of all paths visits a cell, (cells,)."""
    steps = torch.empty(cells + 1, dtype=torch.int64, device=paths.device)
    steps[paths.flatten().long()] = torch.arange(paths.numel(), device=paths.device)  # padding goes to the last one
    return steps[:-1]


def _recorded(module: nn.Module, outputs: dict[str, Tensor], name: str) -> None:
    """Lets a module put its output under a name."""
    module.register_forward_hook(lambda module, args, output: outputs.update({name: output}))


def _mixer(case: Case) -> dict[str, Tensor]:
    """Output, the merged scans before and after their norm, and the map's gradient of sum(y^2)."""
    kwargs, outputs = case.kwargs, {}
    mixer = AtrousSS2D(kwargs["d_model"], kwargs["step_size"], kwargs["d_state"], ssm_ratio=kwargs["ssm_ratio"])
    weights = upstream_names_to_ours({f"op.{name}": tensor for name, tensor in case.group("state").items()})
    mixer.load_state_dict({name.removeprefix("mixer."): tensor for name, tensor in weights.items()})
    mixer.to(case.device, case.dtype).out_norm.register_forward_pre_hook(
        lambda module, args: outputs.update({"output.merged": args[0]})
    )
    _recorded(mixer.out_norm, outputs, "output.normed")
    x = case.inputs()["x"]
    y = mixer(x)
    y.square().sum().backward()
    return {**outputs, "output.y": y, "grad.input": x.grad}


def _block(case: Case) -> dict[str, Tensor]:
    """Output, both branches before and after the gate, and the map's gradient of sum(y^2)."""
    kwargs, outputs = case.kwargs, {}
    dim = kwargs["hidden_dim"]
    block = EVSSBlock(dim, AtrousSS2D(dim, kwargs["step_size"]), kwargs["mlp_ratio"], kwargs["drop_path"])
    block.load_state_dict(upstream_names_to_ours(case.group("state")))
    block.to(case.device, case.dtype).eval()
    _recorded(block.mixer, outputs, "output.ssm_branch")
    _recorded(block.conv_branch, outputs, "output.conv_branch")
    x = case.inputs()["x"]
    y = sum(block(x))  # stream and update
    y.square().sum().backward()
    for gated, branch in (("se_of_ssm", "ssm_branch"), ("se_of_conv", "conv_branch")):
        feature = outputs[f"output.{branch}"]
        outputs[f"output.{gated}"] = feature * block.gate(feature)
    return {**outputs, "output.y": y, "grad.input": x.grad}


def _model(case: Case) -> dict[str, Tensor]:
    """Features of all stages, for a classifier also the stem's map and logits; the image's gradient.

    The gradient is of the sum of the squared logits, or of the squared features where there is no classifier.
    """
    model = case.load(from_upstream(case.class_name, case.kwargs))
    outputs = {}
    _recorded(model.stem, outputs, "output.patch_embed")
    image = case.inputs()["image"]
    final, features = model.forward_intermediates(image)
    outputs.update({f"output.features{i}": feature for i, feature in enumerate(features)})
    logits = model.forward_head(final)
    scored = features if "out_indices" in case.kwargs else [logits]
    sum(x.square().sum() for x in scored).backward()
    return {**outputs, "output.logits": logits, "grad.input": image.grad}
