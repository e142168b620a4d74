"""The causal convolution: every backend against ``F.conv1d`` in float64, outputs and all gradients."""

import runpy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo.kernels import causal_conv1d, use_backend

checks = runpy.run_path(str(Path(__file__).with_name("op_checks.py")))
with_gradients, assert_close = checks["with_gradients"], checks["assert_close"]


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    batch: int
    L: int
    D: int
    W: int
    K: int | None = None  # None: the one-path form
    shared: bool = True
    bias: bool = True
    activation: str | None = "silu"
    reverse: bool | tuple[bool, ...] = False

    def inputs(self, dtype: torch.dtype, device: str | torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """x (the first half of a wider tensor), weight and bias; parameters are never narrower than float32."""
        generator = torch.Generator().manual_seed(0)
        paths = () if self.K is None else (self.K,)
        paths_x = () if self.shared else paths

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        exact = torch.promote_types(dtype, torch.float32)
        x = normal(self.batch, *paths_x, self.L, 2 * self.D).to(device, dtype)[..., : self.D].requires_grad_()
        weight = normal(*paths, self.D, self.W).to(device, exact).requires_grad_()
        bias = normal(*paths, self.D).to(device, exact).requires_grad_() if self.bias else None
        return x, weight, bias

    @property
    def flags(self) -> tuple[bool, ...]:
        """One direction per path."""
        return self.reverse if isinstance(self.reverse, tuple) else (self.reverse,) * (self.K or 1)


CASES = {
    "plain": Case(2, 9, 6, 4),
    "reversed": Case(1, 7, 5, 4, reverse=True),
    "linear": Case(2, 5, 3, 3, activation=None),
    "no_bias": Case(2, 6, 4, 2, bias=False),
    "bare": Case(1, 8, 3, 4, bias=False, activation=None, reverse=True),
    "width_1": Case(2, 4, 3, 1, K=2, reverse=(False, True)),
    "shorter_than_filter": Case(2, 2, 3, 4, K=2, reverse=(False, True)),
    "one_token": Case(1, 1, 3, 4, reverse=True),
    "two_directions": Case(2, 70, 5, 4, K=2, reverse=(False, True)),
    "own_inputs": Case(2, 11, 5, 3, K=3, shared=False, reverse=(True, False, True)),
    "one_flag": Case(1, 6, 4, 4, K=2, reverse=True),
    "single_of_several": Case(1, 6, 4, 4, K=1, shared=False, activation=None),
    "many_channels": Case(1, 5, 131, 4, K=2, shared=False, bias=False, reverse=(True, False)),
}
GPU_CASES = {
    "vim": Case(3, 197, 192, 4, K=2, reverse=(False, True)),
    "long": Case(2, 1031, 100, 4, K=4, shared=False, reverse=(False, True, True, False)),
    "four_shared": Case(2, 333, 257, 3, K=4, reverse=(True, True, False, False)),
    "single": Case(2, 300, 384, 2),
}
SUBJECTS = checks["subjects"](CASES, GPU_CASES)


def run_op(case: Case, inputs: tuple, backend: str = "auto") -> dict[str, Tensor]:
    """Output and all gradients by the op, for a fixed gradient of the output."""
    x, weight, bias = inputs
    reverse = list(case.reverse) if isinstance(case.reverse, tuple) else case.reverse
    with use_backend(backend):
        out = causal_conv1d(x, weight, bias, activation=case.activation, reverse=reverse)
        return with_gradients(out, inputs)


def run_conv1d(case: Case, inputs: tuple) -> dict[str, Tensor]:
    """The same by autograd through ``F.conv1d`` in float64."""
    exact = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    x, weight, bias = exact
    outs = []
    for k, backwards in enumerate(case.flags):
        tokens = x if x.dim() == 3 else x[:, k]
        taps, shift = (weight, bias) if case.K is None else (weight[k], None if bias is None else bias[k])
        padded = F.pad((tokens.flip(1) if backwards else tokens).transpose(1, 2), (case.W - 1, 0))
        y = F.conv1d(padded, taps.unsqueeze(1), shift, groups=case.D).transpose(1, 2)
        y = y.flip(1) if backwards else y
        outs.append(F.silu(y) if case.activation else y)
    return with_gradients(outs[0] if case.K is None else torch.stack(outs, 1), exact)


@pytest.mark.parametrize("backend, device, name", SUBJECTS)
def test_equals_conv1d(backend, device, name):
    case = {**CASES, **GPU_CASES}[name]
    inputs = case.inputs(torch.float64, device)
    assert_close(run_op(case, inputs, backend), run_conv1d(case, inputs), 1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("name", ["two_directions", "own_inputs", "linear"])
def test_only_the_result_is_rounded(name, dtype, tolerance, device):
    """The gradients of float32 parameters are exact to float32 although x and the gradient of out are narrower."""
    case = CASES[name]
    inputs = case.inputs(dtype, device)
    x, weight, bias = inputs
    cotangent = torch.randn(x.shape if case.K is None else (x.shape[0], case.K, *x.shape[-2:]), device=device)
    cotangent = cotangent.to(dtype)
    reverse = list(case.flags) if case.K else False
    out = causal_conv1d(x, weight, bias, activation=case.activation, reverse=reverse)
    grads = torch.autograd.grad(out, inputs, cotangent)
    exact = tuple(t.detach().double().requires_grad_() for t in inputs)
    exact_out = causal_conv1d(*exact, activation=case.activation, reverse=reverse)
    exact_grads = torch.autograd.grad(exact_out, exact, cotangent.double())
    assert out.dtype == grads[0].dtype == dtype and grads[1].dtype == grads[2].dtype == torch.float32
    names = ("out", "x", "weight", "bias")
    got, expected = (dict(zip(names, values, strict=True)) for values in ((out, *grads), (exact_out, *exact_grads)))
    assert_close({n: got[n] for n in names[:2]}, {n: expected[n] for n in names[:2]}, tolerance)
    assert_close({n: got[n] for n in names[2:]}, {n: expected[n] for n in names[2:]}, 3e-6)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_triton_reads_and_writes_16_bit_values(dtype, tolerance):
    case = Case(1, 9, 5, 4, K=2, reverse=(False, True))
    inputs = case.inputs(dtype, "cpu")
    assert_close(run_op(case, inputs, "triton"), run_conv1d(case, inputs), tolerance)


@pytest.mark.interpreted
def test_triton_runs_and_channel_tiles_meet_without_a_seam(monkeypatch):
    implementation = pytest.importorskip("zoo.kernels.causal_conv1d.triton")
    monkeypatch.setattr(implementation, "FORWARD_RUN", 5)
    monkeypatch.setattr(implementation, "BACKWARD_RUN", 6)
    monkeypatch.setattr(implementation, "BLOCK_D", 4)
    case = Case(1, 13, 6, 4, K=2, reverse=(False, True))
    inputs = case.inputs(torch.float64, "cpu")
    assert_close(run_op(case, inputs, "triton"), run_conv1d(case, inputs), 1e-12)


def test_autocast_does_not_narrow_the_sums(device):
    case = CASES["two_directions"]
    inputs = case.inputs(torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        got = run_op(case, inputs)
    assert got["out"].dtype == torch.float32
    assert_close(got, run_conv1d(case, inputs), 3e-6)


def test_any_strides_are_read_in_place_or_copied(device):
    """Tokens sliced out of a projection, a transposed layout and an expanded batch give what their copies give."""
    wide = torch.randn(3, 10, 14, device=device)
    weight = torch.randn(7, 4, device=device)
    for x in (wide[..., 7:], wide[:, ::2, :7], wide[..., :7].transpose(0, 1), wide[:1, :, :7].expand(2, -1, -1)):
        torch.testing.assert_close(causal_conv1d(x, weight), causal_conv1d(x.contiguous(), weight))
    channels_first = torch.randn(3, 7, 10, device=device).transpose(1, 2)
    torch.testing.assert_close(
        causal_conv1d(channels_first, weight), causal_conv1d(channels_first.contiguous(), weight)
    )


def test_paths_are_laid_out_for_one_batched_product(device):
    case = CASES["two_directions"]
    out = causal_conv1d(*case.inputs(torch.float32, device), reverse=[False, True])
    flat = out.transpose(0, 1).flatten(1, 2)  # (K, B * L, D)
    assert flat.is_contiguous() and flat.data_ptr() == out.data_ptr()


def test_two_runs_give_the_same_bits(device):
    case = Case(4, 197, 96, 4, K=2, reverse=(False, True))
    inputs = case.inputs(torch.float32, device)
    first, second = run_op(case, inputs), run_op(case, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["plain", "no_bias", "two_directions", "own_inputs", "single_of_several", "width_1"])
def test_opcheck(name, device):
    case = CASES[name]
    x, weight, bias = case.inputs(torch.float32, device)
    if case.K is None:
        x, weight, bias = x.unsqueeze(1), weight.unsqueeze(0), None if bias is None else bias.unsqueeze(0)
    elif case.shared:
        x = x.unsqueeze(1)
    arguments = (x, weight, bias, case.activation == "silu", list(case.flags))
    torch.library.opcheck(torch.ops.zoo.causal_conv1d.default, arguments)


def test_compiles_into_one_graph_and_exports(device):
    class Convolution(torch.nn.Module):
        def forward(self, x, weight, bias):
            return causal_conv1d(x, weight, bias, activation="silu", reverse=[False, True]).sum(1) * 2

    inputs = CASES["two_directions"].inputs(torch.float32, device)
    module = Convolution()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = with_gradients(module(*inputs), inputs)
    torch.testing.assert_close(with_gradients(compiled(*inputs), inputs), expected)
    leaves = tuple(t.detach() for t in inputs)
    exported = torch.export.export(module, leaves)
    torch.testing.assert_close(exported.module()(*leaves), expected["out"].detach())


def test_meta_tensors_give_the_shape():
    x, weight = torch.empty(2, 9, 6, device="meta", dtype=torch.bfloat16), torch.empty(3, 6, 4, device="meta")
    out = causal_conv1d(x, weight, activation="silu", reverse=[False, True, False])
    assert out.shape == (2, 3, 9, 6) and out.dtype == torch.bfloat16 and out.is_meta
    assert out.stride() == causal_conv1d(torch.zeros(2, 9, 6), torch.zeros(3, 6, 4)).stride()


def test_flops_are_counted():
    x, weight, _ = CASES["two_directions"].inputs(torch.float32, "cpu")
    with FlopCounterMode(display=False) as counter:
        causal_conv1d(x, weight).sum().backward()
    forward = 2 * 2 * 2 * 70 * 5 * 4  # 2 operations x B x K x L x D x W
    assert counter.get_total_flops() == 4 * forward


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(4, 6)), r"x must have shape \(B, L, D\) or \(B, K, L, D\), got 1 dimension"),
        (dict(x=torch.zeros(2, 5, 7)), "weight has 6 channels, x has 7"),
        (dict(x=torch.zeros(2, 3, 5, 6)), "x has 3 paths; weight has 2"),
        (dict(x=torch.zeros(2, 0, 6)), r"x \(2, 1, 0, 6\).* is empty"),
        (dict(x=torch.zeros(2, 5, 6, dtype=torch.int64)), "x is torch.int64; use one of torch.float32"),
        (dict(weight=torch.zeros(6)), r"weight must have shape \(D, W\) or \(K, D, W\), got"),
        (dict(weight=torch.zeros(2, 6, 5)), "weight has 5 taps; at most 4"),
        (dict(weight=torch.zeros(2, 6, 4, dtype=torch.int32)), "weight is torch.int32"),
        (dict(weight=torch.zeros(2, 6, 4, device="meta")), "weight is on meta, x on cpu; move them together"),
        (dict(bias=torch.zeros(6)), r"bias must have shape \(K, D\) = \(2, 6\), got \(6\)"),
        (dict(reverse=[True]), "reverse has 1 flags for 2 paths"),
        (dict(activation="relu"), "activation 'relu' is not known; use 'silu' or None"),
    ],
)
def test_errors_name_expected_and_given(change, message):
    arguments = dict(x=torch.zeros(2, 5, 6), weight=torch.zeros(2, 6, 4), bias=torch.zeros(2, 6))
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**{**arguments, **change})
