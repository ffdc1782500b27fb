"""The losses against plain loops in NumPy, on models that are formulas."""

import contextlib
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from unifluid_jax import losses, sharding
from unifluid_jax.diffusion import process_from
from unifluid_jax.models.pair import Pair
from unifluid_jax.models.unifluid import UniFluid
from unifluid_jax.models.vae import Vae

B, L, D, V, N, C = 3, 9, 5, 7, 6, 4
FLOW = process_from(process="flow")
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(D, V)).astype(np.float32)
CONDITION = RNG.normal(size=(N, D)).astype(np.float32)
HEAD = RNG.normal(size=(D, C)).astype(np.float32)


class Formula(UniFluid):
    """Hidden states are given; what follows them is linear."""

    def __init__(self, hidden):
        self.given = hidden
        self.backbone = types.SimpleNamespace(
            embedding=LOGITS.T, config=types.SimpleNamespace(final_cap=None)
        )

    def hidden(self, batch, latents_BLC):
        return self.given + latents_BLC.sum(-1, keepdims=True)

    def condition(self, hidden_BTD, target_BT):
        return hidden_BTD + jnp.asarray(CONDITION)[target_BT]

    def head(self, x, t, z):
        return 0.5 * x + (z @ HEAD)[None] + 1e-3 * t[..., None]


def make_batch(seed=0):
    """Rows with 3, 1 and 0 text targets and 0, 2 and 4 image targets, of unlike weights."""
    rng = np.random.default_rng(seed)
    batch = {
        "text_target": rng.integers(V, size=(B, L)),
        "text_weight": np.zeros((B, L), np.float32),
        "latent_mean": rng.normal(size=(B, L, C)).astype(np.float32),
        "latent_std": rng.uniform(0, 0.5, (B, L, C)).astype(np.float32),
        "target_position": rng.integers(N, size=(B, L)),
        "image_weight": np.zeros((B, L), np.float32),
    }
    for row, (texts, images) in enumerate([(3, 0), (1, 2), (0, 4)]):
        places = rng.permutation(L)
        batch["text_weight"][row, places[:texts]] = rng.uniform(0.5, 2, texts)
        batch["image_weight"][row, places[texts : texts + images]] = rng.uniform(0.5, 2, images)
    return {name: jnp.asarray(x) for name, x in batch.items()}


HIDDEN = jnp.asarray(RNG.normal(size=(B, L, D)).astype(np.float32))
KEYS = jax.random.split(jax.random.key(1), B)


OPTIONS = {
    "text_slots": 3,
    "image_slots": 5,
    "text_weight": 0.3,
    "draws": 2,
    "latent_noise": 1.0,
}


@functools.partial(jax.jit, static_argnames=OPTIONS)
def run(batch, hidden, keys, total, **options):
    total = losses.totals(batch) if total is None else total
    return losses.unified(Formula(hidden), FLOW, batch, keys, total, **options)


def unified(batch, hidden=HIDDEN, keys=KEYS, total=None, **changes):
    return run(batch, hidden, keys, total, **{**OPTIONS, **changes})


def slow(batch, text_weight=0.3, draws=2, image_slots=5):
    """`unified`, one target and one draw after the other."""
    text = image = hits = 0.0
    for row in range(B):
        latent_key, key = jax.random.split(KEYS[row])
        time_key, noise_key = jax.random.split(key)
        noise = np.asarray(jax.random.normal(latent_key, (L, C)))
        latents = np.asarray(batch["latent_mean"][row] + batch["latent_std"][row] * noise)
        h = np.asarray(HIDDEN[row]) + latents.sum(-1, keepdims=True)
        for place in np.flatnonzero(batch["text_weight"][row]):
            target, weight = int(batch["text_target"][row, place]), batch["text_weight"][row, place]
            logits = (h[place] @ LOGITS).astype(np.float64)
            p = np.exp(logits) / np.exp(logits).sum()
            text += float(weight) * -np.log(p[target])
            hits += float(weight) * (logits.argmax() == target)
        t = np.asarray(FLOW.times(time_key, (draws, image_slots)))
        noise = np.asarray(jax.random.normal(noise_key, (draws, image_slots, C)))
        for slot, place in enumerate(np.flatnonzero(batch["image_weight"][row])):
            z = h[place] + CONDITION[batch["target_position"][row, place]]
            squares = []
            for draw in range(draws):
                x, n, s = latents[place], noise[draw, slot], t[draw, slot]
                noisy = (1 - s) * x + s * n
                out = 0.5 * noisy + z @ HEAD + s  # the network is told 1000 t
                squares.append(((n - x - out) ** 2).mean())
            image += float(batch["image_weight"][row, place]) * np.mean(squares)
    text /= float(batch["text_weight"].sum())
    image /= float(batch["image_weight"].sum())
    hits /= float(batch["text_weight"].sum())
    return {
        "loss": image + text_weight * text,
        "loss_text": text,
        "loss_visual": image,
        "accuracy_text": hits,
        "text_targets": 4,
        "image_targets": 6,
    }


@pytest.mark.parametrize("text_weight", [0.0, 0.3])
@pytest.mark.parametrize("draws", [1, 4])
def test_the_loss_is_that_of_plain_loops(text_weight, draws):
    batch = make_batch()
    loss, scalars = unified(batch, text_weight=text_weight, draws=draws)
    expected = slow(batch, text_weight, draws)
    assert scalars.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(scalars[name], value, rtol=1e-4, err_msg=name)
    assert loss == scalars["loss"]
    assert scalars["loss_text"] > 0 and scalars["loss_visual"] > 0


def test_without_latent_noise_samples_are_the_posteriors_means():
    batch = make_batch()
    certain = {**batch, "latent_std": np.zeros_like(batch["latent_std"])}
    assert unified(batch, latent_noise=0.0)[0] == unified(certain)[0] != unified(batch)[0]


def test_accuracy_is_the_share_of_likeliest_tokens():
    batch = make_batch()
    batch["latent_mean"] *= 0
    batch["latent_std"] *= 0
    best = (HIDDEN @ LOGITS).argmax(-1)
    assert unified({**batch, "text_target": best})[1]["accuracy_text"] == 1
    assert unified({**batch, "text_target": (best + 1) % V})[1]["accuracy_text"] == 0
    one = jnp.where(batch["text_weight"] == batch["text_weight"].max(), best, (best + 1) % V)
    share = batch["text_weight"].max() / batch["text_weight"].sum()
    found = unified({**batch, "text_target": one})[1]["accuracy_text"]
    np.testing.assert_allclose(found, share, rtol=1e-6)


def test_only_targets_have_a_gradient():
    batch = make_batch()
    batch["latent_std"] *= 0
    total = losses.totals(batch)

    def loss(hidden, latents):
        changed = {**batch, "latent_mean": latents}
        return unified(changed, hidden, total=total)[0]

    hidden, latents = jax.grad(loss, (0, 1))(HIDDEN, batch["latent_mean"])
    target = (batch["text_weight"] > 0) | (batch["image_weight"] > 0)
    np.testing.assert_array_equal(np.abs(hidden).max(-1) > 0, target)
    np.testing.assert_array_equal(np.abs(latents).max(-1) > 0, target)


def test_spare_slots_and_what_lies_there_do_not_count():
    batch = make_batch()
    few, many = unified(batch)[1], unified(batch, text_slots=L)[1]
    for name in few:
        np.testing.assert_allclose(few[name], many[name], rtol=1e-5, err_msg=name)
    idle = batch["text_weight"] == 0
    other = {**batch, "text_target": jnp.where(idle, 0, batch["text_target"])}
    assert unified(other)[0] == unified(batch)[0]


def test_each_loss_is_a_mean_over_its_own_targets():
    batch = make_batch()
    plain = unified(batch)[1]
    doubled = {**batch, "text_weight": 2 * batch["text_weight"]}
    for name in ("loss_text", "loss_visual", "accuracy_text"):
        np.testing.assert_allclose(unified(doubled)[1][name], plain[name], rtol=1e-6)
    fewer = {**batch, "image_weight": batch["image_weight"].at[1].set(0)}
    assert unified(fewer)[1]["loss_text"] == plain["loss_text"]
    assert unified(fewer)[1]["loss_visual"] != plain["loss_visual"]


@pytest.mark.parametrize("absent", ["text", "image"])
def test_a_batch_without_a_modality_has_loss_zero_there(absent):
    batch = make_batch()
    batch[f"{absent}_weight"] *= 0
    scalars = unified(batch)[1]
    zero, other = ["loss_text", "loss_visual"][:: 1 if absent == "text" else -1]
    assert scalars[zero] == 0 and scalars[f"{absent}_targets"] == 0
    assert scalars[other] > 0 and np.isfinite(scalars["loss"])


def test_parts_of_a_batch_add_up_to_the_whole():
    batch = make_batch()
    whole = unified(batch)[1]
    parts = []
    for rows in (np.array([0, 2]), np.array([1])):
        part = {name: x[rows] for name, x in batch.items()}
        parts.append(unified(part, HIDDEN[rows], KEYS[rows], losses.totals(batch))[1])
    for name in whole:
        np.testing.assert_allclose(parts[0][name] + parts[1][name], whole[name], rtol=1e-5)


def test_noise_is_the_rows_own():
    """Another key for one row changes nothing in the others, and each row has its own noise."""
    batch = make_batch()
    batch["text_weight"] = jnp.zeros((B, L)).at[0, 0].set(1)
    batch["image_weight"] = jnp.zeros((B, L)).at[1:, 2].set(1)
    total = losses.totals(batch)
    only = [{**batch, "image_weight": batch["image_weight"].at[3 - row].set(0)} for row in (1, 2)]
    swapped = KEYS.at[2].set(jax.random.key(9))
    first, second = (unified(part, total=total)[1]["loss_visual"] for part in only)
    again, other = (unified(part, keys=swapped, total=total)[1]["loss_visual"] for part in only)
    assert first == again and second != other


def plain_text_loss(hidden, table, target, weight, cap):
    """The slow twin of `text_loss`: all logits at once, gradients by JAX."""
    logits = (hidden @ table.T).astype(jnp.float32)
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    loss = jax.nn.logsumexp(logits, axis=-1) - picked
    return (loss * weight).sum(), ((logits.argmax(-1) == target) * weight).sum()


@pytest.mark.parametrize("mesh", [None, (2, 2, 2), (1, 8, 1), (2, 1, 4), (8, 1, 1)])
@pytest.mark.parametrize(("cap", "chunk"), [(None, 0), (2.0, 3)])
def test_logits_in_chunks_and_cut_are_those_of_the_whole_vocabulary(mesh, cap, chunk):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(8, 7, 16)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(24, 16)), jnp.float32)
    target = jnp.asarray(rng.integers(24, size=(8, 7)))
    weight = jnp.asarray(rng.integers(0, 3, (8, 7)), jnp.float32)

    def slow(hidden, table):
        return plain_text_loss(hidden, table, target, weight, cap)

    def fast(hidden, table):
        return losses.text_loss(hidden, table, target, weight, cap, chunk)

    expected, gradients = jax.jit(jax.value_and_grad(slow, (0, 1), has_aux=True))(hidden, table)
    context = contextlib.nullcontext()
    if mesh is not None:
        mesh = sharding.make_mesh(ConfigDict(dict(zip(sharding.AXES, mesh, strict=True))))
        context = jax.set_mesh(mesh)
        hidden = jax.device_put(hidden, sharding.batch_sharding(mesh))
        table = jax.device_put(table, jax.NamedSharding(mesh, jax.P(sharding.VOCABULARY)))
    with context:
        found = jax.jit(fast)(hidden, table)
        also, cut = jax.jit(jax.value_and_grad(fast, (0, 1), has_aux=True))(hidden, table)
    for a, b in zip(
        jax.tree.leaves((found, also, cut)), (*expected, *expected, *gradients), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)
    if mesh is not None:
        assert cut[1].sharding.shard_shape(table.shape) == table.sharding.shard_shape(table.shape)


def test_text_loss_neither_overflows_nor_rounds_to_halves():
    hidden = jnp.asarray([[[1.0]]], jnp.bfloat16)
    table = jnp.asarray([[1e4], [0.0], [-1e4]], jnp.float32)
    for target, least in ((0, 0), (2, 19_000)):
        loss, _ = losses.text_loss(
            hidden, table, jnp.asarray([[target]]), jnp.ones((1, 1)), None, 0
        )
        assert loss.dtype == jnp.float32 and least <= loss <= 2.1 * least


class Blur(Vae):
    """Given moments; decodes every pixel value to the tokens' own mean."""

    def __init__(self, mean, std):
        self.mean, self.std = mean, std

    def encode(self, images):
        return self.mean, self.std

    def decode(self, tokens):
        return jnp.broadcast_to(tokens.mean((1, 2))[:, None, None, None], (len(tokens), 2, 2, 3))


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_the_autoencoders_loss_is_that_of_plain_loops(kl_weight):
    images = jnp.asarray(RNG.uniform(-1, 1, (B, 2, 2, 3)).astype(np.float32))
    mean = jnp.asarray(RNG.normal(size=(B, N, C)).astype(np.float32))
    std = jnp.asarray(RNG.uniform(0.1, 2, (B, N, C)).astype(np.float32))
    absolute = square = kl = 0.0
    for row in range(B):
        noise = np.asarray(jax.random.normal(KEYS[row], (N, C)))
        decoded = (np.asarray(mean[row]) + np.asarray(std[row]) * noise).mean()
        for value in np.asarray(images[row]).flat:
            absolute += abs(decoded - value)
            square += (decoded - value) ** 2
        for m, s in zip(np.asarray(mean[row]).flat, np.asarray(std[row]).flat, strict=True):
            # KL(N(m, s^2) || N(0, 1))
            kl += (s**2 + m**2 - 1) / 2 - np.log(s)
    total = images.size
    loss, scalars = losses.autoencoder(
        Blur(mean, std), images, KEYS, float(total), kl_weight=kl_weight
    )
    expected = {
        "loss": (absolute + square + kl_weight * kl) / total,
        "mse": square / total,
        "kl": kl / total,
    }
    assert scalars.keys() == expected.keys() and loss == scalars["loss"]
    for name, value in expected.items():
        np.testing.assert_allclose(scalars[name], value, rtol=1e-5, err_msg=name)


def test_parts_of_the_autoencoders_batch_add_up():
    images = jnp.asarray(RNG.uniform(-1, 1, (B, 2, 2, 3)).astype(np.float32))
    mean, std = jnp.asarray(RNG.normal(size=(B, N, C)).astype(np.float32)), jnp.ones((B, N, C))

    def part(rows):
        model = Blur(mean[rows], std[rows])
        return losses.autoencoder(model, images[rows], KEYS[rows], 36.0, kl_weight=0.1)[1]

    whole, first, second = (part(np.array(rows)) for rows in ([0, 1, 2], [0, 2], [1]))
    for name in whole:
        np.testing.assert_allclose(first[name] + second[name], whole[name], rtol=1e-5)


def test_an_exact_reconstruction_of_unit_gaussians_costs_nothing():
    images = jnp.full((B, 2, 2, 3), 0.25)
    model = Blur(jnp.zeros((B, N, C)), jnp.ones((B, N, C)))
    model.decode = lambda tokens: images
    loss, _ = losses.autoencoder(model, images, KEYS, 36.0, kl_weight=1.0)
    assert loss == 0


# The contrastive loss.


class Towers(Pair):
    """Embeddings are given; logits are their products."""

    def __init__(self):
        pass

    def embed_images(self, images):
        return images.mean(axis=(1, 2))

    def embed_texts(self, tokens_BT):
        return jnp.asarray(EMBEDDINGS)[tokens_BT[:, 0]]

    def logits(self, images_BW, texts_KW):
        return images_BW @ texts_KW.T


EMBEDDINGS = RNG.normal(size=(V, 3)).astype(np.float32)


def test_the_contrastive_loss_is_that_of_plain_loops():
    images = jnp.asarray(RNG.uniform(-1, 1, (4, 2, 2, 3)).astype(np.float32))
    tokens = jnp.array([[1, 2], [3, 2], [1, 2], [1, 4]])  # the first and the third are alike
    pictures, captions = np.asarray(images).mean((1, 2)), EMBEDDINGS[[1, 3, 1, 1]]
    total, hits = 0.0, 0
    for i in range(4):
        odds = [float(pictures[i] @ captions[j]) for j in range(4)]
        same = [bool((tokens[i] == tokens[j]).all()) for j in range(4)]
        for logit, right in zip(odds, same, strict=True):
            total += np.log1p(np.exp(-logit if right else logit))
        hits += same[int(np.argmax(odds))]
    loss, scalars = losses.contrastive(Towers(), images, tokens, 4.0)
    np.testing.assert_allclose(loss, total / 4, rtol=1e-5)
    assert scalars["loss"] == loss and scalars["accuracy"] == hits / 4
