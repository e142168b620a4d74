"""Residual add and norm: every backend against the definition in float64, outputs and all gradients."""

import importlib
import runpy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zoo.kernels import add_layer_norm, add_rms_norm, use_backend

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

checks = runpy.run_path(str(Path(__file__).with_name("op_checks.py")))
BACKENDS, assert_close = checks["BACKENDS"], checks["assert_close"]


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call, and which of its outputs are used."""

    shape: tuple[int, ...]
    update: bool = True
    scale: bool = False
    eps: float = 1e-5
    centered: bool = False
    bias: bool = False
    used: tuple[str, ...] = ("normed", "stream")

    def inputs(self, stream: torch.dtype, update: torch.dtype, device: str | torch.device) -> dict[str, Tensor]:
        """What the op takes, in these dtypes; the weight is never narrower than float32, the scale drops a sample.

        Rows of layer norms have means of all sizes, and biases the dtype of the update.
        """
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=F64).to(device)

        exact = torch.promote_types(stream, F32)
        means = normal(*self.shape[:-1], 1) if self.centered else 0
        given = dict(stream=(means + normal(*self.shape)).to(stream).requires_grad_())
        given.update(weight=(1 + normal(self.shape[-1])).to(exact).requires_grad_())
        if self.update:
            given.update(update=normal(*self.shape).to(update).requires_grad_())
        if self.bias:
            given.update(bias=normal(self.shape[-1]).to(update).requires_grad_())
        if self.scale:
            given.update(scale=(torch.arange(self.shape[0], device=device) % 3 / 0.8).to(exact))
        return given

    def run(self, given: dict[str, Tensor], dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The normed rows and the new stream."""
        options = dict(eps=self.eps, dtype=dtype, scale=given.get("scale"))
        if self.centered:
            options.update(bias=given.get("bias"))
        norm = add_layer_norm if self.centered else add_rms_norm
        return norm(given.get("update"), given["stream"], given["weight"], **options)


def both_norms(cases: dict[str, Case]) -> dict[str, Case]:
    """The cases of RMS norm, and those of layer norm: with one channel it would give zeros, which have no error."""
    layer_norms = {
        f"layer_norm_{name}": replace(case, centered=True, bias=True)
        for name, case in cases.items()
        if case.shape[-1] > 1
    }
    return {**cases, **layer_norms}


RMS_CASES = {
    "plain": Case((2, 9, 7)),
    "one_channel": Case((3, 5, 1)),
    "many_rows": Case((5, 27, 6), scale=True),
    "vim_tiny": Case((2, 19, 192)),
    "vim_small": Case((2, 13, 384), scale=True),
    "odd_width": Case((1, 5, 1000)),
    "one_row": Case((33,)),
    "samples": Case((11, 12), scale=True),
    "grid": Case((3, 2, 5, 8), scale=True),
    "first_block": Case((2, 9, 7), update=False),
    "no_eps": Case((1, 5, 7), eps=0.0),
    "large_eps": Case((1, 5, 7), eps=10.0),
    "last_block": Case((2, 9, 7), used=("normed",)),
    "last_block_scaled": Case((2, 9, 7), scale=True, used=("normed",)),
    "only_the_sum": Case((4, 9, 7), scale=True, used=("stream",)),
    "first_and_last_block": Case((2, 9, 7), update=False, used=("normed",)),
}
CASES = both_norms(RMS_CASES)
CASES.update(
    layer_norm_no_bias=replace(CASES["layer_norm_many_rows"], bias=False),
    layer_norm_first_block_no_bias=replace(CASES["layer_norm_first_block"], bias=False),
    layer_norm_vmamba_tiny=Case((2, 5, 3, 96), scale=True, centered=True, bias=True),
)
RMS_GPU_CASES = {
    "vim_tiny_224": Case((32, 197, 192), scale=True),
    "vim_small_224": Case((16, 197, 384)),
    "vim_base_224": Case((7, 197, 768), scale=True),
    "wide": Case((3, 501, 2500)),
    "widest": Case((2, 300, 8192), scale=True),
    "many_narrow_rows": Case((3, 40001, 3)),
}
GPU_CASES = both_norms(RMS_GPU_CASES)
GPU_CASES.update(layer_norm_vmamba_tiny_224=Case((8, 56, 56, 96), scale=True, centered=True, bias=True))
SUBJECTS = checks["subjects"](CASES, GPU_CASES)
DTYPES = [  # of stream, update and normed rows, with the tolerances of the stream and of what is normed
    (F32, BF16, BF16, 1e-6, 8e-3),
    (F32, F16, None, 1e-6, 3e-6),
    (F32, F32, F32, 1e-6, 3e-6),
    (BF16, BF16, None, 8e-3, 8e-3),
    (BF16, F32, F16, 1e-6, 1e-3),
    (F16, F16, F32, 1e-3, 1e-3),
    (F16, BF16, BF16, 1e-6, 8e-3),  # float16 and bfloat16 make float32
    (F32, F64, F64, 1e-12, 1e-12),
]


def run_op(case: Case, given: dict[str, Tensor], backend: str = "auto", dtype: torch.dtype | None = None) -> dict:
    """Outputs and all gradients by the op, for fixed gradients of the outputs."""
    with use_backend(backend):
        normed, stream = case.run(given, dtype)
        return with_gradients(case, dict(normed=normed, stream=stream), given)


def run_definition(case: Case, given: dict[str, Tensor]) -> dict:
    """The same by autograd through the definition in float64."""
    exact = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in given.items()}
    stream = exact["stream"]
    if "update" in exact:
        scale = exact.get("scale", torch.ones((), device=stream.device, dtype=F64))
        stream = stream + exact["update"] * scale.view(-1, *[1] * (stream.dim() - 1))
    normed = normalise(stream, case) * exact["weight"] + exact.get("bias", 0)
    return with_gradients(case, dict(normed=normed, stream=stream), exact)


def normalise(x: Tensor, case: Case) -> Tensor:
    """Rows divided by their RMS, or by their deviation from the mean."""
    if case.centered:
        x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + case.eps)


def with_gradients(case: Case, outputs: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs, and the gradients of those inputs on which the used outputs depend."""
    generator = torch.Generator().manual_seed(1)
    cotangents = {
        name: torch.randn(x.shape, generator=generator, dtype=F64).to(x.device) for name, x in outputs.items()
    }
    total = sum((outputs[name].double() * cotangents[name]).sum() for name in case.used)
    leaves = {name: t for name, t in given.items() if t.requires_grad}
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    named = {f"d_{name}": d for name, d in zip(leaves, gradients, strict=True) if d is not None}
    return dict(**outputs, **named)


@pytest.mark.parametrize("backend, device, name", SUBJECTS)
def test_equals_the_definition(backend, device, name):
    case = {**CASES, **GPU_CASES}[name]
    given = case.inputs(F64, F64, device)
    assert_close(run_op(case, given, backend), run_definition(case, given), 1e-12)


@pytest.mark.parametrize("stream, update, dtype, stream_tolerance, tolerance", DTYPES)
@pytest.mark.parametrize("name", ["many_rows", "vim_tiny", "layer_norm_many_rows", "layer_norm_vmamba_tiny"])
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_dtypes(backend, device, name, stream, update, dtype, stream_tolerance, tolerance):
    """Outputs have the dtypes promised, gradients those of their inputs, and nothing is rounded but what is written."""
    case = CASES[name]
    given = case.inputs(stream, update, device)
    got, expected = run_op(case, given, backend, dtype), run_definition(case, given)
    sum_dtype = torch.promote_types(stream, update)
    assert got["stream"].dtype == sum_dtype and got["normed"].dtype == (dtype or sum_dtype)
    assert all(got[f"d_{n}"].dtype == t.dtype for n, t in given.items() if t.requires_grad)
    assert_close({"stream": got["stream"]}, {"stream": expected["stream"]}, stream_tolerance)
    rounding = {F64: 1e-12, F32: 3e-6, F16: 1e-3, BF16: 8e-3}
    for n in got.keys() - {"stream"}:
        # gradients of the outputs arrive rounded to the dtypes of the outputs
        worst = max(tolerance, stream_tolerance, rounding[got[n].dtype])
        assert_close({n: got[n]}, {n: expected[n]}, worst)


@pytest.mark.parametrize("name", ["vim_small", "layer_norm_vim_small"])
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_gradients_of_parameters_are_exact_where_activations_are_16_bit(backend, device, name):
    case = replace(CASES[name], used=("normed",))
    given = case.inputs(F32, BF16, device)
    parameters = {n: given[n].detach().float().requires_grad_() for n in ("weight", "bias") if n in given}
    given.update(parameters)
    with use_backend(backend):
        normed, _ = case.run(given, BF16)
        cotangent = torch.randn(normed.shape, device=device).to(BF16)
        got = torch.autograd.grad(normed, list(parameters.values()), cotangent)
    stream = run_definition(case, given)["stream"]
    expected = [(normalise(stream, case) * cotangent.double()).sum((0, 1)), cotangent.double().sum((0, 1))]
    for name, d, exact in zip(parameters, got, expected, strict=False):
        assert_close({name: d}, {name: exact}, 3e-6)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_layer_norm_of_one_channel_is_the_bias(backend, device):
    x, weight, bias = torch.randn(3, 1, device=device), torch.ones(1, device=device), torch.full((1,), 2.0).to(device)
    with use_backend(backend):
        torch.testing.assert_close(add_layer_norm(None, x, weight, bias)[0], torch.full_like(x, 2.0))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_large_means_take_no_digits_from_the_variance(backend, device):
    """A mean of 1e4 is known to 1e-3, and squares of 1e8 only to 10."""
    case = Case((2, 40, 96), update=False, centered=True, used=("normed",))
    given = case.inputs(F32, F32, device)
    given["stream"] = (given["stream"].detach() + 1e4).requires_grad_()
    assert_close(run_op(case, given, backend), run_definition(case, given), 2e-3)


@pytest.mark.parametrize("name", ["vim_tiny", "layer_norm_vim_tiny"])
def test_a_16_bit_stream_gives_what_two_calls_give(name, device):
    """The norm is that of the stream as it was rounded, so that a block may be fused or not."""
    case = CASES[name]
    given = case.inputs(BF16, BF16, device)
    normed, stream = case.run(given)
    assert torch.equal(stream, given["stream"] + given["update"])
    alone, same = case.run({"stream": stream, **{n: given[n] for n in ("weight", "bias") if n in given}})
    assert torch.equal(normed, alone) and same is stream


@pytest.mark.interpreted
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(
    "elements, most_rows, resident, warps", [(1, 32, 1, 1), (1, 4, 2, 4), (16, 32, 3, 2), (4, 1, 1, 1)]
)
def test_triton_tiles_and_programs_meet_without_a_seam(monkeypatch, elements, most_rows, resident, warps, centered):
    implementation = pytest.importorskip("zoo.kernels.add_norm.triton")
    rows = importlib.import_module("zoo.kernels.triton_rows")
    monkeypatch.setattr(rows, "ELEMENTS", elements)
    monkeypatch.setattr(rows, "MOST_ROWS", most_rows)
    monkeypatch.setattr(implementation, "RESIDENT_WARPS", resident)
    monkeypatch.setattr(implementation, "FORWARD_WARPS", warps)
    # rows that are not there must not count, whatever eps is
    case = Case((5, 27, 6), scale=True, eps=0.0, centered=centered, bias=centered)
    given = case.inputs(F64, F64, "cpu")
    assert_close(run_op(case, given, "triton"), run_definition(case, given), 1e-12)


def test_gradients_are_those_of_finite_differences(device):
    given = Case((2, 3, 5), scale=True).inputs(F64, F64, device)

    def both(update, stream, weight):
        return add_rms_norm(update, stream, weight, scale=given["scale"])

    assert torch.autograd.gradcheck(both, (given["update"], given["stream"], given["weight"]))
    assert torch.autograd.gradcheck(lambda s, w: add_rms_norm(None, s, w), (given["stream"], given["weight"]))


@pytest.mark.parametrize("biased", [True, False])
def test_gradients_of_layer_norm_are_those_of_finite_differences(biased, device):
    given = Case((2, 3, 5), scale=True, centered=True, bias=biased).inputs(F64, F64, device)
    names = ("update", "stream", "weight", "bias") if biased else ("update", "stream", "weight")

    def both(*inputs):
        return add_layer_norm(*inputs, scale=given["scale"])

    assert torch.autograd.gradcheck(both, tuple(given[name] for name in names))
    assert torch.autograd.gradcheck(
        lambda *inputs: add_layer_norm(None, *inputs), tuple(given[name] for name in names[1:])
    )


@pytest.mark.parametrize("dtype", [F32, F64])
def test_equals_torchs_rms_norm(dtype, device):
    x, weight = torch.randn(3, 7, 20, device=device, dtype=dtype), torch.randn(20, device=device, dtype=dtype)
    torch.testing.assert_close(
        add_rms_norm(None, x, weight, 1e-6)[0], torch.nn.functional.rms_norm(x, (20,), weight, 1e-6)
    )


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_equals_torchs_layer_norm(backend, device, dtype, biased):
    """With all gradients."""
    case = Case((3, 7, 20), update=False, centered=True, bias=biased, eps=1e-6, used=("normed",))
    given = case.inputs(dtype, dtype, device)
    normed = torch.nn.functional.layer_norm(given["stream"], (20,), given["weight"], given.get("bias"), 1e-6)
    expected = with_gradients(case, dict(normed=normed, stream=given["stream"]), given)
    assert_close(run_op(case, given, backend), expected, 1e-12 if dtype == F64 else 3e-6)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_dropped_samples_pass_unchanged(dtype, backend, device):
    stream, update = torch.randn(2, 3, 4, 6, device=device).unbind(0)
    scale = torch.tensor([0.0, 2.0, 0.0], device=device, dtype=dtype)
    with use_backend(backend):
        _, new_stream = add_rms_norm(update, stream, torch.ones(6, device=device), scale=scale)
    assert new_stream.dtype == F32
    assert torch.equal(new_stream[[0, 2]], stream[[0, 2]])
    torch.testing.assert_close(new_stream[1], stream[1] + 2 * update[1])


@pytest.mark.parametrize("name", ["vim_tiny", "layer_norm_vim_tiny"])
def test_autocast_does_not_narrow_the_sums(name, device):
    case = CASES[name]
    given = case.inputs(F32, F32, device)
    with torch.autocast(device.type, BF16):
        got = run_op(case, given)
    assert got["normed"].dtype == got["stream"].dtype == F32
    assert_close(got, run_definition(case, given), 3e-6)


@pytest.mark.parametrize("norm", [add_rms_norm, add_layer_norm])
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_any_strides_are_read_and_results_are_contiguous(backend, device, norm):
    """Slices, transposed layouts and expanded batches give what their copies give, as inputs and as gradients."""
    wide, weight = torch.randn(3, 10, 14, device=device), torch.randn(14, device=device)[::2]
    layouts = (wide[..., 7:], wide[:, ::2, :7], wide[..., :7].transpose(0, 1), wide[:1, :, :7].expand(2, -1, -1))
    channels_first = torch.randn(3, 7, 10, device=device).transpose(1, 2), torch.randn(7, 10, device=device).t()
    for x in (*layouts, *channels_first):
        outputs = {}
        for name, t in (("strided", x.detach()), ("copied", x.detach().contiguous())):
            t.requires_grad_()
            with use_backend(backend):
                normed, stream = norm(t, t, weight, *((-weight,) if norm is add_layer_norm else ()))
                gradients = torch.autograd.grad((normed, stream), t, (t.detach(), 2 * t.detach()))
            assert normed.is_contiguous() and stream.is_contiguous()
            outputs[name] = (normed, stream, *gradients)
        torch.testing.assert_close(outputs["strided"], outputs["copied"])


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("centered", [False, True])
def test_two_runs_give_the_same_bits(backend, device, centered):
    case = Case((2, 61, 96), scale=True, centered=centered, bias=centered)
    given = case.inputs(F32, BF16, device)
    first, second = run_op(case, given, backend, BF16), run_op(case, given, backend, BF16)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["", "layer_norm_"])
@pytest.mark.parametrize("name", ["plain", "many_rows", "first_block", "samples", "one_row"])
@pytest.mark.parametrize("update_dtype", [F32, BF16])
def test_opcheck(name, kind, update_dtype, device):
    case = CASES[kind + name]
    given = case.inputs(F32, update_dtype, device)
    tensors = given["stream"], *(given.get(name) for name in ("update", "weight", "bias", "scale"))
    torch.library.opcheck(torch.ops.zoo.add_norm.default, (*tensors, 1e-5, update_dtype, case.centered))


class Blocks(torch.nn.Module):
    """Adds and norms of both kinds as a column of blocks makes them, the first without an update."""

    def forward(self, stream, update, weight):
        normed, stream = add_rms_norm(None, stream, weight, dtype=update.dtype)
        normed, stream = add_rms_norm(update * normed, stream, weight, dtype=update.dtype)
        normed, stream = add_layer_norm(update * normed, stream, weight, weight, dtype=update.dtype)
        normed = normed + add_layer_norm(None, stream, weight)[0]
        return normed.to(stream.dtype) + stream


@pytest.mark.parametrize("update_dtype", [F32, BF16])
def test_compiles_into_one_graph_and_exports(update_dtype, device):
    given = CASES["plain"].inputs(F32, update_dtype, device)
    inputs = given["stream"], given["update"], given["weight"]
    module = Blocks()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected, got = (
        (out, *torch.autograd.grad(out.square().sum(), inputs)) for out in (module(*inputs), compiled(*inputs))
    )
    torch.testing.assert_close(got, expected)
    leaves = tuple(t.detach() for t in inputs)
    exported = torch.export.export(module, leaves)
    torch.testing.assert_close(exported.module()(*leaves), expected[0].detach())


def test_fx_traces_it_as_one_node():
    module = Blocks()
    graph = torch.fx.Tracer(autowrap_functions=(add_rms_norm, add_layer_norm)).trace(module)
    assert sum(node.target in (add_rms_norm, add_layer_norm) for node in graph.nodes) == 4
    inputs = torch.randn(2, 3, 7), torch.randn(2, 3, 7), torch.randn(7)
    torch.testing.assert_close(torch.fx.GraphModule(module, graph)(*inputs), module(*inputs))


def test_meta_tensors_give_the_shapes():
    stream, update = torch.empty(2, 9, 6, device="meta"), torch.empty(2, 9, 6, device="meta", dtype=BF16)
    normed, new_stream = add_rms_norm(
        update, stream.transpose(0, 1).transpose(0, 1), torch.empty(6, device="meta"), dtype=BF16
    )
    assert normed.is_meta and normed.dtype == BF16 and new_stream.dtype == F32
    assert normed.shape == new_stream.shape == (2, 9, 6)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(stream=torch.zeros(())), r"stream \(\) must have shape \(..., D\)"),
        (dict(stream=torch.zeros(2, 0, 6)), r"stream \(2, 0, 6\) must have .* at least one element"),
        (dict(stream=torch.zeros(1, 8193)), "stream has 8193 channels; at most 8192"),
        (dict(stream=torch.zeros(2, 5, 6, dtype=torch.int64)), "stream is torch.int64; use one of torch.float32"),
        (dict(update=torch.zeros(10, 6)), r"update must have shape \(..., D\) = \(2, 5, 6\), got \(10, 6\)"),
        (dict(update=torch.zeros(2, 5, 6, dtype=torch.complex64)), "update is torch.complex64; use one of"),
        (
            dict(update=torch.zeros(2, 5, 6, device="meta")),
            "update is on meta but stream is on cpu; move them together",
        ),
        (dict(update=None), "scale multiplies the update, but update is None; leave out scale"),
        (dict(weight=torch.zeros(5)), r"weight must have shape \(D\) = \(6\), got \(5\)"),
        (dict(weight=torch.zeros(6, dtype=torch.int32)), "weight is torch.int32"),
        (dict(scale=torch.zeros(5)), r"scale must have shape \(B\) = \(2\), got \(5\)"),
        (dict(scale=torch.zeros(2, requires_grad=True)), r"scale requires a gradient.* pass scale.detach\(\)"),
        (dict(stream=torch.zeros(6), update=torch.zeros(6)), r"scale needs samples, .* \(6\); use \(1, D\)"),
        (dict(eps=-1.0), "eps is -1.0; it must be 0 or more"),
        (dict(eps=float("nan")), "eps is nan; it must be 0 or more"),
        (dict(dtype=torch.int32), "dtype is torch.int32; use one of torch.float32"),
    ],
)
def test_errors_name_expected_and_given(change, message):
    arguments = dict(
        update=torch.zeros(2, 5, 6), stream=torch.zeros(2, 5, 6), weight=torch.zeros(6), scale=torch.zeros(2)
    )
    with pytest.raises(ValueError, match=message):
        add_rms_norm(**{**arguments, **change})


def test_errors_name_the_bias():
    x, weight = torch.zeros(2, 5, 6), torch.zeros(6)
    with pytest.raises(ValueError, match=r"bias must have shape \(D\) = \(6\), got \(5\)"):
        add_layer_norm(None, x, weight, torch.zeros(5))
    with pytest.raises(ValueError, match=r"bias is torch\.int32"):
        add_layer_norm(None, x, weight, weight.int())
