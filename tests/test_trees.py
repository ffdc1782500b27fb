import jax
import jax.numpy as jnp
import optax
import pytest

from unifluid_jax import trees
from unifluid_jax.errors import UserError

TREE = {"b": {"w": 1, "scale": 2}, "a": [3, {"w": 4}]}


def test_names_go_down_through_dicts_lists_and_named_tuples():
    assert trees.flatten(TREE) == {"a/0": 3, "a/1/w": 4, "b/scale": 2, "b/w": 1}
    assert trees.paths(TREE)["a"][1]["w"] == "a/1/w"
    state = optax.adam(1.0).init({"w": jnp.zeros(2)})
    assert list(trees.flatten(state)) == ["0/count", "0/mu/w", "0/nu/w"]
    assert list(trees.flatten(state)) == jax.tree.leaves(trees.paths(state))


def test_the_first_match_of_the_whole_name_wins():
    rules = [("b/.*", "b"), (".*/w", "w"), (".*", "rest")]
    assert trees.match_rules(rules, TREE, "rules") == {
        "b": {"w": "b", "scale": "b"},
        "a": ["rest", {"w": "w"}],
    }


def test_what_is_split_is_joined_again():
    tree = {"a": {"x": 1, "y": {"z": 2}}, "b": {"w": 3}}
    chosen = {"a": {"x": False, "y": {"z": True}}, "b": {"w": True}}
    picked, rest = trees.split(tree, chosen)
    assert picked == {"a": {"y": {"z": 2}}, "b": {"w": 3}} and rest == {"a": {"x": 1}}
    assert trees.join(picked, rest) == trees.join(rest, picked) == tree
    everything = jax.tree.map(lambda _: True, tree)
    assert trees.split(tree, everything) == (tree, {}) and trees.join(tree, {}) == tree


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("b/.*", 0)], 'rules: no rule covers "a/0"'),
        ([("b", 0), (".*", 1)], 'rules: "b" matches no leaf'),
        ([("b/(", 0), (".*", 1)], 'rules: "b/." is no regular expression'),
        ([], "no rule covers"),
    ],
)
def test_rules_that_miss_are_errors(rules, message):
    with pytest.raises(UserError, match=message):
        trees.match_rules(rules, TREE, "rules")


def test_a_rule_hidden_by_earlier_ones_is_none_that_misses():
    assert trees.match_rules([("x", 1), (".*", 2)], {"x": 0}, "rules") == {"x": 1}
