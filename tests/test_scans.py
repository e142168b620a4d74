"""Every scan strategy: its table against the authors', and what any table has to satisfy."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import zoo
from zoo.backbones.scans import list_scans, register_scan, scan_paths
from zoo.backbones.scans.memory import remember_tables
from zoo.backbones.scans.snake import SNAKE_MOVES, snake, snake_moves
from zoo.kernels import selective_scan

TABLES = load_file(Path(__file__).parent / "scan_tables.safetensors")  # from the authors' code
SIZES = [(1, 1), (1, 6), (5, 1), (4, 4), (5, 7), (6, 3), (14, 14), (8, 13)]


@pytest.mark.parametrize("name", sorted(TABLES))
def test_table_equals_the_authors(name):
    scan, H, W, size = re.fullmatch(r"([a-z]+)_(\d+)x(\d+)(?:_size(\d+))?", name).groups()
    options = {"size": int(size)} if size else {}
    assert torch.equal(scan_paths(scan, int(H), int(W), **options), TABLES[name])


@pytest.mark.parametrize("H, W", SIZES)
@pytest.mark.parametrize("name", list_scans())
def test_paths_cover_the_grid_and_visit_no_cell_twice(name, H, W):
    table = scan_paths(name, H, W)
    assert table.dtype == torch.int32 and table.dim() == 2
    assert table.min() >= -2 and table.max() < H * W
    assert set(range(H * W)) <= set(table.flatten().tolist())
    for path in table:
        cells = path[path >= 0]
        assert len(cells.unique()) == len(cells)


@pytest.mark.parametrize("H, W", [(4, 4), (5, 7), (1, 6)])
@pytest.mark.parametrize("name", list_scans())
def test_merge_of_expand_is_visits_times_x(name, H, W):
    """With step 1, B = C = 1 and a state that forgets at once, the scan copies its input along every path."""
    table = scan_paths(name, H, W)
    K, L = len(table), H * W
    x = torch.randn(2, L, 3)
    ones = torch.ones(2, K, L, 1)
    merged = selective_scan(x, torch.ones(2, K, L, 3), torch.full((K, 3, 1), -1e4), ones, ones, paths=table)
    visits = torch.bincount(table[table >= 0].flatten().long(), minlength=L)
    torch.testing.assert_close(merged, x * visits[:, None])


@pytest.mark.parametrize("name", ["bidirectional", "cross", "diagonal", "hilbert", "shuffled_bidirectional"])
def test_paths_come_with_their_reverse(name):
    table = scan_paths(name, 5, 6)
    forward, backward = table.view(2, -1, table.shape[1])
    assert torch.equal(forward.flip(1), backward)


@pytest.mark.parametrize("H, W", [(8, 8), (16, 16)])
def test_hilbert_and_snake_never_jump(H, W):
    for name in ("hilbert", "snake"):
        for path in scan_paths(name, H, W).long():
            distance = (path // W).diff().abs() + (path % W).diff().abs()
            assert (distance == 1).all()


@pytest.mark.parametrize("H, W", SIZES)
def test_snake_moves_lead_along_the_snake(H, W):
    """Walked from its first cell, every list of moves visits the cells of its path."""
    displacement = torch.tensor([[0, 0], [0, 1], [0, -1], [-1, 0], [1, 0]])  # rows and columns, as SNAKE_MOVES
    assert SNAKE_MOVES == ("start", "right", "left", "up", "down")
    for path, moves in zip(snake(H, W), snake_moves(H, W), strict=True):
        position = torch.stack([path[0] // W, path[0] % W]) + displacement[moves].cumsum(0)
        assert torch.equal(position[:, 0] * W + position[:, 1], path)
        assert moves[0] == 0 and (moves[1:] > 0).all()


@pytest.mark.parametrize("H, W", SIZES)
def test_columns_are_rows_of_the_transposed_grid(H, W):
    path = scan_paths("columns", H, W)[0].long()
    assert torch.equal(path // W + path % W * H, torch.arange(H * W))


def test_tables_made_while_a_graph_is_captured_are_not_kept(monkeypatch):
    table = remember_tables(torch.arange)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert table(3) is not table(3)
    monkeypatch.undo()
    assert table(3) is table(3)


def test_remembered_tables():
    calls = []

    @remember_tables
    def table(size: int) -> torch.Tensor:
        calls.append(size)
        return torch.arange(size)

    with torch.inference_mode():
        first = table(3)
    assert not first.is_inference()  # so autograd may save it
    assert table(3) is first and table(4).shape == (4,)
    assert calls == [3, 4]

    class Lookup(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[table(x.shape[0])]

    dynamic = {0: torch.export.Dim.AUTO}
    exported = torch.export.export(Lookup(), (torch.randn(5),), dynamic_shapes=(dynamic,)).module()
    assert exported(torch.randn(7)).shape == (7,)
    assert table(5).sum() == 10  # a real one, not the trace's


def test_shuffles_follow_their_seed():
    assert torch.equal(scan_paths("shuffled", 6, 6, seed=3), scan_paths("shuffled", 6, 6, seed=3))
    assert not torch.equal(scan_paths("shuffled", 6, 6, seed=3), scan_paths("shuffled", 6, 6, seed=4))


def test_atrous_of_any_rate_covers_odd_grids():
    table = scan_paths("atrous", 7, 5, rate=3)
    assert table.shape == (9, 6)
    assert sorted(table[table >= 0].tolist()) == list(range(35))


def test_errors_name_the_value():
    with pytest.raises(ValueError, match=r"no scan 'spiral'; there are atrous, bidirectional"):
        scan_paths("spiral", 4, 4)
    with pytest.raises(ValueError, match=r"a grid of 0 rows and 4 columns has no cells"):
        scan_paths("raster", 0, 4)
    with pytest.raises(ValueError, match=r"size must be at least 1, got 0"):
        scan_paths("window", 4, 4, size=0)
    with pytest.raises(ValueError, match=r"rate must be at least 1, got 0"):
        scan_paths("atrous", 4, 4, rate=0)
    with pytest.raises(ValueError, match=r"scan 'raster' is registered already, by zoo.backbones.scans.raster"):
        register_scan("raster")(lambda H, W, device: torch.zeros(1, H * W))


class _Table(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return scan_paths(self.name, *x.shape[-2:], x.device)


@pytest.mark.parametrize("name", sorted(set(list_scans()) - {"hilbert", "shuffled", "shuffled_bidirectional"}))
def test_a_compiled_model_makes_its_table_on_its_own_device(name):
    """A CUDA graph cannot copy it from the CPU. Orders that depend on values or on a CPU's generator are left out."""
    program = torch.export.export(_Table(name), (torch.empty(5, 7, device="meta"),), strict=False)
    made = [value for node in program.graph.nodes if isinstance(value := node.meta.get("val"), torch.Tensor)]
    assert len(made) > 1 and {value.device.type for value in made} == {"meta"}


def test_listed_in_the_public_api():
    assert zoo.list_scans() == list_scans()
    assert {"raster", "cross", "atrous", "window", "snake", "hilbert", "shuffled"} <= set(zoo.list_scans())
