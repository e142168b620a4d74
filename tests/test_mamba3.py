"""Mamba-3: the scan and the mixer against the recurrence, token by token, and what they promise besides."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.backbones.layers.mamba3 import Mamba3Mixer, Mamba3State, mamba3_scan
from zoo.kernels.ssd import cpu, cpu_paths

SIZES = {  # B, L, R, H, P, N, pairs
    "siso": (2, 37, 1, 3, 5, 6, 2),
    "long": (1, 131, 1, 2, 3, 4, 2),
    "mimo": (2, 29, 3, 2, 4, 7, 3),
    "unrotated": (1, 9, 2, 2, 3, 5, 0),
    "one_token": (2, 1, 2, 3, 2, 4, 1),
}
MIXERS = {
    "siso": dict(),
    "rotated": dict(rope_fraction=1.0, out_norm=True, groups=2),
    "mimo": dict(mimo_rank=3, groups=2),
    "mimo_normed": dict(mimo_rank=2, out_norm=True, rope_fraction=0.3, bias=True),
}


def scan_inputs(name: str) -> dict[str, Tensor]:
    B, L, R, H, P, N, pairs = SIZES[name]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = dict(
        x=normal(B, L, R, H, P),
        dt=F.softplus(normal(B, L, H)),
        log_decay=-normal(B, L, H).abs(),
        trap=torch.sigmoid(normal(B, L, H)),
        B=normal(B, L, R, H, N),
        C=normal(B, L, R, H, N),
        angles=3 * normal(B, L, H, pairs),
        D=normal(H),
    )
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def start_state(name: str) -> Mamba3State:
    B, _, R, H, P, N, pairs = SIZES[name]
    shapes = (B, H, pairs), (B, H, P, N), (B, R, H, N), (B, R, H, P)
    generator = torch.Generator().manual_seed(1)
    return Mamba3State(*(torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes))


def turned(x: Tensor, phase: Tensor) -> Tensor:
    """Pairs of channels of x (B, R, H, N) as complex numbers, times exp(i phase), (B, H, pairs)."""
    pairs = phase.shape[-1]
    numbers = torch.view_as_complex(x[..., : 2 * pairs].unflatten(-1, (pairs, 2)).contiguous())
    numbers = numbers * torch.polar(torch.ones_like(phase), phase).unsqueeze(1)
    return torch.cat([torch.view_as_real(numbers).flatten(-2), x[..., 2 * pairs :]], dim=-1)


def step_by_step(
    x: Tensor, dt: Tensor, log_decay: Tensor, trap: Tensor, B: Tensor, C: Tensor, angles: Tensor, D: Tensor,
    state: Mamba3State,
) -> tuple[Tensor, Mamba3State]:  # fmt: skip
    """The definition."""
    phase, h, last_B, last_x = state
    outputs = []
    for t in range(x.shape[1]):
        phase = phase + angles[:, t] * dt[:, t, :, None]
        B_t, C_t = turned(B[:, t], phase), turned(C[:, t], phase)
        step, decay, share = (v[:, t, :, None, None] for v in (dt, log_decay.exp(), trap))
        before = torch.einsum("brhp,brhn->bhpn", last_x, last_B)
        received = torch.einsum("brhp,brhn->bhpn", x[:, t], B_t)
        h = decay * h + (1 - share) * step * decay * before + share * step * received
        outputs.append(torch.einsum("bhpn,brhn->brhp", h, C_t) + D[:, None] * x[:, t])
        last_B, last_x = B_t, x[:, t]
    return torch.stack(outputs, dim=1), Mamba3State(phase.remainder(2 * math.pi), h, last_B, last_x)


def zeros_like(state: Mamba3State) -> Mamba3State:
    return Mamba3State(*map(torch.zeros_like, state))


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_scan_equals_the_recurrence(name, begun):
    """Outputs, states and every gradient, in float64."""
    inputs, state = scan_inputs(name), start_state(name)
    expected = step_by_step(**inputs, state=state if begun else zeros_like(state))
    got = mamba3_scan(**inputs, state=state if begun else None, return_state=True)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    leaves = [*inputs.values(), *(state if begun else ())]
    leaves = [leaf for leaf in leaves if leaf.numel()]
    weights = [torch.randn_like(t) for t in (expected[0], *expected[1])]
    expected_grads, got_grads = (
        torch.autograd.grad(sum((t * w).sum() for t, w in zip((y, *last), weights, strict=True)), leaves)
        for y, last in (expected, got)
    )
    torch.testing.assert_close(got_grads, expected_grads, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("name", ["long", "mimo"])
def test_scan_does_not_depend_on_the_chunk(name, chunk, monkeypatch):
    inputs = scan_inputs(name)
    expected = mamba3_scan(**inputs)
    for module in (cpu, cpu_paths):
        monkeypatch.setattr(module, "CHUNK", chunk)
    torch.testing.assert_close(mamba3_scan(**inputs), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", ["long", "mimo"])
def test_scan_precision(name, dtype, tolerance, device):
    """Activations in 16 bits; steps, decays and angles in float32, as the mixer computes them."""
    inputs = scan_inputs(name)
    rounded = {n: t.detach().to(dtype if n in ("x", "B", "C") else torch.float32).to(device) for n, t in inputs.items()}
    got, state = mamba3_scan(**rounded, return_state=True)
    assert got.dtype == dtype and state.ssm.dtype == torch.float32
    expected = mamba3_scan(**{n: t.double().cpu() for n, t in rounded.items()})
    assert (got.cpu() - expected).abs().max() < tolerance * expected.abs().max()


def make(**options) -> Mamba3Mixer:
    torch.manual_seed(0)
    mixer = Mamba3Mixer(16, **{**dict(d_state=10, head_dim=8), **options})
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return mixer


def mixer_step_by_step(mixer: Mamba3Mixer, u: Tensor) -> Tensor:
    """The mixer, head by head in the notation of the paper's code."""
    H, P, N, R, G = mixer.heads, mixer.head_dim, mixer.d_state, mixer.ranks, mixer.groups
    z, x, B, C, dt, A, trap, angles = mixer.in_proj(u).split(mixer.projected, dim=-1)
    dt = torch.log1p(torch.exp(dt + mixer.dt_bias))
    A = -torch.where(A >= 0, 1 + A, 1 / (1 - A)).clamp(min=1e-4)

    def heads(v: Tensor, norm: torch.nn.RMSNorm, bias: Tensor) -> Tensor:
        v = v.reshape(*v.shape[:2], R, G, N)
        v = v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
        return torch.stack([v[:, :, :, h // (H // G)] + bias[h] for h in range(H)], dim=3)

    B, C = heads(B, mixer.B_norm, mixer.B_bias), heads(C, mixer.C_norm, mixer.C_bias)
    ones = torch.ones(H, R, P, dtype=u.dtype)
    to_x, to_z, to_o = (ones if w is None else w for w in (mixer.mimo_x, mixer.mimo_z, mixer.mimo_o))
    x, z = (torch.einsum("blhp,hrp->blrhp", v.unflatten(-1, (H, P)), w) for v, w in ((x, to_x), (z, to_z)))
    angles = (math.pi * torch.tanh(angles)).unsqueeze(2).expand(-1, -1, H, -1)
    shapes = (H, angles.shape[-1]), (H, P, N), (R, H, N), (R, H, P)
    state = Mamba3State(*(u.new_zeros(len(u), *shape) for shape in shapes))
    y, _ = step_by_step(x, dt, dt * A, torch.sigmoid(trap), B, C, angles, mixer.D, state)
    if mixer.norm_weight is not None:
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm_weight.view(H, P)
    y = torch.einsum("blrhp,hrp->blhp", y * z * torch.sigmoid(z), to_o)
    return mixer.out_proj(y.flatten(2))


@pytest.mark.parametrize("options", MIXERS.values(), ids=MIXERS)
def test_mixer_equals_its_definition(options):
    mixer = make(**options).double()
    u = torch.randn(2, 21, 16, dtype=torch.float64, requires_grad=True)
    expected, got = mixer_step_by_step(mixer, u), mixer(u)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    leaves = dict(mixer.named_parameters(), u=u)
    expected, got = (torch.autograd.grad(y.sin().sum(), list(leaves.values())) for y in (expected, got))
    for name, exact, grad in zip(leaves, expected, got, strict=True):
        assert exact.any(), name
        torch.testing.assert_close(grad, exact, rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize("options", MIXERS.values(), ids=MIXERS)
def test_parts_of_a_sequence_chained_by_the_state_equal_the_whole(options):
    mixer = make(**options)
    u = torch.randn(2, 23, 16)
    whole, last = mixer(u, return_state=True)
    state, outputs = None, []
    for part in u.split([9, 1, 13], dim=1):
        y, state = mixer(part, state, return_state=True)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state[1:], last[1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.sin(state.phase), torch.sin(last.phase), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", MIXERS.values(), ids=MIXERS)
def test_sixteen_bit_floats(options):
    mixer = make(**options)
    u = torch.randn(2, 40, 16)
    expected = mixer(u)
    narrow = copy.deepcopy(mixer).to(torch.bfloat16)(u.bfloat16())
    assert narrow.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(u)
    for got in (narrow, y):
        torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    y.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in mixer.parameters())


def test_long_sequences_stay_finite():
    mixer = make()
    u = (20 * torch.randn(1, 3000, 16)).requires_grad_()
    y = mixer(u)
    y.sum().backward()
    assert torch.isfinite(y).all() and torch.isfinite(u.grad).all()


@pytest.mark.parametrize("options", MIXERS.values(), ids=MIXERS)
def test_meta_mixer_is_initialised_after_to_empty(options):
    options = dict(d_state=10, head_dim=8, **options)
    mixer = Mamba3Mixer(16, device="meta", **options).to_empty(device="cpu")
    for module in mixer.modules():
        if module is not mixer and hasattr(module, "reset_parameters"):
            module.reset_parameters()
    mixer.reset_parameters()
    step = F.softplus(mixer.dt_bias)
    assert (step >= 1e-4).all() and (step <= 0.1001).all()
    assert torch.isfinite(mixer(torch.randn(1, 3, 16))).all()


def test_compiles_into_one_graph():
    torch.compiler.reset()
    mixer = make(mimo_rank=2)
    u = torch.randn(2, 12, 16)
    torch.testing.assert_close(torch.compile(mixer, fullgraph=True, backend="aot_eager")(u), mixer(u))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(head_dim=5), "inner width 32"),
        (dict(groups=3), "groups=3"),
        (dict(rope_fraction=1.5), "rope_fraction=1.5"),
        (dict(mimo_rank=0), "mimo_rank=0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_too_many_angles_are_named():
    inputs = scan_inputs("siso")
    inputs["angles"] = torch.zeros(2, 37, 3, 4)
    with pytest.raises(ValueError, match="4 pairs of channels to rotate, but B has 6"):
        mamba3_scan(**inputs)
