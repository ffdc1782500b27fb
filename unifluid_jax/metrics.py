"""What a run reports: JSON lines, TensorBoard, a progress bar. Process 0 reports for all."""

import collections
import contextlib
import datetime
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorboardX
from jaxtyping import UInt8
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

Scalars = Mapping[str, Any]


def _floats(scalars: Scalars) -> dict[str, float]:
    # Fetched explicitly, all at once: the training loop forbids implicit transfers. JAX sorts keys.
    fetched = jax.device_get(dict(scalars))
    return {name: float(fetched[name]) for name in scalars}


class Writer:
    """Appends to WORKDIR/metrics.jsonl and WORKDIR/tensorboard; pictures go to WORKDIR/images too.

    A run that resumes reports each step once: what an interrupted run reported after the step that
    was restored is dropped.

    Args:
        workdir: made when missing.
        start_step: steps done before this run.
    """

    def __init__(self, workdir: str | os.PathLike, start_step: int = 0):
        self._on = jax.process_index() == 0
        if not self._on:
            return
        self._workdir = Path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        path = self._workdir / "metrics.jsonl"
        _drop_lines_after(path, start_step)
        self._lines = path.open("a", encoding="utf-8")
        self._board = tensorboardX.SummaryWriter(
            str(self._workdir / "tensorboard"), purge_step=start_step + 1
        )

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *unused: Any) -> None:
        self.close()

    def scalars(self, step: int, values: Scalars) -> None:
        """One JSON line `{"step": ..., name: value, ...}`, on disk on return.

        Args:
            step: steps done.
            values: numbers or 0-d arrays. One that is not finite becomes null, for JSON knows none.
        """
        if not self._on:
            return
        numbers = _floats(values)
        record = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        self._lines.write(json.dumps({"step": step, **record}, allow_nan=False) + "\n")
        self._lines.flush()
        for name, number in numbers.items():
            self._board.add_scalar(name, number, step)

    def images(self, step: int, images: Mapping[str, UInt8[np.ndarray, "H W 3"]]) -> None:
        """Pictures by name, as images/NAME_STEP.png and in TensorBoard."""
        if not self._on:
            return
        for name, image in images.items():
            path = self._workdir / "images" / f"{name}_{step:07d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
            self._board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Writes out what TensorBoard still holds."""
        if self._on:
            self._lines.close()
            self._board.close()


def _drop_lines_after(path: Path, step: int) -> None:
    """Leaves the records of steps up to `step`; a line that a killed process cut short goes too."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    if kept != lines:
        # In one move: a crash here must not lose the history.
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)


class Meter:
    """How fast the last steps were, what the time went into, and how much of it was of use.

    Time is that of the phase it is in, and of "compute" otherwise: the host stays one step ahead,
    so that all it waits for outside a phase is a step. Call `read` once per step. What comes before
    the first call, compilation above all, counts in no speed.

    Args:
        enter: hears of every change of phase, with the step where one is named.
        productive: seconds of computing that led to the state which this run starts from.
        began: when the run was first started, seconds since the epoch.
        window: steps that speeds are averaged over.
        clock: for tests.
    """

    def __init__(
        self,
        enter: Callable[[str, int | None], None] = lambda phase, step: None,
        productive: float = 0.0,
        began: float | None = None,
        window: int = 20,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._enter, self._clock = enter, clock
        self._steps: collections.deque[tuple[float, Mapping[str, int | float]]]
        self._steps = collections.deque(maxlen=window)
        self._since: float | None = None
        self._phase, self._phase_since = "compute", clock()
        self._spent: collections.Counter[str] = collections.Counter()
        self._shared: collections.Counter[str] = collections.Counter()
        self._read: collections.Counter[str] = collections.Counter()
        self._productive, self._began = productive, time.time() if began is None else began

    def _turn(self, phase: str, step: int | None) -> str:
        """Books the time of the phase that ends here, and returns its name."""
        now, before = self._clock(), self._phase
        self._spent[before] += now - self._phase_since
        self._phase, self._phase_since = phase, now
        self._enter(phase, step)
        return before

    @contextlib.contextmanager
    def phase(self, name: str, step: int | None = None) -> Iterator[None]:
        """Around what is no computing: "input", "compile", "checkpoint", "evaluate"."""
        before = self._turn(name, step)
        try:
            yield
        finally:
            self._turn(before, None)

    def read(self, counts: Mapping[str, int | float]) -> dict[str, float]:
        """Ends a step.

        Args:
            counts: what the step processed on all processes together, like {"examples": 64}.

        Returns:
            "steps/s", and "NAME/s" for every name of `counts`: per second of computing and of
            waiting for input. Empty at the first call.
        """
        self._turn(self._phase, None)
        spent = self._spent - self._read
        seconds = spent["compute"] + spent["input"]
        if self._since is not None:
            self._steps.append((seconds, counts))
        self._since, self._read = self._clock(), self._spent.copy()
        total = sum(elapsed for elapsed, _ in self._steps)
        if not total:
            return {}
        sums = {name: sum(c[name] for _, c in self._steps) for name in counts}
        return {
            "steps/s": len(self._steps) / total,
            **{f"{name}/s": n / total for name, n in sums.items()},
        }

    def shares(self) -> dict[str, float]:
        """What the time since the last call went into: "time/PHASE", which add up to 1.

        "time/goodput" is the share of all time since the run was first started, restarts and what
        was lost by them with it, that went into computing the present state.
        """
        self._turn(self._phase, None)
        spent = self._spent - self._shared
        self._shared = self._spent.copy()
        total = sum(spent.values()) or 1.0
        return {
            **{f"time/{name}": seconds / total for name, seconds in sorted(spent.items())},
            "time/goodput": self.productive() / max(time.time() - self._began, 1e-9),
        }

    def productive(self) -> float:
        """Seconds of computing that led to the present state; to be saved with it."""
        return self._productive + self._spent["compute"]


def log_start(workdir: str | os.PathLike, step: int) -> float:
    """Notes in WORKDIR/starts.jsonl that a process begins; returns when the first one did.

    Args:
        step: where it goes on.

    Returns:
        Seconds since the epoch. Process 0 notes and reads for all.
    """
    now = time.time()
    if jax.process_index() != 0:
        return now
    path = Path(workdir) / "starts.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        record = {
            "time": now,
            "step": step,
            "processes": jax.process_count(),
            "devices": jax.device_count(),
            "device_kind": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        }
        stream.write(json.dumps(record) + "\n")
    with path.open(encoding="utf-8") as stream, contextlib.suppress(ValueError):
        return float(json.loads(stream.readline())["time"])
    return now


class Progress:
    """A bar with step, losses, examples/s and time left; without a terminal, plain lines.

    Args:
        total_steps: steps of the run.
        start_step: steps done before.
        description: stands before the bar.
        console: where to draw; standard error by default.
        seconds: time between two plain lines.
        clock: for tests.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        description: str,
        console: Console | None = None,
        seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total = total_steps
        self._description = description
        self._console = console or Console(stderr=True)
        self._seconds = seconds
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._next_line = -math.inf
        self._on = jax.process_index() == 0
        self._bar = None
        if self._on and self._console.is_terminal:
            # The bar takes what the text leaves of a line; in a narrow terminal the text wraps.
            self._bar = RichProgress(
                TextColumn("{task.description}", table_column=Column()),
                BarColumn(bar_width=None, table_column=Column(ratio=1)),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task(
                f"{description} (compiling)", total=total_steps, completed=start_step
            )

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *unused: Any) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, losses: Scalars, speeds: Mapping[str, float] | None = None) -> None:
        """Shows where the run stands.

        Args:
            step: steps done.
            losses: what to show of them.
            speeds: from `Meter.read`.
        """
        if not self._on:
            return
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
        if not self._bar and now < self._next_line and step < self._total:
            return
        parts = [f"{name} {value:.3f}" for name, value in _floats(losses).items()]
        if speeds and "examples/s" in speeds:
            parts.append(f"{speeds['examples/s']:.1f} examples/s")
        # From the mean of the whole run, evaluations and checkpoints with it, compilation without.
        first, began = self._first
        if step > first:
            left = (now - began) / (step - first) * (self._total - step)
            parts.append(f"{datetime.timedelta(seconds=round(left))} left")
        text = "  ".join([f"{self._description} {step}/{self._total}", *parts])
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
        else:
            self._next_line = now + self._seconds
            self._console.print(text, soft_wrap=True)
