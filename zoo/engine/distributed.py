"""Several processes that train one model: how they start, agree, stop and fail together."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from zoo.config import TrainConfig
from zoo.engine.task import Place
from zoo.optional import require

__all__ = [
    "StopRequest",
    "explain_lost_process",
    "on_main_process",
    "raise_together",
    "same_everywhere",
    "share_buffers",
    "start_processes",
]

LOST = (  # what gloo and NCCL say of a process that is gone
    *("closed by peer", "reset by peer", "Broken pipe", "Connection refused"),
    *("remote process exit", "communicator was aborted"),
)


def start_processes(config: TrainConfig) -> tuple[Any, Place]:
    """Joins the other processes, if this one was started with some.

    Returns:
        The ``accelerate.Accelerator``, and where this process computes.

    Raises:
        ValueError: If Accelerate is configured for another strategy than its own data parallelism.
    """
    accelerator = require("accelerate").Accelerator(
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        cpu=config.cpu,
        gradient_accumulation_steps=config.optim.grad_accum,
    )
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        raise ValueError(f"Accelerate is configured for {kind}; configure it for plain processes and set strategy=fsdp")
    return accelerator, Place(accelerator.device, accelerator.process_index, accelerator.num_processes)


def same_everywhere(value: Any) -> bool:
    """Whether all processes have the same value; every process has to call it."""
    values = require("accelerate.utils").gather_object([value])
    return all(other == values[0] for other in values)


def share_buffers(model: nn.Module) -> None:
    """Gives every process the main process's buffers: running statistics differ, as each has seen its own images."""
    broadcast = require("accelerate.utils").broadcast
    for buffer in model.buffers():
        buffer.copy_(broadcast(buffer.contiguous()))


def on_main_process(action: Callable[[], None]) -> None:
    """Does something in the main process, for which the others wait; if it fails, all of them end.

    Raises:
        Exception: In the main process, what the action raised.
        SystemExit: In the others, see :func:`raise_together`.
    """
    error = None
    if require("accelerate").PartialState().is_main_process:
        try:
            action()
        except Exception as caught:
            error = caught
    [failed] = require("accelerate.utils").broadcast_object_list([error is not None])
    if failed:
        raise_together(error)


def raise_together(error: Exception | None) -> None:
    """Ends all processes for a reason that all of them know; every process has to call it.

    Args:
        error: Of the main process.

    Raises:
        Exception: The error, in the main process.
        SystemExit: In the others, with status 1 and without words: one message is enough.
    """
    state = require("accelerate").PartialState()
    is_main_process = state.is_main_process
    state.destroy_process_group()
    if is_main_process and error:
        raise error
    raise SystemExit(1)


@contextlib.contextmanager
def explain_lost_process(several: bool) -> Iterator[None]:
    """Says what it means if this process cannot reach the others any more.

    Args:
        several: Whether there are others.

    Raises:
        ConnectionError: Instead of the backend's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not several or not any(sign in str(error) for sign in LOST):
            raise
        reason = str(error).splitlines()[0]
    else:
        return
    raise ConnectionError(
        f"another process of this run has ended ({reason}); its own message says why, if it had time for one; "
        "continue from the last saved state with resume=auto"
    )


class StopRequest:
    """Notes SIGTERM (a job scheduler's stop) and Ctrl-C, so that the loop stops where it can save its state.

    Attributes:
        signal: The signal that came, or None.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.signal: int | None = None
        self.previous: dict[int, Any] = {}

    def requested(self) -> bool:
        """Whether any process was asked to stop; every process has to call it."""
        return self.accelerator.check_trigger()

    def _note(self, number: int, _: object) -> None:
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt  # the second one
        self.signal = number
        self.accelerator.set_trigger()

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # no other may set signal handlers
            self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
