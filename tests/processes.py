"""Scripts and torchrun in processes of their own, without the seconds that importing takes each of them.

They are forked from a server, multiprocessing's, that has imported this module, and torchrun's agent forks its workers
where it would start an interpreter for each. The rest is as it is without: pids, signals, sessions, exit codes, output.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch
import torch.distributed.run
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

import datasets
import mtmamba
import train

TESTS = Path(__file__).parent
sys.modules["matplotlib.figure"] = None    # as in conftest.py

if not mtmamba.backend_fault("numba"):    # the scan is compiled once, not by each process forked from this one
    pixel, each, matrix = (torch.zeros(shape) for shape in ((1, 1, 1, 1), (1, 1, 1, 4, 1), (4, 1, 1)))
    inputs = pixel, each, matrix, each.repeat(1, 1, 1, 1, 2), matrix[:, 0], matrix[:, 0], None, "numba"
    mtmamba._scan_backward_op(*mtmamba._scan_op(*inputs), *inputs)
mtmamba._scan_reference(train.SMALL["d_state"])    # for check_scan
gc.freeze()    # or each process copies the memory of what has been imported, to look for garbage there


def descendants(pid: int) -> list[int]:
    """The pids of a process's processes, and of theirs, on Linux."""
    children = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        children += map(int, tasks.read_text().split())
    return children + [other for child in children for other in descendants(child)]


def server() -> multiprocessing.context.BaseContext:
    """Its processes are forked from one that has imported the project; it is started where it does not run yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["processes", "train"])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([str(TESTS.parent), str(TESTS)])):
        forkserver.ensure_running()
    return context


class Forked:
    """What torchrun and the tests use of subprocess.Popen."""

    def __init__(self, context, function, *arguments):
        self.process = context.Process(target=function, args=arguments)
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill

    def poll(self) -> int | None:
        return self.process.exitcode

    returncode = property(poll)

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.poll()


class Script(Forked):
    """Of `python SCRIPT ARGUMENTS`, or torchrun with that many processes. files: for standard output and error."""

    def __init__(self, files: list[Path], environment: dict, processes: int, command: list[str]):
        self.files = files
        if processes > 1:
            command = ["--standalone", "--nproc-per-node", str(processes), *command]
        super().__init__(server(), start, files, environment, torchrun if processes > 1 else python, command)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return tuple(path.read_text() for path in self.files)


def start(files, environment, function, command):
    for descriptor, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    # Processes that it starts itself are made as by any script; those that match boundaries are forked, too.
    multiprocessing.set_start_method(None, force=True)
    datasets.get_context = lambda method: multiprocessing.get_context("fork")
    function(command, environment)


def python(command, environment):
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()    # multiprocessing leaves that out


def torchrun(command, environment):
    os.environ.update(environment)
    SubprocessHandler._popen = lambda self, command, environment: Forked(
        multiprocessing.get_context("fork"), worker, list(command[2:]), environment)    # after python -u
    torch.distributed.run.main(command)


def worker(command, environment):
    os.setsid()
    for number in signal.valid_signals():    # the agent's handlers
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    python(command, environment)
