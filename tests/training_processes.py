"""Runs the training tool in processes of their own, for tests that kill it or spread it over several.

Loading torch and this package takes seconds, so a server process does it once and is forked for every process. Tests
load this file with ``runpy``; so do the processes, where it makes the one process that it was started for.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

OURS = ["zoo.engine.tasks.classification", "zoo.tools.train"]
OTHERS = ["sklearn.datasets", "torch._dynamo", "torch.distributed.fsdp", "torchmetrics.classification"]  # used later
SMALL = [
    "model.kwargs={img_size: 8, patch_size: 2, embed_dim: 16, depth: 2, d_state: 4}",
    "data.train_samples=128",
    "data.val_samples=61",
    "data.batch_size=32",
    "optim.epochs=3",
    "optim.warmup_epochs=1",
    "cpu=true",
]


@dataclass
class Job:
    """Processes that train together.

    Attributes:
        processes: By rank.
        logs: What each of them writes on both streams.
    """

    processes: list
    logs: list[Path]

    def wait(self, timeout=180.0):
        """Waits for the end of all processes and returns their exit codes."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        if None in codes:
            self.kill()
            raise TimeoutError(f"exit codes after {timeout} s: {codes}\n{self.output()}")
        return codes

    def kill(self):
        """Ends all processes at once, as a power cut would."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def output(self):
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in self.logs)


def start(folder, arguments, world_size=1, fault=None, config="vim/micro_digits"):
    """Starts ``zoo.tools.train`` as that many processes.

    Args:
        folder: Where the processes' output goes; the run's folder is ``folder/run``.
        arguments: Overrides of the configuration, which is small itself unless another is named.
        world_size: Number of processes.
        fault: Name of a function of this file that is called in every process before, with its rank.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*OURS, *OTHERS])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"process-{rank}.txt" for rank in range(world_size)]
    processes = []
    for rank, log in enumerate(logs):
        job = {
            "environment": {
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)},
                **{"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            },
            "arguments": [
                config,
                *(SMALL if config == "vim/micro_digits" else []),
                *arguments,
                f"output={folder / 'run'}",
            ],
            "log": str(log),
            "fault": fault,
        }
        keywords = {"init_globals": {"JOB": job}, "run_name": "training_process"}
        processes.append(context.Process(target=runpy.run_path, args=(__file__,), kwargs=keywords))
        processes[-1].start()
    return Job(processes, logs)


def run(folder, arguments, world_size=1, fault=None, timeout=180.0):
    """The same to the end; returns exit codes and output."""
    job = start(folder, arguments, world_size, fault)
    return job.wait(timeout), job.output()


def nan_in_process_1(rank):
    """The loss of one process is not a number from its sixth batch on."""
    from zoo.engine.tasks.classification import Classification

    loss, calls = Classification.loss, []

    def broken(self, model, batch):
        calls.append(None)
        return loss(self, model, batch) * (float("nan") if rank == 1 and len(calls) > 5 else 1.0)

    Classification.loss = broken


def process_1_dies(rank):
    """One process ends without a word at its sixth batch."""
    from zoo.engine.tasks.classification import Classification

    loss, calls = Classification.loss, []

    def dying(self, model, batch):
        calls.append(None)
        if rank == 1 and len(calls) > 5:
            os._exit(9)
        return loss(self, model, batch)

    Classification.loss = dying


def process_1_sees_another_folder(rank):
    """Where there is no state yet."""
    import zoo.engine.loop as loop

    find_start = loop.find_start
    loop.find_start = lambda config: None if rank == 1 else find_start(config)


def stops_after_an_epoch(rank):
    """The loop believes that the epoch after which it is was the last."""
    from zoo.engine.loop import _Run

    finish = _Run.finish_epoch

    def finish_and_stop(self):
        finish(self)
        self.config.optim.epochs = self.epoch  # seen by nothing but the loop

    _Run.finish_epoch = finish_and_stop


def disk_is_full(rank):
    """No file can grow beyond 8 kB any more once the first epoch is saved."""
    import resource

    import zoo.engine.loop as loop

    save, calls = loop.save_checkpoint, []

    def save_and_fill(*arguments):
        calls.append(save(*arguments))
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    loop.save_checkpoint = save_and_fill


def _train(job):
    descriptor = os.open(job["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(job["environment"], CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    sys.modules.update(matplotlib=None, numba=None)  # pictures and loading compiled loops take longer than the training
    import torch

    torch.set_num_threads(1)
    from zoo.tools.train import main

    if job["fault"]:
        globals()[job["fault"]](int(job["environment"]["RANK"]))
    sys.exit(main(job["arguments"]))


if __name__ == "training_process":
    _train(JOB)  # noqa: F821 given by whoever runs this file
