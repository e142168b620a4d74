"""Connectors between vision towers and decoders: shapes, gradients, scans against flipped copies, errors."""

import pytest
import torch
from torch import Tensor

from zoo.backbones.scans import scan_paths
from zoo.heads.registry import create_head, list_heads
from zoo.heads.vlm import connectors, convert_connector
from zoo.heads.vlm.connectors import LDPConnector, Mamba2ScanConnector, MMCConnector

IN, OUT, GRID = 12, 16, (3, 5)
OPTIONS = {
    "mamba2_scan_connector": [
        dict(head_dim=8, d_state=8),
        dict(head_dim=8, d_state=8, scans=("raster", "columns")),
        dict(head_dim=8, d_state=8, groups=2, block_mlp=False, scans=("snake",)),
    ],
    "mmc_connector": [dict(form=form, scan=scan) for form in ("l2", "mlp") for scan in ("bidirectional", "cross")],
    "ldp_connector": [dict(out_grid=2), dict(hidden_channels=16, out_grid=4)],
}
CASES = [(name, options) for name in list_heads("connector") for options in OPTIONS.get(name, [{}])]
SCANNING = ("mamba2_scan_connector", "mmc_connector")


def connector(name: str, options: dict) -> torch.nn.Module:
    """A connector with random weights and biases."""
    made = create_head(name, IN, OUT, **options)
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def test_all_are_registered():
    assert len(list_heads("connector")) == 6 == len(connectors.__all__)


@pytest.mark.parametrize("name, options", CASES)
def test_shapes_gradients_and_rows(name, options):
    """On a grid that is no square; every parameter learns, and images of a batch do not mix."""
    model = connector(name, options)
    features = torch.randn(2, GRID[0] * GRID[1], IN, requires_grad=True)
    out = model(features, GRID)
    tokens = options["out_grid"] ** 2 if name == "ldp_connector" else GRID[0] * GRID[1]
    assert out.shape == (2, tokens, OUT)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    torch.testing.assert_close(model(features[1:], GRID), out[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, options", CASES)
def test_bfloat16_and_the_meta_device(name, options):
    model = connector(name, options)
    features = torch.randn(1, 15, IN)
    expected = model(features, GRID)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(features, GRID) - expected).norm() < 0.1 * expected.norm()
    out = model.bfloat16()(features.bfloat16(), GRID)
    assert out.dtype == torch.bfloat16 and (out - expected).norm() < 0.1 * expected.norm()
    meta = create_head(name, IN, OUT, **options, device="meta", dtype=torch.float16)
    assert all(p.is_meta and p.dtype == torch.float16 for p in meta.parameters())


@pytest.mark.parametrize("name, options", [case for case in CASES if case[0] in SCANNING])
def test_scanning_tokens_see_each_other(name, options):
    """Each output depends on every feature: paths run both ways."""
    features = torch.randn(1, 15, IN, requires_grad=True)
    out = connector(name, options).double()(features.double(), GRID)
    for token in (0, 7, 14):
        (gradient,) = torch.autograd.grad(out[0, token].sum(), features, retain_graph=True)
        assert bool((gradient[0].abs().sum(dim=-1) > 0).all())


def permuted(x: Tensor, order: Tensor) -> Tensor:
    """Tokens (B, L, ...) in another order."""
    return x[:, order.long()]


@pytest.mark.parametrize("scans", [("raster",), ("raster", "columns"), ("snake", "hilbert")])
def test_mamba2_scans_follow_their_tables(scans):
    """Against the mixer's own one-path scan of tokens that are put into the path's order and back."""
    mixer = Mamba2ScanConnector(IN, OUT, depth=1, head_dim=8, d_state=8, scans=scans).blocks[0].mixer.double()
    x = torch.randn(2, 15, OUT, dtype=torch.float64)
    tables = torch.cat([scan_paths(scan, *GRID) for scan in scans])
    z, xBC, dt = mixer.in_proj(x).split([mixer.projected[0], sum(mixer.projected[1:4]), mixer.projected[4]], dim=-1)
    convolved, _ = mixer._convolve(xBC, None)
    directions = []
    for k in (0, 1):
        total = 0
        for order in tables:
            y, _ = mixer._scan(permuted(convolved[:, k], order), permuted(dt, order), k, None)
            total = total + permuted(y, order.long().argsort())
        directions.append(mixer._gate_and_norm(total / len(tables), z))
    expected = mixer.out_proj((directions[0] + directions[1]) / 2)
    torch.testing.assert_close(mixer(x, tables), expected)
    if scans == ("raster",):
        torch.testing.assert_close(mixer(x), expected)


def test_mamba2_scan_takes_weights_of_the_other_scan():
    rows = Mamba2ScanConnector(IN, OUT, head_dim=8, d_state=8)
    cross = Mamba2ScanConnector(IN, OUT, head_dim=8, d_state=8, scans=("raster", "columns"))
    cross.load_state_dict(rows.state_dict())
    line = torch.randn(1, 6, IN)
    torch.testing.assert_close(cross(line, (1, 6)), rows(line, (1, 6)))  # one row: its columns are in the same order
    assert not torch.allclose(cross(line, (2, 3)), rows(line, (2, 3)))


def test_squares_need_no_grid():
    model = LDPConnector(IN, OUT, out_grid=2)
    features = torch.randn(1, 9, IN)
    assert torch.equal(model(features), model(features, (3, 3)))


@pytest.mark.parametrize("make", [LDPConnector, lambda *sizes: MMCConnector(*sizes, scan="cross")])
def test_features_that_fit_no_grid(make):
    with pytest.raises(ValueError, match="15 image features do not fit a square grid; give the grid"):
        make(IN, OUT)(torch.randn(1, 15, IN))
    with pytest.raises(ValueError, match="15 image features do not fit a grid of 4 x 4"):
        make(IN, OUT)(torch.randn(1, 15, IN), (4, 4))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("mamba2_scan_connector", dict(scans=("raster", "zigzag")), "zigzag.*choose from"),
        ("mamba2_scan_connector", dict(scans=()), "choose from"),
        ("mamba2_scan_connector", dict(head_dim=7), "head_dim=7"),
        ("mmc_connector", dict(form="l3"), "form='l3' is not known; use one of l2, mlp"),
        ("mmc_connector", dict(scan="diagonal"), "scan='diagonal' is not known"),
    ],
)
def test_arguments_that_are_not_known(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_head(name, IN, OUT, **options)


def test_released_linear_layers():
    converted = convert_connector(
        {"projector.projector.weight": torch.zeros(2), "projector.projector.bias": torch.zeros(2)}
    )
    assert sorted(converted) == sorted(create_head("linear_connector", IN, OUT).state_dict())
