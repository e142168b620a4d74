"""Parity with the authors' code, and that the checker fails when it should."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zoo.parity import check_case, check_keys, find_cases
from zoo.tools.check_parity import main

GOLDENS = Path(__file__).parent / "goldens"
KEYS = Path(__file__).parent / "keys"
CASES = find_cases(GOLDENS)
NEED_TRANSFORMERS = ("cobra", "mamba_lm", "cobra_3b", "mlmamba_3b")


@pytest.fixture
def packages(path):
    """Skips language models where the package of their classes is missing."""
    if {path.stem, path.parent.name} & set(NEED_TRANSFORMERS):
        pytest.importorskip("transformers", reason="language models need transformers")


@pytest.mark.parametrize("path", CASES, ids=[f"{path.parent.name}-{path.stem}" for path in CASES])
def test_golden_case(path, packages):
    report = check_case(path)
    assert report.passed, str(report)


@pytest.mark.gpu
@pytest.mark.parametrize("path", CASES, ids=[f"{path.parent.name}-{path.stem}" for path in CASES])
def test_golden_case_on_gpu(path, packages):
    report = check_case(path, "cuda")
    assert report.passed, str(report)


@pytest.mark.parametrize("path", sorted(KEYS.glob("*.json")), ids=lambda path: path.stem)
def test_released_keys(path, packages):
    report = check_keys(path)
    assert report.passed, str(report)


@pytest.fixture
def case(tmp_path):
    """A small case in a folder of its own, named so that nothing can be told from its name."""
    folder = tmp_path / "vim"
    folder.mkdir()
    for suffix in (".json", ".safetensors"):
        shutil.copy(GOLDENS / "vim" / f"midcls_nonsquare{suffix}", folder / f"x{suffix}")
    return folder / "x.json"


def edit_tensors(case, change):
    path = case.with_suffix(".safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_spec(case, change):
    spec = json.loads(case.read_text())
    change(spec)
    case.write_text(json.dumps(spec))


def nudge(name, amount):
    def change(tensors):
        tensors[name].view(-1)[3] += amount

    return change


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (nudge("output.logits", 2e-3), "output.logits"),
        (nudge("output.hidden1", 2e-3), "output.hidden1"),
        (nudge("grad.input", 2e-4), "grad.input"),
        (nudge("state.layers.1.mixer.D_b", 0.1), "used by"),
        (lambda tensors: tensors.update({"output.logits": torch.full((2, 10), float("nan"))}), "output.logits"),
        (lambda tensors: tensors.update({"output.extra": torch.zeros(1)}), "not computed: output.extra"),
        (lambda tensors: tensors.pop("state.head.bias"), "missing head.bias"),
        (lambda tensors: tensors.update({"output.logits": torch.zeros(2, 11)}), "shape"),
    ],
)
def test_a_wrong_tensor_fails(case, change, detail):
    assert check_case(case).passed
    edit_tensors(case, change)
    report = check_case(case)
    assert not report.passed
    assert detail in report.detail


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (lambda spec: spec["kwargs"].update(if_divide_out=False), "used by"),
        (lambda spec: spec["kwargs"].update(use_middle_cls_token=False), "used by"),
        (lambda spec: spec["kwargs"].update(surprise=1), "surprise"),
        (lambda spec: spec.update({"class": "vim/other.py:Mystery"}), "no builder for 'Mystery'"),
    ],
)
def test_a_wrong_description_fails(case, change, detail):
    edit_spec(case, change)
    report = check_case(case)
    assert not report.passed
    assert detail in report.detail


def test_sixteen_bit_run_uses_its_own_tolerance(case):
    report = check_case(case, dtype=torch.bfloat16)
    assert report.tolerance == "rtol 0.03 atol 0.03*max"
    assert 1e-4 < report.max_error < 0.5


def test_command_line(case, capsys):
    assert main([str(case.parent)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 0 failed"
    unknown = case.parent.parent / "no_such_family"
    shutil.copytree(case.parent, unknown)
    assert main([str(case.parent.parent)]) == 1
    rows = capsys.readouterr().out.splitlines()
    assert rows[-1] == "1 passed, 1 failed"
    assert rows[0].startswith("no_such_family/x") and "no builder" in rows[0]
    assert main([str(case.parent.parent), "--family", "vim"]) == 0


def test_command_line_keys(tmp_path, capsys):
    spec = json.loads((KEYS / "vim_tiny_patch16_224.json").read_text())
    spec["state_dict"]["norm_f.weight"] = [193]
    (tmp_path / "vim_tiny_patch16_224.json").write_text(json.dumps(spec))
    spec["params"] += 1
    (tmp_path / "vim_small_patch16_224.json").write_text(json.dumps(spec))
    (tmp_path / "unheard_of.json").write_text(json.dumps(spec))
    assert main(["--keys", str(tmp_path)]) == 1
    unheard, small, tiny, summary = capsys.readouterr().out.splitlines()
    assert "no builder" in unheard
    assert "25796584 parameters, the released model has 7148009" in small
    assert "norm.weight (193,) for (192,)" in tiny
    assert summary == "0 passed, 3 failed"
    assert main(["--keys", str(KEYS), "--family", "vim"]) == 0


def test_command_line_as_a_module():
    command = [sys.executable, "-m", "zoo.tools.check_parity", str(GOLDENS / "selective_scan")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == f"{len(find_cases(GOLDENS / 'selective_scan'))} passed, 0 failed"


def test_nothing_to_check_is_an_error(tmp_path):
    for arguments in ([], [str(tmp_path)], [str(tmp_path / "missing")], ["--keys", str(tmp_path)]):
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
        assert exit_info.value.code == 2
