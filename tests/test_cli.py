"""The command line as its users meet it: whole processes, exit codes and both streams."""

import subprocess
import sys

import pytest

from unifluid_jax import __main__, cli
from unifluid_jax.errors import UserError

CONFIG = """
from ml_collections import ConfigDict
from unifluid_jax.config import parse_arg
def get_config(arg=""):
    arg = parse_arg(arg, debug=False)
    return ConfigDict({"train": {"steps": 1 if arg.debug else 100}, "name": "x"})
"""

PROGRAM = '''
"""Prints what it was given.

More about it.
"""
from absl import flags
from ml_collections import ConfigDict
from unifluid_jax import cli
from unifluid_jax.errors import Restart, UserError

_CONFIG = cli.config_flag(%s)
_SIZE = flags.DEFINE_integer("size", 3, "how large")
_WORKDIR = flags.DEFINE_string("workdir", None, "where to", required=%s)


def main(argv):
    words = cli.positional(argv, "say|bug|interrupt|mistake|full|again", "[NAME]...")
    if words[0] == "bug":
        raise RuntimeError("a bug")
    if words[0] == "interrupt":
        raise KeyboardInterrupt
    if words[0] == "full":
        with open("/dev/full", "w") as stream:
            stream.write("x")
    if words[0] == "again":
        raise Restart("a notice came")
    if words[0] == "mistake":
        raise UserError("a mistake")
    print(_CONFIG.value.train.steps, _SIZE.value, words)


if __name__ == "__main__":
    cli.run(main)
'''


@pytest.fixture
def program(tmp_path):
    """Runs the program in a folder that holds a config; returns exit code, stdout and stderr."""
    (tmp_path / "config.py").write_text(CONFIG)

    def run(*arguments: str, stored: str = "", required: bool = False) -> tuple[int, str, str]:
        (tmp_path / "program.py").write_text(PROGRAM % (stored, required))
        done = subprocess.run(
            [sys.executable, "program.py", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    return run


def test_a_program_gets_flags_config_and_words(program):
    assert program(
        "say", "--config=config.py", "--config.train.steps=7", "--size", "4", "a", "--", "--b"
    ) == (0, "7 4 ['say', 'a', '--b']\n", "")
    assert program("say", "--config=config.py:debug") == (0, "1 3 ['say']\n", "")


def test_overrides_also_hold_for_a_stored_config(program):
    stored = 'stored=lambda: ConfigDict({"train": {"steps": 5}}).lock()'
    assert program("say", stored=stored) == (0, "5 3 ['say']\n", "")
    assert program("say", "--config.train.steps=6", stored=stored)[1] == "6 3 ['say']\n"
    assert program("say", "--config=config.py", stored=stored)[1] == "100 3 ['say']\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["say"], "which config?"),
        (["say", "--config.train.steps=1"], "which config?"),
        (["say", "--config=nowhere.py"], 'no config file "nowhere.py"'),
        (["say", "--config=config.py:fast"], 'config argument "fast" is unknown'),
        (["say", "--config=config.py", "--config.train.step=1"], 'did you mean "steps"?'),
        (["say", "--config=config.py", "--config.train.steps=x"], "must be of type int (now 100)"),
        (["say", "--config=config.py", "--sise=3"], 'unknown flag --sise (did you mean "size"?)'),
        (["say", "--config=config.py", "--size=x"], "flag --size=x"),
        (["say", "--config=config.py", "--size"], "Missing value for flag --size"),
        (
            ["shout"],
            'unknown command "shout" (known: again, bug, full, interrupt, mistake',
        ),
        ([], "say|bug|interrupt|mistake|full|again is missing; usage: "),
        (["mistake"], "error: a mistake"),
        (["full"], "error: cannot write: No space left on device"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(program, arguments, message):
    code, out, err = program(*arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_a_required_flag_is_asked_for(program):
    code, _, err = program("say", "--config=config.py", required=True)
    assert (code, err) == (2, "error: --workdir is missing: where to\n")


def test_what_passes_asks_to_be_given_again(program):
    assert program("again") == (75, "", "restart: a notice came\n")


def test_interrupt_is_quiet_and_a_bug_is_not(program):
    assert program("interrupt") == (130, "", "interrupted\n")
    code, _, err = program("bug")
    assert code == 1
    assert "Traceback" in err and "RuntimeError: a bug" in err


def test_help_shows_the_docstring_and_the_flags_of_the_program_alone(program):
    code, out, _ = program("--help")
    assert code == 0
    assert out.startswith("Prints what it was given.\n\nMore about it.")
    assert "--size\n      how large (default: '3')" in out
    assert "--config\n" in out and "--workdir" in out
    assert "verbosity" not in out


def test_positional_counts_its_arguments():
    assert cli.positional(["p"]) == []
    assert cli.positional(["p", "a"], "NAME") == ["a"]
    assert cli.positional(["p", "build", "a", "b"], "build|show", "[NAME]...") == [
        "build",
        "a",
        "b",
    ]
    with pytest.raises(UserError, match='unexpected argument "a"; usage: unifluid train$'):
        cli.positional(["unifluid train", "a"])
    with pytest.raises(UserError, match="usage: python -m unifluid_jax.train NAME"):
        cli.positional(["/somewhere/unifluid_jax/train.py"], "NAME")
    with pytest.raises(UserError, match='unknown command "biuld" .did you mean "build"'):
        cli.positional(["p", "biuld"], "build|show")


def unifluid(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "unifluid_jax", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stderr.splitlines(keepends=True)
    imported = "".join(line for line in lines if line.startswith("import time:"))
    assert "| jax\n" not in imported.replace(" ", "").replace("|", "| "), "help imports JAX"
    return done.returncode, done.stdout, "".join(lines[imported.count("\n") :])


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)])
def test_unifluid_lists_its_commands_without_importing_jax(arguments):
    code, out, _ = unifluid(*arguments)
    assert code == 0
    for name, text in [*__main__.COMMANDS.items(), *__main__.BENCHMARKS.items()]:
        assert f"  {name} " in out and text in out


def test_unifluid_names_the_nearest_command():
    code, out, err = unifluid("evalute")
    assert (code, out) == (2, "")
    assert err == 'error: unknown command "evalute" (did you mean "evaluate"?)\n'


def test_unifluid_names_the_nearest_benchmark():
    code, out, err = unifluid("benchmark", "smaple")
    assert (code, out) == (2, "")
    assert err == 'error: unknown benchmark "smaple" (did you mean "sample"?)\n'
    known = ", ".join(sorted(__main__.BENCHMARKS))
    assert unifluid("benchmark")[2] == f'error: unknown benchmark "" (known: {known})\n'


def test_unifluid_knows_its_version():
    code, out, _ = unifluid("--version")
    assert code == 0 and out.startswith("unifluid_jax 0.")
