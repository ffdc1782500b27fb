"""The two losses and their balance: `L = L_visual + lambda * L_text` (UniFluid).

Every mean is per modality, over supervised text tokens or image tokens of the whole batch, so that
lambda does not depend on the mixing ratio (the reductions are our choice).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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


def cross_entropy(logits: Float[Array, "*S V"], target: Int[Array, "*S"]) -> Float[Array, "*S"]:
    """Cross-entropy of one target each, in nats."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


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

    Returns:
        The loss, and scalars, all of which add up over the parts of a batch: `loss`, `loss_text`
        (nats a token), `loss_visual` (squared error per dim), `accuracy_text` (share of supervised
        tokens predicted right), `text_targets`, `image_targets` (their numbers).
    """
    key_B2 = jax.vmap(jax.random.split)(key_B)
    noise_BLC = _normal(key_B2[:, 0], batch["latent_mean"].shape[1:])
    latents_BLC = batch["latent_mean"] + batch["latent_std"] * noise_BLC
    hidden_BLD = model.hidden(batch, latents_BLC)

    index_BK, weight_BK = slots(batch["text_weight"], text_slots)
    target_BK = jnp.take_along_axis(batch["text_target"], index_BK, axis=1)
    logits_BKV = model.backbone.logits(_at(hidden_BLD, index_BK))
    loss_text = (cross_entropy(logits_BKV, target_BK) * weight_BK).sum() / total["text"]
    hit_BK = (logits_BKV.argmax(-1) == target_BK) * weight_BK

    index_BN, weight_BN = slots(batch["image_weight"], image_slots)
    position_BN = jnp.take_along_axis(batch["target_position"], index_BN, axis=1)
    z_BND = model.condition(_at(hidden_BLD, index_BN), position_BN)
    x_BNC = _at(latents_BLC, index_BN)
    time_key_B, noise_key_B = jax.vmap(jax.random.split, out_axes=1)(key_B2[:, 1])
    t_RBN = jax.vmap(lambda key: process.times(key, (draws, x_BNC.shape[1])), out_axes=1)(
        time_key_B
    )
    noise_RBNC = jnp.moveaxis(_normal(noise_key_B, (draws, *x_BNC.shape[1:])), 0, 1)
    loss_RBN = process.loss_at(
        lambda x, t: model.head(x, t, z_BND),
        jnp.broadcast_to(x_BNC[None], noise_RBNC.shape),
        t_RBN,
        noise_RBNC,
    )
    loss_visual = (loss_RBN.mean(axis=0) * weight_BN).sum() / total["image"]

    loss = loss_visual + text_weight * loss_text
    return loss, {
        "loss": loss,
        "loss_text": loss_text,
        "loss_visual": loss_visual,
        "accuracy_text": hit_BK.sum() / total["text"],
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
