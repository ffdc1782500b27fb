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
    """How fast the last steps were, and how much of their time the input took.

    Call `read` once per step. What comes before the first call, compilation above all, counts
    nowhere; neither does what happens inside `aside`.

    Args:
        window: steps to average over.
        clock: for tests.
    """

    def __init__(self, window: int = 20, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._steps: collections.deque[tuple[float, float, Mapping[str, int | float]]]
        self._steps = collections.deque(maxlen=window)
        self._since: float | None = None
        self._waited = 0.0
        self._aside = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what fetches the next batch."""
        began = self._clock()
        yield
        self._waited += self._clock() - began

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Around what is no part of a step: an evaluation, a checkpoint."""
        began = self._clock()
        yield
        self._aside += self._clock() - began

    def read(self, counts: Mapping[str, int | float]) -> dict[str, float]:
        """Ends a step.

        Args:
            counts: what the step processed on all processes together, like {"examples": 64}.

        Returns:
            "steps/s"; "NAME/s" for every name of `counts`; "input_wait", the share of the time in
            which the step waited for its batch. Empty at the first call.
        """
        now = self._clock()
        if self._since is not None:
            self._steps.append((now - self._since - self._aside, self._waited, counts))
        self._since, self._waited, self._aside = now, 0.0, 0.0
        seconds = sum(elapsed for elapsed, _, _ in self._steps)
        if not seconds:
            return {}
        totals = {name: sum(c[name] for _, _, c in self._steps) for name in counts}
        return {
            "steps/s": len(self._steps) / seconds,
            **{f"{name}/s": total / seconds for name, total in totals.items()},
            "input_wait": sum(waited for _, waited, _ in self._steps) / seconds,
        }


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
