import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from unifluid_jax import optim, trees
from unifluid_jax.errors import UserError


def make_config(**fields) -> ConfigDict:
    config = {
        "lr": 0.1,
        "warmup_steps": 0,
        "decay": "none",
        "decay_steps": -1,
        "end_scale": 0.0,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "clip": 1.0,
        "weight_decay": 0.0,
        "mu_dtype": "float32",
        "nu_dtype": "float32",
        "rules": ((".*", {}),),
    }
    return ConfigDict({**config, **fields}).lock()


@pytest.fixture
def params():
    key = jax.random.key(0)
    return {
        "backbone": {"w": jax.random.normal(key, (4, 3)), "scale": jnp.ones(3)},
        "head": {"w": jax.random.normal(key, (3, 3))},
    }


def gradients(params, seed=1):
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten(
        [jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)]
    )


def run(tx, params, steps=3):
    state = tx.init(params)
    for i in range(steps):
        updates, state = tx.update(gradients(params, seed=i), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {0: 1.0, 50: 1.0, 99: 1.0}),
        ({"warmup_steps": 10}, {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 99: 1.0}),
        (
            {"warmup_steps": 20, "decay": "cosine"},
            {19: 1.0, 20: 1.0, 60: 0.5, 40: (1 + np.cos(np.pi / 4)) / 2, 100: 0.0},
        ),
        ({"decay": "linear", "decay_steps": 20}, {79: 1.0, 80: 1.0, 90: 0.5, 100: 0.0}),
        (
            {"decay": "linear", "decay_steps": 20, "end_scale": 0.2},
            {80: 1.0, 90: 0.6, 100: 0.2, 150: 0.2},
        ),
        ({"decay": "sqrt", "decay_steps": 20}, {80: 1.0, 85: 0.5, 100: 0.0}),
        ({"decay": "cosine", "end_scale": 0.1}, {0: 1.0, 50: 0.55, 100: 0.1}),
    ],
)
def test_schedule_goes_through_known_points(fields, expected):
    rate = optim.schedule(make_config(**fields), total_steps=100)
    for step, value in expected.items():
        np.testing.assert_allclose(rate(jnp.asarray(step)), 0.1 * value, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decay": "cosin"}, 'did you mean "cosine"'),
        ({"warmup_steps": 101}, "do not fit into a run of 100 steps"),
        ({"warmup_steps": 60, "decay": "linear", "decay_steps": 50}, "60 warm-up and 50 decay"),
        ({"warmup_steps": 100, "decay": "cosine"}, "decay_steps must be at least 1"),
        ({"decay": "cosine", "decay_steps": 0}, "decay_steps must be at least 1"),
        ({"warmup_steps": -1}, "do not fit"),
    ],
)
def test_an_impossible_schedule_is_an_error(fields, message):
    with pytest.raises(UserError, match=message):
        optim.schedule(make_config(**fields), total_steps=100)


def test_without_rules_it_is_optax_adamw(params):
    config = make_config(clip=0.5, weight_decay=0.3, warmup_steps=2)
    rate = optim.schedule(config, 10)
    reference = optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(rate, 0.9, 0.95, weight_decay=0.3)
    )
    ours, _ = run(optim.make(config, params, 10), params)
    theirs, _ = run(reference, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs)


def test_clip_zero_means_no_limit(params):
    tx = optim.make(make_config(clip=0.0), params, 10)
    big = jax.tree.map(lambda p: 1e3 * jnp.ones_like(p), params)
    _, state = tx.update(big, tx.init(params), params)
    moments = [leaf for name, leaf in trees.flatten(state).items() if "/mu/" in name]
    for mu in moments:
        np.testing.assert_allclose(mu, 100.0, rtol=1e-5)


def test_rules_scale_decay_and_learning_rate_of_single_parameters(params):
    config = make_config(
        clip=0.0,
        weight_decay=0.5,
        rules=((".*/scale", {"decay": 0.0}), ("head/.*", {"lr_scale": 0.1}), (".*", {})),
    )
    tx = optim.make(config, params, 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_array_equal(updates["backbone"]["scale"], 0)
    np.testing.assert_allclose(updates["head"]["w"], -0.1 * 0.1 * 0.5 * params["head"]["w"], 1e-6)
    np.testing.assert_allclose(updates["backbone"]["w"], -0.1 * 0.5 * params["backbone"]["w"], 1e-6)


def test_a_frozen_parameter_is_none_of_the_optimizers_business(params):
    config = make_config(
        clip=0.1, weight_decay=0.5, rules=(("backbone/.*", {"freeze": True}), (".*", {}))
    )
    trained, frozen = optim.split(config, params)
    assert trained == {"head": params["head"]} and frozen == {"backbone": params["backbone"]}
    moved, state = run(optim.make(config, params, 10), trained)
    names = [name for name, leaf in trees.flatten(state).items() if leaf.ndim]
    assert len(names) == 2 and all(name.endswith("/head/w") for name in names)
    alone, _ = run(optim.make(make_config(clip=0.1, weight_decay=0.5), trained, 10), trained)
    jax.tree.map(np.testing.assert_array_equal, moved, alone)
    assert not np.array_equal(moved["head"]["w"], params["head"]["w"])


@pytest.mark.parametrize("mu", ["bfloat16", "float32"])
@pytest.mark.parametrize("nu", ["bfloat16", "float32"])
def test_moments_have_the_dtypes_asked_for_and_computing_has_not(params, mu, nu):
    moved, state = run(optim.make(make_config(mu_dtype=mu, nu_dtype=nu), params, 20), params, 20)
    dtypes = {name: leaf.dtype for name, leaf in trees.flatten(state).items() if leaf.ndim}
    assert {str(d) for n, d in dtypes.items() if "/mu/" in n} == {mu}
    assert {str(d) for n, d in dtypes.items() if "/nu/" in n} == {nu}
    wanted, _ = run(optim.make(make_config(), params, 20), params, 20)
    wanted, start = trees.flatten(wanted), trees.flatten(params)
    for name, leaf in trees.flatten(moved).items():
        change = np.abs(wanted[name] - start[name]).max()
        np.testing.assert_allclose(leaf, wanted[name], atol=0.03 * change)


def test_a_second_moment_that_would_stand_still_is_refused(params):
    config = make_config(nu_dtype="bfloat16", b2=0.999)
    with pytest.raises(UserError, match="nu_dtype is bfloat16.*b2=0.999 the second moment.* 0.984"):
        optim.make(config, params, 10)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (((".*/w", {}),), 'no rule covers "backbone/scale"'),
        ((("bakcbone/.*", {"freeze": True}), (".*", {})), "matches no leaf"),
        (((".*", {"freeze": True}),), "config.optim.rules freeze every parameter"),
        (((".*", {"frezee": True}),), '"frezee" of ".." is unknown .did you mean "freeze"'),
        (((".*", {"muon": (0,)}),), r"muon=\(0,\) of backbone/scale \[3\]"),
        (((".*/w", {"muon": (0, 1)}), (".*", {})), r"muon=\(0, 1\) of backbone/w \[4, 3\]"),
    ],
)
def test_wrong_rules_are_errors(params, rules, message):
    with pytest.raises(UserError, match=message):
        optim.make(make_config(rules=rules), params, 10)


def test_muon_makes_orthogonal_updates_of_the_size_of_adams():
    """Dims (1, 2) of the parameter are a matrix's inputs; its two layers are matrices apart."""
    params = {"w": jnp.zeros((2, 3, 4, 16)), "b": jnp.zeros(5)}
    config = make_config(rules=(("w", {"muon": (1, 2)}), (".*", {})), clip=0.0)
    tx = optim.make(config, params, 10)
    state = tx.init(params)
    grads = gradients(params)
    grads["w"] = grads["w"].at[1].mul(100.0)  # a layer's size does not matter
    updates, _ = tx.update(grads, state, params)
    for layer in range(2):
        matrix = np.asarray(updates["w"][layer]).reshape(12, 16)
        size = np.linalg.svd(matrix, compute_uv=False) / (0.2 * config.lr * np.sqrt(16))
        # Newton and Schulz's five steps bring singular values to 1, give or take.
        assert size.min() > 0.6 and size.max() < 1.3
        assert np.sum(matrix * np.asarray(grads["w"][layer]).reshape(12, 16)) < 0
    alone = optim.make(make_config(clip=0.0), {"b": params["b"]}, 10)
    bias = {"b": params["b"]}
    expected, _ = alone.update({"b": grads["b"]}, alone.init(bias), bias)
    np.testing.assert_array_equal(updates["b"], expected["b"])


def test_muon_keeps_one_moment(params):
    config = make_config(rules=((".*/w", {"muon": (0,)}), (".*", {})))
    state = trees.flatten(jax.eval_shape(optim.make(config, params, 10).init, params))
    kept = {name.partition("inner_state/")[2] for name in state if name.endswith("/w")}
    assert kept == {"mu/backbone/w", "mu/head/w"}
    assert not any("nu/" in name and name.endswith("/w") for name in state)


def test_rules_survive_the_stored_config(params):
    from unifluid_jax.config import from_json, to_json

    config = make_config(rules=((".*/scale", {"decay": 0.0}), (".*", {"muon": (0,)})))
    a, _ = run(optim.make(config, params, 10), params)
    b, _ = run(optim.make(from_json(to_json(config)), params, 10), params)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_ema_is_the_average_and_warms_up():
    ema, params = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
    for step in range(5):
        ema = optim.ema_update(ema, params, step, 0.9, warmup=False)
    np.testing.assert_allclose(ema["w"], 1 - 0.9**5, rtol=1e-6)

    first = optim.ema_update({"w": jnp.zeros(2)}, params, jnp.asarray(0), 0.9, warmup=True)
    np.testing.assert_allclose(first["w"], 0.9, rtol=1e-6)
    late = optim.ema_update({"w": jnp.zeros(2)}, params, jnp.asarray(10**6), 0.9, warmup=True)
    np.testing.assert_allclose(late["w"], 0.1, rtol=1e-5)
