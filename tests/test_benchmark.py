"""The benchmark of the kernels, at shapes so small that only its own logic takes time."""

import json
import math
from dataclasses import dataclass

import pytest
import torch

from zoo.kernels import selective_scan
from zoo.tools import benchmark
from zoo.tools.benchmarks import add_norm, bias_gelu, cross_scan, gated_norm, ops, projected_scan, ssd
from zoo.tools.benchmarks import selective_scan as selective_scans
from zoo.tools.benchmarks.measure import Machine, host_milliseconds, measure, peer, plan_calls
from zoo.tools.benchmarks.section import Implementation, run_sections

SCAN = selective_scans.Shape("tiny scan", 2, 3, 5, 2)
CROSS = cross_scan.Shape("tiny grid", 2, 4, 3, 2, 5, 1)
PROJECTED = cross_scan.Shape("tiny tokens", 2, 4, 5, 3, 3, 1)
HEADS = ssd.Shape("tiny heads", 2, 5, 3, 4, 2)
ROWS = (add_norm.Shape("tiny rows", 5, 3, centered=False), add_norm.Shape("tiny centred rows", 5, 3, centered=True))
GATED = tuple(gated_norm.Shape(f"tiny, gate first: {first}", 5, 3, gate_first=first) for first in (False, True))
HIDDEN = bias_gelu.Shape("tiny rows", 5, 3)
SECTIONS = (
    selective_scans.SelectiveScan((SCAN,), (SCAN,)),
    cross_scan.CrossScan((CROSS,), (CROSS,)),
    ssd.SSD((HEADS,), (HEADS,)),
    add_norm.AddNorm(ROWS, ROWS),
    projected_scan.ProjectedScan((PROJECTED,), (PROJECTED,)),
    bias_gelu.BiasGelu((HIDDEN,), (HIDDEN,)),
    gated_norm.GatedNorm(GATED, GATED),
)
CPU = Machine("cpu", torch.float32, 0.001)


@pytest.fixture
def tiny_sections(monkeypatch):
    monkeypatch.setattr(ops, "SECTIONS", {section.name: section for section in SECTIONS})


def assert_positive(record):
    """All measured numbers are finite and above zero; an error may be exactly zero."""
    numbers = {name: value for name, value in record.items() if isinstance(value, float)}
    assert {"forward_ms", "backward_ms", "forward_vs_zoo", "backward_vs_zoo", "forward_vs_dram"} <= set(numbers)
    for name, value in numbers.items():
        assert math.isfinite(value), name
        assert value >= 0 if "error" in name else value > 0, name


def test_ops_writes_all_sections(tiny_sections, tmp_path, capsys):
    file = tmp_path / "results" / "ops.json"
    assert benchmark.main(["ops", "--device", "cpu", "--seconds", "0.001", "--json", str(file)]) == 0
    results = json.loads(file.read_text())
    assert results["environment"]["command"].startswith("python -m zoo.tools.benchmark ops --device cpu")
    assert results["environment"]["dtype"] == "float32"
    assert results["bandwidth_gb_s"] > 0
    for record in results["records"]:
        assert_positive(record)
    rows = {(record["section"], record["implementation"]) for record in results["records"]}
    assert rows >= {
        ("selective_scan", "zoo"),
        ("selective_scan", "step recurrence"),
        ("cross_scan", "zoo fused"),
        ("cross_scan", "unfused: gather, zoo scan, scatter"),
        ("projected_scan", "zoo"),
        ("projected_scan", "one after the other"),
        ("ssd", "zoo"),
        ("ssd", "step recurrence"),
        ("add_norm", "zoo"),
        ("add_norm", "torch: add, norm, cast"),
        ("bias_gelu", "zoo"),
        ("bias_gelu", "torch: GELU, sum of gradients"),
        ("gated_norm", "zoo"),
        ("gated_norm", "torch: norm, activation, product"),
    }
    printed = capsys.readouterr().out
    assert "cross_scan, tiny grid: batch=2 K=4 D=3 H=2 W=5 N=1" in printed
    assert "forward+backward" in printed
    assert "dram shared backward" in printed


def test_only_chooses_sections(tiny_sections, tmp_path, capsys):
    file = tmp_path / "ops.json"
    chosen = ["--only", "ssd", "cross_scan"]
    assert benchmark.main(["ops", "--device", "cpu", "--seconds", "0.001", *chosen, "--json", str(file)]) == 0
    sections = [record["section"] for record in json.loads(file.read_text())["records"]]
    assert list(dict.fromkeys(sections)) == ["cross_scan", "ssd"]
    with pytest.raises(SystemExit):
        benchmark.main(["ops", "--only", "sdd"])
    assert "invalid choice: 'sdd'" in capsys.readouterr().err


def test_ratios_are_quotients():
    records = run_sections([cross_scan.CrossScan((CROSS,))], CPU)["records"]
    fused, unfused = records
    assert fused["forward_vs_zoo"] == 1
    assert unfused["backward_vs_zoo"] == unfused["backward_ms"] / fused["backward_ms"]
    assert unfused["forward_vs_dram"] == unfused["forward_ms"] / unfused["dram_forward"]
    both_ways = fused["dram_shared_forward"] + fused["dram_shared_backward"]  # what is timed as backward on a CPU
    assert fused["backward_vs_dram_shared"] == pytest.approx(fused["backward_ms"] / both_ways)


def test_backward_by_itself_or_with_the_forward():
    inputs = dict(x=torch.ones(2, 3), index=torch.tensor([0, 1]))
    for backward_alone in (True, False):
        numbers = measure(lambda x, index: x[index].exp(), inputs, CPU, backward_alone)
        assert set(numbers) == {"forward_ms", "backward_ms"}
        assert min(numbers.values()) > 0


@pytest.mark.gpu
def test_sections_on_gpu():
    machine = Machine("cuda", torch.bfloat16, 0.001)
    records = [record for record in run_sections(SECTIONS, machine)["records"] if "failed" not in record]
    for record in records:
        assert_positive(record)
        assert 0 < record["peak_mib"] < 64
    by_row = {(record["section"], record["implementation"]): record for record in records}
    assert by_row["selective_scan", "zoo"]["host_ms"] < 10
    assert by_row["ssd", "zoo"]["output_error"] < 2e-2
    assert by_row["ssd", "zoo"]["float32_output_error"] < 1e-5


@pytest.mark.parametrize("shape", ROWS, ids=lambda shape: shape.name)
def test_add_and_norm_is_the_same_in_steps(device, shape):
    section = add_norm.AddNorm()
    inputs = section.inputs(shape, device, torch.float32)
    ours, steps = (way.function(**inputs) for way in list(section.implementations("cpu").values())[:2])
    torch.testing.assert_close(ours, steps)


def test_projected_scan_is_the_same_one_after_the_other(device):
    section = projected_scan.ProjectedScan()
    inputs = section.inputs(PROJECTED, device, torch.float32)
    one, other = (way.function(**inputs) for way in section.implementations(device.type).values())
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("size", [(2, 5), (5, 2), (1, 7)])
def test_cross_scan_is_the_same_fused_or_not(device, size):
    section = cross_scan.CrossScan()
    inputs = section.inputs(cross_scan.Shape("grid", 2, 4, 6, *size, 3), device, torch.float64)
    cotangent = torch.randn_like(inputs["u"])
    results = {}
    for name, implementation in section.implementations(device.type).items():
        leaves = implementation.prepare({**inputs, "u": inputs["u"].detach().requires_grad_()})
        out = implementation.function(**leaves)
        results[name] = (out, *torch.autograd.grad(out, leaves["u"], cotangent))
    definition = selective_scan(
        **{name: inputs[name] for name in ("u", "delta", "A", "B", "C", "D", "delta_bias")},
        paths=inputs["table"],
        delta_softplus=True,
    )
    for out, grad in results.values():
        torch.testing.assert_close(out, definition)
        torch.testing.assert_close(grad, results["zoo fused"][1])


@pytest.mark.parametrize(
    "section, shape, expected",
    [
        # E = 2 * 3 * 5 = 30 elements and S = 2 * 5 * 2 = 20, of two bytes
        (SECTIONS[0], SCAN, dict(dram_forward=(4 * 30 + 2 * 20) * 2, dram_backward=(7 * 30 + 4 * 20) * 2)),
        # E = 2 * 10 * 3 = 60 and S = 2 * 10 = 20
        (
            SECTIONS[1],
            CROSS,
            dict(dram_forward=1760, dram_backward=3040, dram_shared_forward=1040, dram_shared_backward=1960),
        ),
        # x of 2 * 5 * 3 * 4 = 120 elements, dt of 30, B and C of 20 each
        (SECTIONS[2], HEADS, dict(dram_forward=(240 + 30 + 40) * 2, dram_backward=(360 + 60 + 80) * 2)),
        # 5 * 3 = 15 elements of two tensors of 4 bytes and two of 2; backward of three and two
        (SECTIONS[3], ROWS[0], dict(dram_forward=15 * 12, dram_backward=15 * 16)),
        # 2 * 9 * 5 = 90 elements of two bytes, and steps of four paths
        (
            SECTIONS[4],
            PROJECTED,
            dict(
                dram_forward=2 * 180,
                dram_backward=3 * 180,
                dram_steps_forward=10 * 180,
                dram_steps_backward=15 * 180,
            ),
        ),
    ],
)
def test_floors_by_hand(section, shape, expected):
    """At 1000 bytes per second a millisecond is a byte."""
    floors = section.floors(shape, Machine("cpu", torch.bfloat16, 1.0), bandwidth=1000.0)
    assert floors == pytest.approx(expected)


def test_errors_are_relative_to_the_largest_value():
    inputs = ssd.SSD().inputs(HEADS, "cpu", torch.float32)
    found = ssd.errors({"right": ssd.our_ssd, "twice": lambda **x: 2 * ssd.our_ssd(**x)}, inputs)
    assert found["right"]["output_error"] < 1e-6
    assert found["right"]["gradient_error"] < 1e-5
    assert found["twice"] == pytest.approx(dict(output_error=1, gradient_error=1), rel=1e-4)


def test_errors_of_16_bits_come_with_those_of_float32():
    (ours, _) = run_sections([SECTIONS[2]], Machine("cpu", torch.bfloat16, 0.001))["records"]
    assert 1e-4 < ours["output_error"] < 3e-2
    assert ours["float32_output_error"] < 1e-6


def test_peers_have_rows_where_they_are_installed():
    scan, _, heads, rows, *_ = SECTIONS
    mamba_scan = peer("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    mamba_ssd = peer("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    assert ("mamba_ssm" in scan.implementations("cuda")) == (mamba_scan is not None)
    assert ("mamba_ssm" in heads.implementations("cuda")) == (mamba_ssd is not None)
    mamba_norm = peer("mamba_ssm.ops.triton.layer_norm", "layer_norm_fn")
    assert ("mamba_ssm" in rows.implementations("cuda")) == (mamba_norm is not None)
    assert ("mambapy" in scan.implementations("cpu")) == (peer("mambapy.pscan", "pscan") is not None)
    assert peer("no_such_package.ops", "scan") is None


def test_broken_peer_is_named():
    assert peer("json", "dumps") is json.dumps
    with pytest.warns(UserWarning, match=r"json is installed but has no working json\.scan"):
        assert peer("json", "scan") is None


def test_failing_peer_costs_only_its_own_row(capsys):
    def fail(**inputs):
        raise RuntimeError("out of shared memory")

    @dataclass(frozen=True)
    class WithFailure(selective_scans.SelectiveScan):
        peer: bool = True

        def implementations(self, device):
            found = super().implementations(device)
            return {"zoo": found["zoo"], "other": Implementation(fail, peer=self.peer), "last": found["zoo"]}

    records = {r["implementation"]: r for r in run_sections([WithFailure((SCAN,))], CPU)["records"]}
    assert_positive(records["zoo"])
    assert_positive(records["last"])
    assert records["other"]["failed"] == "RuntimeError: out of shared memory"
    assert "forward_ms" not in records["other"]
    assert "other failed: RuntimeError: out of shared memory" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="out of shared memory"):
        run_sections([WithFailure((SCAN,), peer=False)], CPU)


def test_calls_adapt_to_their_length_and_never_fill_the_queue():
    assert plan_calls(call=1.0, issue=1e-4, seconds=0.3)[0] == 5
    assert plan_calls(call=0.03, issue=1e-4, seconds=0.3)[0] == 10
    assert plan_calls(call=1e-4, issue=1e-5, seconds=0.3) == (20, 20)
    assert plan_calls(call=1e-2, issue=1e-2, seconds=0.3) == (20, 1)
    for issue in (1e-5, 1e-4, 3e-4, 1e-3):
        calls, at_once = plan_calls(1e-3, issue, 0.3)
        assert 1 <= at_once <= calls
        assert at_once == 1 or at_once * (issue / 3e-6 + 3) < 1000


def test_host_time_is_that_of_issuing(device):
    x = torch.ones(4, device=device)
    assert 0 < host_milliseconds(lambda: x + 1, Machine(device.type, torch.float32, 0.001)) < 10
