"""`unifluid COMMAND` = `python -m unifluid_jax.COMMAND`."""

import importlib
import sys
from importlib import metadata

from unifluid_jax.errors import UserError, nearest

# Said here and not in the modules: the list must not take the seconds that importing JAX takes.
COMMANDS = {
    "data": "build or import a data set, or show the batches that a config makes of it",
    "train": "train a model, or go on where its workdir stopped",
    "plan": "compile a training step for TPUs without having them: memory, time, traffic",
    "convert": "pretrained weights in; out: a folder of its own, formats of others",
    "tokenizer": "export a trained image tokenizer",
    "sample": "generate, edit, inpaint, caption or answer from a checkpoint",
    "demo": "a page in the browser for all of this",
    "evaluate": "the scores of a checkpoint",
    "benchmark": "measure something, see below",
}
# `unifluid benchmark NAME` = `python -m benchmarks.NAME`.
BENCHMARKS = {
    "against_torch": "a training step of ours beside one of PyTorch, on the CPU",
    "curves": "the losses of a run over its steps, as a plot",
    "first_picture": "the time from start to picture, and what the interface adds",
    "plan": "a step as the TPU compiler sees it, beside MaxText's",
    "plans": "every recipe compiled for every topology it has a layout for, as a page",
    "sample": "speed and quality of image sampling, as a table and a plot",
}


def main() -> None:
    """Entry point of the console script."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("help", "-h", "--help"):
        print(_help())
    elif command == "--version":
        print(f"unifluid_jax {metadata.version('unifluid_jax')}")
    elif command not in COMMANDS:
        print(f'error: unknown command "{command}"{nearest(command, COMMANDS)}', file=sys.stderr)
        sys.exit(2)
    elif command == "benchmark":
        name = sys.argv[2] if len(sys.argv) > 2 else ""
        if name not in BENCHMARKS:
            hint = nearest(name, BENCHMARKS)
            print(f'error: unknown benchmark "{name}"{hint}', file=sys.stderr)
            sys.exit(2)
        _run(f"benchmarks.{name}", words=3)
    else:
        _run(f"unifluid_jax.{command}", words=2)


def _run(module: str, words: int) -> None:
    """Runs a program; the first words of the command line are its name."""
    sys.argv[:words] = [" ".join(["unifluid", *sys.argv[1:words]])]
    from unifluid_jax import cli

    try:
        program = importlib.import_module(module)
    except UserError as error:  # a package is missing that only this command needs
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    cli.run(program.main)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: unifluid COMMAND [--flag=value]...", ""]
    lines += [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    lines += ["", "usage: unifluid benchmark NAME [--flag=value]...", ""]
    lines += [f"  {name:{width}}  {text}" for name, text in BENCHMARKS.items()]
    lines += ["", "unifluid COMMAND --help lists the flags of a command."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
