"""What every program of the command line shares: flags, the config, one-line errors.

A program is a module with absl flags at its top, a docstring that `--help` prints, and

    def main(argv: list[str]) -> None: ...

    if __name__ == "__main__":
        cli.run(main)

Exit codes: 0 done; 1 a bug, with its stack trace; 2 a `UserError` or a wrong flag; 75 a `Restart`:
give the same command again; 130 interrupted.
"""

import errno
import re
import sys
from collections.abc import Callable, Sequence
from functools import cached_property

from absl import app, flags, logging
from ml_collections import ConfigDict

from unifluid_jax import config as configs
from unifluid_jax.errors import Restart, UserError, nearest

# The flags that `config_flag` defines belong to the program that calls it, also in its --help.
flags.disclaim_key_flags()


class ConfigFlag:
    """The flag `--config` and the overrides `--config.train.steps=100` that go with it."""

    def __init__(self, stored: Callable[[], ConfigDict] | None):
        text = "experiment, as file.py or file.py:argument; --config.KEY=VALUE sets a field of it"
        if stored is not None:
            text += " (default: the config stored in the checkpoint)"
        self._path = flags.DEFINE_string("config", None, text)
        self._stored = stored

    @property
    def given(self) -> bool:
        """Whether the user named a config."""
        return self._path.value is not None

    @cached_property
    def value(self) -> ConfigDict:
        """The config with its overrides, locked.

        Raises:
            UserError: no config was given and the program has no other source for one.
        """
        if self._path.value is not None:
            return configs.load(self._path.value)
        if self._stored is not None:
            return self._stored()
        raise UserError("which config? give one like --config=experiments/quickstart.py")

    def parse(self, argv: Sequence[str]) -> list[str]:
        """Applies the overrides among `argv` and returns the other arguments.

        Raises:
            UserError: an unknown key or a value of the wrong type.
        """
        if self._path.value is not None or configs.find_overrides(argv):
            return configs.apply_overrides(self.value, argv)
        return list(argv)


_config_flag: ConfigFlag | None = None


def config_flag(stored: Callable[[], ConfigDict] | None = None) -> ConfigFlag:
    """Defines `--config` for a program; to be called at most once, at the top of its module.

    Args:
        stored: where the config comes from without the flag, called after the flags are parsed;
            by default the program cannot do without.
    """
    global _config_flag
    _config_flag = ConfigFlag(stored)
    return _config_flag


def positional(argv: Sequence[str], *wanted: str) -> list[str]:
    """The arguments of a program that are no flags.

    Args:
        argv: what `main` got; the first element is the program.
        *wanted: one pattern per argument: "NAME" for any word, "build|show" for one of these; the
            last may be "[NAME]..." for any number.

    Raises:
        UserError: too few, too many, or none of the words allowed.
    """
    program, *given = argv
    usage = f"usage: {_program_name(program)} {' '.join(wanted)}".rstrip()
    many = bool(wanted) and wanted[-1].endswith("...")
    fixed = wanted[:-1] if many else wanted
    if len(given) < len(fixed):
        raise UserError(f"{fixed[len(given)]} is missing; {usage}")
    if len(given) > len(fixed) and not many:
        raise UserError(f'unexpected argument "{given[len(fixed)]}"; {usage}')
    for word, pattern in zip(given, fixed, strict=False):
        choices = pattern.split("|")
        if len(choices) > 1 and word not in choices:
            raise UserError(f'unknown command "{word}"{nearest(word, choices)}; {usage}')
    return given


def run(main: Callable[[list[str]], None]) -> None:
    """Parses the flags, runs `main` and ends the process; mistakes of the user become one line."""
    module = sys.modules[main.__module__]
    # absl files the flags of a script under the script's path.
    owner = sys.argv[0] if module.__name__ == "__main__" else module.__name__
    if any(argument in ("-h", "-?", "--help", "--helpshort") for argument in sys.argv[1:]):
        print(_help(owner, module.__doc__ or ""))
        sys.exit(0)
    try:
        app.run(main, flags_parser=_parse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Restart as error:
        print(f"restart: {error}", file=sys.stderr)
        sys.exit(Restart.EXIT_CODE)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: cannot write: {error.strerror}{where}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _parse(argv: Sequence[str]) -> list[str]:
    """The `flags_parser` of `app.run`: returns the program and its positional arguments."""
    try:
        program, *rest = flags.FLAGS(argv, known_only=True)
    except flags.Error as error:
        # absl speaks of a "value other than None".
        if missing := re.search(r"Flag --(\w+) must have a value", str(error)):
            text = flags.FLAGS[missing[1]].help
            raise UserError(f"--{missing[1]} is missing: {text}") from None
        raise UserError(" ".join(str(error).split())) from None
    if _config_flag is not None:
        rest = _config_flag.parse(rest)
    for i, argument in enumerate(rest):
        if argument == "--":
            del rest[i]
            break
        if argument.startswith("-"):
            name = argument.lstrip("-").partition("=")[0]
            raise UserError(f"unknown flag --{name}{nearest(name, flags.FLAGS)}; see --help")
    # Libraries log at level INFO what only their authors want to read.
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING
    return [program, *rest]


def _program_name(program: str) -> str:
    """How the user calls it: `unifluid train`, or `python -m unifluid_jax.train`."""
    if not program.endswith(".py"):
        return program
    parts = program.removesuffix(".py").split("/")[-2:]
    return f"python -m {'.'.join(parts)}"


def _help(module: str, doc: str) -> str:
    lines = [doc.strip(), "", "flags:"]
    for flag in sorted(flags.FLAGS.get_key_flags_for_module(module), key=lambda flag: flag.name):
        default = "" if flag.default is None else f" (default: {flag.default_as_str})"
        lines += [f"  --{flag.name}", f"      {' '.join(flag.help.split())}{default}"]
    lines += ["  --helpfull", "      all flags, those of the libraries too"]
    return "\n".join(lines)
