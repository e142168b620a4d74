"""A2Mamba: the classifier, its mixer and state-space model alone, and neighbourhood attention."""

from torch import Tensor, nn

from zoo.backbones.a2mamba import from_upstream, rename_upstream
from zoo.backbones.layers.multi_scale import AttentionAugmentedSSM, MultiScaleMixer, ScaleMaps, rotary_tables
from zoo.backbones.layers.neighborhood import (
    axis_windows,
    neighborhood_aggregate,
    neighborhood_maps,
    neighborhood_scores,
)
from zoo.parity.case import Case

__all__ = ["run"]


def run(case: Case) -> dict[str, Tensor]:
    """Runs what a case names."""
    runners = {"Attention": _mixer, "A2SSM": _ssm, "natten.functional.na2d_qk": _neighborhood}
    return runners.get(case.class_name, _model)(case)


def _model(case: Case) -> dict[str, Tensor]:
    """Features of all stages, logits, and the image's gradient of sum(logits^2)."""
    model = case.load(from_upstream(case.class_name, case.kwargs))
    image = case.inputs()["image"]
    final, features = model.forward_intermediates(image)
    logits = model.forward_head(final)
    logits.square().sum().backward()
    outputs = {f"output.features{i}": feature for i, feature in enumerate(features)}
    return {**outputs, "output.logits": logits, "grad.input": image.grad}


def _load(case: Case, module: nn.Module, theirs: str, ours: str) -> nn.Module:
    """Loads a part of a model that the authors call ``theirs``."""
    state_dict = rename_upstream({f"{theirs}.{name}": t for name, t in case.group("state").items()})
    module.load_state_dict({name.removeprefix(f"{ours}."): t for name, t in state_dict.items()})
    return module.to(case.device, case.dtype).train(case.mode == "train")


def _mixer(case: Case) -> dict[str, Tensor]:
    """Tables of the rotary embedding, maps, what the mixer's parts return, and the gradient of sum(y^2)."""
    kwargs = case.kwargs
    grid = tuple(kwargs["image_size"]) if kwargs["global_mode"] else None
    mixer = MultiScaleMixer(kwargs["embed_dim"], kwargs["num_heads"], kwargs["window_size"], grid)
    _load(case, mixer, "layers.0.blocks.0.token_mixer", "stages.0.blocks.0.mixer")
    x = case.inputs()["x"]
    tokens = x.permute(0, 2, 3, 1)
    tables = rotary_tables(*tokens.shape[1:3], tokens.shape[3] // mixer.num_heads, case.device, case.dtype)
    cos, sin = (table[:, :, 1, 0].repeat_interleave(2, dim=-1) for table in tables)
    values, maps = mixer.attend(*mixer.project(tokens))
    outputs = {"output.attn1": maps.near, "output.attn2": maps.far, "output.sin": sin, "output.cos": cos}
    outputs["output.attn_out"] = values.flatten(3).permute(0, 3, 1, 2)
    if mixer.ssm is not None:
        outputs["output.ssm_out"] = mixer.ssm(values.flatten(3), maps).permute(0, 3, 1, 2)
    y = mixer(tokens).permute(0, 3, 1, 2)
    y.square().sum().backward()
    return {**outputs, "output.y": y, "grad.x": x.grad}


def _ssm(case: Case) -> dict[str, Tensor]:
    """Outputs with and without attention maps, and gradients of sum(y^2) with them."""
    kwargs = case.kwargs
    ssm = AttentionAugmentedSSM(kwargs["d_model"], kwargs["num_heads"])
    _load(case, ssm, "layers.0.blocks.0.token_mixer.ssm", "stages.0.blocks.0.mixer.ssm")
    inputs = case.inputs()
    tokens = inputs["x"].permute(0, 2, 3, 1)
    maps = ScaleMaps(inputs["attn1"], inputs["attn2"], kwargs["window_size"], tuple(kwargs["dilation"]))
    y = ssm(tokens, maps).permute(0, 3, 1, 2)
    y.square().sum().backward()
    grads = {f"grad.{name}": x.grad for name, x in inputs.items()}
    return {**grads, "output.y": y, "output.y_noattn": ssm(tokens).permute(0, 3, 1, 2)}


def _neighborhood(case: Case) -> dict[str, Tensor]:
    """Windows, scores, sums and gradients for every grid in the case."""
    inputs, outputs = case.inputs(), {}
    for spec in case.spec["cases"]:
        i, (kernel_size, _), dilation = spec["index"], spec["kernel"], spec["dilation"]
        q, k, v = (inputs[f"{name}{i}"].permute(0, 2, 3, 1, 4) for name in "qkv")
        bias = inputs[f"rpb{i}"]
        sums = neighborhood_aggregate(
            neighborhood_maps(q, k, kernel_size, dilation, bias), v, kernel_size, dilation
        ).permute(0, 3, 1, 2, 4)
        sums.square().sum().backward()
        outputs[f"output.attn{i}"] = neighborhood_scores(q, k, kernel_size, dilation, bias)
        outputs[f"output.out{i}"] = sums
        outputs |= {f"grad.{name}{i}": inputs[f"{name}{i}"].grad for name in ("q", "k", "v", "rpb")}
        outputs[f"output.rows{i}"] = axis_windows(spec["H"], kernel_size, dilation[0])
        outputs[f"output.cols{i}"] = axis_windows(spec["W"], kernel_size, dilation[1])
    return outputs
