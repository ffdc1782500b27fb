"""How long the first picture takes, and what the interface adds to the compiled programs.

    unifluid benchmark first_picture --workdir=runs/quickstart

Every start is a process of its own. "cold" finds no compiled programs on disk, "warm" those of the
start before it. Overhead is the time of `m.generate` less that of its two programs, which run right
after it on the same arguments; the median over these pairs, as shares of the median call.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import rich.console
import rich.table
from absl import flags

import unifluid_jax
from benchmarks import cores
from unifluid_jax import cli, decode_image

_WORKDIR = flags.DEFINE_string("workdir", None, "Run, exported folder or name.", required=True)
_REPEATS = flags.DEFINE_integer("repeats", 9, "Calls that the medians are taken over.")
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
print(json.dumps([imported - begun, loaded - imported, first - loaded, second - first]))
"""


def main(argv: list[str]) -> None:
    cli.positional(argv)
    console = rich.console.Console(soft_wrap=True, highlight=False)
    table = rich.table.Table("start", "import", "load", "first picture", "second picture", box=None)
    with tempfile.TemporaryDirectory() as programs:
        for start in ("cold", "warm"):
            seconds = _start(_WORKDIR.value, programs)
            table.add_row(start, *(f"{x:.2f} s" for x in seconds))
    console.print(table)
    table = rich.table.Table("pictures", "m.generate", "overhead", "share", box=None)
    model = unifluid_jax.load(_WORKDIR.value)
    for batch in map(int, _BATCHES.value):
        whole, overhead = _overhead(model, batch, _REPEATS.value)
        milliseconds = [f"{1e3 * seconds:.1f} ms" for seconds in (whole, overhead)]
        table.add_row(str(batch), *milliseconds, f"{overhead / whole:.1%}")
    console.print(table)
    device = jax.devices()[0]
    console.print(
        f"{jax.device_count()} x {device.device_kind}, {cores()} cores, jax {jax.__version__},"
        f" Python {platform.python_version()}; {model.config.sampling.sampler.to_dict()}"
    )


def _start(workdir: str, programs: str) -> list[float]:
    """Seconds of a fresh process: import, load, first and second picture."""
    result = subprocess.run(
        [sys.executable, "-c", _START, workdir],
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": programs},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(result.stdout)


def _overhead(model: unifluid_jax.Model, batch: int, repeats: int) -> tuple[float, float]:
    """Median seconds of a call, and of what it takes longer than its programs alone."""
    drawing = model.drawing()
    rows = model._image_rows(model.requests("generate", "a red circle", n=batch), drawing, 0)
    arguments = model._image_arguments(model._filled(rows, batch), drawing)
    images, scale = model.parts.images, model.parts.sequencer.scale

    def programs() -> None:
        tokens = jax.device_get(decode_image.images(*arguments, how=drawing.how))
        images.decode(scale.raw(tokens))

    def whole() -> None:
        model.generate("a red circle", n=batch)

    def seconds(call: Callable[[], None]) -> float:
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun

    pairs = [(seconds(whole), seconds(programs)) for _ in range(repeats + 1)][1:]
    longer = [whole - programs for whole, programs in pairs]
    return statistics.median(whole for whole, _ in pairs), statistics.median(longer)


if __name__ == "__main__":
    cli.run(main)
