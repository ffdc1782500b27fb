"""Runs one of the measurements of benchmarks/ and prints its table.

    unifluid benchmark plan --json=docs/benchmark_plan.json
    unifluid benchmark plans

`plan` compiles the step for TPUs beside MaxText's figures; `plans` compiles every recipe for every
topology it has a layout for and writes docs/plans.md. Every table says what it ran on.
"""

import importlib
from pathlib import Path

from absl import flags

from unifluid_jax import cli
from unifluid_jax.errors import UserError

_JSON = flags.DEFINE_string("json", None, "File to write the figures to.")
_ONLY = flags.DEFINE_string("only", "", "Run only the cases whose name contains this.")

NAMES = ("plan", "plans")


def main(argv: list[str]) -> None:
    (name,) = cli.positional(argv, "|".join(NAMES))
    out = _JSON.value and Path(_JSON.value)
    if out and not out.parent.is_dir():
        raise UserError(f"--json: there is no folder {out.parent}")
    importlib.import_module(f"benchmarks.{name}").run(_ONLY.value, out)


if __name__ == "__main__":
    cli.run(main)
