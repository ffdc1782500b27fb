"""Names for the leaves of a pytree, and rules that choose values by those names."""

import re
from collections.abc import Sequence
from typing import Any

import jax

from unifluid_jax.errors import UserError

Tree = Any


def paths(tree: Tree) -> Tree:
    """The same tree with the name of each leaf in its place, like "backbone/layers/attn/q"."""
    return jax.tree_util.tree_map_with_path(lambda keys, _: leaf_name(keys), tree)


def flatten(tree: Tree) -> dict[str, Any]:
    """Name -> leaf, in the order of `jax.tree.leaves`."""
    return {leaf_name(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def leaf_name(keys: tuple[Any, ...]) -> str:
    """The name of a leaf from its key path, as `jax.tree_util.tree_map_with_path` gives it."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def split(tree: Tree, chosen: Tree) -> tuple[Tree, Tree]:
    """The leaves of nested dicts that are chosen, and the others; neither has empty branches.

    Args:
        chosen: the same tree with a bool at every leaf.
    """
    picked, rest = {}, {}
    for key, node in tree.items():
        if isinstance(node, dict):
            parts = split(node, chosen[key])
        else:
            parts = (node, None) if chosen[key] else (None, node)
        for side, part in zip((picked, rest), parts, strict=True):
            if part is not None and not (isinstance(part, dict) and not part):
                side[key] = part
    return picked, rest


def join(first: Tree, second: Tree) -> Tree:
    """What `split` took apart, as one tree."""
    both = {key: join(first[key], second[key]) for key in first if key in second}
    return {**first, **second, **both}


def match_rules(rules: Sequence[tuple[str, Any]], tree: Tree, what: str) -> Tree:
    """Chooses a value for each leaf by regular expressions on its name.

    Args:
        rules: (pattern, value) pairs. A pattern must match the whole name; the first match wins.
        tree: the tree whose leaves need values.
        what: where the rules come from, for messages: "config.optim.rules".

    Returns:
        A tree like `tree` with a value at every leaf.

    Raises:
        UserError: a leaf that no pattern matches, a pattern that matches no leaf (a misspelt one
            would otherwise do nothing, silently), or one that is no regular expression.
    """
    names = list(flatten(tree))
    compiled = []
    for pattern, value in rules:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise UserError(f'{what}: "{pattern}" is no regular expression: {error.msg}') from None
        if not any(expression.fullmatch(name) for name in names):
            raise UserError(f'{what}: "{pattern}" matches no leaf; leaves are like "{names[0]}"')
        compiled.append((expression, value))

    def choose(keys: tuple[Any, ...], _: Any) -> Any:
        for expression, value in compiled:
            if expression.fullmatch(leaf_name(keys)):
                return value
        raise UserError(
            f'{what}: no rule covers "{leaf_name(keys)}"; end the list with (".*", ...)'
        )

    return jax.tree_util.tree_map_with_path(choose, tree)
