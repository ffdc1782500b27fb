"""Cached decoding of text; how a cache is filled and fed is in `decode.py`.

Letters: as in `decode.py`, and T text tokens decoded; V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from unifluid_jax.decode import State, feed, prefill
from unifluid_jax.models.functional import Functional, Params
from unifluid_jax.models.unifluid import Batch, UniFluid


@dataclasses.dataclass(frozen=True)
class TextSampling:
    """How the next text token is chosen; all traced.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: only the k likeliest tokens; 0 is all of them.
        top_p: only the fewest likeliest tokens that together have this probability; 1 is all.
    """

    temperature: ArrayLike = 0.0
    top_k: ArrayLike = 0
    top_p: ArrayLike = 1.0


jax.tree_util.register_dataclass(TextSampling)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("eos", "max_tokens"))
def text(
    functional: Functional,
    params: Params,
    prefix: Batch,
    key_B: jax.Array,
    sampling: TextSampling,
    *,
    eos: int,
    max_tokens: int,
) -> Int[Array, "B T"]:
    """Text tokens that follow the prefixes: up to `max_tokens`, from the first EOS on all EOS.

    The loop ends when every row has ended.

    Args:
        functional, params: the UniFluid.
        prefix: rows up to and with the separator, from `stack`.
        key_B: a typed key per row.
        sampling: how tokens are chosen.
        eos: id of the end of sequence.
    """
    model: UniFluid = functional.bind(params)

    def pick(i: Array | int, hidden_BD: Array) -> Array:
        key_i_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, i)
        return choose(model.backbone.logits(hidden_BD), key_i_B, sampling)

    def more(carry: tuple[Array, Array, State]) -> Array:
        i, tokens_BT, _ = carry
        return (i < max_tokens) & ~(tokens_BT == eos).any(axis=1).all()

    def step(carry: tuple[Array, Array, State]) -> tuple[Array, Array, State]:
        i, tokens_BT, state = carry
        last_B = tokens_BT[:, i - 1]
        hidden_BD, state = feed(model, model.backbone.embed(last_B[:, None])[:, 0], state)
        next_B = jnp.where(last_B == eos, eos, pick(i, hidden_BD))
        return i + 1, tokens_BT.at[:, i].set(next_B), state

    hidden_BD, state = prefill(model, prefix, max_tokens - 1)
    # Filled with a token that is not EOS, so that `more` can look at the whole of it.
    tokens_BT = jnp.full((len(hidden_BD), max_tokens), -1, jnp.int32)
    tokens_BT = tokens_BT.at[:, 0].set(pick(0, hidden_BD))
    _, tokens_BT, _ = jax.lax.while_loop(more, step, (jnp.asarray(1), tokens_BT, state))
    return jnp.where(tokens_BT < 0, eos, tokens_BT)


def choose(
    logits_BV: Float[Array, "B V"], key_B: jax.Array, sampling: TextSampling
) -> Int[Array, "B"]:
    """The next token of every row."""

    def greedy() -> Array:
        return logits_BV.argmax(axis=-1).astype(jnp.int32)

    def sampled() -> Array:
        ranked_BV, index_BV = jax.lax.top_k(logits_BV, logits_BV.shape[-1])
        ranked_BV = ranked_BV / sampling.temperature
        rank_V = jnp.arange(ranked_BV.shape[-1])
        inside_V = (rank_V < sampling.top_k) | (sampling.top_k == 0)
        ranked_BV = jnp.where(inside_V[None], ranked_BV, -jnp.inf)
        p_BV = jax.nn.softmax(ranked_BV, axis=-1)
        # Probability of all that rank higher: the likeliest token always stays.
        higher_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
        ranked_BV = jnp.where(higher_BV < sampling.top_p, ranked_BV, -jnp.inf)
        rank_B = jax.vmap(jax.random.categorical)(key_B, ranked_BV)
        return jnp.take_along_axis(index_BV, rank_B[:, None], axis=1)[:, 0]

    return jax.lax.cond(jnp.asarray(sampling.temperature) > 0, sampled, greedy)
