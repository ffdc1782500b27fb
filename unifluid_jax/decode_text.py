"""Cached decoding of text; how a cache is filled and fed is in `decode.py`.

Two programs: `begin` feeds the prefixes, `advance` adds tokens until every row has ended or has as
many as were asked for. Called once it writes whole texts, called often it streams them. Beam search
is a program of its own.

Many questions on one picture share their prefix: the picture's keys and values are computed once
and copied to the rows (see `Shared`).

Letters: as in `decode.py`, and T text tokens decoded; V vocabulary; U different pictures; M
positions of a picture; K beams.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from unifluid_jax.decode import Entropy, State, feed, keys_of, prefill, rows_of
from unifluid_jax.models.functional import Functional, Params
from unifluid_jax.models.unifluid import UniFluid
from unifluid_jax.sequence import Sequence, attention_mask

Rows = dict[str, jax.Array | np.ndarray]


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


class Shared(NamedTuple):
    """What the prefixes of several rows begin with.

    Attributes:
        start: U rows from `stack`, none of them padded.
        owner_B: the row of `start` that each prefix goes on from.
    """

    start: Rows
    owner_B: Int[Array, "B"] | Int[np.ndarray, "B"]


class Progress(NamedTuple):
    """Where the decoding of text stands.

    Attributes:
        tokens_BT: ids, -1 where there is none yet.
        count: tokens decoded so far, at least 1; a row that has ended goes on with EOS.
        state: of the cache.
    """

    tokens_BT: Int[Array, "B T"]
    count: Int[Array, ""]
    state: State


def cut(sequence: Sequence, at: int) -> tuple[Sequence, Sequence]:
    """The first `at` positions of a sequence, which keep its pictures, and the rest.

    Only where nothing before `at` looks behind it: a prefix that attends to itself in both
    directions cannot be shared.
    """
    fields = [field.name for field in dataclasses.fields(sequence) if field.name != "images"]
    start, rest = (
        {name: getattr(sequence, name)[part] for name in fields}
        for part in (slice(at), slice(at, None))
    )
    return (
        dataclasses.replace(sequence, **start),
        dataclasses.replace(sequence, **rest, images=sequence.images[:0]),
    )


def _prefill(
    model: UniFluid, prefix: Rows, shared: Shared | None, room: int
) -> tuple[Float[Array, "B D"], State]:
    """`decode.prefill` of whole prefixes, or of what follows a shared beginning."""
    if shared is None:
        return prefill(model, prefix, room)
    valid_BP = prefix["segment"] > 0
    rows, length = valid_BP.shape
    _, state = prefill(model, shared.start, length + room)
    cache = _rows_of(state, shared.owner_B).cache
    before = shared.start["segment"].shape[1]
    mask_BPP = attention_mask(prefix["step"], prefix["segment"])
    seen_BPM = jnp.broadcast_to(valid_BP[:, :, None], (rows, length, before))
    mask_BPS = jnp.pad(jnp.concatenate([seen_BPM, mask_BPP], axis=2), ((0, 0), (0, 0), (0, room)))
    x_BPD = model.embed(prefix, prefix["latent_mean"])
    hidden_BPD, cache = model.backbone(x_BPD, prefix["position"], mask_BPS, cache, before)
    length_B = valid_BP.sum(axis=1)
    last_BD = jnp.take_along_axis(hidden_BPD, length_B[:, None, None] - 1, axis=1)[:, 0]
    seen_BS = jnp.pad(valid_BP, ((0, 0), (before, room)))
    seen_BS = seen_BS.at[:, :before].set(True)
    return last_BD, State(cache, seen_BS, before + length_B, jnp.asarray(before + length))


def _rows_of(state: State, index: ArrayLike) -> State:
    """The state whose rows are those rows of `state`."""
    cache = rows_of(state.cache, index)
    return State(cache, state.seen_BS[index], state.position_B[index], state.slot)


@functools.partial(jax.jit, static_argnums=0, static_argnames="max_tokens")
def begin(
    functional: Functional,
    params: Params,
    prefix: Rows,
    shared: Shared | None,
    entropy_B2: Entropy,
    sampling: TextSampling,
    *,
    max_tokens: int,
) -> Progress:
    """Feeds the prefixes and decodes the first token of every row.

    Args:
        functional, params: the UniFluid.
        prefix: rows up to and with the separator, from `stack`; without what is in `shared`.
        shared: what several rows begin with, or None.
        entropy_B2: 64 bits per row; what is drawn for the row depends on them alone.
        sampling: how tokens are chosen.
        max_tokens: T, room for tokens.
    """
    model: UniFluid = functional.bind(params).unstacked()
    hidden_BD, state = _prefill(model, prefix, shared, max_tokens - 1)
    first_B = _pick(model, 0, hidden_BD, keys_of(entropy_B2), sampling)
    tokens_BT = jnp.full((len(hidden_BD), max_tokens), -1, jnp.int32).at[:, 0].set(first_B)
    return Progress(tokens_BT, jnp.asarray(1), state)


@functools.partial(jax.jit, static_argnums=0, static_argnames="eos", donate_argnums=2)
def advance(
    functional: Functional,
    params: Params,
    progress: Progress,
    entropy_B2: Entropy,
    sampling: TextSampling,
    until: ArrayLike,
    *,
    eos: int,
) -> Progress:
    """Decodes until there are `until` tokens or every row has ended.

    Args:
        progress: from `begin` or `advance`, of the same `entropy_B2` and `sampling`; given away.
        eos: id of the end of sequence.
    """
    model: UniFluid = functional.bind(params).unstacked()

    key_B = keys_of(entropy_B2)

    def more(progress: Progress) -> Array:
        ended_B = (progress.tokens_BT == eos).any(axis=1)
        return (progress.count < until) & ~ended_B.all()

    def step(progress: Progress) -> Progress:
        tokens_BT, i, state = progress
        last_B = tokens_BT[:, i - 1]
        hidden_BD, state = feed(model, model.backbone.embed(last_B[:, None])[:, 0], state)
        next_B = jnp.where(last_B == eos, eos, _pick(model, i, hidden_BD, key_B, sampling))
        return Progress(tokens_BT.at[:, i].set(next_B), i + 1, state)

    return jax.lax.while_loop(more, step, progress)


def _pick(
    model: UniFluid, i: ArrayLike, hidden_BD: Array, key_B: jax.Array, sampling: TextSampling
) -> Array:
    key_i_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, i)
    return choose(model.backbone.logits(hidden_BD), key_i_B, sampling)


def text(
    functional: Functional,
    params: Params,
    prefix: Rows,
    shared: Shared | None,
    entropy_B2: Entropy,
    sampling: TextSampling,
    *,
    eos: int,
    max_tokens: int,
) -> Int[Array, "B T"]:
    """Text tokens that follow the prefixes: up to `max_tokens`, from the first EOS on all EOS.

    Arguments as for `begin` and `advance`.
    """
    progress = begin(
        functional, params, prefix, shared, entropy_B2, sampling, max_tokens=max_tokens
    )
    progress = advance(functional, params, progress, entropy_B2, sampling, max_tokens, eos=eos)
    return _ended(progress.tokens_BT, eos)


def stream(
    functional: Functional,
    params: Params,
    prefix: Rows,
    shared: Shared | None,
    entropy_B2: Entropy,
    sampling: TextSampling,
    *,
    eos: int,
    max_tokens: int,
) -> Iterator[Int[Array, "B T"]]:
    """What `text` returns, after each token: EOS stands where there is none yet."""
    progress = begin(
        functional, params, prefix, shared, entropy_B2, sampling, max_tokens=max_tokens
    )
    for count in range(2, max_tokens + 1):
        yield _ended(progress.tokens_BT, eos)
        progress = advance(functional, params, progress, entropy_B2, sampling, count, eos=eos)
        if int(progress.count) < count:  # every row had ended
            return
    yield _ended(progress.tokens_BT, eos)


@functools.partial(jax.jit, static_argnames="eos")
def _ended(tokens_BT: Array, eos: int) -> Array:
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


@functools.partial(jax.jit, static_argnums=0, static_argnames=("eos", "max_tokens", "beams"))
def beam_search(
    functional: Functional,
    params: Params,
    prefix: Rows,
    shared: Shared | None,
    length_penalty: ArrayLike,
    *,
    eos: int,
    max_tokens: int,
    beams: int,
) -> Int[Array, "B T"]:
    """The likeliest texts that beam search finds: as `text` gives them.

    Texts are ranked by their log probability divided by `length ** length_penalty`, their EOS
    counted in: 0 ranks by probability, which favours short texts, 1 by the mean over tokens.

    Args:
        functional, params, prefix, shared, eos, max_tokens: as for `text`.
        length_penalty: see above.
        beams: K, texts kept at every step; at most the size of the vocabulary.
    """
    model: UniFluid = functional.bind(params).unstacked()
    hidden_BD, state = _prefill(model, prefix, shared, max_tokens - 1)
    rows = len(hidden_BD)
    score_BK, token_BK = jax.lax.top_k(_log_p(model, hidden_BD), beams)
    tokens_BKT = jnp.full((rows, beams, max_tokens), eos, jnp.int32).at[:, :, 0].set(token_BK)
    state = _rows_of(state, jnp.repeat(jnp.arange(rows), beams))

    def ended(tokens_BKT: Array, i: Array) -> Array:
        # Before i every token was chosen; those behind it are EOS as yet.
        return tokens_BKT[:, :, i - 1] == eos

    def more(carry: tuple[Array | State, ...]) -> Array:
        i, _, _, tokens_BKT, _ = carry
        return (i < max_tokens) & ~ended(tokens_BKT, i).all()

    def step(carry: tuple[Array | State, ...]) -> tuple[Array | State, ...]:
        i, score_BK, length_BK, tokens_BKT, state = carry
        last_BK = tokens_BKT[:, :, i - 1]
        x_RD = model.backbone.embed(last_BK.reshape(-1, 1))[:, 0]
        hidden_RD, state = feed(model, x_RD, state)
        next_BKV = _log_p(model, hidden_RD).reshape(rows, beams, -1)
        vocab = next_BKV.shape[-1]
        # A text that has ended goes on with EOS alone, which costs nothing.
        over_BK = ended(tokens_BKT, i)
        rest_V = jnp.where(jnp.arange(vocab) == eos, 0.0, -jnp.inf)
        next_BKV = jnp.where(over_BK[:, :, None], rest_V[None, None], next_BKV)
        total_BKV = score_BK[:, :, None] + next_BKV
        length_BK = jnp.where(over_BK, length_BK, i + 1)
        ranked_BKV = total_BKV / length_BK[:, :, None].astype(jnp.float32) ** length_penalty
        _, chosen_BK = jax.lax.top_k(ranked_BKV.reshape(rows, -1), beams)
        parent_BK, token_BK = jnp.divmod(chosen_BK, vocab)
        score_BK = jnp.take_along_axis(total_BKV.reshape(rows, -1), chosen_BK, axis=1)
        length_BK = jnp.take_along_axis(length_BK, parent_BK, axis=1)
        tokens_BKT = jnp.take_along_axis(tokens_BKT, parent_BK[:, :, None], axis=1)
        state = _rows_of(state, (jnp.arange(rows)[:, None] * beams + parent_BK).reshape(-1))
        return i + 1, score_BK, length_BK, tokens_BKT.at[:, :, i].set(token_BK), state

    length_BK = jnp.ones((rows, beams), jnp.int32)
    carry = (jnp.asarray(1), score_BK, length_BK, tokens_BKT, state)
    # The beams of a row stand in the order of their rank.
    return jax.lax.while_loop(more, step, carry)[3][:, 0]


def _log_p(model: UniFluid, hidden_BD: Array) -> Array:
    return jax.nn.log_softmax(model.backbone.logits(hidden_BD))
