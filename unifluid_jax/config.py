"""Experiment configs: locked `ConfigDict`s, made by `get_config(arg)` of a Python file.

Everything a user can get wrong here ends in a one-line `UserError`.
"""

import importlib.util
import inspect
import itertools
import json
import os
import re
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path

from unifluid_jax.errors import UserError, nearest


def parse_arg(arg: str | None, **defaults: bool | int | float | str) -> ConfigDict:
    """The argument of a config, `size=2b,res=256,debug`, as a locked ConfigDict.

    The idea is big_vision's `parse_arg`.

    Args:
        arg: comma-separated `name=value`; a bare `name` is `name=true`.
        **defaults: every known name with its default, whose type the value must have.

    Raises:
        UserError: an unknown name, a name given twice, or a value of the wrong type.
    """
    values = dict(defaults)
    given = set()
    for item in filter(None, (part.strip() for part in (arg or "").split(","))):
        name, equals, text = (part.strip() for part in item.partition("="))
        if name not in defaults:
            raise UserError(f'config argument "{name}" is unknown{nearest(name, defaults)}')
        if name in given:
            raise UserError(f'config argument "{name}" is given twice')
        given.add(name)
        values[name] = _convert(name, text if equals else "true", defaults[name])
    return ConfigDict(values).lock()


def _convert(name: str, text: str, default: bool | int | float | str) -> bool | int | float | str:
    kind = type(default)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError):
        raise UserError(
            f'config argument "{name}" must be of type {kind.__name__}, got "{text}"'
        ) from None


def load(path: str) -> ConfigDict:
    """Reads a config and locks it.

    Args:
        path: `file.py`, or `file.py:arg` where `arg` goes to the file's `get_config`; or a `.json`
            written with `to_json`.

    Raises:
        UserError: no such file, or the file does not make a ConfigDict.
    """
    file, colon, arg = path.partition(":")
    if not os.path.isfile(file):
        raise UserError(
            f'no config file "{file}": give one like --config=experiments/quickstart.py'
        )
    if file.endswith(".json"):
        with open(file) as stream:
            try:
                return from_json(json.load(stream))
            except ValueError as error:
                raise UserError(f'config file "{file}" is not a saved config: {error}') from None
    if not file.endswith(".py"):
        raise UserError(f'config file "{file}" must be a .py file or a saved .json')

    try:
        spec = importlib.util.spec_from_file_location(f"unifluid_config_{Path(file).stem}", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config(*([arg] if colon else []))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f'config "{path}" failed at {_origin(error, file)}') from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f'get_config() of "{file}" must return a ConfigDict, got {type(config).__name__}'
        )
    return config.lock()


def _origin(error: Exception, file: str) -> str:
    """`line 12: NameError: ...`, with the innermost line of the config file itself."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename.endswith(os.path.basename(file))]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno)
    where = f"line {lines[-1]}: " if lines else ""
    return f"{where}{type(error).__name__}: {error}".splitlines()[0]


def apply_overrides(config: ConfigDict, argv: Sequence[str]) -> list[str]:
    """Sets the fields named by `--config.train.steps=100` and its like, in place.

    The syntax and the typing are those of `ml_collections.config_flags`, but on flags of their own:
    the config may come from a file or from a checkpoint, and nothing global remembers it.

    Returns:
        The arguments that are no overrides, in order.

    Raises:
        UserError: an unknown key (with its nearest name and full path), or a value of another type.
    """
    argv = list(argv)
    overrides = find_overrides(argv)
    before = {key: _lookup(config, key) for key in overrides}
    values = flags.FlagValues()
    # Both the flags library and config_flags take the first element for the program's name.
    command = ["", *argv]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=command)
        rest = values(command, known_only=True)[1:]
    except flags.IllegalFlagValueError as error:
        raise _wrong_value(config, overrides, str(error)) from None
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    for key, old in before.items():
        _check_items(key, old, config_path.get_value(key, config))
    return rest


def find_overrides(argv: Sequence[str]) -> dict[str, str]:
    """The dotted keys of the overrides in `argv`, with the text after them; up to a `--`."""
    found = {}
    for argument, following in itertools.pairwise([*argv, ""]):
        if argument == "--":
            break
        if match := re.match(r"--?(?:no)?config\.([^=]*)(=?)(.*)", argument, re.DOTALL):
            found[match[1]] = match[3] if match[2] else following
    return found


def _lookup(config: ConfigDict, key: str) -> Any:
    """The value of the field `key` ("input.mixture[0].weight").

    Raises:
        UserError: there is no such field, or it is none that a flag can set.
    """
    node: Any = config
    path = "config"
    if not re.fullmatch(r"\w+(\[\d+\])*(\.\w+(\[\d+\])*)*", key):
        raise UserError(f"--config.{key} is no key: write it like --config.train.steps=100")
    for name, index in re.findall(r"(\w+)|\[(\d+)\]", key.replace("[", ".[")):
        if name and isinstance(node, Mapping | ConfigDict) and name in node:
            node = node[name]
        elif index and isinstance(node, list | tuple) and int(index) < len(node):
            node = node[int(index)]
        elif index:
            reason = f"has {len(node)} items" if isinstance(node, list | tuple) else "is no list"
            raise UserError(f"no config key --config.{key}: {path} {reason}")
        else:
            options = list(node) if isinstance(node, Mapping | ConfigDict) else []
            hint = nearest(name, options) if options else f" ({path} has no fields)"
            raise UserError(f'no config key --config.{key}: unknown "{name}" in {path}{hint}')
        path += f"[{index}]" if index else f".{name}"
    if isinstance(node, Mapping | ConfigDict):
        raise UserError(f"--config.{key} is a group of fields: set one of {', '.join(node)}")
    if isinstance(node, list):
        raise UserError(f"--config.{key} is a list: set one item, like --config.{key}[0]...=")
    if config_path.get_type(key, config) is type(None):
        raise UserError(f"--config.{key} is None without a type: use placeholder() in the config")
    return node


def _wrong_value(config: ConfigDict, overrides: Mapping[str, str], message: str) -> UserError:
    for key, text in overrides.items():
        if f"config.{key}=" in message:
            kind = config_path.get_type(key, config).__name__
            now = config_path.get_value(key, config)
            return UserError(f'--config.{key} must be of type {kind} (now {now!r}), got "{text}"')
    return UserError(" ".join(message.split()))


def _check_items(key: str, old: Any, new: Any) -> None:
    """A tuple keeps the type of its items: config_flags makes a string of what does not parse."""
    kinds = {type(item) for item in old} if isinstance(old, tuple) else set()
    if len(kinds) != 1:
        return
    (kind,) = kinds
    allowed = (int, float) if kind is float else (kind,)
    for item in new:
        if type(item) not in allowed or (kind is str and item.startswith(("(", "["))):
            raise UserError(
                f"--config.{key} must be a tuple of {kind.__name__} (now {old!r}), got {item!r}"
            )


def make_part(kind: Callable[..., Any], where: str, fields: ConfigDict, **fixed: Any) -> Any:
    """`kind(**fields, **fixed)`: a part made of a sub-config and of what the other parts fix.

    Args:
        where: path of the sub-config, for messages.

    Raises:
        UserError: the sub-config has a field that `kind` has not, or lacks one.
    """
    check_options(kind, where, fields, fixed)
    try:
        return kind(**fields, **fixed)
    except TypeError as error:
        raise UserError(f"{where}: {error}") from error


def check_options(
    function: Callable[..., Any], where: str, fields: ConfigDict, fixed: Collection[str]
) -> None:
    """Makes sure that a sub-config has the arguments of a function, less those that are `fixed`.

    Raises:
        UserError: it has another one, or lacks one that has no default.
    """
    parameters = inspect.signature(function).parameters
    known = {name: p.default for name, p in parameters.items() if name not in fixed}
    for field in fields:
        if field not in known:
            raise UserError(f'{where} has no option "{field}"{nearest(field, known)}')
    for name, default in known.items():
        if default is inspect.Parameter.empty and name not in fields:
            raise UserError(f'{where}: "{name}" is missing')


def to_json(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values, placeholders as null. Tuples become lists."""
    return json.loads(config.to_json(sort_keys=True))


def from_json(values: Any) -> ConfigDict:
    """The locked config that `to_json` stored; sequences become tuples, which flags can override.

    Raises:
        ValueError: `values` is no mapping.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"expected an object, got {type(values).__name__}")
    return ConfigDict(_frozen(values)).lock()


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _frozen(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_frozen(item) for item in value)
    return value


def differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], path: str = ""
) -> dict[str, tuple[Any, Any]]:
    """The leaves in which two JSON configs differ: dotted path -> (saved, current).

    A leaf that one of them lacks has the value "(absent)" there.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*saved, *current]):
        old, new = saved.get(key, "(absent)"), current.get(key, "(absent)")
        name = f"{path}.{key}" if path else key
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found.update(differences(old, new, name))
        elif old != new:
            found[name] = (old, new)
    return found
