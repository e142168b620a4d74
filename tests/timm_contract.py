"""Runs timm's own model tests on our models: a pytest plug-in, and the command behind ``make test-contract``.

timm's wheel has no tests, its source archive has: pip fetches the one of the installed version into pytest's cache
folder. The tests ask ``timm.list_models`` for their models while they are imported, with patterns and module names that
know timm's models only. The plug-in answers with ours in the same roles, and drops the tests whose models are named.
Where the tests script a model, it is traced.

    python tests/timm_contract.py           # all models on two processes, and a report in results/timm_contract.txt
    python tests/timm_contract.py -k vim    # any arguments of pytest, and no report
"""

import ctypes
import fnmatch
import functools
import os
import platform
import subprocess
import sys
import tarfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest
import timm
import torch
from timm.models import model_entrypoint

import zoo
from zoo.backbones.layers.columnar import ColumnarBackbone

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".pytest_cache" / "timm"
REPORT = ROOT / "results" / "timm_contract.txt"
PROCESSES = 2

NON_STANDARD = "vit_*"  # stands in timm's list of patterns for models whose features are no map
IMPOSSIBLE = {  # (test, pattern of models): why it has to fail
    ("test_model_default_cfgs_non_std", "shufflemamba_reg_*"): (
        "the test wants pooled features as wide as tokens; the published feature joins those of all registers"
    ),
}
BLOCK = 1_000_003  # a prime, so that rows of a matrix differ
LARGE = 500e6  # parameters: tests of a further form of such a model take minutes
FURTHER_FORMS = {
    "test_model_backward_fx",
    "test_model_forward_fx",
    "test_model_forward_fx_torchscript",
    "test_model_forward_intermediates_features",
    "test_model_forward_torchscript",
}
LIBC = ctypes.CDLL(None) if os.name == "posix" else None
OURS = frozenset(zoo.list_models())
MAX_PRUNED = 60e6  # parameters times features: minutes for what smaller models of the family show in seconds


def source_folder() -> Path:
    """Where timm's tests lie, or will."""
    return CACHE / f"timm-{timm.__version__}"


def cached_tests() -> Path | None:
    """timm's test file of the installed version, if it was fetched before."""
    path = source_folder() / "tests" / "test_models.py"
    return path if path.is_file() else None


def fetch_tests() -> Path:
    """Downloads the source archive of the installed timm and takes its tests out."""
    CACHE.mkdir(parents=True, exist_ok=True)
    name = f"timm=={timm.__version__}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm", "--dest", str(CACHE)]
    subprocess.run([*pip, name], check=True)
    with tarfile.open(CACHE / f"timm-{timm.__version__}.tar.gz") as archive:
        wanted = [m for m in archive.getmembers() if m.name.endswith("pyproject.toml") or "/tests/" in m.name]
        archive.extractall(CACHE, wanted, filter="data")
    return cached_tests()


@functools.cache
def is_columnar(name: str) -> bool:
    """Whether a family's models keep one sequence of tokens, so that what their features are is no map."""
    module = sys.modules[model_entrypoint(name).__module__]
    classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    return any(issubclass(c, ColumnarBackbone) for c in classes)


@functools.cache
def size_of(name: str) -> tuple[int, int]:
    """Parameters and features of a model."""
    model = timm.create_model(name, device="meta")
    return sum(p.numel() for p in model.parameters()), len(model.feature_info)


timm_list_models = timm.list_models


def list_our_models(
    filter: str | Sequence[str] = "",
    module: str | Sequence[str] = "",
    pretrained: bool = False,
    exclude_filters: str | Sequence[str] = "",
    **options: bool,
) -> list[str]:
    """Stands in for ``timm.list_models``: our models in the role that the arguments describe.

    Modules are those whose models have ``forward_intermediates``, as all of ours. Other patterns name models of timm.
    """
    if pretrained or (filter and NON_STANDARD not in filter):
        return []
    chosen = OURS
    if filter:
        chosen = {name for name in OURS if is_columnar(name)}
    elif NON_STANDARD in exclude_filters:
        chosen = {name for name in OURS if not is_columnar(name)}
    names = timm_list_models(exclude_filters=exclude_filters, **options)
    return [name for name in names if name.split(".")[0] in chosen]


def model_of(item: pytest.Item) -> str | None:
    """Which of our models a test is about, without tag."""
    name = getattr(item, "callspec", None) and item.callspec.params.get("model_name")
    name = name.split(".")[0] if isinstance(name, str) else None
    return name if name in OURS else None


def memory_in_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Traced:
    """Stands in for ``torch.jit.script``: TorchScript of a model as torch.jit.trace makes it of the first input.

    torch.jit.script compiles a part of Python without abstract sequences, callable arguments and blocks chosen by
    number, all of which the models' code has.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.traced: torch.jit.ScriptModule | None = None

    def to(self, device: torch.device) -> "Traced":
        self.model.to(device)
        return self

    def __call__(self, images: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        if self.traced is None:
            self.traced = torch.jit.trace(self.model, images, strict=False, check_trace=False)
        return self.traced(images)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--contract-report", type=Path, help="file for the table of outcomes")


draw_uniform = torch.Tensor.uniform_


def uniform_in_blocks(self: torch.Tensor, *args: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Stands in for ``Tensor.uniform_``: repeats a block of random numbers, as to draw 740 million takes seconds."""
    if self.is_meta or self.numel() <= BLOCK or not self.is_contiguous():
        return draw_uniform(self, *args, generator=generator)
    block, flat = draw_uniform(self.new_empty(BLOCK), *args, generator=generator), self.detach().view(-1)
    for part in flat.split(BLOCK):
        part.copy_(block[: len(part)])
    return self


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # one process per core is fast; threads that wait for each other are not
    torch.Tensor.uniform_ = uniform_in_blocks
    timm.list_models = list_our_models
    timm.list_pretrained = lambda *args, **kwargs: []
    torch.jit.script = Traced
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): how long timm gives a test; needs pytest-timeout")
    if config.getoption("contract_report") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Reporter(config.getoption("contract_report")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if model_of(item)]
    config.hook.pytest_deselected(items=[item for item in items if not model_of(item)])
    items[:] = ours
    for item in ours:
        for (test, pattern), reason in IMPOSSIBLE.items():
            if item.originalname == test and fnmatch.fnmatch(model_of(item), pattern):
                item.add_marker(pytest.mark.xfail(strict=True, reason=reason))


def pytest_runtest_teardown(item: pytest.Item) -> None:
    if "torchscript" in item.originalname:
        forget_traces()
    if size_of(model_of(item))[0] > LARGE / 2 and hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)  # glibc keeps what a large model needed, and two processes share the memory


def forget_traces() -> None:
    """Frees the graphs of all traced models, of which torch keeps about 100 MB each, as its own tests do."""
    torch.jit._state._clear_class_state()
    torch._C._jit_clear_class_registry()
    torch.jit._recursive.concrete_type_store = torch.jit._recursive.ConcreteTypeStore()


def pytest_runtest_setup(item: pytest.Item) -> None:
    test = item.originalname
    parameters, features = size_of(model_of(item))
    if test == "test_prune_intermediate_layers_contract" and parameters * features > MAX_PRUNED:
        pytest.skip("prunes a large model at every feature, which takes minutes; timm's CI leaves this test out")
    if test in FURTHER_FORMS and parameters > LARGE:
        pytest.skip("takes minutes for 740 M parameters; smaller models of the family show the same")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if "default_cfgs" not in test and 10 * parameters > 0.75 * memory_in_bytes() / workers:  # weights and gradients
        pytest.skip("weights and gradients do not fit into this machine's memory beside the other processes'")


class Reporter:
    """Counts outcomes, and writes them at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start = time.monotonic()
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.reasons: Counter[str] = Counter()
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = report.nodeid.split("::")[-1]
        if report.when == "call" or report.outcome != "passed":
            outcome = "impossible" if report.skipped and hasattr(report, "wasxfail") else report.outcome
            self.outcomes[test.split("[")[0]][outcome] += 1
        if report.skipped:
            reason = report.wasxfail if hasattr(report, "wasxfail") else report.longrepr[2]
            self.reasons[reason.removeprefix("Skipped: ")] += 1
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failures.append(f"{test}: {crash.message.splitlines()[0] if crash else report.longrepr}")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        text = self.table()
        self.path.write_text(text)
        terminalreporter.write("\n" + text)

    def table(self) -> str:
        columns = ("passed", "failed", "skipped", "impossible")
        rows = [(test, *(self.outcomes[test][column] for column in columns)) for test in sorted(self.outcomes)]
        rows.append(("all", *(sum(row[i + 1] for row in rows) for i in range(len(columns)))))
        minutes = (time.monotonic() - self.start) / 60
        lines = [
            f"tests/test_models.py of timm {timm.__version__} on the {len(OURS)} models of zoo {zoo.__version__}",
            f"`make test-contract`: {minutes:.0f} min on {PROCESSES} processes, torch {torch.__version__} on the CPU, "
            f"Python {platform.python_version()}",
            "",
            f"{'test':<46}" + "".join(f"{column:>11}" for column in columns),
            *(f"{test:<46}" + "".join(f"{count:>11}" for count in counts) for test, *counts in rows),
            "",
            "Why skipped or impossible:",
            *(f"{count:>5}  {reason}" for reason, count in self.reasons.most_common()),
            "",
            "TorchScript is made by torch.jit.trace: torch.jit.script does not know all that the models' code has.",
            *(("", "Failed:", *sorted(self.failures)) if self.failures else ()),
        ]
        return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    tests = cached_tests() or fetch_tests()
    arguments = list(arguments) or ["-n", str(PROCESSES), "--dist", "worksteal", f"--contract-report={REPORT}"]
    folder = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])}
    environment["OMP_NUM_THREADS"] = "1"
    config = ["-c", str(source_folder() / "pyproject.toml"), "--rootdir", str(source_folder())]
    options = ["-p", "timm_contract", "-p", "no:cacheprovider", "--import-mode=importlib", "-q", "--tb=short"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *config, *options, *arguments, str(tests)], env=environment
    ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
