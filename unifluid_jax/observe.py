"""What a step is made of, on demand: its program, a profile, the memory that it takes."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import logging

from unifluid_jax import trees
from unifluid_jax.errors import UserError


class Program:
    """A jitted function that tells when, how long and why it is compiled.

    Args:
        function: from `jax.jit`.
        name: for messages.
        dump: folder to write NAME.jaxpr.txt, NAME.stablehlo.txt and NAME.hlo.txt (what the
            compiler made of it) to; None for none.
        compiling: a context manager to be in meanwhile.
    """

    def __init__(
        self,
        function: Any,
        name: str,
        dump: Path | None = None,
        compiling: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        self._function, self._name, self._dump = function, name, dump
        self._compiling = compiling
        self._compiled: Any = None
        self._signature: dict[str, str] = {}
        self.seconds = 0.0

    def __call__(self, *arguments: Any) -> Any:
        if self._compiled is not None:
            try:
                return self._compiled(*arguments)
            except (TypeError, ValueError):
                if not (changes := self._changes(arguments)):
                    raise
                # What jax.jit would hide: another program, and the minutes it takes to compile.
                logging.warning("%s is compiled again: %s", self._name, changes)
        with self._compiling():
            self._compile(arguments)
        return self._compiled(*arguments)

    def _compile(self, arguments: tuple[Any, ...]) -> None:
        begun = time.perf_counter()
        traced = self._function.trace(*arguments)
        lowered = traced.lower()
        self._compiled = lowered.compile()
        self.seconds += time.perf_counter() - begun
        self._signature = _signature(arguments)
        if self._dump is not None and jax.process_index() == 0:
            self._dump.mkdir(parents=True, exist_ok=True)
            for kind, text in {
                "jaxpr": str(traced.jaxpr),
                "stablehlo": lowered.as_text(),
                "hlo": self._compiled.as_text(),
            }.items():
                (self._dump / f"{self._name}.{kind}.txt").write_text(text)

    def _changes(self, arguments: tuple[Any, ...]) -> str:
        now = _signature(arguments)
        return "; ".join(
            f"{name} was {self._signature.get(name, '(absent)')}, now {now.get(name, '(absent)')}"
            for name in dict.fromkeys([*self._signature, *now])
            if self._signature.get(name) != now.get(name)
        )


def _signature(arguments: tuple[Any, ...]) -> dict[str, str]:
    """Dtype, shape and placement of every leaf, by path."""
    return {
        name: f"{leaf.dtype.name}{list(leaf.shape)} on {getattr(leaf, 'sharding', 'the host')}"
        for name, leaf in trees.flatten(list(arguments)).items()
    }


def profile_window(text: str | None) -> range:
    """The steps to profile, of "100:105": from 100 to 104; none of None.

    Raises:
        UserError: it is no such window.
    """
    if text is None:
        return range(0)
    first, colon, end = text.partition(":")
    if not (colon and first.isdigit() and end.isdigit() and 0 < int(first) < int(end)):
        raise UserError(f'--profile="{text}": give steps like --profile=100:105')
    return range(int(first), int(end))


class Profiler:
    """Traces some steps with JAX's profiler, for XProf or Perfetto.

    Args:
        folder: to write to.
        steps: which.
    """

    def __init__(self, folder: Path, steps: range):
        self._folder, self._steps, self._on = folder, steps, False

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the dispatch of a step; the trace gets its number."""
        if step in self._steps and not self._on:
            jax.profiler.start_trace(str(self._folder))
            self._on = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def done(self, step: int) -> None:
        """To be told when the devices have finished a step."""
        if self._on and step + 1 >= self._steps.stop:
            self.close()

    def close(self) -> None:
        """Writes what there is."""
        if self._on:
            jax.profiler.stop_trace()
            logging.warning("profile of steps in %s", self._folder)
            self._on, self._steps = False, range(0)


def memory() -> dict[str, float]:
    """Memory of the fullest local device in GiB: now, at most so far, and its limit.

    Empty where the backend does not say, as on CPUs.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    fields = {
        "hbm/used": "bytes_in_use",
        "hbm/peak": "peak_bytes_in_use",
        "hbm/limit": "bytes_limit",
    }
    found = {name: max(s.get(field, 0) for s in stats) for name, field in fields.items()}
    return {name: value / 2**30 for name, value in found.items() if value}
