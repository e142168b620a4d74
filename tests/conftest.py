"""What every test starts from: fixed seeds, uninitialised memory full of NaN, and markers that know the machine."""

import importlib.util
import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
torch.set_num_threads(1)  # one test process per core (pytest -n) is fast; threads that wait for each other are not
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same for processes that tests start
if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, by a test


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips GPU tests without a GPU, and interpreted kernels where Triton is missing or compiles for the GPU."""
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
