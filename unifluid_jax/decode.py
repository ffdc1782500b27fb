"""Cached decoding: what text (`decode_text.py`) and image tokens (`decode_image.py`) share.

The conditioning prefix of every row, padded on the right to one length P, goes through the model
once and fills the key/value cache. After that one position per row is fed at a time. All rows write
it to the same slot, P, P + 1, ..., behind the longest prefix; its RoPE position is the row's own,
behind the row's own prefix, and the slots of padding are never looked at. So a row gets what it
would get alone.

Prompts, entropy, guidance and temperatures are traced: a program is compiled per number of rows,
prefix length and static setting.

Letters: B rows; P positions of a padded prefix; S slots of the cache; D model width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, UInt32

from unifluid_jax.models.gemma import Cache
from unifluid_jax.models.unifluid import Batch, UniFluid
from unifluid_jax.sequence import Sequence, attention_mask

# What a row's random numbers come from.
Entropy = UInt32[Array, "B 2"] | UInt32[np.ndarray, "B 2"]
# What padding holds: zero, but here.
_PADDING = {"content_position": -1, "target_position": -1}
# What a prefix is read by; the rest of a `Sequence` are targets.
_FIELDS = ("tokens", "modality", "position", "step", "latent_mean", "behind", *_PADDING)


def stack(
    sequences: list[Sequence], length: int, shown: list[Sequence] | None = None
) -> dict[str, np.ndarray]:
    """Prefixes as the rows of a batch, each padded on the right to `length` positions.

    Args:
        shown: those whose pictures go along, by default all.

    Raises:
        ValueError: one of them is longer.
    """
    if max(map(len, sequences)) > length:
        raise ValueError(f"a prefix of {max(map(len, sequences))} positions for rows of {length}")

    def padded(name: str) -> np.ndarray:
        like, fill = getattr(sequences[0], name), _PADDING.get(name, 0)
        rows = np.full((len(sequences), length, *like.shape[1:]), fill, like.dtype)
        for row, s in zip(rows, sequences, strict=True):
            row[: len(s)] = getattr(s, name)
        return rows

    batch = {name: padded(name) for name in _FIELDS}
    lengths = np.array([len(s) for s in sequences])
    batch["segment"] = (np.arange(length)[None] < lengths[:, None]).astype(np.int32)
    batch["images"] = np.stack([s.images for s in shown or sequences])
    return batch


def keys_of(entropy_B2: Entropy) -> jax.Array:
    """Typed keys of 64 bits each, one per row, whatever kind of keys JAX is set to.

    Part of each program: one of its own would be another to start for every picture.
    """
    first_B = jax.vmap(jax.random.key)(entropy_B2[:, 0])
    return jax.vmap(jax.random.fold_in)(first_B, entropy_B2[:, 1])


class State(NamedTuple):
    """Where decoding stands.

    Attributes:
        cache: keys and values of all that was fed.
        seen_BS: the slots that the next position looks at, besides its own.
        position_B: RoPE position of the next position.
        slot: where it will be written.
    """

    cache: Cache
    seen_BS: Bool[Array, "B S"]
    position_B: Int[Array, "B"]
    slot: Int[Array, ""]


def fill(model: UniFluid, prefix: Batch, room: int) -> tuple[Float[Array, "B P D"], Cache]:
    """Hidden states of prefixes, and a cache that holds them.

    Args:
        prefix: from `stack`. Latents in it (the source of an edit) are fed at their mean.
        room: slots of the cache behind them.
    """
    rows, length = prefix["segment"].shape
    x_BPD = model.embed(prefix, prefix["latent_mean"])
    mask_BPP = attention_mask(prefix["step"], prefix["segment"])
    return model.backbone(
        x_BPD,
        prefix["position"],
        jnp.pad(mask_BPP, ((0, 0), (0, 0), (0, room))),
        model.backbone.init_cache(rows, length + room),
    )


def rows_of(cache: Cache, index: ArrayLike) -> Cache:
    """The cache whose rows are those rows of another one."""
    # They are the fourth axis from behind, whether layers are stacked or not.
    layers = jax.tree.map(lambda x: jnp.take(x, index, axis=-4), cache["layers"])
    return {"layers": layers, "position": cache["position"][index]}


def prefill(model: UniFluid, prefix: Batch, room: int) -> tuple[Float[Array, "B D"], State]:
    """Feeds the prefixes.

    Args:
        prefix: from `stack`. Latents in it (the source of an edit) are fed at their mean.
        room: number of positions to be fed afterwards.

    Returns:
        The hidden state of each row's last position, which predicts what follows; and the state.
    """
    valid_BP = prefix["segment"] > 0
    hidden_BPD, cache = fill(model, prefix, room)
    length = valid_BP.shape[1]
    length_B = valid_BP.sum(axis=1)
    last_BD = jnp.take_along_axis(hidden_BPD, length_B[:, None, None] - 1, axis=1)[:, 0]
    seen_BS = jnp.pad(valid_BP, ((0, 0), (0, room)))
    return last_BD, State(cache, seen_BS, length_B, jnp.asarray(length))


def feed(
    model: UniFluid, x_BD: Float[Array, "B D"], state: State
) -> tuple[Float[Array, "B D"], State]:
    """Feeds one position per row, given its embedding; returns its hidden state."""
    seen_BS = jax.lax.dynamic_update_slice_in_dim(
        state.seen_BS, jnp.ones((len(x_BD), 1), bool), state.slot, axis=1
    )
    hidden_B1D, cache = model.backbone(
        x_BD[:, None], state.position_B[:, None], seen_BS[:, None], state.cache, state.slot
    )
    return hidden_B1D[:, 0], State(cache, seen_BS, state.position_B + 1, state.slot + 1)
