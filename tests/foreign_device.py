"""A device for tests that is not the CPU although its memory is: what forgets about devices fails on it, as on a GPU.

Its tensors keep their numbers in a tensor on the CPU, which does the work. An operator that is given some of them and
some on the CPU raises an error, unless it is one that takes both on a GPU; so does reading them through numpy. Custom
operators run their CPU code, also where a GPU would have kernels.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "foreign"
# Copies go from one device to another, and tensors anywhere are indexed by those on the CPU.
TAKES_BOTH = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class _Module(backend_registration._DummyBackendModule):
    """What torch asks a kind of device: there is one, and autocast may use 16 bits."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def device(self, _: Any) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def get_rng_state(self, _: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, _: Any = None) -> None:
        torch.set_rng_state(state)


class ForeignTensor(Tensor):
    """A tensor on the device, whose numbers are in ``numbers``."""

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "ForeignTensor":
        layout = dict(strides=numbers.stride(), storage_offset=numbers.storage_offset(), dtype=numbers.dtype)
        made = Tensor._make_wrapper_subclass(cls, numbers.size(), **layout, device=torch.device(NAME, 0))
        made.numbers = numbers
        return made

    __torch_dispatch__ = classmethod(lambda cls, func, types, args=(), kwargs=None: _run(func, args, kwargs or {}))

    def __repr__(self) -> str:
        return f"ForeignTensor({self.numbers})"

    def __array__(self, *_: Any) -> None:
        raise TypeError(f"can't convert {NAME} device type tensor to numpy. Use Tensor.cpu() first")

    numpy = __array__

    def tolist(self) -> Any:
        return self.numbers.tolist()


class _Mode(TorchDispatchMode):
    """Sees operators that are given no tensor of the device, but the device itself."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Runs an operator on the CPU; results are on the device if it asks for it, or if its inputs are."""
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    foreign = [x for x in given if isinstance(x, ForeignTensor)]
    others = [tuple(x.shape) for x in given if not isinstance(x, ForeignTensor) and x.dim()]
    name = func.overloadpacket.__name__
    if foreign and others and name not in TAKES_BOTH:
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} has {others} on cpu")
    device = kwargs.get("device")
    to_device = bool(foreign) if device is None else torch.device(device).type == NAME
    if name == "copy_":
        to_device = isinstance(args[0], ForeignTensor)
    if device is not None and to_device:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda x: x.numbers if isinstance(x, ForeignTensor) else x, (args, kwargs))
    known = {id(x.numbers): x for x in foreign}  # operators that write into an input return it

    def wrap(x: Any) -> Any:
        if not isinstance(x, Tensor) or not to_device:
            return x
        return known[id(x)] if id(x) in known else ForeignTensor(x)

    return tree_map(wrap, func(*args, **kwargs))


@contextlib.contextmanager
def foreign_device() -> Iterator[torch.device]:
    """The device, which exists inside of the ``with`` block."""
    if torch._C._get_privateuse1_backend_name() != NAME:  # for good
        backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    replaces = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # parameters become tensors of another class
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) copies where this file sees it
    try:
        with _Mode():
            yield torch.device(NAME, 0)
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(replaces)


def train_and_evaluate(task: Any, steps: int = 2) -> dict[str, float]:
    """Trains a task's model for some batches on the device of its place, without updates; returns its scores."""
    model = task.model.to(task.place.device).train()
    assert {x.device.type for x in (*model.parameters(), *model.buffers())} == {NAME}
    for batch, _ in zip(task.train_loader, range(steps), strict=False):
        loss = task.loss(model, batch)
        loss.backward()
        assert loss.device.type == NAME and loss.isfinite()
    return task.evaluate(model.eval())
