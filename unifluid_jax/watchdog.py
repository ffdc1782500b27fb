"""Is the run alive? A heartbeat file for those outside, stacks and an end for a run that hangs.

    WORKDIR/heartbeats/0.json    {"time": ..., "phase": "compute", "step": 300, "since": ..., ...}

One file a process, written every second by a thread: an old `time` means that the process is gone
or stuck in a call that holds Python; an old `since`, that its phase makes no progress.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from unifluid_jax.errors import Restart

# What may take long without being stuck has no limit: compilation, evaluations.
WATCHED = frozenset({"input", "compute", "checkpoint"})


def path(workdir: Path, process: int) -> Path:
    """Where the heartbeat of a process is."""
    return workdir / "heartbeats" / f"{process}.json"


def read(workdir: Path, process: int) -> dict[str, Any] | None:
    """The last heartbeat of a process, None when there is none to be read."""
    try:
        return json.loads(path(workdir, process).read_text())
    except (OSError, ValueError):
        return None


def end(why: str) -> NoReturn:
    """Ends the process as a `Restart` would, from any thread and without waiting for anything.

    For when the main thread hangs, or when those are gone for whom an orderly end would wait.
    """
    print(f"restart: {why}", file=sys.stderr, flush=True)
    os._exit(Restart.EXIT_CODE)


class Watchdog:
    """Writes the heartbeat, and watches for a phase that does not end.

    Args:
        workdir: of the run.
        process: number of this process.
        hang: seconds after which a phase of `WATCHED` counts as hanging: the stacks of all threads
            go to standard error, once a phase; 0 for never.
        end: seconds after which the process ends, with the exit code of `Restart`; 0 for never.
        every: seconds between two heartbeats.
    """

    def __init__(
        self,
        workdir: Path,
        process: int,
        hang: int | float = 0,
        end: int | float = 0,
        every: int | float = 1,
    ):
        self._path, self._every = path(workdir, process), every
        self._hang, self._end = hang, end
        self._state = {
            "phase": "start",
            "step": 0,
            "since": time.time(),
            "process": process,
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        self._entered = time.monotonic()
        self._shown = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *unused: Any) -> None:
        self._done.set()
        self._thread.join()
        self._state |= {"phase": "end", "since": time.time()}
        self._write()

    def enter(self, phase: str, step: int | None = None) -> None:
        """Begins a phase; with a step, one of that step."""
        self._entered, self._shown = time.monotonic(), False
        step = self._state["step"] if step is None else step
        self._state = {**self._state, "phase": phase, "step": step, "since": time.time()}

    def _watch(self) -> None:
        while not self._done.wait(self._every):
            self._write()
            state, elapsed = self._state, time.monotonic() - self._entered
            if state["phase"] not in WATCHED:
                continue
            where = f"process {state['process']} is in {state['phase']} of step {state['step']}"
            if self._hang and elapsed >= self._hang and not self._shown:
                self._shown = True
                print(f"{where} since {elapsed:.0f} s; all stacks:", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
            if self._end and elapsed >= self._end:
                end(f"{where} since {elapsed:.0f} s")

    def _write(self) -> None:
        # A full or lost disk is the trainer's to report.
        with contextlib.suppress(OSError):
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps({"time": time.time(), **self._state}) + "\n")
            partial.replace(self._path)


@contextlib.contextmanager
def deadline(seconds: int | float, explain: Callable[[], str]) -> Iterator[None]:
    """Ends the process, with the exit code of `Restart`, when its body takes longer.

    For calls that know no deadline of their own, or that abort without a word.

    Args:
        explain: the line to print then.
    """

    timer = threading.Timer(seconds, lambda: end(explain()))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
