"""Operators in exported files, one by one: as plain torch operators, in ONNX, and what is worked out beforehand."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.backbones.layers.neighborhood import axis_windows, neighborhood_aggregate, neighborhood_maps
from zoo.kernels import (
    add_layer_norm,
    add_rms_norm,
    causal_conv1d,
    depthwise_conv2d,
    selective_scan,
    ssd,
    use_backend,
)
from zoo.tools.exporting.decompositions import DECOMPOSITIONS, window_axis
from zoo.tools.exporting.folding import fold_constants
from zoo.tools.exporting.onnx_file import convert, onnx_runner


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def wave(x: Tensor, *shape: int) -> Tensor:
    """Numbers between -1 and 1 without a pattern, in the dtype of x."""
    return torch.sin(torch.arange(1, math.prod(shape) + 1, dtype=x.dtype).square()).view(shape)


@dataclass(frozen=True)
class Scan:
    """Sizes and options of one selective scan."""

    K: int = 1
    G: int = 1
    N: int = 4
    shared: bool = True
    table: tuple[tuple[int, ...], ...] | None = None
    reverse: tuple[bool, ...] = (False,)
    window: int = 1
    softplus: bool = True
    optional: bool = True
    complete: bool = False

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scans 9 tokens of 6 channels made from x (B, 9, 6); returns the output and the last states."""
        K, N = self.K, self.N
        scale = x.mean((1, 2)).view(-1, 1, 1, 1, 1)
        B, C = wave(x, 1, K, 9, self.G, N) + scale, wave(x, 1, K, 9, self.G, N) - scale
        return selective_scan(
            x if self.shared else x.unsqueeze(1) * wave(x, K, 1, 1),
            x.unsqueeze(1) * 0.5 + wave(x, K, 9, 6),
            -wave(x, K, 6, N).abs(),
            B,
            C,
            *((wave(x, K, 6), x * 0.7, wave(x, K, 6).cos()) if self.optional else ()),
            delta_softplus=self.softplus,
            paths=None if self.table is None else torch.tensor(self.table),
            reverse=list(self.reverse),
            window=self.window,
            complete=self.complete,
            initial_state=wave(x, K, 6, N) + scale.flatten(1, 2) if self.optional else None,
            return_last_state=True,
        )


SNAKE = (0, 1, 2, 5, 4, 3, 6, 7, 8)
SCANS = {
    "plain": Scan(),
    "bare": Scan(softplus=False, optional=False),
    "two_ends": Scan(K=2, reverse=(False, True), G=2),
    "own_inputs": Scan(K=2, reverse=(True, False), shared=False, N=1, G=3),
    "one_order_for_four_paths": Scan(K=4, table=(SNAKE,), reverse=(False, True) * 2, complete=True),
    "zero_tokens_and_fillers": Scan(
        K=2, table=((4, -1, 0, -1, 8), (7, 2, 5, -2, -2)), reverse=(False, True), shared=False
    ),
    "windows": Scan(K=2, reverse=(False, True), window=4),
    "windows_and_fillers": Scan(
        K=2, table=((3, -2, 0, -1, 8, 7, 1), (-2, 2, 5, -2, 1, 0, -1)), reverse=(False, True), window=2
    ),
}


def conv(x: Tensor) -> list[Tensor]:
    """Convolutions of tokens (B, 9, 6) along one and several paths."""
    weight, bias = torch.linspace(-1, 1, 48, dtype=x.dtype).view(2, 6, 4), torch.linspace(-1, 1, 12, dtype=x.dtype)
    return [
        causal_conv1d(x, weight[0], bias[:6]),
        causal_conv1d(x, weight, bias.view(2, 6), activation="silu", reverse=[False, True]),
        causal_conv1d(torch.stack([x, -x], 1), weight[:, :, :3], reverse=True),
    ]


def maps(x: Tensor) -> list[Tensor]:
    """Convolutions of maps (B, 3, 3, 6) made from x (B, 9, 6)."""
    weight, bias = torch.linspace(-1, 1, 54, dtype=x.dtype).view(6, 3, 3), torch.linspace(-1, 1, 6, dtype=x.dtype)
    grid = x.unflatten(1, (3, 3))
    kinds = [(bias, "silu"), (bias, "gelu"), (None, "relu"), (None, None)]
    return [depthwise_conv2d(grid, weight, shift, activation=activation) for shift, activation in kinds]


def heads(x: Tensor) -> list[Tensor]:
    """SSD over tokens (B, 9, 6) as 2 heads of 3 channels."""
    scale, values = x.mean((1, 2)).view(-1, 1, 1, 1), x.unflatten(2, (2, 3))
    dt, B, C = scale + wave(x, 2, 9, 2), (scale.unsqueeze(-1) + wave(x, 2, 9, 2, 5)), x.mean() - wave(x, 1, 2, 9, 2, 5)
    C = C.expand(len(x), -1, -1, -1, -1)
    A, D, bias, state = (
        -wave(x, 2, 2).abs(),
        wave(x, 2, 2),
        wave(x, 2, 2).cos(),
        scale.unsqueeze(-1) + wave(x, 2, 2, 3, 5),
    )
    table = torch.tensor([[4, -1, 0, -1, 8], [7, 2, 5, -2, -2]])
    return [
        *ssd(values, dt, A, B, C, D, bias, dt_softplus=True, reverse=[False, True], return_last_state=True),
        *ssd(values, dt, A, B, C, D, paths=table, reverse=[True, False], initial_state=state, return_last_state=True),
        ssd(values, -dt[:, 0].abs(), None, B[:, 0, :, 0], C[:, 0, :, 0]),
    ]


def norms(x: Tensor) -> list[Tensor]:
    """Norms of tokens (B, 9, 6), with and without an update, factors of it and a bias."""
    weight, bias = torch.linspace(0.5, 1.5, 6, dtype=x.dtype), torch.linspace(-1, 1, 6, dtype=x.dtype)
    return [
        add_rms_norm(None, x, weight)[0],
        *add_rms_norm(x.sin(), x, weight, 1e-3),
        *add_rms_norm(x.cos(), x, weight, scale=x.mean((1, 2))),
        add_layer_norm(None, x, weight)[0],
        *add_layer_norm(x.sin(), x, weight, bias, 1e-3),
        *add_layer_norm(x.cos(), x, weight, bias, scale=x.mean((1, 2))),
    ]


def attend(x: Tensor) -> list[Tensor]:
    """Neighbourhood attention on maps (B, 8, 9, 6) made from x (B, 9, 6), as 2 heads of 3 channels."""
    grid = torch.stack([x * (1 + 0.1 * row) for row in range(8)], 1).unflatten(3, (2, 3))
    bias = torch.linspace(-1, 1, 50, dtype=x.dtype).view(2, 5, 5)
    near = neighborhood_maps(grid, grid.cos(), 3, 1, bias)
    far = neighborhood_maps(grid, grid.sin(), 3, (2, 3))
    return [near, far, neighborhood_aggregate(near, grid, 3), neighborhood_aggregate(far, grid, 3, (2, 3))]


class Everything(nn.Module):
    """All operators with all of their options, one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        scans = [out for scan in SCANS.values() for out in scan(x)]
        results = [*scans, *conv(x), *maps(x), *heads(x), *norms(x), *attend(x)]
        return torch.cat([result.flatten() for result in results])


class Decomposed(TorchDispatchMode):
    """Runs the decompositions in place of the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.met = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.met.add(func)
        return DECOMPOSITIONS.get(func, func)(*args, **(kwargs or {}))


def test_decompositions_equal_the_operators():
    """In float64, so that nothing but a mistake makes a difference."""
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    with use_backend("reference"):
        expected = Everything()(x)
    with Decomposed() as mode:
        torch.testing.assert_close(Everything()(x), expected, rtol=1e-10, atol=1e-10)
    assert mode.met >= set(DECOMPOSITIONS)


def test_operators_in_onnx(tmp_path):
    program = torch.export.export(Everything(), (torch.randn(2, 9, 6),))
    translated = convert(program, ["x"], ["y"])
    translated.save(tmp_path / "everything.onnx")
    onnx.checker.check_model(str(tmp_path / "everything.onnx"), full_check=True)
    x = torch.randn(2, 9, 6)
    torch.testing.assert_close(onnx_runner(tmp_path / "everything.onnx")(x), Everything()(x), rtol=1e-4, atol=1e-5)


@torch.library.custom_op("zoo_test::unheard_of", mutates_args=())
def unheard_of(x: Tensor) -> Tensor:
    return x.clone()


@unheard_of.register_fake
def _(x):
    return torch.empty_like(x)


def test_operators_without_translation_are_named():
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.zoo_test.unheard_of(x)

    with pytest.raises(RuntimeError, match=r"cannot be translated to ONNX: .*zoo_test.unheard_of"):
        convert(torch.export.export(Odd(), (torch.randn(3),)), ["x"], ["y"])


@pytest.mark.parametrize("length, kernel_size, dilation", [(7, 3, 1), (9, 3, 3), (16, 5, 3), (14, 7, 2), (5, 1, 4)])
def test_windows_of_neighbourhood_attention(length, kernel_size, dilation):
    cells, bias_rows = window_axis(length, kernel_size, dilation)
    assert torch.equal(cells, axis_windows(length, kernel_size, dilation))
    assert torch.equal(bias_rows * dilation, cells - torch.arange(length).unsqueeze(1) + (kernel_size - 1) * dilation)


class Tables(nn.Module):
    """Adds much that depends on no input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(300))

    def forward(self, x: Tensor) -> Tensor:
        order = torch.arange(300)
        order[::3] = order[::3].flip(0)
        values, places = torch.sort(self.weight.exp()[order])
        large = self.weight.unsqueeze(1) * self.weight
        return x + values + places + self.weight.exp()[order].sort().values + large.sum(0) + torch.rand(300) * 0


def test_folding_leaves_what_depends_on_the_input_and_what_grows():
    module, x = Tables(), torch.randn(4, 300)
    program = torch.export.export(module, (x,)).run_decompositions({})
    fold_constants(program)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not [target for target in targets if any(op in target for op in ("sort", "index", "arange", "exp"))]
    assert len([target for target in targets if "aten.add" in target]) == 5
    assert [target for target in targets if "mul" in target] and [target for target in targets if "rand" in target]
    folded = [name for name in program.constants if name.startswith("folded")]
    assert len(folded) == 3  # values, which are used twice, places, and the column of the large product
    torch.testing.assert_close(program.module()(x), module(x))
