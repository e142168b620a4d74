"""What every test starts from: fixed seeds, uninitialised memory full of NaN, and markers that know the machine."""

import importlib.util
import os
import random
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
ON_FOREIGN_DEVICE = os.environ.get("ZOO_FOREIGN_DEVICE") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
torch.set_num_threads(1)  # one test process per core (pytest -n) is fast; threads that wait for each other are not
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same for processes that tests start
if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, by a test


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips GPU tests without a GPU, and interpreted kernels where Triton is missing or compiles for the GPU.

    Tests on the foreign device are for processes of their own, which ``test_foreign_device.py`` starts: torch cannot
    forget a device.
    """
    elsewhere = [item for item in items if ("foreign" in item.fixturenames) != ON_FOREIGN_DEVICE]
    config.hook.pytest_deselected(items=elsewhere)
    items[:] = [item for item in items if item not in elsewhere]
    interpreting = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if "gpu" in item.keywords and not HAS_CUDA:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "interpreted" in item.keywords and not interpreting:
            item.add_marker(pytest.mark.skip(reason="needs triton and TRITON_INTERPRET=1"))


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Makes ``torch.empty`` return NaN, so that an output nobody wrote is seen.

    Torch fills memory only while it is asked for deterministic algorithms; ops that have none warn.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and under ``pytest -m gpu`` the GPU."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def foreign_file() -> dict[str, Any]:
    """What ``foreign_device.py`` defines."""
    return runpy.run_path(str(Path(__file__).with_name("foreign_device.py")))


@pytest.fixture
def foreign(foreign_file: dict[str, Any]) -> Iterator[torch.device]:
    """A device on which a tensor that was left on the CPU is an error, see ``foreign_device.py``."""
    with foreign_file["foreign_device"]() as device:
        yield device


@pytest.fixture
def train_elsewhere(
    foreign: torch.device, foreign_file: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Any], dict[str, float]]:
    """Trains as configured for two batches on that device, and returns the scores."""
    from zoo.engine.task import Place, find_task

    monkeypatch.setattr(Place, "generator", torch.default_generator)  # it has no generator of its own
    return lambda config: foreign_file["train_and_evaluate"](find_task(config.task)(config, Place(foreign)))
