"""Norms as backbones use them: as ``nn.LayerNorm`` would, alone and with the residual add before them."""

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models._features_fx import FeatureGraphNet
from torch import Tensor, nn

from zoo.backbones.layers import add_norm as add_norm_module
from zoo.backbones.layers import layer_norm as layer_norm_module
from zoo.backbones.layers.add_norm import add_norm
from zoo.backbones.layers.layer_norm import LayerNorm, _layer_norm
from zoo.backbones.layers.vss import VSSBlock, VSSStage, make_norm
from zoo.kernels import MAX_NORM_CHANNELS

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(params=["as_it_is", "by_the_op"], autouse=True)
def path(request, monkeypatch):
    """Every test runs twice: on CPUs most calls would not reach the op."""
    if request.param == "by_the_op":
        for module in (add_norm_module, layer_norm_module):
            monkeypatch.setattr(module, "plain_on_cpu", lambda dtype, *tensors: False)


def lively(norm: nn.LayerNorm) -> nn.LayerNorm:
    """The norm with random parameters."""
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    return norm


def pair(dim: int, device: torch.device, **options) -> tuple[LayerNorm, nn.LayerNorm]:
    """Our norm and torch's with the same parameters."""
    ours, theirs = lively(LayerNorm(dim, device=device, **options)), nn.LayerNorm(dim, device=device)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_parameters_are_those_of_torchs(device):
    ours, theirs = LayerNorm(6, device=device, dtype=F64), nn.LayerNorm(6, device=device, dtype=F64)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight", "bias"]
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 5, 33), (2, MAX_NORM_CHANNELS), (2, MAX_NORM_CHANNELS + 1)])
def test_outputs_and_gradients_are_torchs(shape, device):
    ours, theirs = pair(shape[-1], device)
    x = torch.randn(shape, device=device, requires_grad=True)
    cotangent = torch.randn(shape, device=device)
    results = []
    for norm in (ours, theirs):
        y = norm(x)
        results.append((y, *torch.autograd.grad(y, (x, norm.weight, norm.bias), cotangent)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_autocast_narrows_what_linear_layers_read(dtype, narrow, device):
    ours, theirs = pair(48, device, narrow=narrow)
    if dtype == F64:
        ours.double()
    x = torch.randn(2, 7, 48, device=device).to(dtype)
    with torch.autocast(device.type, BF16):
        y = ours(x)
    assert y.dtype == (F64 if dtype == F64 else BF16 if narrow else F32)
    tolerance = 1e-2 if y.dtype == BF16 else 1e-5
    torch.testing.assert_close(y.float(), theirs(x.float()), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("weight_dtype", [F32, BF16])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_without_autocast_the_dtype_is_the_inputs(dtype, weight_dtype, device):
    norm = lively(LayerNorm(8, narrow=True, device=device)).to(weight_dtype)
    x = torch.randn(2, 3, 8, device=device).to(dtype)
    expected = nn.functional.layer_norm(x.float(), (8,), norm.weight.float(), norm.bias.float())
    y = norm(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("make", [nn.RMSNorm, nn.LayerNorm, LayerNorm])
def test_add_norm_is_add_then_norm(make, device):
    norm = make(12, eps=1e-5, device=device)
    stream, update = torch.randn(2, 3, 2, 5, 12, device=device).unbind(0)
    total, normed = add_norm(stream, update, norm)
    torch.testing.assert_close(total, stream + update)
    torch.testing.assert_close(normed, norm(stream + update))


@pytest.mark.parametrize("shape", [(64, 3, 12), (64, 2, 3, 12)])
def test_add_norm_drops_whole_samples(shape, device):
    norm, drop_path = LayerNorm(12, device=device), DropPath(0.5)
    stream, update = torch.randn(2, *shape, device=device).unbind(0)
    torch.manual_seed(0)
    total, normed = add_norm(stream, update, norm, drop_path)
    torch.manual_seed(0)
    expected = stream + drop_path(update)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(normed, norm(expected))
    assert 10 < (total == stream).flatten(1).all(1).sum() < 54
    torch.testing.assert_close(add_norm(stream, update, norm, drop_path.eval())[0], stream + update)


@pytest.mark.parametrize("narrow", [True, False])
def test_add_norm_keeps_the_stream_as_it_is_under_autocast(narrow, device):
    stream, update = torch.randn(2, 3, 12, device=device), torch.randn(2, 3, 12, device=device).to(BF16)
    with torch.autocast(device.type, BF16):
        total, normed = add_norm(stream, update, LayerNorm(12, device=device), narrow=narrow)
    assert total.dtype == F32 and normed.dtype == (BF16 if narrow else F32)


def test_norms_without_parameters_are_refused():
    x = torch.zeros(2, 3, 6)
    with pytest.raises(ValueError, match="no weight; make it with elementwise_affine=True"):
        add_norm(x, x, nn.LayerNorm(6, elementwise_affine=False))


class Block(nn.Module):
    """A norm alone, then one with an add."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.norm, self.norm2 = lively(LayerNorm(12, device=device)), lively(LayerNorm(12, device=device))

    def forward(self, x: Tensor) -> Tensor:
        x, normed = add_norm(x, self.norm(x), self.norm2)
        return x + normed


def test_traced_compiled_and_exported_blocks_give_the_same(device):
    block, x = Block(device), torch.randn(2, 3, 5, 12, device=device, requires_grad=True)
    expected = block(x)
    gradients = torch.autograd.grad(expected.square().sum(), [x, *block.parameters()])
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, expected)
    got = torch.autograd.grad(compiled.square().sum(), [x, *block.parameters()])
    torch.testing.assert_close(got, gradients, rtol=1e-4, atol=1e-5)
    x, other = x.detach(), torch.randn(3, 4, 2, 12, device=device)
    traced = torch.jit.trace(block, (x,))
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("height"), 2: torch.export.Dim("width")}
    exported = torch.export.export(block, (x,), dynamic_shapes={"x": sizes}).module()
    for images in (x, other):
        torch.testing.assert_close(traced(images), block(images))
        torch.testing.assert_close(exported(images), block(images))


def test_compiled_blocks_narrow_under_autocast(device):
    norm, x = LayerNorm(12, device=device), torch.randn(2, 3, 12, device=device)
    with torch.autocast(device.type, BF16):
        assert torch.compile(norm, fullgraph=True, backend="aot_eager")(x).dtype == BF16


def test_fx_sees_one_node_each(device):
    block, x = Block(device), torch.randn(2, 3, 5, 12, device=device)
    graph = torch.fx.Tracer().trace(block)
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    assert targets.count(_layer_norm) == 1 and targets.count(add_norm_module._add_norm) == 1
    torch.testing.assert_close(torch.fx.GraphModule(block, graph)(x), block(x))


def test_meta_tensors_give_the_shapes():
    block = Block(torch.device("meta"))
    assert block(torch.empty(2, 3, 5, 12, device="meta")).shape == (2, 3, 5, 12)


def test_models_go_through_timms_extractor():
    model = timm.create_model("vmamba_nano", depths=(1, 1), dims=(16, 32)).eval()
    net = FeatureGraphNet(model, out_indices=(0, 1))
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model.forward_intermediates(images, intermediates_only=True, output_fmt="NHWC")
        for got, feature in zip(net(images), expected, strict=True):
            torch.testing.assert_close(got, feature)


@pytest.mark.parametrize("kind", ["layernorm", "batchnorm"])
def test_blocks_take_other_norms_too(kind, device):
    """A stage is what its formula says, whatever norms its blocks have, with MLPs and without."""
    norm, norm2, last_norm = (make_norm(kind, 8, device=device) for _ in range(3))
    mixer, mlp, last = (nn.Linear(8, 8, device=device) for _ in range(3))
    stage = VSSStage([VSSBlock(norm, mixer, norm2, mlp), VSSBlock(last_norm, last)]).eval()
    x = torch.randn(2, 3, 4, 8, device=device)
    y = x + mixer(norm(x))
    y = y + mlp(norm2(y))
    torch.testing.assert_close(stage(x), y + last(last_norm(y)))
