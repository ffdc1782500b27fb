"""The same numbers as the reference implementations, from checkpoints in their own layouts.

`tests/golden/README.md` says where the numbers come from. Converted weights, float32, at most 1e-4
of the output's own scale.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from unifluid_jax import diffusion, image_tokenizer, interop, samplers
from unifluid_jax.models import siglip, vae
from unifluid_jax.models.functional import Functional
from unifluid_jax.models.gemma import Gemma, GemmaConfig
from unifluid_jax.models.head import DiffusionHead, HeadConfig
from unifluid_jax.models.siglip import Siglip, SiglipConfig
from unifluid_jax.models.unifluid import Linear
from unifluid_jax.models.vae import VaeConfig
from unifluid_jax.sequence import attention_mask

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name):
    return dict(np.load(GOLDEN / name / "golden.npz"))


def abstract(functional):
    return jax.eval_shape(functional.init, jax.random.key(0))


def close(ours, theirs, tolerance=1e-4):
    assert ours.shape == theirs.shape
    difference = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    assert difference <= tolerance


COMMON = {"vocab_size": 64, "width": 24, "mlp_dim": 40, "heads": 4, "kv_heads": 2, "head_dim": 8}
GEMMA1 = GemmaConfig(
    **COMMON,
    depth=3,
    attention=("global",),
    attention_cap=None,
    final_cap=None,
    post_norms=False,
)
GEMMA2 = GemmaConfig(
    **COMMON, depth=5, window=4, query_scale=6**-0.5, attention_cap=2.0, final_cap=3.0
)
GEMMA3 = GemmaConfig(
    **{**COMMON, "kv_heads": 1},
    depth=8,
    attention=("local",) * 5 + ("global",),
    window=4,
    query_scale=12**-0.5,
    qk_norm=True,
    attention_cap=None,
    final_cap=None,
    rope_base=1_000_000.0,
    local_rope_base=10_000.0,
    rope_stretch=8.0,
)
GEMMAS = {"gemma1": GEMMA1, "gemma2": GEMMA2, "gemma3": GEMMA3}


def decoder(config):
    return Functional(lambda rngs: Gemma(config, rngs=rngs))


@pytest.mark.parametrize("name", GEMMAS)
def test_gemma_equals_transformers(name):
    """The full pass scanned over the layers, and cached pieces through unrolled ones."""
    numbers = golden(name)
    tokens = jnp.asarray(numbers["tokens"])
    rows, length = tokens.shape
    position = jnp.broadcast_to(jnp.arange(length), (rows, length))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (rows, length, length))
    scanned = decoder(GEMMAS[name])
    unrolled = decoder(dataclasses.replace(GEMMAS[name], scan_layers=False))
    params = interop.read_part("gemma", GOLDEN / name, abstract(scanned))

    @jax.jit
    def full(params):
        model = scanned.bind(params)
        return model.logits(model(model.embed(tokens), position, mask)[0])

    @jax.jit
    def cached(params):
        model = unrolled.bind(params)
        cache, x, pieces = model.init_cache(rows, length), model.embed(tokens), []
        for start, stop in ((0, 9), (9, 10), (10, 17)):
            part = slice(start, stop)
            hidden, cache = model(x[:, part], position[:, part], mask[:, part], cache, start)
            pieces.append(hidden)
        return model.logits(jnp.concatenate(pieces, axis=1))

    close(full(params), numbers["logits"])
    close(cached(params), numbers["logits"])


@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3"])
def test_every_feature_matters(name):
    """A golden that a switch of the config does not change would prove nothing about it."""
    config, numbers = GEMMAS[name], golden(name)
    tokens = jnp.asarray(numbers["tokens"])[:1]
    length = tokens.shape[1]
    params = interop.read_part("gemma", GOLDEN / name, abstract(decoder(config)))
    params = jax.tree.map(jnp.asarray, params)
    switches = {"gemma1": ["query_scale", "attention_cap", "final_cap", "rope_base"]}
    switches["gemma2"] = [*switches["gemma1"], "window"]
    switches["gemma3"] = ["query_scale", "window", "rope_base", "local_rope_base", "rope_stretch"]
    for switch in switches[name]:
        value = {"window": 5, "attention_cap": 1.5, "final_cap": 2.0}.get(switch)
        value = value or {"rope_stretch": 4.0, "query_scale": 0.3}.get(switch, 5_000.0)
        changed = dataclasses.replace(config, scan_layers=False, **{switch: value})
        model = decoder(changed).bind(params)
        mask = jnp.tril(jnp.ones((1, length, length), bool))
        hidden = model(model.embed(tokens), jnp.arange(length)[None], mask)[0]
        theirs = numbers["logits"][:1]
        difference = np.abs(np.asarray(model.logits(hidden)) - theirs).max() / np.abs(theirs).max()
        assert difference > 1e-3, switch


VISION = SiglipConfig(image_size=30, patch_size=7, width=24, depth=2, heads=3, mlp_dim=40)


def tower(config):
    return Functional(lambda rngs: Siglip(config, rngs=rngs))


def nhwc(images):
    return jnp.asarray(images.transpose(0, 2, 3, 1))


@pytest.fixture(scope="module")
def vision():
    return interop.read_part("siglip", GOLDEN / "siglip", abstract(tower(VISION)), patch=7)


@pytest.mark.parametrize("size", ["", "larger_", "smaller_"])
def test_siglip_equals_transformers(vision, size):
    """At its own size (two pixels left over), and with positions resized to 6 x 6 and 3 x 3."""
    numbers = golden("siglip")
    images = nhwc(numbers[f"{size}images"])
    config = dataclasses.replace(VISION, image_size=images.shape[1])
    positions = siglip.resize_positions(np.asarray(vision["positions"]), config.grid)
    params = {**vision, "positions": positions}
    features = jax.jit(lambda p: tower(config).bind(p)(images))(params)
    close(features, numbers[f"{size}features"])


@pytest.mark.parametrize("name", ["paligemma1", "paligemma2"])
def test_paligemma_equals_transformers(name):
    """Vision tower, projection and backbone at once, under PaliGemma's prefix mask."""
    config = dataclasses.replace(
        GEMMA1 if name == "paligemma1" else GEMMA2,
        depth=2 if name == "paligemma1" else 3,
        window=64,
    )
    numbers = golden(name)

    class Understanding(nnx.Module):
        def __init__(self, rngs):
            self.backbone = Gemma(config, rngs=rngs)
            self.vision = Siglip(VISION, rngs=rngs)
            self.vision_proj = Linear(VISION.width, config.width, None, rngs=rngs)

    functional = Functional(Understanding)
    params = interop.read_part("paligemma", GOLDEN / name, abstract(functional), patch=7)
    tokens, suffix = jnp.asarray(numbers["tokens"]), jnp.asarray(numbers["suffix"])

    @jax.jit
    def logits(params):
        model = functional.bind(params)
        seen = model.vision_proj(model.vision(nhwc(numbers["images"])), "float32")
        x = jnp.concatenate([seen, model.backbone.embed(tokens[:, seen.shape[1] :])], axis=1)
        mask = attention_mask(suffix, jnp.ones_like(suffix))
        position = jnp.broadcast_to(jnp.arange(x.shape[1]), suffix.shape)
        return model.backbone.logits(model.backbone(x, position, mask)[0])

    close(logits(params), numbers["logits"])


SD = VaeConfig(image_size=24, channels=4, multipliers=(1, 2, 2, 2), groups=2, patch=1)
KL16 = VaeConfig(
    image_size=48,
    channels=4,
    multipliers=(1, 1, 2, 2, 2),
    encoder_attention=(4,),
    groups=2,
    latent_channels=16,
    patch=1,
)


@pytest.mark.parametrize(
    ("file", "config"),
    [("sd_vae", SD), ("sd_vae_ldm/model.ckpt", SD), ("mar_kl16/kl16.ckpt", KL16)],
)
def test_autoencoder_equals_its_reference(file, config):
    """Moments of pictures, and pictures of latents."""
    functional = image_tokenizer.module(config)
    params = interop.read_part("vae", GOLDEN / file, abstract(functional))
    numbers = golden(file.split("/")[0])

    @jax.jit
    def run(params, images, latents):
        model = functional.bind(params)
        return *model.encode(images), model.decode(vae.group(latents, 1))

    mean, std, decoded = run(params, nhwc(numbers["images"]), nhwc(numbers["latents"]))
    true_mean, log_variance = np.split(numbers["moments"].transpose(0, 2, 3, 1), 2, axis=-1)
    close(mean.reshape(true_mean.shape), true_mean)
    close(std.reshape(true_mean.shape), np.exp(0.5 * log_variance))
    close(decoded, numbers["decoded"].transpose(0, 2, 3, 1))
    assert mean.shape[1] == config.image_tokens


HEAD = HeadConfig(token_dim=6, cond_dim=10, width=32, depth=2, out_dim=12)


@pytest.fixture(scope="module")
def head():
    functional = Functional(lambda rngs: DiffusionHead(HEAD, rngs=rngs))
    path = GOLDEN / "mar_head" / "model.safetensors"
    return functional.bind(interop.read_part("head", path, abstract(functional)))


@pytest.mark.parametrize("vlb_weight", [0.0, 1.0])
def test_diffusion_loss_equals_mars(head, vlb_weight):
    """The same tokens, times and noise; step 0 and both ends of the chain among them."""
    numbers = golden("mar_head")
    x, t, noise, z = (jnp.asarray(numbers[name]) for name in ("x", "t", "noise", "z"))
    process = diffusion.DDPM(vlb_weight=vlb_weight)
    loss = process.loss_at(lambda x, t: head(x, t, z), x, t, noise)
    close(loss, numbers["squared"] + vlb_weight * numbers["bits"])


def test_diffusion_sample_equals_mars(head, monkeypatch):
    """100 steps with guidance, temperature and learned variance."""
    numbers = golden("mar_head")
    noise = jnp.asarray(numbers["sample_noise"])
    z = jnp.stack([numbers["sample_z"], numbers["sample_z_null"]])
    monkeypatch.setattr(samplers, "_row_noise", lambda key, index, dim: noise[index])
    predict = samplers.guided(lambda x, t: head(x, t, z), (numbers["guidance"],), dim=6)
    sampler = samplers.sampler_from(diffusion.DDPM(), steps=100)
    keys = jax.random.split(jax.random.key(0), 4)
    sample = jax.jit(lambda keys: sampler(keys, predict, 6, numbers["temperature"]))(keys)
    close(sample, numbers["sample"])
