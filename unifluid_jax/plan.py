"""Compiles a config's step for a TPU topology without the hardware, and says what it needs.

    unifluid plan --config=experiments/unifluid_2b.py --topology=v5e:8x8
    unifluid plan --config=experiments/unifluid_9b.py --topology=v5p:4x4x4 --search --json=plan.json

Memory is the compiler's own figure. The step's time is an estimate, never a measurement: the cycles
that the compiler expects of each operation, at the chip's clock; attention kernels, which have no
such figure, at 40 % of peak; collectives at nominal link rates, where those that run beside other
work are hidden in the low figure and added in the high one. MFU is model FLOPs (see flops.py: three
forward passes of what is trained, one of what is frozen, nothing for recomputation) over time and
peak.

With --search, batches are cut into other numbers of parts, other activations are kept, and other
meshes tried: the most promising by size are compiled, and the best is printed.

Exit code 0 when the step fits, 3 when it does not.
"""

import json
import sys
from pathlib import Path

import rich.console
from absl import flags

from unifluid_jax import cli, planning
from unifluid_jax.errors import UserError

_CONFIG = cli.config_flag()
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Chips to compile for: v5e:8x8, v5p:4x4x8, v6e:16x16*2.", required=True
)
_JSON = flags.DEFINE_string("json", None, "File to write the plan to.")
_SEARCH = flags.DEFINE_bool("search", False, "Try other batches, remat and meshes.")
_TRIES = flags.DEFINE_integer("tries", 4, "How many candidates --search compiles.")


def main(argv: list[str]) -> None:
    cli.positional(argv)
    config = _CONFIG.value
    out = _JSON.value and Path(_JSON.value)
    if out and not out.parent.is_dir():
        raise UserError(f"--json: there is no folder {out.parent}")
    if _TRIES.value < 1:
        raise UserError(f"--tries is {_TRIES.value}: set it to 1 or more")
    console = rich.console.Console(width=110)
    if _SEARCH.value:
        found = planning.search(config, _TOPOLOGY.value, _TRIES.value, console.print)
    else:
        found = planning.make(config, _TOPOLOGY.value)
    console.print(planning.heading(found), soft_wrap=True)
    for table in planning.tables(found):
        console.print(table)
    for line in planning.remarks(found):
        console.print(line, soft_wrap=True)
    if out:
        out.write_text(json.dumps(found, indent=2) + "\n")
    if not found["fits"]:
        sys.exit(3)


if __name__ == "__main__":
    cli.run(main)
