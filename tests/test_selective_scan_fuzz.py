"""The selective scan on random shapes and flags, against the definition in float64."""

import importlib
import random

import pytest
import torch
from torch import Tensor

from zoo.kernels import use_backend
from zoo.kernels._backend import why_no_compiled_loops
from zoo.kernels.selective_scan import cpu
from zoo.kernels.selective_scan.reference import selective_scan_reference

GROUP = 4
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def random_table(orders: int, L: int, complete: bool, draw: random.Random) -> Tensor:
    """Permutations, or partial orders with zero tokens and rows of different lengths."""
    rows = torch.stack([torch.tensor(draw.sample(range(L), L)) for _ in range(orders)])
    if complete:
        return rows
    for row in rows:
        row[torch.rand(L, generator=torch.Generator().manual_seed(draw.randrange(1 << 30))) < 0.1] = -1
        row[L - draw.randrange(L) :] = -2
        row[0] = draw.choice([-1, 0]) if 0 not in row[1:] else -1
    return rows


def random_partition(K: int, L: int, draw: random.Random) -> Tensor:
    """Every token on one of K paths, of any lengths, with zero tokens and steps past the end."""
    rows = [[] for _ in range(K)]
    for token in draw.sample(range(L), L):
        row = draw.choice(rows)
        row += [token] if draw.random() < 0.9 else [token, -1]
    width = max(map(len, rows))
    return torch.tensor([row + [-2] * (width - len(row)) for row in rows])


def random_case(seed: int, largest: int, widest: int) -> tuple[dict[str, Tensor | None], dict]:
    """Float64 inputs by name, and the options of the op.

    Of ``GROUP`` neighbouring seeds only batch, length and numbers differ: they share their compiled kernels.
    """
    generator, own = torch.Generator().manual_seed(seed), random.Random(seed)
    batch, L = own.randint(1, 3), own.randint(1, largest)
    draw = random.Random(seed // GROUP)
    K, G = draw.choice([1, 1, 2, 4]), draw.choice([1, 1, 2, 3])
    N = draw.choice([1, 2, 3, 4, 8, 16, 16, 24, 32, 64])
    D = G * min(draw.choice([1, 3, 8, 20, 33, 96]), widest)
    orders = draw.choice([order for order in (1, 2, 4) if K % order == 0])
    kind, window = draw.choice(["none", "partition", "partial", "complete"]), draw.choice([1, 1, 1, 2, 8, 16])
    softplus = draw.random() < 0.7

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = dict(
        u=normal(batch, draw.choice([1, K]), L, D),
        delta=normal(batch, K, L, D) if softplus else normal(batch, K, L, D).abs() * 0.3,
        A=-normal(K, D, N).abs() - 0.1,
        B=normal(batch, K, L, G, N),
        C=normal(batch, K, L, G, N),
        D=normal(K, D) if draw.random() < 0.5 else None,
        z=normal(batch, L, D) if draw.random() < 0.5 else None,
        delta_bias=normal(K, D).abs() * 0.3 if draw.random() < 0.5 else None,
        initial_state=normal(batch, K, D, N) if draw.random() < 0.3 else None,
    )
    table = None if kind == "none" else random_table(orders, L, kind == "complete", own)
    options = dict(
        paths=random_partition(K, L, own) if kind == "partition" else table,
        delta_softplus=softplus,
        reverse=[draw.random() < 0.5 for _ in range(K)],
        window=window,
    )
    return inputs, {**options, "complete": kind == "complete", "partition": kind == "partition"}


def gradients(outputs: tuple[Tensor, Tensor], inputs: dict[str, Tensor | None], seed: int) -> dict[str, Tensor]:
    """Outputs and the gradients of their sum with fixed weights."""
    generator = torch.Generator().manual_seed(seed + 1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device) for x in outputs]
    loss = sum((x.double() * weight).sum() for x, weight in zip(outputs, weights, strict=True))
    given = {name: x for name, x in inputs.items() if x is not None}
    grads = torch.autograd.grad(loss, list(given.values()), allow_unused=True)
    results = {name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(given.items(), grads, strict=True)}
    return dict(out=outputs[0], last_state=outputs[1], **{f"grad.{name}": grad for name, grad in results.items()})


def check(
    seed: int, backend: str, device: str, dtype: torch.dtype, tolerance: float, largest: int, widest: int = 96
) -> None:
    exact, options = random_case(seed, largest, widest)
    rounded = {name: None if x is None else x.to(dtype) for name, x in exact.items()}
    expected_inputs = {name: None if x is None else x.double().requires_grad_() for name, x in rounded.items()}
    definition = {name: value for name, value in options.items() if name not in ("complete", "partition")}
    outputs = selective_scan_reference(*(expected_inputs[name] for name in NAMES), **definition)[:2]
    expected = gradients(outputs, expected_inputs, seed)
    given = {name: None if x is None else x.to(device).requires_grad_() for name, x in rounded.items()}
    paths = None if options["paths"] is None else options["paths"].to(device)
    with use_backend(backend):
        out, last_state, _ = torch.ops.zoo.selective_scan(
            *(given[name] for name in NAMES),
            paths,
            options["delta_softplus"],
            options["reverse"],
            options["window"],
            options["complete"],
            options["partition"],
            True,
        )
        got = gradients((out, last_state), given, seed)
    for name, want in expected.items():
        error, largest_entry = (got[name].cpu().double() - want).abs().max(), want.abs().max()
        assert error <= tolerance * largest_entry + 1e-6, f"seed {seed}, {name}: {error:.2e} of {largest_entry:.2e}"


@pytest.mark.parametrize("code", ["cpu_torch", "cpu_numba"])
@pytest.mark.parametrize("seed", range(0, 96, GROUP))
def test_cpu(seed, code, monkeypatch):
    """Each of the two codes on every case, also on those that are usually left to the other."""
    if code == "cpu_numba" and why_no_compiled_loops():
        pytest.skip(why_no_compiled_loops())
    module = importlib.import_module(f"zoo.kernels.selective_scan.{code}")
    monkeypatch.setattr(cpu, "chosen", lambda u, B: module)
    check(seed, "cpu", "cpu", torch.float32, 1e-4, 60, 96)


@pytest.mark.interpreted
@pytest.mark.parametrize("seed", range(400, 432, GROUP))
def test_interpreted(seed):
    check(seed, "triton", "cpu", torch.float32, 1e-4, 40, 20)  # the interpreter takes a second for a program


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [pytest.param(s, marks=pytest.mark.xdist_group(f"{s // GROUP}")) for s in range(300)])
def test_gpu(seed):
    dtype, tolerance = random.Random(seed // GROUP).choice(
        [(torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 1e-2)]
    )
    check(seed, "triton", "cuda", dtype, tolerance, 400, 96)
