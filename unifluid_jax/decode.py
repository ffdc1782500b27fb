"""Cached decoding: what text and image tokens share, and images. Text is in `decode_text.py`.

The conditioning prefix of every row, padded on the right to one length P, goes through the model
once and fills the key/value cache. After that one position per row is fed at a time. All rows write
it to the same slot, P, P + 1, ..., behind the longest prefix; its RoPE position is the row's own,
behind the row's own prefix, and the slots of padding are never looked at. So a row gets what it
would get alone.

Prompts, keys, guidance and temperatures are traced: a program is compiled per number of rows,
prefix length and static setting.

Letters: B rows; P positions of a padded prefix; S slots of the cache; N tokens of an
image, C their dims; D model width; G = 2 branches of guidance.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from unifluid_jax.diffusion import Sampler, guidance_at, guided
from unifluid_jax.models.functional import Functional, Params
from unifluid_jax.models.gemma import Cache
from unifluid_jax.models.unifluid import Batch, UniFluid
from unifluid_jax.sequence import Sequence, attention_mask

# What padding holds: zero, but here.
_PADDING = {"content_position": -1, "target_position": -1}
# What a prefix is read by; the rest of a `Sequence` are targets.
_FIELDS = ("tokens", "modality", "position", "step", "latent_mean", *_PADDING)


def stack(sequences: list[Sequence], length: int) -> dict[str, np.ndarray]:
    """Prefixes as the rows of a batch, each padded on the right to `length` positions.

    Raises:
        ValueError: one of them is longer.
    """
    if max(map(len, sequences)) > length:
        raise ValueError(f"a prefix of {max(map(len, sequences))} positions for rows of {length}")

    def padded(x: np.ndarray, fill: int = 0) -> np.ndarray:
        widths = [(0, length - len(x)), *[(0, 0)] * (x.ndim - 1)]
        return np.pad(x, widths, constant_values=fill)

    batch = {
        name: np.stack([padded(getattr(s, name), _PADDING.get(name, 0)) for s in sequences])
        for name in _FIELDS
    }
    batch["segment"] = np.stack([padded(np.ones(len(s), np.int32)) for s in sequences])
    batch["images"] = np.stack([s.images for s in sequences])
    return batch


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


def prefill(model: UniFluid, prefix: Batch, room: int) -> tuple[Float[Array, "B D"], State]:
    """Feeds the prefixes.

    Args:
        prefix: from `stack`. Latents in it (the source of an edit) are fed at their mean.
        room: number of positions to be fed afterwards.

    Returns:
        The hidden state of each row's last position, which predicts what follows; and the state.
    """
    valid_BP = prefix["segment"] > 0
    rows, length = valid_BP.shape
    x_BPD = model.embed(prefix, prefix["latent_mean"])
    mask_BPP = attention_mask(prefix["step"], prefix["segment"])
    hidden_BPD, cache = model.backbone(
        x_BPD,
        prefix["position"],
        jnp.pad(mask_BPP, ((0, 0), (0, 0), (0, room))),
        model.backbone.init_cache(rows, length + room),
    )
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


# --- images ---


@functools.partial(jax.jit, static_argnums=0, static_argnames=("sampler", "schedule"))
def images(
    functional: Functional,
    params: Params,
    prefix: Batch,
    twin: Batch | None,
    order_BN: Int[Array, "B N"],
    key_B: jax.Array,
    guidance: ArrayLike,
    temperature: ArrayLike,
    *,
    sampler: Sampler,
    schedule: str,
) -> Float[Array, "B N C"]:
    """Image tokens, normalised, in raster order.

    Args:
        functional, params: the UniFluid.
        prefix: rows up to and with BOI, from `stack`.
        twin: their unconditional twins, of the same lengths; None decodes without guidance, at
            half the cost.
        order_BN: the order in which the grid cells are decoded; BOI in the prefix asks for the
            first.
        key_B: a typed key per row; the row's noise depends on it alone.
        guidance: scale, reached as `schedule` says (see `diffusion.guidance_at`).
        temperature: of the sampler.
    """
    model: UniFluid = functional.bind(params)
    rows, count = order_BN.shape
    dim = model.config.head.token_dim
    branches = 1 if twin is None else 2
    if twin is not None:
        prefix = jax.tree.map(lambda *pair: jnp.concatenate(pair), prefix, twin)

    def sample(i: Array | int, hidden_BD: Array) -> tuple[Array, Array]:
        """The cells decoded at step i and their tokens; `hidden_BD` has rows of all branches."""
        cell_B = order_BN[:, i]
        z_BD = model.condition(hidden_BD[:, None], jnp.tile(cell_B, branches)[:, None])[:, 0]
        key_i_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, i)
        if branches == 1:
            predict = lambda x_BC, t: model.head(x_BC, t, z_BD)  # noqa: E731
        else:
            z_GBD = z_BD.reshape(branches, rows, -1)
            scale = guidance_at(schedule, guidance, (i + 1) / count)
            predict = guided(lambda x_1BC, t: model.head(x_1BC, t, z_GBD), scale, dim)
        return cell_B, sampler(key_i_B, predict, dim, temperature)

    def put(tokens_BNC: Array, cell_B: Array, x_BC: Array) -> Array:
        return tokens_BNC.at[jnp.arange(rows), cell_B].set(x_BC)

    def step(i: Array, carry: tuple[Array, Array, State]) -> tuple[Array, Array, State]:
        tokens_BNC, hidden_BD, state = carry
        cell_B, x_BC = sample(i, hidden_BD)
        content_BD = model.embed_content(x_BC[:, None], cell_B[:, None])
        x_BD = (content_BD + model.embed_target(order_BN[:, i + 1][:, None]))[:, 0]
        hidden_BD, state = feed(model, jnp.tile(x_BD, (branches, 1)), state)
        return put(tokens_BNC, cell_B, x_BC), hidden_BD, state

    hidden_BD, state = prefill(model, prefix, count - 1)
    tokens_BNC = jnp.zeros((rows, count, dim), jnp.float32)
    tokens_BNC, hidden_BD, _ = jax.lax.fori_loop(0, count - 1, step, (tokens_BNC, hidden_BD, state))
    # The last token is predicted, never fed.
    return put(tokens_BNC, *sample(count - 1, hidden_BD))
