import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from unifluid_jax import sharding, trees
from unifluid_jax.errors import UserError
from unifluid_jax.models.functional import Functional
from unifluid_jax.models.gemma import GemmaConfig
from unifluid_jax.models.head import HeadConfig
from unifluid_jax.models.siglip import SiglipConfig
from unifluid_jax.models.unifluid import UniFluid, UniFluidConfig
from unifluid_jax.models.vae import Vae, VaeConfig

AXES = {
    "embedding": ("vocab", "embed"),
    "layers": {"q": ("layers", "embed", "heads", "head_dim"), "scale": ("layers", "embed")},
    "positions": (None, "embed"),
    "free": (None,),
}


def init(key):
    keys = jax.random.split(key, 3)
    return {
        "embedding": jax.random.normal(keys[0], (16, 8)),
        "layers": {"q": jax.random.normal(keys[1], (3, 8, 4, 2)), "scale": jnp.ones((3, 8))},
        "positions": jax.random.normal(keys[2], (5, 8)),
        "free": jnp.zeros(6),
    }


def make_mesh(data=1, fsdp=1, tensor=1, devices=None):
    config = ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor})
    return sharding.make_mesh(config, devices)


def specs(tree):
    return {name: leaf.spec for name, leaf in trees.flatten(tree).items()}


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((1, 2, 4), (1, 2, 4)),
        ((8, 1, -1), (8, 1, 1)),
    ],
)
def test_mesh_sizes_with_one_left_open(sizes, shape):
    mesh = make_mesh(*sizes)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert tuple(mesh.shape.values()) == shape
    assert make_mesh(-1, devices=jax.devices()[:3]).shape["data"] == 3


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1), "data=3, fsdp=1, tensor=1. does not fit 8 devices"),
        ((-1, 3, 1), "data=-1, fsdp=3, tensor=1. does not fit 8 devices"),
        ((-1, -1, 1), "one of them may be -1"),
        ((0, 8, 1), "sizes are at least 1"),
        ((1, -2, 1), "sizes are at least 1"),
        ((16, 1, 1), "does not fit 8 devices"),
    ],
)
def test_an_impossible_mesh_is_an_error(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(*sizes)


def test_the_table_places_parameters():
    where = sharding.shardings(AXES, jax.eval_shape(init, jax.random.key(0)), make_mesh(2, 2, 2))
    assert specs(where) == {
        "embedding": jax.P("tensor", "fsdp"),
        "layers/q": jax.P(None, "fsdp", "tensor", None),
        "layers/scale": jax.P(None, "fsdp"),
        "positions": jax.P(None, "fsdp"),
        "free": jax.P(None),
    }


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 1, 4)])
def test_a_state_is_born_in_its_place_with_the_values_of_one_device(sizes):
    tx = optax.chain(optax.masked(optax.adam(1.0), lambda p: jax.tree.map(jnp.ndim, p)))

    def init_state(key):
        params = init(key)
        # One step of Adam, so that the moments are no zeros.
        _, moments = tx.update(params, tx.init(params), params)
        return {"step": jnp.asarray(3), "params": params, "ema": params, "opt_state": moments}

    devices = jax.devices()[: np.prod(sizes)]
    mesh = make_mesh(*sizes, devices=devices)
    abstract = jax.eval_shape(init_state, jax.random.key(0))
    where = sharding.state_shardings(
        abstract, sharding.shardings(AXES, abstract["params"], mesh), mesh
    )
    state = jax.jit(init_state, out_shardings=where)(jax.random.key(0))

    placed = trees.flatten(sharding.abstract(abstract, where))
    for name, leaf in trees.flatten(state).items():
        assert leaf.sharding == placed[name].sharding
        expected = mirrored_axes(name)
        cuts = [sharding.LOGICAL_AXES[a] if a else None for a in expected]
        cuts = [c if c and leaf.shape[i] % mesh.shape[c] == 0 else None for i, c in enumerate(cuts)]
        assert leaf.sharding.spec == jax.P(*cuts), name
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        state,
        jax.jit(init_state)(jax.random.key(0)),
    )


def mirrored_axes(name):
    """The axes of the parameter that a leaf of the state mirrors."""
    flat = {n: a for n, a in _flat_axes(AXES).items() if name.endswith(n)}
    return next(iter(flat.values()), ())


def _flat_axes(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))
    return {trees.leaf_name(keys): leaf for keys, leaf in leaves}


def place(axes, shape, mesh, large=1):
    param = jax.ShapeDtypeStruct(shape, jnp.float32)
    return sharding.shardings({"m": {"w": axes}}, {"m": {"w": param}}, mesh, large)["m"]["w"].spec


@pytest.mark.parametrize(
    ("axes", "shape", "error", "message"),
    [
        (("embed", "vision_embed"), (8, 8), ValueError, 'two dimensions .* over "fsdp"'),
        (("embed", "mpl"), (8, 8), ValueError, '"mpl" is unknown .did you mean "mlp"'),
        (("embed",), (8, 8), ValueError, "1 axes for 2 dimensions"),
        (("embed", "mlp"), (6, 8), UserError, "embed = 6 does not divide by config.mesh.fsdp = 4"),
        (("embed", "mlp"), (8, 7), UserError, "mlp = 7 does not divide by config.mesh.tensor = 2"),
        ((None, None), (8, 8), UserError, "stay whole on every device of the mesh data=1 x fsdp=4"),
        (("layers", "head_dim"), (8, 8), UserError, "stay whole"),
        (("layers", "kv_heads"), (8, 1), UserError, "stay whole"),
    ],
)
def test_a_large_parameter_that_does_not_fit_is_named(axes, shape, error, message):
    with pytest.raises(error, match=message) as raised:
        place(axes, shape, make_mesh(1, 4, 2))
    assert "m/w" in str(raised.value)


def test_small_and_replicated_parameters_are_no_errors():
    mesh = make_mesh(1, 4, 2)
    assert place(("embed", "mlp"), (6, 8), mesh, large=49) == jax.P(None, "tensor")
    assert place((None, None), (8, 8), mesh, large=65) == jax.P(None, None)
    assert place((None, None), (8, 8), make_mesh(8)) == jax.P(None, None)
    # One key head for all: its matrix is still cut over fsdp.
    assert place(("embed", "kv_heads"), (8, 1), mesh) == jax.P("fsdp", None)


def unifluid_2b():
    """Gemma-2 2B, SigLIP So400m/14, the largest of MAR's heads."""
    config = UniFluidConfig(
        backbone=GemmaConfig(256_128, 2304, 26, 9216, heads=8, kv_heads=4, head_dim=256),
        vision=SiglipConfig(224, 14, width=1152, depth=27, heads=16, mlp_dim=4304),
        head=HeadConfig(token_dim=16, cond_dim=2304, width=1536, depth=12, out_dim=32),
        image_tokens=256,
    )
    return Functional(lambda rngs: UniFluid(config, rngs=rngs))


def sd_vae():
    return Functional(lambda rngs: Vae(VaeConfig(), rngs=rngs))


@pytest.mark.parametrize("make_model", [unifluid_2b, sd_vae])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 1, 4), (1, 2, 4), (2, 2, 2)])
def test_the_real_models_are_cut_on_every_mesh(make_model, sizes):
    """No logical axis without an entry in the table, no collision, nothing large left whole."""
    model, mesh = make_model(), make_mesh(*sizes)
    params = jax.eval_shape(model.init, jax.random.key(0))
    where = trees.flatten(sharding.shardings(model.axes, params, mesh))
    total = share = 0
    for name, leaf in trees.flatten(params).items():
        total += leaf.size
        share += math.prod(where[name].shard_shape(leaf.shape))
    # What stays whole is little: a device holds hardly more than its part.
    if make_model is unifluid_2b:
        assert share < 1.02 * total / (mesh.shape["fsdp"] * mesh.shape["tensor"])


def test_a_batch_is_spread_over_the_replicas_without_an_implicit_transfer():
    mesh = make_mesh(2, 2, 2)
    batch = {"tokens": np.arange(8 * 3).reshape(8, 3), "rows": np.arange(8)}
    with jax.transfer_guard("disallow"):
        sharded = sharding.shard_batch(batch, mesh)
    assert sharded["tokens"].sharding == sharding.batch_sharding(mesh)
    assert sharded["tokens"].addressable_shards[0].data.shape == (2, 3)
    for name in batch:
        np.testing.assert_array_equal(sharded[name], batch[name])


def test_a_batch_that_cannot_be_spread_is_an_error():
    sharding.check_batch(8, 2, make_mesh(2, 2, 2))
    with pytest.raises(UserError, match="batch_size = 6 does not divide by the 4 replicas"):
        sharding.check_batch(6, 1, make_mesh(2, 2, 2))
