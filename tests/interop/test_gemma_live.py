"""Against the `gemma` package itself: logits of small models, published sizes.

Runs where the package is installed: `make test-interop`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unifluid_jax import interop, trees
from unifluid_jax.interop import export
from unifluid_jax.interop.tensors import Memory
from unifluid_jax.models.functional import Functional
from unifluid_jax.models.gemma import Gemma, GemmaConfig
from unifluid_jax.models.presets import GEMMA

pytestmark = pytest.mark.interop
gm = pytest.importorskip("gemma.gm", reason="make test-interop installs the gemma package")

SIZES = {"width": 24, "mlp_dim": 40, "heads": 4, "kv_heads": 2, "head_dim": 8}
GLOBAL_ALONE = {"attention": ("global",), "attention_cap": None, "final_cap": None}
CONFIGS = {
    "gemma1": {**SIZES, **GLOBAL_ALONE, "kv_heads": 1, "depth": 3, "post_norms": False},
    # As many key heads as query heads: the package then keeps all three projections in one.
    "gemma1_mha": {**SIZES, **GLOBAL_ALONE, "kv_heads": 4, "depth": 2, "post_norms": False},
    "gemma2": {
        **SIZES,
        "depth": 5,
        "window": 4,
        "query_scale": (24 // 4) ** -0.5,  # that of 27B, unlike head_dim^-0.5
        "attention_cap": 2.0,
        "final_cap": 3.0,
    },
    "gemma3": {
        **SIZES,
        "depth": 8,
        "attention": ("local",) * 5 + ("global",),
        "window": 4,
        "qk_norm": True,
        "attention_cap": None,
        "final_cap": None,
        "rope_base": 1_000_000.0,
        "local_rope_base": 10_000.0,
        "rope_stretch": 8.0,
    },
}


def their_config(c):
    """The package's config of ours."""
    kinds = {
        "local": gm.nn.AttentionType.LOCAL_SLIDING,
        "global": gm.nn.AttentionType.GLOBAL,
    }
    scales = gm.nn.config.QueryPreAttentionNormalisation
    return gm.nn.config.TransformerConfig(
        num_embed=c.vocab_size,
        embed_dim=c.width,
        hidden_dim=c.mlp_dim,
        num_heads=c.heads,
        head_dim=c.head_dim,
        num_kv_heads=c.kv_heads,
        final_logit_softcap=c.final_cap,
        use_post_attn_norm=c.post_norms,
        use_post_ffw_norm=c.post_norms,
        attention_types=tuple(kinds[c.attention[i % len(c.attention)]] for i in range(c.depth)),
        query_pre_attn_norm=scales.BY_ONE_OVER_SQRT_HEAD_DIM
        if c.query_scale is None
        else scales.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS,
        attn_logits_soft_cap=c.attention_cap,
        sliding_window_size=c.window if "local" in c.attention else None,
        use_qk_norm=c.qk_norm,
        local_base_frequency=c.rope_base if c.local_rope_base is None else c.local_rope_base,
        global_base_frequency=c.rope_base,
        global_scale_factor=c.rope_stretch,
    )


def random_params(theirs):
    """A tree of the package's for this model."""
    rng = np.random.RandomState(1)
    tokens = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(lambda: theirs.init(jax.random.key(0), tokens=tokens))
    return jax.tree.map(
        lambda x: (rng.standard_normal(x.shape) * (0.2 if x.ndim < 2 else 0.3)).astype("f"),
        shapes["params"],
    )


def both(name, transposed):
    """Our model and theirs, of one config."""
    config = GemmaConfig(vocab_size=64, **CONFIGS[name])
    changed = dataclasses.replace(their_config(config), transpose_gating_einsum=transposed)
    theirs = gm.nn.Transformer(config=changed, dtype=jnp.float32)
    return config, Functional(lambda rngs: Gemma(config, rngs=rngs)), theirs


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_packages(name, transposed, tmp_path):
    """From a checkpoint that the package saved; the shapes tell in which layout the gates are."""
    _, ours, theirs = both(name, transposed)
    tokens = jnp.asarray(np.random.RandomState(0).randint(1, 64, (2, 17)))
    params = random_params(theirs)
    logits = theirs.apply({"params": params}, tokens=tokens).logits

    gm.ckpts.save_params(params, tmp_path / "saved", wait_until_finished=True)
    abstract = jax.eval_shape(ours.init, jax.random.key(0))
    converted = interop.read_part("gemma", tmp_path / "saved", abstract)

    @jax.jit
    def run(params):
        model = ours.bind(params)
        rows, length = tokens.shape
        position = jnp.broadcast_to(jnp.arange(length), (rows, length))
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (rows, length, length))
        return model.logits(model(model.embed(tokens), position, mask)[0])

    difference = np.abs(run(converted) - logits).max() / np.abs(logits).max()
    assert difference <= 1e-4


@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3"])
def test_the_package_loads_what_we_write(name, tmp_path):
    # The package's models have the gates transposed from Gemma-2 9B on.
    config, ours, theirs = both(name, transposed=name == "gemma3")
    params = jax.tree.map(np.asarray, ours.init(jax.random.key(0)))
    source = Memory({f"backbone/{path}": x for path, x in trees.flatten(params).items()})
    (tmp_path / "out").mkdir()
    export.write(source, config, None, "gemma", tmp_path / "out")

    loaded = gm.ckpts.load_params(tmp_path / "out")
    assert jax.tree.map(np.shape, loaded) == jax.tree.map(np.shape, random_params(theirs))
    abstract = jax.eval_shape(ours.init, jax.random.key(0))
    gm.ckpts.save_params(loaded, tmp_path / "again", wait_until_finished=True)
    returned = interop.read_part("gemma", tmp_path / "again", abstract)
    jax.tree.map(np.testing.assert_array_equal, returned, params)


@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3"])
def test_the_layout_of_the_official_files(name, tmp_path):
    """Flat, and in bfloat16: the same numbers as nested."""
    from gemma.gm.ckpts import _checkpoint  # the package writes this layout nowhere in public

    _, ours, theirs = both(name, transposed=False)
    abstract = jax.eval_shape(ours.init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_params(theirs))
    gm.ckpts.save_params(params, tmp_path / "nested", wait_until_finished=True)
    flat = _checkpoint._nested_to_flat(params)
    assert "transformer/layer_0/attn/attn_vec_einsum" in flat
    gm.ckpts.save_params(flat, tmp_path / "flat", wait_until_finished=True)
    nested, read = (
        interop.read_part("gemma", tmp_path / layout, abstract) for layout in ("nested", "flat")
    )
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(read))
    jax.tree.map(np.testing.assert_array_equal, read, nested)


@pytest.mark.parametrize("name", [n for n in GEMMA if not n.startswith("gemma1")])
def test_published_sizes_are_the_packages(name):
    """All but Gemma-1, which the package no longer has."""
    version, size = name.removeprefix("gemma").split("_")
    config = getattr(gm.nn, f"Gemma{version}_{size.upper()}").config
    rows = {"2": 256_128, "3": 262_144}[version]
    ours = GemmaConfig(vocab_size=rows, **GEMMA[name])
    left_out = {"vision_encoder", "transpose_gating_einsum"}
    for field in dataclasses.fields(config):
        if field.name in left_out:
            continue
        expected, given = getattr(config, field.name), getattr(their_config(ours), field.name)
        if field.name == "attention_types":
            expected, given = tuple(expected), tuple(given)
        assert given == expected, field.name
    assert their_config(ours).query_pre_attn_scalar() == pytest.approx(
        ours.head_dim**-0.5 if ours.query_scale is None else ours.query_scale
    )
