"""How long the first picture takes, and what the interface adds to the compiled programs.

    unifluid benchmark first_picture --workdir=runs/quickstart

Every start is a process of its own. The first, "cold", finds no compiled programs on disk, the
"warm" ones those of the starts before them; the medians of these. Overhead is the time that
`m.generate` spends outside of its two programs, the wait for them counted as theirs: medians over
the calls of a start, then over the warm starts, in which it differs. A share is of the median call.
"""

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import rich.console
import rich.table
from absl import flags

import unifluid_jax
from benchmarks import cores
from unifluid_jax import cli, decode_image, inference
from unifluid_jax.image_tokenizer import ImageTokenizer

_WORKDIR = flags.DEFINE_string("workdir", None, "Run, exported folder or name.", required=True)
_STARTS = flags.DEFINE_integer("starts", 5, "Warm starts.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 21, "Calls in each of them.", lower_bound=1)
_BATCHES = flags.DEFINE_list("batches", ["1", "32"], "Pictures of a call.")

_START = """
import json, sys, time
begun = time.monotonic()
import unifluid_jax
imported = time.monotonic()
model = unifluid_jax.load(sys.argv[1])
loaded = time.monotonic()
model.generate("a red circle")
first = time.monotonic()
model.generate("a blue triangle", seed=1)
second = time.monotonic()
from benchmarks import first_picture
calls = [first_picture.overhead(model, int(n), int(sys.argv[2])) for n in sys.argv[3:]]
print(json.dumps([[imported - begun, loaded - imported, first - loaded, second - first], calls]))
"""


def main(argv: list[str]) -> None:
    cli.positional(argv)
    console = rich.console.Console(soft_wrap=True, highlight=False)
    table = rich.table.Table("start", "import", "load", "first picture", "second picture", box=None)
    with tempfile.TemporaryDirectory() as programs:
        cold, _ = _start(programs, [])
        warm, calls = zip(
            *[_start(programs, _BATCHES.value) for _ in range(_STARTS.value)], strict=True
        )
    for name, seconds in (
        ("cold", cold),
        ("warm", map(statistics.median, zip(*warm, strict=True))),
    ):
        table.add_row(name, *(f"{x:.2f} s" for x in seconds))
    console.print(table)
    table = rich.table.Table("pictures", "m.generate", "overhead", "share", "of starts", box=None)
    for batch, found in zip(_BATCHES.value, zip(*calls, strict=True), strict=True):
        shares = sorted(over / whole for whole, over in found)
        middle = map(statistics.median, zip(*found, strict=True))
        table.add_row(
            batch,
            *(f"{1e3 * seconds:.1f} ms" for seconds in middle),
            f"{statistics.median(shares):.1%}",
            f"{shares[0]:.1%} to {shares[-1]:.1%}",
        )
    console.print(table)
    sampler = inference.stored_config(_WORKDIR.value).sampling.sampler.to_dict()
    device = jax.devices()[0]
    console.print(
        f"{jax.device_count()} x {device.device_kind}, {cores()} cores, jax {jax.__version__},"
        f" Python {platform.python_version()}; {sampler};"
        f" {_STARTS.value} warm starts of {_REPEATS.value} calls"
    )


def _start(programs: str, batches: list[str]) -> tuple[list[float], list[list[float]]]:
    """A fresh process: seconds of import, load, first and second picture; `overhead` by batch."""
    result = subprocess.run(
        [sys.executable, "-c", _START, _WORKDIR.value, str(_REPEATS.value), *batches],
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": programs},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    starts, calls = json.loads(result.stdout)
    return starts, calls


def overhead(model: unifluid_jax.Model, batch: int, repeats: int) -> tuple[float, float]:
    """Median seconds of a call, and of what of it passes outside of its programs."""
    inside = 0.0

    def timed(function: Callable) -> Callable:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal inside
            begun = time.perf_counter()
            result = function(*arguments, **named)
            inside += time.perf_counter() - begun
            return result

        return call

    found = []
    with contextlib.ExitStack() as stack:
        # The drawing program; that of the image tokenizer, and the wait for both.
        for owner, name in ((decode_image, "images"), (ImageTokenizer, "pictures")):
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name))))
        for _ in range(repeats + 1):
            inside, begun = 0, time.perf_counter()
            model.generate("a red circle", n=batch)
            whole = time.perf_counter() - begun
            found.append((whole, whole - inside))
    calls, outside = zip(*found[1:], strict=True)
    return statistics.median(calls), statistics.median(outside)


if __name__ == "__main__":
    cli.run(main)
