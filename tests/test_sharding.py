import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from unifluid_jax import sharding, trees
from unifluid_jax.errors import UserError
from unifluid_jax.models.functional import Functional, unstack
from unifluid_jax.models.gemma import Gemma, GemmaConfig
from unifluid_jax.models.head import HeadConfig
from unifluid_jax.models.siglip import SiglipConfig
from unifluid_jax.models.unifluid import UniFluid, UniFluidConfig
from unifluid_jax.models.vae import Vae, VaeConfig

AXES = {
    "embedding": ("vocab", "embed_out"),
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


class Chip:
    """A device of a multi-slice TPU, as far as a mesh looks at it."""

    platform, device_kind, process_index = "stand-in", "stand-in", 0

    def __init__(self, number, per_slice):
        self.id, self.slice_index = number, number // per_slice


def hybrid(dcn, sizes, devices):
    dcn, ici = (dict(zip(sharding.AXES, s, strict=True)) for s in (dcn, sizes))
    return sharding.make_mesh(ConfigDict({**ici, "dcn": dcn}), devices)


def test_slices_are_neighbours_along_the_axes_of_dcn():
    chips = [Chip(i, 4) for i in range(8)]
    mesh = hybrid((-1, 1, 1), (2, -1, 1), chips)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert np.vectorize(lambda c: c.slice_index)(mesh.devices)[:, :, 0].tolist() == [
        [0, 0],
        [0, 0],
        [1, 1],
        [1, 1],
    ]
    assert dict(hybrid((1, 2, 1), (1, 2, 2), chips).shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    # Devices without slices count as one, or as blocks of neighbours.
    assert dict(hybrid((1, 1, -1), (-1, 1, 1), None).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    mesh = hybrid((2, 1, 1), (1, 2, 2), None)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert {d.id for d in mesh.devices[0].flat} == set(range(4))


@pytest.mark.parametrize(
    ("dcn", "sizes", "message"),
    [
        ((1, 1, 1), (8, 1, 1), r"config.mesh.dcn .data=1.* does not fit 2 slices"),
        ((3, 1, 1), (-1, 1, 1), r"config.mesh.dcn .data=3.* does not fit 2 slices"),
        ((2, 1, 1), (8, 1, 1), r"config.mesh .data=8.* does not fit 4 devices"),
        ((-1, -1, 1), (-1, 1, 1), "config.mesh.dcn .* one of them may be -1"),
    ],
)
def test_an_impossible_mesh_of_slices_is_an_error(dcn, sizes, message):
    with pytest.raises(UserError, match=message):
        hybrid(dcn, sizes, [Chip(i, 4) for i in range(8)])
    with pytest.raises(UserError, match="slices of unlike sizes .* 4, 3"):
        hybrid((2, 1, 1), (-1, 1, 1), [Chip(i, 4) for i in range(7)])


def test_the_table_places_parameters():
    where = sharding.shardings(AXES, jax.eval_shape(init, jax.random.key(0)), make_mesh(2, 2, 2))
    assert specs(where) == {
        "embedding": jax.P(("tensor", "fsdp"), None),
        "layers/q": jax.P(None, "fsdp", "tensor", None),
        "layers/scale": jax.P(None, None),
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
        # What is cut is cut as evenly as the table says.
        expected = {"embedding": mesh.shape["tensor"] * mesh.shape["fsdp"]}
        expected["q"] = mesh.shape["fsdp"] * min(mesh.shape["tensor"], 4)
        expected["positions"] = mesh.shape["fsdp"]
        pieces = expected.get(name.rpartition("/")[2], 1)
        assert math.prod(leaf.sharding.shard_shape(leaf.shape)) * pieces == leaf.size, name
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        state,
        jax.jit(init_state)(jax.random.key(0)),
    )


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
        (("mlp_in", "embed_out"), (6, 8), UserError, "mlp_in = 6 .*tensor = 2 x .*fsdp = 4"),
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


def test_gathered_weights_are_whole_and_their_gradients_cut():
    mesh = make_mesh(2, 2, 2)
    config = GemmaConfig(64, 16, 1, 32, heads=2, kv_heads=1, head_dim=8)
    model = Functional(lambda rngs: Gemma(config, rngs=rngs))
    where = sharding.shardings(model.axes, jax.eval_shape(model.init, jax.random.key(0)), mesh)
    params = jax.jit(model.init, out_shardings=where)(jax.random.key(0))

    def total(params, seen=None):
        (layer,) = unstack(model.bind(params).layers, 1)
        layer = sharding.gathered(layer, "bfloat16")
        if seen is not None:
            for name in ("gate", "o", "down"):
                jax.debug.inspect_array_sharding(
                    getattr(layer, name).get_value(),
                    callback=lambda s, name=name: seen.update({name: s.spec}),
                )
            seen["dtypes"] = {layer.gate[...].dtype, layer.pre_mlp_norm.scale[...].dtype}
        return jnp.sum(layer.gate[...].astype(jnp.float32) ** 2) + layer.down[...].sum()

    seen = {}
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(total))(params)
        jax.jit(lambda p: total(p, seen)).lower(params).compile()
    assert seen["dtypes"] == {jnp.dtype("bfloat16"), jnp.dtype("float32")}
    for name in ("gate", "o", "down"):
        assert "fsdp" not in str(seen[name]) and "tensor" in str(seen[name])
    layers = gradient["layers"]
    assert layers["gate"].sharding.spec == where["layers"]["gate"].spec
    np.testing.assert_allclose(layers["gate"], 2 * params["layers"]["gate"], rtol=0.01)


def test_without_a_mesh_in_context_nothing_is_moved():
    x = jnp.ones((3, 2))
    assert sharding.context() is None and sharding.over_replicas(x) is x
    assert sharding.platform() == "cpu"
    with jax.set_mesh(make_mesh(8)):
        assert sharding.context().shape["data"] == 8
        assert sharding.over_replicas(x) is x  # 3 rows, 8 replicas
