"""`unifluid COMMAND` = `python -m unifluid_jax.COMMAND`."""

import importlib
import sys
from importlib import metadata

from unifluid_jax.errors import nearest

# Said here and not in the modules: the list must not take the seconds that importing JAX takes.
COMMANDS = {
    "data": "build a data set, or show the batches that a config makes of it",
    "train": "train a model, or go on where its workdir stopped",
    "plan": "compile a training step for TPUs without having them: memory, time, traffic",
    "tokenizer": "export a trained image tokenizer",
    "sample": "generate, edit, caption or answer from a checkpoint",
    "benchmark": "a measurement of benchmarks/, by name",
    "evaluate": "the scores of a checkpoint",
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
    else:
        sys.argv[:2] = [f"unifluid {command}"]
        from unifluid_jax import cli

        cli.run(importlib.import_module(f"unifluid_jax.{command}").main)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: unifluid COMMAND [--flag=value]...", ""]
    lines += [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    lines += ["", "unifluid COMMAND --help lists the flags of a command."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
