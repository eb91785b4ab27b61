"""Signals that end a run, at a moment when nothing is lost."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TextIO

# Ctrl-C, `kill`, the end of a terminal, Slurm's warning; Windows lacks some.
STOPPING = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
]


class Stopped(KeyboardInterrupt):
    """A signal ends the program; its number is the argument."""


class Signals:
    """What signals ask for while a script's guard listens; a notebook's are left to Python.

    The first one raises Stopped, at once, or where `held` is set, when a loop finds its `number` at
    the end of a step. A second one ends the process at once.
    """

    def __init__(self):
        self.held, self.number, self.since = False, 0, 0.0

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Listen, in the main thread; but to none that the program was told to ignore (nohup)."""
        self.__init__()
        main = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in STOPPING if main}
        before = {n: handler for n, handler in before.items() if handler != signal.SIG_IGN}
        for number in before:
            signal.signal(number, self._hear)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.__init__()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            # What Slurm sends to all processes comes a second time from torchrun.
            if time.monotonic() - self.since > 1:
                os._exit(128 + number)
            return
        self.number, self.since = number, time.monotonic()
        if int(os.environ.get("RANK", 0)) == 0:
            text = "interrupted; the same command with --resume continues"
            if self.held:
                text = "interrupted: finishes the step and saves; another signal ends at once"
            line = "\n" * sys.stderr.isatty() + f"{Path(sys.argv[0]).name}: {text}\n"
            with suppress(OSError):
                os.write(2, line.encode())  # `print` may be what was interrupted
        if not self.held:
            raise Stopped(number)


signals = Signals()


def outlive_reader(stream: TextIO) -> None:
    """Drop what is printed from when nothing takes it: a pipe whose reader ended, a full disk."""

    def forgiving(method: Callable) -> Callable:
        def call(*args: str) -> int | None:
            try:
                return method(*args)
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

        return call

    stream.write, stream.flush = forgiving(stream.write), forgiving(stream.flush)


def outlive_signals(worker: int) -> None:
    """What a loader process begins with: only the run ends it.

    A terminal and Slurm signal loader processes too, and the step under way may need their batch.
    """
    for number in STOPPING:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)

    def obey_the_run() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != multiprocessing.parent_process().pid:
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows, where SIGTERM ends it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=obey_the_run, daemon=True).start()
