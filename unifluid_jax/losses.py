"""The two losses and their balance: `L = L_visual + lambda * L_text` (UniFluid).

Every mean is per modality, over supervised text tokens or image tokens of the whole batch, so that
lambda does not depend on the mixing ratio (the reductions are our choice).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Real

from unifluid_jax import sharding
from unifluid_jax.diffusion import DDPM, Flow
from unifluid_jax.models.pair import Pair
from unifluid_jax.models.unifluid import UniFluid
from unifluid_jax.models.vae import Vae
from unifluid_jax.sequence import slots


def totals(batch: dict[str, jax.Array]) -> dict[str, Float[Array, ""]]:
    """Weights of all targets of a batch, by modality: what sums of losses are divided by.

    Taken over the whole batch before it is cut for gradient accumulation, so that the parts add up
    to exactly the big batch's loss; at least a tiny number, so that a batch without one modality
    has loss zero there.
    """
    return {
        "text": jnp.maximum(batch["text_weight"].sum(), 1e-8),
        "image": jnp.maximum(batch["image_weight"].sum(), 1e-8),
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def text_loss(
    hidden_BKD: Float[Array, "B K D"],
    table_VD: Float[Array, "V D"],
    target_BK: Int[Array, "B K"],
    weight_BK: Float[Array, "B K"],
    cap: float | None,
    chunk: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sums of the cross-entropy and of hits, from hidden states to the tied vocabulary.

    The logits of `chunk` targets a row exist at a time, and their gradient is taken while they do:
    a vocabulary of 256,000 never meets the whole batch, and nothing is computed twice. Where the
    vocabulary is cut, hidden states travel and the table stays.

    Args:
        hidden_BKD: final hidden states at the targets, in the compute type.
        table_VD: embeddings.
        target_BK, weight_BK: the targets, and what each counts.
        cap: soft cap of the logits.
        chunk: targets of a row whose logits are computed at once, 0 for all.

    Returns:
        Sums over all targets: of weight x cross-entropy in nats, and of weight x whether the target
        has the largest logit.
    """
    return _text_loss(hidden_BKD, table_VD, target_BK, weight_BK, cap, chunk, False)[:2]


def _text_loss_forward(hidden_BKD, table_VD, target_BK, weight_BK, cap, chunk):
    loss, hits, *gradients = _text_loss(
        hidden_BKD, table_VD, target_BK, weight_BK, cap, chunk, True
    )
    return (loss, hits), gradients


def _text_loss_backward(cap, chunk, gradients, cotangents):
    # Hits have no gradient, and weights and targets are data.
    d_hidden, d_table = gradients
    loss = cotangents[0]
    return (d_hidden * loss.astype(d_hidden.dtype), d_table * loss, None, None)


text_loss.defvjp(_text_loss_forward, _text_loss_backward)


def _text_loss(hidden, table, target, weight, cap, chunk, with_gradient):
    """Loss and hits and, where asked for, the gradients of the loss to `hidden` and `table`."""
    with jax.named_scope("logits"):
        return _cut_text_loss(hidden, table, target, weight, cap, chunk, with_gradient)


def _cut_text_loss(hidden, table, target, weight, cap, chunk, with_gradient):
    size = chunk or target.shape[1]
    spare = -target.shape[1] % size
    hidden, target, weight = (
        jnp.pad(x, ((0, 0), (0, spare)) + ((0, 0),) * (x.ndim - 2))
        for x in (hidden, target, weight)
    )
    mesh = sharding.vocabulary_mesh(len(table), rows=len(target))
    run = functools.partial(_chunks, cap=cap, size=size, with_gradient=with_gradient)
    if mesh is None:
        loss, hits, d_hidden, d_table = run(hidden, table, target, weight, vocabulary=())
    else:
        rows, vocabulary = jax.P(sharding.REPLICAS), jax.P(sharding.VOCABULARY)
        run = jax.shard_map(
            functools.partial(run, vocabulary=sharding.VOCABULARY),
            in_specs=(rows, vocabulary, rows, rows),
            out_specs=(jax.P(), jax.P(), rows, vocabulary),
            check_vma=False,  # gradients are taken by hand
        )
        loss, hits, d_hidden, d_table = run(hidden, table, target, weight)
    if not with_gradient:
        return loss, hits, None, None
    return loss, hits, d_hidden[:, : target.shape[1] - spare], d_table


def _chunks(hidden_BKD, table_VD, target_BK, weight_BK, *, cap, size, with_gradient, vocabulary):
    """`_text_loss` on one device, which has its rows and its part of the vocabulary."""
    part_VD = table_VD.astype(hidden_BKD.dtype)
    first = jax.lax.axis_index(vocabulary) * len(table_VD) if vocabulary else 0

    def everyone(x):  # rows of all devices among which the vocabulary is cut
        return jax.lax.all_gather(x, "fsdp", axis=0, tiled=True) if vocabulary else x

    def over_vocabulary(x, combine):
        return combine(x, vocabulary) if vocabulary else x

    def one(d_table_VD, inputs):
        h_BkD, target_Bk, weight_Bk = map(everyone, inputs)
        raw_BkV = jnp.einsum("BkD,VD->BkV", h_BkD, part_VD, preferred_element_type=jnp.float32)
        logits_BkV = raw_BkV if cap is None else cap * jnp.tanh(raw_BkV / cap)
        top_Bk = over_vocabulary(logits_BkV.max(axis=-1), jax.lax.pmax)
        # Capped logits cannot overflow when the cap itself is taken off: the sum then needs no
        # maximum first, and stands beside it in one pass over the logits.
        shift = top_Bk[:, :, None] if cap is None else jnp.full((1, 1, 1), cap)
        exp_BkV = jnp.exp(logits_BkV - shift)
        sum_Bk = over_vocabulary(exp_BkV.sum(axis=-1), jax.lax.psum)
        index_V = first + jnp.arange(len(part_VD))
        right_BkV = index_V[None, None] == target_Bk[:, :, None]
        picked_Bk = over_vocabulary(
            jnp.where(right_BkV, logits_BkV, 0.0).sum(axis=-1), jax.lax.psum
        )
        loss = ((shift[:, :, 0] + jnp.log(sum_Bk) - picked_Bk) * weight_Bk).sum()
        hits = ((picked_Bk == top_Bk) * weight_Bk).sum()
        if not with_gradient:
            return d_table_VD, (loss, hits, None)
        d_BkV = exp_BkV * (weight_Bk / sum_Bk)[:, :, None]
        d_BkV = jnp.where(right_BkV, d_BkV - weight_Bk[:, :, None], d_BkV)
        if cap is not None:
            d_BkV *= 1.0 - jnp.square(logits_BkV / cap)
        d_BkV = d_BkV.astype(h_BkD.dtype)
        d_table_VD += jnp.einsum("BkV,BkD->VD", d_BkV, h_BkD, preferred_element_type=jnp.float32)
        d_h_BkD = jnp.einsum("BkV,VD->BkD", d_BkV, part_VD)
        if vocabulary:
            d_h_BkD = jax.lax.psum_scatter(d_h_BkD, "fsdp", scatter_dimension=0, tiled=True)
            d_h_BkD = jax.lax.psum(d_h_BkD, "tensor")
        return d_table_VD, (loss, hits, d_h_BkD)

    cut = [
        x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)
        for x in (hidden_BKD, target_BK, weight_BK)
    ]
    start = jnp.zeros(table_VD.shape, jnp.float32) if with_gradient else None
    if len(cut[0]) == 1:
        d_table, per_chunk = one(start, [x[0] for x in cut])
        per_chunk = jax.tree.map(lambda x: x[None], per_chunk)
    else:
        d_table, per_chunk = jax.lax.scan(one, start, cut)
    loss, hits, d_hidden = per_chunk
    loss, hits = loss.sum(), hits.sum()
    if vocabulary:
        # All rows of an fsdp group are counted on each of its devices.
        loss, hits = jax.lax.psum((loss, hits), "data")
        d_table = d_table if d_table is None else jax.lax.psum(d_table, "data")
    if d_hidden is not None:
        d_hidden = d_hidden.swapaxes(0, 1).reshape(hidden_BKD.shape)
        d_table = d_table.astype(table_VD.dtype)
    return loss, hits, d_hidden, d_table


class Noise(NamedTuple):
    """All that is random in the loss of some rows.

    Attributes:
        latent_BLC: of the samples of the latents' posterior.
        t_RBN, token_RBNC: time and noise of each of R draws for each of N slots for image tokens.
    """

    latent_BLC: Float[Array, "B L C"]
    t_RBN: Real[Array, "R B N"]
    token_RBNC: Float[Array, "R B N C"]


def draw_noise(
    process: DDPM | Flow, key_B: jax.Array, shape: tuple[int, int], slots: int, draws: int
) -> Noise:
    """The noise of rows of this shape [L, C], each from a key of its own."""
    key_B2 = jax.vmap(jax.random.split)(key_B)
    time_key_B, token_key_B = jax.vmap(jax.random.split, out_axes=1)(key_B2[:, 1])
    times = jax.vmap(lambda key: process.times(key, (draws, slots)), out_axes=1)
    tokens_BRNC = _normal(token_key_B, (draws, slots, shape[1]))
    return Noise(_normal(key_B2[:, 0], shape), times(time_key_B), jnp.moveaxis(tokens_BRNC, 0, 1))


def unified(
    model: UniFluid,
    process: DDPM | Flow,
    batch: dict[str, jax.Array],
    key_B: jax.Array,
    total: dict[str, jax.Array],
    *,
    text_slots: int,
    image_slots: int,
    text_weight: float,
    draws: int,
    text_chunk: int = 0,
    latent_noise: float = 1.0,
) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
    """UniFluid's loss of one packed batch.

    Args:
        batch: a packed batch as the input pipeline makes it, or some rows of one.
        key_B: a key for each row, so that a row's noise does not depend on the rows beside it.
        total: `totals` of the whole batch.
        text_slots, image_slots: supervised positions of each kind that a row has at most (packing
            sees to it).
        text_weight: lambda.
        draws: R, pairs of (t, noise) for each image token and pass of the backbone (MAR: 4).
        text_chunk: text targets of a row whose logits are computed at once, 0 for all.
        latent_noise: how much of the image tokenizer's posterior deviation its samples have: 1
            samples the posterior (MAR), 0 takes its mean.

    Returns:
        The loss, and scalars, all of which add up over the parts of a batch: `loss`, `loss_text`
        (nats a token), `loss_visual` (squared error per dim), `accuracy_text` (share of supervised
        tokens predicted right), `text_targets`, `image_targets` (their numbers).
    """
    noise = draw_noise(process, key_B, batch["latent_mean"].shape[1:], image_slots, draws)
    latents_BLC = batch["latent_mean"] + latent_noise * batch["latent_std"] * noise.latent_BLC
    hidden_BLD = model.hidden(batch, latents_BLC)

    index_BK, weight_BK = slots(batch["text_weight"], text_slots)
    target_BK = jnp.take_along_axis(batch["text_target"], index_BK, axis=1)
    loss_text, hits = text_loss(
        _at(hidden_BLD, index_BK),
        model.backbone.embedding[...],
        target_BK,
        weight_BK / total["text"],
        model.backbone.config.final_cap,
        text_chunk,
    )

    index_BN, weight_BN = slots(batch["image_weight"], image_slots)
    position_BN = jnp.take_along_axis(batch["target_position"], index_BN, axis=1)
    z_BND = model.condition(_at(hidden_BLD, index_BN), position_BN)
    x_BNC = _at(latents_BLC, index_BN)
    with jax.named_scope("head"):
        loss_RBN = process.loss_at(
            lambda x, t: model.head(x, t, z_BND),
            jnp.broadcast_to(x_BNC[None], noise.token_RBNC.shape),
            noise.t_RBN,
            noise.token_RBNC,
        )
    loss_visual = (loss_RBN.mean(axis=0) * weight_BN).sum() / total["image"]

    loss = loss_visual + text_weight * loss_text
    return loss, {
        "loss": loss,
        "loss_text": loss_text,
        "loss_visual": loss_visual,
        "accuracy_text": hits,
        "text_targets": (weight_BK > 0).sum(),
        "image_targets": (weight_BN > 0).sum(),
    }


def autoencoder(
    model: Vae, images: Float[Array, "B H W 3"], key_B: jax.Array, total: float, *, kl_weight: float
) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
    """Reconstruction and KL of the image tokenizer.

    Our choice: no perceptual nor adversarial term, whose networks need weights of their own.

    `|x - y| + (x - y)^2`, mean over pixels: the first keeps edges sharp, the second punishes the
    few large errors. KL to the unit Gaussian in nats per pixel value. `total` is the number of
    pixel values in the whole batch.
    """
    mean_BNC, std_BNC = model.encode(images)
    tokens_BNC = mean_BNC + std_BNC * _normal(key_B, mean_BNC.shape[1:])
    error = model.decode(tokens_BNC) - images
    square = jnp.square(error).sum() / total
    kl_BNC = 0.5 * (jnp.square(mean_BNC) + jnp.square(std_BNC) - 1.0) - jnp.log(std_BNC)
    kl = kl_BNC.sum() / total
    loss = jnp.abs(error).sum() / total + square + kl_weight * kl
    return loss, {"loss": loss, "mse": square, "kl": kl}


def contrastive(
    model: Pair,
    images: Float[Array, "B H W 3"],
    tokens_BT: Int[Array, "B T"],
    total: float,
) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
    """SigLIP's sigmoid loss (Zhai et al. 2023, eq. 1): every picture with every caption.

    Our choice: all pictures of one caption are positives of it, not just the one it came with; on
    pictures of a few dozen captions the others would be false negatives.

    Args:
        images: pictures, values in [-1, 1].
        tokens_BT: their captions, padded.
        total: pictures in the whole batch.

    Returns:
        The loss, nats a picture, and scalars: `loss`, `accuracy` (share of pictures whose best
        caption of the batch is a right one).
    """
    logits_BB = model.logits(model.embed_images(images), model.embed_texts(tokens_BT))
    same_BB = (tokens_BT[:, None] == tokens_BT[None]).all(axis=-1)
    loss = -jax.nn.log_sigmoid(jnp.where(same_BB, logits_BB, -logits_BB)).sum() / total
    best_B = logits_BB.argmax(axis=1)
    hits = jnp.take_along_axis(same_BB, best_B[:, None], axis=1).sum()
    return loss, {"loss": loss, "accuracy": hits / total}


def _normal(key_B: jax.Array, shape: tuple[int, ...]) -> Float[Array, "B *shape"]:  # noqa: F821
    return jax.vmap(lambda key: jax.random.normal(key, shape))(key_B)


def _at(x_BLD: Float[Array, "B L D"], index_BK: Int[Array, "B K"]) -> Float[Array, "B K D"]:
    """Rows of the positions in `index_BK`."""
    return jnp.take_along_axis(x_BLD, index_BK[:, :, None], axis=1)
