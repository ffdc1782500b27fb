"""Several processes, one run: how they find, await and miss each other."""

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed as _jax_distributed  # its client knows barriers with a deadline
from jax.experimental import multihost_utils

from unifluid_jax import watchdog
from unifluid_jax.errors import Restart, UserError

# A process that died is noticed by its silence after so long, where no broken connection tells.
_HEARTBEAT = 100


def start(
    workdir: Path,
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    multihost: bool,
    wait: int | float,
) -> None:
    """Joins the other processes, when the arguments or the environment say that there are some.

    To be called before JAX is used in any other way. Ends the process, with the exit code of
    `Restart` and the numbers of those missing, when not all come.

    Args:
        workdir: of the run, on a disk that all processes share.
        coordinator: HOST:PORT of process 0; by default JAX_COORDINATOR_ADDRESS.
        processes: their number; by default JAX_NUM_PROCESSES.
        process: which one this is; by default JAX_PROCESS_ID.
        multihost: let JAX find out what is not said (TPU slices, Slurm, GKE, Open MPI).
        wait: seconds to wait for each other.

    Raises:
        UserError: the arguments contradict each other.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _number(processes, "JAX_NUM_PROCESSES")
    process = _number(process, "JAX_PROCESS_ID")
    if coordinator is None and not multihost:
        if process is not None or processes is not None:
            raise UserError("--process and --processes need --coordinator=HOST:PORT or --multihost")
        return
    if (process is None) != (processes is None) or (process is None and not multihost):
        raise UserError("--coordinator, --processes and --process go together")
    if process is not None and not 0 <= process < processes:
        raise UserError(f"--process={process} is none of 0 to {processes - 1}")

    begun = time.time()
    if process is not None:
        # They cannot talk yet; the shared workdir tells who has come.
        here = watchdog.Watchdog(workdir, process)
        here.enter("join")
        with watchdog.deadline(wait, lambda: _absent(workdir, processes, begun, wait)), here:
            _initialize(coordinator, processes, process, wait)
    else:
        with watchdog.deadline(wait, lambda: f"not all processes joined within {wait:g} s"):
            _initialize(coordinator, processes, process, wait)
    barrier("start", wait)


def _number(value: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if value is not None or not text:
        return value
    try:
        return int(text)
    except ValueError:
        raise UserError(f'{variable} is "{text}": a number is needed') from None


def _initialize(
    coordinator: str | None, processes: int | None, process: int | None, wait: int | float
) -> None:
    # JAX's own deadline aborts without naming anyone: ours comes before it.
    jax.distributed.initialize(
        coordinator,
        processes,
        process,
        initialization_timeout=int(wait) + 60,
        heartbeat_timeout_seconds=_HEARTBEAT,
        shutdown_timeout_seconds=60,
    )


def _absent(workdir: Path, processes: int, begun: float, wait: int | float) -> str:
    """The line that names the processes that left no sign of life in the time of waiting."""
    beats = {i: watchdog.read(workdir, i) for i in range(processes)}
    # Whoever came before us has been waiting, and beating, until now.
    absent = [i for i, beat in beats.items() if beat is None or beat["time"] < begun]
    if absent:
        return f"{_named(absent)} of {processes} did not come within {wait:g} s"
    return f"all {processes} processes came, but could not connect within {wait:g} s"


def _named(processes: list[int]) -> str:
    numbers = ", ".join(map(str, processes))
    return f"process {numbers}" if len(processes) == 1 else f"processes {numbers}"


def barrier(name: str, seconds: int | float) -> None:
    """Waits until all processes are here; ends this one, naming those that did not come.

    Args:
        name: no other barrier of the run may have it.
    """
    if missing := _missing(name, seconds):
        watchdog.end(f"{missing} did not reach {name} within {seconds:g} s")


def _missing(name: str, seconds: int | float) -> str:
    """Waits at a barrier; the processes that did not come, empty when all did."""
    client = _jax_distributed.global_state.client
    if client is None:
        return ""
    try:
        client.wait_at_barrier(name, timeout_in_ms=int(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        _, _, tasks = str(error).partition("timed out task names:")
        numbers = sorted({int(n) for n in re.findall(r"^\D*(\d+)\s*$", tasks, re.MULTILINE)})
        return f"{_named(numbers)} of {jax.process_count()}" if numbers else "another process"
    return ""


@contextmanager
def peers(seconds: int | float = 10) -> Iterator[None]:
    """Around what the processes do together: an error there may only mean that one has died.

    If so it ends this process, naming the one that is lost; other errors pass through.
    """
    try:
        yield
    except (UserError, Restart):
        raise
    except Exception as error:
        if missing := _missing("after an error", seconds):
            reason = " ".join(str(error).split())[:200]
            watchdog.end(f"{missing} does not answer any more ({reason})")
        raise


def gather(value: Any) -> list[Any]:
    """The JSON value of every process, in their order."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray(len(text)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(text)] = text
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(t[:n].tobytes()) for t, n in zip(texts, lengths, strict=True)]


def local(tree: Any) -> Any:
    """The arrays whole in every process, on the host; as they are when there is one process."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.process_allgather(tree, tiled=True)
