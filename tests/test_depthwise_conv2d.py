"""The depth-wise convolution: every backend against ``F.conv2d`` in float64, outputs and all gradients."""

import runpy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from zoo.backbones.layers.conv_norm import conv_norm, convolve
from zoo.backbones.layers.depthwise_conv import DepthwiseConv
from zoo.kernels import depthwise_conv2d, use_backend

checks = runpy.run_path(str(Path(__file__).with_name("op_checks.py")))
with_gradients, assert_close = checks["with_gradients"], checks["assert_close"]


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    batch: int
    H: int
    W: int
    C: int
    side: int = 3
    bias: bool = True
    activation: str | None = "silu"

    def inputs(self, dtype: torch.dtype, device: str | torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """x (the second half of a wider tensor), weight and bias; parameters are never narrower than float32."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        exact = torch.promote_types(dtype, torch.float32)
        x = normal(self.batch, self.H, self.W, 2 * self.C).to(device, dtype)[..., self.C :].requires_grad_()
        weight = normal(self.C, 1, self.side, self.side).to(device, exact).requires_grad_()
        bias = normal(self.C).to(device, exact).requires_grad_() if self.bias else None
        return x, weight, bias


CASES = {
    "silu": Case(2, 5, 7, 6),
    "gelu": Case(1, 6, 4, 5, activation="gelu"),
    "relu": Case(2, 3, 9, 4, activation="relu"),
    "linear": Case(2, 4, 5, 3, activation=None),
    "no_bias": Case(1, 7, 6, 8, bias=False),
    "bare": Case(2, 6, 3, 4, bias=False, activation=None),
    "side_5": Case(2, 6, 5, 7, side=5),
    "side_7": Case(1, 9, 8, 5, side=7, bias=False),
    "smaller_than_kernel": Case(2, 2, 3, 4, side=7),
    "one_row": Case(2, 1, 9, 5),
    "one_column": Case(2, 9, 1, 5, side=5, activation=None),
    "one_cell": Case(3, 1, 1, 2),
    "many_channels": Case(1, 3, 4, 131, activation="relu"),
}
GPU_CASES = {
    "vmamba_stage_1": Case(4, 56, 56, 96),
    "vmamba_stage_4": Case(8, 7, 7, 768),
    "inverted_residual": Case(4, 14, 14, 1024, bias=False, activation="relu"),
    "a2mamba": Case(3, 28, 28, 160, side=5),
    "plain_mamba": Case(3, 14, 15, 384, side=7),
    "odd": Case(3, 37, 53, 77, activation="gelu"),
}
SUBJECTS = checks["subjects"](CASES, GPU_CASES)


def run_op(case: Case, inputs: tuple, backend: str = "auto") -> dict[str, Tensor]:
    """Output and all gradients by the op, for a fixed gradient of the output."""
    with use_backend(backend):
        return with_gradients(depthwise_conv2d(*inputs, activation=case.activation), inputs)


def run_conv2d(case: Case, inputs: tuple) -> dict[str, Tensor]:
    """The same by autograd through ``F.conv2d`` in float64."""
    exact = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    x, weight, bias = exact
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=case.side // 2, groups=case.C).permute(0, 2, 3, 1)
    return with_gradients(getattr(F, case.activation)(y) if case.activation else y, exact)


@pytest.mark.parametrize("backend, device, name", SUBJECTS)
def test_equals_conv2d(backend, device, name):
    case = {**CASES, **GPU_CASES}[name]
    inputs = case.inputs(torch.float64, device)
    assert_close(run_op(case, inputs, backend), run_conv2d(case, inputs), 1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("name", ["silu", "gelu", "side_5", "bare"])
def test_only_the_results_are_rounded(name, dtype, tolerance, device):
    """The gradients of float32 parameters are exact to float32 although x and the gradient of out are narrower."""
    case = CASES[name]
    inputs = case.inputs(dtype, device)
    x, given = inputs[0], [t for t in inputs if t is not None]
    cotangent = torch.randn(x.shape, device=device).to(dtype)
    out = depthwise_conv2d(*inputs, activation=case.activation)
    grads = torch.autograd.grad(out, given, cotangent)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    exact_out = depthwise_conv2d(*exact, activation=case.activation)
    exact_grads = torch.autograd.grad(exact_out, [t for t in exact if t is not None], cotangent.double())
    assert out.dtype == grads[0].dtype == dtype and {g.dtype for g in grads[1:]} == {torch.float32}
    assert_close(dict(out=out), dict(out=exact_out), tolerance)
    # The gradient before the activation is a result of Triton's first kernel, and rounded too.
    assert_close(dict(x=grads[0]), dict(x=exact_grads[0]), 2 * tolerance)
    names = [f"parameter {i}" for i in range(len(grads) - 1)]
    assert_close(dict(zip(names, grads[1:], strict=True)), dict(zip(names, exact_grads[1:], strict=True)), 3e-6)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
def test_triton_reads_and_writes_16_bit_values(dtype, tolerance):
    case = Case(1, 4, 5, 5)
    inputs = case.inputs(dtype, "cpu")
    assert_close(run_op(case, inputs, "triton"), run_conv2d(case, inputs), tolerance)


@pytest.mark.interpreted
@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 3), (3, 2), (4, 1)])
def test_triton_strips_and_tiles_meet_without_a_seam(monkeypatch, rows, columns):
    implementation = pytest.importorskip("zoo.kernels.depthwise_conv2d.triton")
    monkeypatch.setattr(implementation, "ROWS", rows)
    monkeypatch.setattr(implementation, "COLUMNS", columns)
    monkeypatch.setattr(implementation, "WARPS", 1)  # fewer strips to a program, so that there are several
    monkeypatch.setattr(implementation, "GRADIENT_ELEMENTS", {5: 1})
    monkeypatch.setattr(implementation, "RESIDENT", {5: 4})
    case = Case(2, 7, 5, 70, side=5, activation="gelu")
    inputs = case.inputs(torch.float64, "cpu")
    assert_close(run_op(case, inputs, "triton"), run_conv2d(case, inputs), 1e-12)


@pytest.mark.interpreted
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, at the infinite cell
def test_triton_leaves_infinite_cells_to_their_neighbourhood():
    x, weight, bias = Case(1, 3, 8, 4).inputs(torch.float32, "cpu")
    x.data[0, 0, 0] = torch.inf
    with use_backend("triton"):
        out = depthwise_conv2d(x, weight, bias, activation="silu")
        (d_x,) = torch.autograd.grad(out[:, :, 4:].sum(), x)
    assert not out[:, :2, :2].isfinite().all() and out[:, :, 2:].isfinite().all() and d_x.isfinite().all()


def test_autocast_does_not_narrow_the_sums(device):
    inputs = CASES["silu"].inputs(torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        got = run_op(CASES["silu"], inputs)
    assert got["out"].dtype == torch.float32
    assert_close(got, run_conv2d(CASES["silu"], inputs), 3e-6)


def test_any_strides_are_read_in_place_or_copied(device):
    """A part of a projection, turned maps, an expanded batch and channels first give what their copies give."""
    wide = torch.randn(3, 6, 6, 14, device=device)
    weight = torch.randn(7, 3, 3, device=device)
    part = wide[..., :7]
    parts = (wide[..., 7:], part[:, ::2, ::3], part.transpose(1, 2), part[:1].expand(2, -1, -1, -1))
    for x in (*parts, torch.randn(3, 7, 4, 5, device=device).permute(0, 2, 3, 1)):
        out = depthwise_conv2d(x, weight)
        torch.testing.assert_close(out, depthwise_conv2d(x.contiguous(), weight))
        assert out.is_contiguous()


def test_two_runs_give_the_same_bits(device):
    case = Case(8, 28, 28, 96)
    inputs = case.inputs(torch.float32, device)
    first, second = run_op(case, inputs), run_op(case, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["silu", "no_bias", "linear", "side_5"])
def test_opcheck(name, device):
    x, weight, bias = CASES[name].inputs(torch.float32, device)
    arguments = (x, weight.detach().squeeze(1).requires_grad_(), bias, CASES[name].activation)
    torch.library.opcheck(torch.ops.zoo.depthwise_conv2d.default, arguments)


def test_compiles_into_one_graph_and_exports(device):
    class Convolution(nn.Module):
        def forward(self, x, weight, bias):
            return depthwise_conv2d(x, weight, bias, activation="silu") * 2

    inputs = CASES["silu"].inputs(torch.float32, device)
    module = Convolution()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = with_gradients(module(*inputs), inputs)
    torch.testing.assert_close(with_gradients(compiled(*inputs), inputs), expected)
    leaves = tuple(t.detach() for t in inputs)
    exported = torch.export.export(module, leaves)
    torch.testing.assert_close(exported.module()(*leaves), expected["out"].detach())


def test_meta_tensors_give_the_shape():
    x, weight = torch.empty(2, 4, 5, 6, device="meta", dtype=torch.bfloat16), torch.empty(6, 3, 3, device="meta")
    out = depthwise_conv2d(x, weight)
    assert out.shape == x.shape and out.dtype == torch.bfloat16 and out.is_meta


def test_flops_are_counted():
    x, weight, _ = CASES["silu"].inputs(torch.float32, "cpu")
    with FlopCounterMode(display=False) as counter:
        depthwise_conv2d(x, weight).sum().backward()
    forward = 2 * 2 * 5 * 7 * 6 * 9  # 2 operations x B x H x W x C x k x k
    assert counter.get_total_flops() == 4 * forward


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(4, 5, 6)), r"x must have shape \(B, H, W, C\), got \(4, 5, 6\)"),
        (dict(x=torch.zeros(2, 0, 5, 6)), r"x \(2, 0, 5, 6\) is empty"),
        (dict(x=torch.zeros(2, 4, 5, 7)), r"weight must have shape \(C, k, k\) with C = 7, got \(6, 3, 3\)"),
        (dict(x=torch.zeros(2, 4, 5, 6, dtype=torch.int64)), "x is torch.int64; use one of torch.float32"),
        (dict(weight=torch.zeros(6, 3, 5)), r"weight must have shape \(C, k, k\) with C = 6, got \(6, 3, 5\)"),
        (dict(weight=torch.zeros(6, 2, 3, 3)), r"weight must have shape .*, got \(6, 2, 3, 3\)"),
        (dict(weight=torch.zeros(6, 4, 4)), "the kernel's side is 4; use one of 3, 5, 7"),
        (dict(weight=torch.zeros(6, 3, 3, dtype=torch.int32)), "weight is torch.int32"),
        (dict(weight=torch.zeros(6, 3, 3, device="meta")), "weight is on meta but x is on cpu; move them together"),
        (dict(bias=torch.zeros(5)), r"bias must have shape \(C\) = \(6\), got \(5\)"),
        (dict(activation="tanh"), "activation 'tanh' is not known; use 'silu', 'gelu', 'relu' or None"),
    ],
)
def test_errors_name_expected_and_given(change, message):
    arguments = dict(x=torch.zeros(2, 4, 5, 6), weight=torch.zeros(6, 3, 3), bias=torch.zeros(6))
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(**{**arguments, **change})


class TestLayer:
    @pytest.mark.parametrize("activation", ["silu", "gelu", "relu", None])
    @pytest.mark.parametrize("size", [1, 3, 5, 9])
    def test_equals_torch_layers(self, size, activation, device):
        layer = DepthwiseConv(6, size, activation=activation, device=device, dtype=torch.float64)
        x = torch.randn(2, 5, 7, 6, device=device, dtype=torch.float64)
        y = F.conv2d(x.permute(0, 3, 1, 2), layer.weight, layer.bias, padding=size // 2, groups=6)
        torch.testing.assert_close(layer(x), (getattr(F, activation)(y) if activation else y).permute(0, 2, 3, 1))

    def test_autocast_makes_it_narrow(self, device):
        layer = DepthwiseConv(6, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            assert layer(torch.randn(2, 5, 7, 6, device=device)).dtype == torch.bfloat16


def layers(kind: str, device: torch.device) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution of 6 channels and a norm, all of whose numbers are random, and which are evaluated."""
    conv = nn.Conv2d(6, 8, 1) if kind == "pointwise" else nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=kind == "bias")
    norm = nn.BatchNorm2d(conv.out_channels)
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2)
    return conv.to(device, torch.float64).eval(), norm.to(device, torch.float64).eval()


class TestConvNorm:
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("kind", ["pointwise", "bias", "no_bias"])
    def test_equals_the_layers_one_by_one(self, kind, training, device):
        conv, norm = layers(kind, device)
        norm.train(training)
        x = torch.randn(2, 5, 7, 6, device=device, dtype=torch.float64, requires_grad=True)
        inputs = [x, *conv.parameters(), *norm.parameters()]
        got = conv_norm(x, conv, norm, "gelu")
        expected = F.gelu(norm(conv(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
        torch.testing.assert_close(got, expected)
        grads = (torch.autograd.grad(out.square().sum(), inputs) for out in (got, expected))
        torch.testing.assert_close(*grads)

    @pytest.mark.parametrize("training", [False, True])
    def test_a_norm_that_activates_does_so_once(self, training):
        conv, plain = layers("bias", torch.device("cpu"))
        norm = BatchNormAct2d(6, act_layer=nn.SiLU).double().train(training)
        norm.load_state_dict(plain.state_dict())
        x = torch.randn(2, 5, 7, 6, dtype=torch.float64)
        expected = F.silu(plain.train(training)(conv(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
        torch.testing.assert_close(conv_norm(x, conv, norm, "silu"), expected)

    def test_what_stands_for_a_layer_is_called(self):
        """Adapters of convolutions and norms that are shared by processes have weights that do not say all."""

        class Doubled(nn.Conv2d):
            def forward(self, x):
                return 2 * super().forward(x)

        conv, norm = layers("pointwise", torch.device("cpu"))
        twice = Doubled(6, 8, 1).double()
        twice.load_state_dict(conv.state_dict())
        x = torch.randn(2, 5, 7, 6, dtype=torch.float64)
        torch.testing.assert_close(convolve(x, twice), 2 * convolve(x, conv))
        torch.testing.assert_close(conv_norm(x, twice, norm), norm(2 * conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1))
        shared = nn.SyncBatchNorm.convert_sync_batchnorm(norm)
        assert isinstance(shared, nn.SyncBatchNorm)
        torch.testing.assert_close(conv_norm(x, conv, shared), conv_norm(x, conv, norm))
        torch.testing.assert_close(
            conv_norm(x, conv, nn.InstanceNorm2d(8, dtype=torch.float64)),
            nn.InstanceNorm2d(8)(conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1),
        )

    def test_sixteen_bit_weights_are_folded_in_float32(self):
        conv, norm = layers("bias", torch.device("cpu"))
        x = torch.randn(2, 5, 7, 6, dtype=torch.float64)
        exact = conv_norm(x, conv, norm)
        narrow = conv_norm(x.bfloat16(), conv.bfloat16(), norm.bfloat16())
        assert narrow.dtype == torch.bfloat16
        assert (narrow.double() - exact).abs().max() < 0.02 * exact.abs().max()
