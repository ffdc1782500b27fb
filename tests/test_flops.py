"""FLOPs by formula against values by hand, and against the products that JAX really traces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unifluid_jax import flops
from unifluid_jax.models.functional import Functional
from unifluid_jax.models.gemma import Gemma, GemmaConfig
from unifluid_jax.models.head import DiffusionHead, HeadConfig
from unifluid_jax.models.presets import preset
from unifluid_jax.models.siglip import Siglip, SiglipConfig
from unifluid_jax.models.unifluid import UniFluidConfig
from unifluid_jax.models.vae import Vae, VaeConfig

GEMMA = GemmaConfig(50, 16, 3, 24, heads=4, kv_heads=2, head_dim=4, window=4, scan_layers=False)
HEAD = HeadConfig(token_dim=6, cond_dim=16, width=8, depth=2, out_dim=12, time_dim=10)
SIGLIP = SiglipConfig(image_size=12, patch_size=4, width=8, depth=2, heads=2, mlp_dim=20)
VAE = VaeConfig(
    image_size=16, channels=4, multipliers=(1, 2, 2), blocks=2, groups=2, encoder_attention=(1,)
)


def traced(function, *args):
    """Operations of all matrix products and convolutions of a function."""
    total = 0

    def visit(jaxpr):
        nonlocal total
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                left = equation.invars[0].aval.shape
                inner = np.prod([left[i] for i in contracted])
                total += 2 * np.prod(equation.outvars[0].aval.shape) * inner
            if equation.primitive.name == "conv_general_dilated":
                numbers = equation.params["dimension_numbers"]
                kernel = equation.invars[1].aval.shape
                taps = np.prod(kernel) / kernel[numbers.rhs_spec[0]]
                total += 2 * np.prod(equation.outvars[0].aval.shape) * taps
            for value in equation.params.values():
                for inside in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns")):
                    if hasattr(inside, "jaxpr"):
                        visit(inside.jaxpr)
                    elif hasattr(inside, "eqns"):
                        visit(inside)

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return total


def bound(kind, config):
    model = Functional(lambda rngs: kind(config, rngs=rngs))
    return model, jax.eval_shape(model.init, jax.random.key(0))


def test_attended_positions():
    assert flops.attended(4) == (1 + 2 + 3 + 4) / 4
    assert flops.attended(4, window=2) == (1 + 2 + 2 + 2) / 4
    assert flops.attended(4, window=9) == flops.attended(4)
    # Two of text, then query, content, query, content, query: each query sees what contents see,
    # and itself.


def test_backbone_by_hand_and_as_traced():
    # A layer's matrices: q and o 16 x 16, k and v 16 x 8, three of 16 x 24. Layers are local,
    # global, local; of 8 positions a local one sees 3.25 on average, a global one 4.5.
    matrices = 3 * (2 * 256 + 2 * 128 + 3 * 384)
    pairs = 3.25 + 4.5 + 3.25
    assert flops.backbone(GEMMA, 8) == 2 * 8 * (matrices + 2 * pairs * 16)
    model, params = bound(Gemma, GEMMA)
    x = jax.ShapeDtypeStruct((1, 8, 16), jnp.float32)
    found = traced(
        lambda p, x: model.bind(p)(x, jnp.arange(8)[None], jnp.ones((1, 8, 8), bool))[0], params, x
    )
    # The einsum multiplies all 8 x 8 pairs.
    assert found == 2 * 8 * (matrices + 2 * 3 * 8 * 16)


def test_logits_by_hand_and_as_traced():
    assert flops.logits(GEMMA, 5) == 2 * 5 * 16 * 50
    model, params = bound(Gemma, GEMMA)
    hidden = jax.ShapeDtypeStruct((5, 16), jnp.float32)
    assert traced(lambda p, h: model.bind(p).logits(h), params, hidden) == flops.logits(GEMMA, 5)


def test_head_by_hand_and_as_traced():
    # For each draw: 6 x 8 in, 10 x 8 and 8 x 8 of time, two blocks of 5 x 64, 8 x 16, 8 x 12 out.
    draw = 48 + 80 + 64 + 2 * 320 + 128 + 96
    assert flops.head(HEAD, tokens=3, draws=4) == 2 * 3 * (16 * 8 + 4 * draw)
    model, params = bound(DiffusionHead, HEAD)
    shapes = [(4, 3, 6), (4, 3), (3, 16)]
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    assert traced(lambda p, *x: model.bind(p)(*x), params, *inputs) == flops.head(HEAD, 3, 4)


def test_siglip_by_hand_and_as_traced():
    # 9 patches of 48 values; a block has four matrices of 8 x 8, two of 8 x 20, and 2 x 9 x 8.
    assert flops.siglip(SIGLIP, 2) == 2 * 2 * 9 * (48 * 8 + 2 * (256 + 320 + 144))
    model, params = bound(Siglip, SIGLIP)
    images = jax.ShapeDtypeStruct((2, 12, 12, 3), jnp.float32)
    assert traced(lambda p, x: model.bind(p)(x), params, images) == flops.siglip(SIGLIP, 2)


def test_vae_encoder_as_traced():
    model, params = bound(Vae, VAE)
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    found = traced(lambda p, x: model.bind(p).encode(x), params, images)
    assert found == flops.vae_encoder(VAE, 2)


def test_published_sizes():
    """Gemma-2 2B: 2.02e9 parameters in its matrices without the table, two operations each."""
    gemma = GemmaConfig(**preset("gemma2_2b", vocab_size=256_128))
    assert flops.backbone(gemma, 1) == pytest.approx(2 * 2.024e9, rel=2e-3)
    assert flops.logits(gemma, 1) == 2 * 256_128 * 2304
    # MAR's largest head has 151 M parameters; ours here of its size, once for each draw.
    head = HeadConfig(16, 1280, 1536, 12, 32)
    assert flops.head(head, 1, 1) == pytest.approx(2 * 151e6, rel=0.05)


def test_a_step_is_three_passes_of_what_is_trained():
    sizes = UniFluidConfig(backbone=GEMMA, vision=SIGLIP, head=HEAD, image_tokens=4)
    row = {"length": 8, "text_targets": 2, "image_targets": 4, "draws": 3, "pictures": 1}
    parts = flops.of_row(sizes, **row, frozen={"vision": True}, vae=VAE, encoded=2)
    assert parts["backbone"].step == 3 * flops.backbone(GEMMA, 8)
    assert parts["siglip"].step == flops.siglip(SIGLIP, 1)
    assert parts["vae"].step == flops.vae_encoder(VAE, 2)
    assert parts["projections"].forward == 2 * 16 * (8 * 9 + 6 * 8)
    assert flops.of_row(sizes, **row, frozen={})["siglip"].step == 3 * flops.siglip(SIGLIP, 1)
