"""Cached decoding of image tokens: one compiled program, or the same a step at a time.

The prefix goes through the model once; then a loop makes the tokens, in the order given, one group
(see `sequence.py`) at a time: a pass of the backbone, which is fed the tokens of the group before,
and the head's diffusion inside. All of a group are drawn at once, each given everything but the
others of its group. Groups of one are sequential decoding.

Guidance decodes several branches of every picture side by side, from the most to the least
conditional: (text, none); for edits with a scale for the source too (text and source, source,
none), as InstructPix2Pix. They share the tokens drawn.

What is known beforehand (inpainting) is laid out in the prefix, first in the order; it is never
drawn.

Prompts, entropy, guidance and temperature are traced: one program serves all of them; it is
compiled per number of rows, prefix length and `ImageSampling`.

Letters: as in `decode.py`, and G branches of guidance, R = G B rows of them, F prefixes fed for
these, K tokens of a group.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from unifluid_jax.decode import Entropy, fill, keys_of, rows_of, stack
from unifluid_jax.diffusion import Predict, Process
from unifluid_jax.errors import UserError
from unifluid_jax.models.functional import Functional, Params
from unifluid_jax.models.gemma import Cache
from unifluid_jax.models.unifluid import Batch, UniFluid
from unifluid_jax.samplers import (
    SCHEDULES,
    Sampler,
    Within,
    guidance_at,
    guided,
    sampler_from,
)
from unifluid_jax.sequence import GROWTHS, Modality, group_sizes
from unifluid_jax.sequence import Sequence as TokenSequence

_BUCKETS = 4  # numbers of diffusion steps that DiSA's schedule takes: each is compiled


@dataclasses.dataclass(frozen=True)
class ImageSampling:
    """How image tokens are drawn; all of it compiled in.

    Attributes:
        sampler: of the diffusion head.
        schedule: of guidance over the tokens, see `samplers.guidance_at`.
        power: exponent of the schedule "power".
        interval: of diffusion time, 0 (clean) to 1 (noise), inside of which there is guidance;
            outside, the head runs for the conditional branch alone (arXiv 2404.07724; in time
            where that has noise levels).
        guided: share of the tokens, the first ones, that are drawn under guidance. For the others
            backbone and head run for the conditional branch alone, half of the rows (ours: what an
            image shows is settled by its first tokens).
        last_steps: diffusion steps of the last tokens, the sampler's own being those of the first;
            between, they fall linearly in four stages (DiSA, arXiv 2505.20297: the more tokens are
            known, the less is left to decide). None keeps them as they are.
        parallel: tokens drawn in a step, on average; above 1 only for a model trained with groups.
        growth: "constant", or "cosine" for few tokens in the first steps and many in the last
            (MaskGIT).
        limit: bound on the root mean square of a drawn token over its dims, in standard deviations
            of the data: longer ones are scaled down to it, so that guidance does not drive them off
            scale. Ours, after SphereAR's constant norm (arXiv 2509.24335). None is no bound.

    Raises:
        UserError: a value makes no sense.
    """

    sampler: Sampler
    schedule: str = "constant"
    power: float = 2.0
    interval: tuple[float, float] = (0.0, 1.0)
    guided: float = 1.0
    last_steps: int | None = None
    parallel: int = 1
    growth: str = "constant"
    limit: float | None = None

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise UserError(
                f"no guidance schedule called {self.schedule!r}: choose {', '.join(SCHEDULES)}"
            )
        if not (math.isfinite(self.power) and self.power > 0):
            raise UserError(f"power is {self.power}: set it above 0")
        if not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise UserError(
                f"the guidance interval is {tuple(self.interval)}: set two times, the first below"
                " the second, both from 0 (clean) to 1 (noise)"
            )
        if not 0 < self.guided <= 1:
            raise UserError(
                f"guided is {self.guided}: set it above 0 and to at most 1; guidance 1 is none"
            )
        if self.last_steps is not None:
            self.sampler.with_steps(self.last_steps)  # knows how few it can do with
            if self.last_steps > self.sampler.steps:
                raise UserError(
                    f"last_steps is {self.last_steps} and the sampler's steps are"
                    f" {self.sampler.steps}: set last_steps to at most that"
                )
        if self.parallel < 1:
            raise UserError(f"parallel is {self.parallel}: draw 1 token or more in a step")
        if self.growth not in GROWTHS:
            raise UserError(f'growth is "{self.growth}": set it to {" or ".join(GROWTHS)}')
        if self.limit is not None and not self.limit > 0:
            raise UserError(f"limit is {self.limit}: set it above 0, or to None for no bound")


def sampling_from(
    process: Process, learned: Iterable[int], sampler: Mapping[str, Any], **fields: Any
) -> ImageSampling:
    """An `ImageSampling` from plain values.

    Args:
        process: of the diffusion head.
        learned: numbers of tokens at once that the model has been trained with
            (`config.input.parallel`); fewer than the most of them will do as well.
        sampler: `name` and fields of the sampler, see `samplers.sampler_from`.
        **fields: of `ImageSampling`; those left out have their defaults.

    Raises:
        UserError: an unknown name, or a value that makes no sense.
    """
    if "interval" in fields:
        fields["interval"] = tuple(map(float, fields["interval"]))
        if len(fields["interval"]) != 2:
            raise UserError(f"the guidance interval is {fields['interval']}: set two times")
    sampling = ImageSampling(sampler_from(process, **sampler), **fields)
    if sampling.parallel > max(learned):
        raise UserError(
            f"parallel={sampling.parallel}, and the model has learned to draw at most"
            f" {max(learned)} at once (config.input.parallel): set parallel to that or less"
        )
    return sampling


class Given(NamedTuple):
    """Tokens known beforehand, the first `count_B` cells of each row's order.

    Attributes:
        tokens_BNC: in raster order, normalised; elsewhere anything.
        count_B: how many, 0 to N. The prefix of a row holds as many.
    """

    tokens_BNC: Float[Array, "B N C"]
    count_B: Int[Array, "B"]


class Stage(NamedTuple):
    """Steps of one kind.

    Attributes:
        first: number of tokens known before its first step.
        groups: number of steps.
        width: K, tokens of a step.
        before: tokens of the step before its first one, 0 if there is none.
        guided: whether there is guidance.
        sampler: of the diffusion head.
    """

    first: int
    groups: int
    width: int
    before: int
    guided: bool
    sampler: Sampler


def stages(count: int, how: ImageSampling) -> list[Stage]:
    """How `count` tokens are made; the widths of successive stages never fall."""
    found: list[Stage] = []
    known = 0
    for width in group_sizes(count, how.parallel, how.growth):
        sampler = how.sampler
        if how.last_steps is not None:
            bucket = min(known * _BUCKETS // count, _BUCKETS - 1)
            span = how.last_steps - sampler.steps
            sampler = sampler.with_steps(sampler.steps + round(span * bucket / (_BUCKETS - 1)))
        kind = (width, known < how.guided * count, sampler)
        if found and (found[-1].width, found[-1].guided, found[-1].sampler) == kind:
            found[-1] = found[-1]._replace(groups=found[-1].groups + 1)
        else:
            before = found[-1].width if found else 0
            found.append(Stage(known, 1, width, before, *kind[1:]))
        known += width
    return found


class _Fixed(NamedTuple):
    """What stays the same while pictures are made.

    Attributes:
        valid_RP: positions of the prefix that are looked at; R = G B rows, branch by branch.
        base_R: RoPE position of what stands where token 0 is asked for.
        boi_BD: embedding of BOI, fed where there is no token to feed.
    """

    valid_RP: Array
    base_R: Array
    boi_BD: Array
    order_BN: Array
    key_B: Array
    count_B: Array
    guidance: tuple[Array, ...]
    temperature: Array


class _Progress(NamedTuple):
    """What changes: the cache, and the tokens known so far, in raster order."""

    cache: Cache
    tokens_BNC: Array


def branched(
    branches: Sequence[list[TokenSequence]], length: int, share: bool = True
) -> dict[str, np.ndarray]:
    """The prefixes of all branches as the rows of one batch, the most conditional branch first.

    Branches look at the same pictures, or at none: they are kept once, and seen by the vision tower
    once. Where the least conditional branch is the same null text in all rows, shorter or longer,
    the longest stands for them all: a causal model computes the same for every beginning of it.

    Args:
        share: whether it may stand for them all; not where rows are spread over devices.
    """
    *others, last = branches
    if share and others and len(last) > 1 and _nested(last) and not len(others[0][0].images):
        branches = [*others, [max(last, key=len)]]
    return stack([s for sequences in branches for s in sequences], length, shown=branches[0])


def _nested(sequences: list[TokenSequence]) -> bool:
    """Whether these are beginnings of one causal text, but for their last positions."""
    longest = max(sequences, key=len)
    if not (longest.step == 1).all():
        return False
    return all(
        np.array_equal(s.tokens[:-1], longest.tokens[: len(s) - 1])
        and (s.modality[:-1] == Modality.TEXT).all()
        for s in sequences
    )


@functools.partial(jax.jit, static_argnums=0, static_argnames="how")
def images(
    functional: Functional,
    params: Params,
    prefix: Batch,
    order_BN: Int[Array, "B N"],
    entropy_B2: Entropy,
    guidance: tuple[ArrayLike, ...],
    temperature: ArrayLike,
    given: Given | None = None,
    *,
    how: ImageSampling,
) -> Float[Array, "B N C"]:
    """Image tokens, normalised, in raster order.

    Args:
        functional, params: the UniFluid.
        prefix: from `branched`: rows up to and with the position that asks for the first token;
            one row of the least conditional branch may stand for all.
        order_BN: the order in which the grid cells are decoded.
        entropy_B2: 64 bits per row; the row's noise depends on them alone.
        guidance: a scale for each branch but the last, a scalar or a value per row: for (text,
            none) that of the text; for (text and source, source, none) those of text and source.
            Empty without guidance: one branch.
        temperature: of the sampler, scalar or one per row.
        given: tokens known beforehand, which the result holds unchanged.
        how: all other settings.
    """
    model: UniFluid = functional.bind(params).unstacked()
    fixed, progress = _begin(model, prefix, order_BN, entropy_B2, guidance, temperature, given)
    for stage in stages(order_BN.shape[1], how):
        fixed, progress = _needed(fixed, progress, stage)

        def body(
            group: Array, progress: _Progress, fixed: _Fixed = fixed, stage: Stage = stage
        ) -> _Progress:
            known = stage.first + group * stage.width
            return _step(model, fixed, progress, known, stage, how)

        low = 0 if given is None else _passed(fixed.count_B.min(), stage)
        progress = jax.lax.fori_loop(low, stage.groups, body, progress)
    return progress.tokens_BNC


def stream(
    functional: Functional,
    params: Params,
    prefix: Mapping[str, ArrayLike],
    order_BN: ArrayLike,
    entropy_B2: Entropy,
    guidance: tuple[ArrayLike, ...],
    temperature: ArrayLike,
    given: Given | None = None,
    *,
    how: ImageSampling,
) -> Iterator[tuple[Float[Array, "B N C"], int]]:
    """As `images`, a step at a time: the tokens so far (0 where unknown), and how many are known.

    The first yield shows what is given, the last is what `images` returns.
    """
    least = 0 if given is None else int(np.min(given.count_B))
    if given is not None:
        known = np.argsort(order_BN, axis=1) < given.count_B[:, None]
        given = given._replace(tokens_BNC=np.where(known[:, :, None], given.tokens_BNC, 0))
    fixed, progress = _started(
        functional, params, prefix, order_BN, entropy_B2, guidance, temperature, given
    )
    # Handed out as copies: the next step overwrites its buffers.
    yield jnp.copy(progress.tokens_BNC), least
    for stage in stages(order_BN.shape[1], how):
        fixed, progress = _needed(fixed, progress, stage)
        for group in range(int(_passed(least, stage)), stage.groups):
            known = stage.first + group * stage.width
            progress = _stepped(functional, params, fixed, progress, known, stage=stage, how=how)
            yield jnp.copy(progress.tokens_BNC), known + stage.width


def _needed(fixed: _Fixed, progress: _Progress, stage: Stage) -> tuple[_Fixed, _Progress]:
    """What a stage needs: without guidance the rows of the most conditional branch alone."""
    if stage.guided or not fixed.guidance:
        return fixed, progress
    rows = len(fixed.order_BN)
    fixed = fixed._replace(valid_RP=fixed.valid_RP[:rows], base_R=fixed.base_R[:rows], guidance=())
    return fixed, progress._replace(cache=rows_of(progress.cache, np.arange(rows)))


def _passed(least: ArrayLike, stage: Stage) -> Array:
    """Steps of a stage that draw nothing, when every row has `least` tokens given or more."""
    return jnp.clip((least - stage.first) // stage.width, 0, stage.groups)


@functools.partial(jax.jit, static_argnums=0)
def _started(functional, params, *arguments):
    return _begin(functional.bind(params), *arguments)


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("stage", "how"), donate_argnames="progress"
)
def _stepped(functional, params, fixed, progress, known, *, stage, how):
    return _step(functional.bind(params), fixed, progress, known, stage, how)


def _begin(
    model: UniFluid,
    prefix: Batch,
    order_BN: Array,
    entropy_B2: Entropy,
    guidance: tuple[Array, ...],
    temperature: Array,
    given: Given | None,
) -> tuple[_Fixed, _Progress]:
    """Feeds the prefixes, all but their last position, which belongs to the first step."""
    (rows, count), branches = order_BN.shape, len(guidance) + 1
    fed, length = prefix["segment"].shape
    shared = branches > 1 and rows > 1 and fed == (branches - 1) * rows + 1
    if not shared and fed != branches * rows:
        raise ValueError(f"{fed} prefixes for {branches} branches of {rows} pictures")
    if given is None:
        given = Given(
            jnp.zeros((rows, count, model.config.head.token_dim), jnp.float32),
            jnp.zeros(rows, jnp.int32),
        )
    length_F = (prefix["segment"] > 0).sum(axis=1) - 1
    valid_FP = jnp.arange(length)[None] < length_F[:, None]
    prefix = {**prefix, "segment": valid_FP.astype(jnp.int32)}
    cache = _filled(model, prefix, count)
    # Rows of the least conditional branch are as long as those of the most conditional one, and end
    # alike; where one row stands for all of them, only what was before the end is its own.
    row_R, owner_R = (jnp.arange(branches * rows),) * 2
    if shared:
        row_R = jnp.where(row_R < fed - 1, row_R, row_R % rows)
        owner_R = jnp.minimum(owner_R, fed - 1)
        cache = rows_of(cache, owner_R)
    length_R = length_F[row_R]
    base_R = length_R - jnp.tile(given.count_B, branches)
    boi_B1 = jnp.take_along_axis(prefix["tokens"][:rows], base_R[:rows, None], axis=1)
    fixed = _Fixed(
        valid_RP=jnp.arange(length)[None] < length_R[:, None],
        base_R=base_R,
        boi_BD=model.backbone.embed(boi_B1)[:, 0],
        order_BN=order_BN,
        key_B=keys_of(entropy_B2),
        count_B=given.count_B,
        guidance=tuple(jnp.asarray(scale, jnp.float32) for scale in guidance),
        temperature=jnp.asarray(temperature, jnp.float32),
    )
    return fixed, _Progress(cache, given.tokens_BNC)


def _filled(model: UniFluid, prefix: Batch, room: int) -> Cache:
    """The cache of prefixes; where all are short, of the first half of their positions alone."""
    length = prefix["segment"].shape[1]
    half = (length + 1) // 2

    def filled(part: int, prefix: Batch) -> Cache:
        images = prefix["images"]
        prefix = {name: x[:, :part] for name, x in prefix.items()} | {"images": images}
        return fill(model, prefix, length - part + room)[1]

    return jax.lax.cond(
        prefix["segment"][:, half:].any(),
        functools.partial(filled, length),
        functools.partial(filled, half),
        prefix,
    )


def _step(
    model: UniFluid,
    fixed: _Fixed,
    progress: _Progress,
    known: ArrayLike,
    stage: Stage,
    how: ImageSampling,
) -> _Progress:
    """Draws the group that follows the first `known` tokens.

    What asks for token j has slot j behind the prefix. A group of rows of which some are given is
    drawn like any other, and what was drawn in place of a given token is thrown away.
    """
    count, branches = fixed.order_BN.shape[1], len(fixed.guidance) + 1
    length = fixed.valid_RP.shape[1]
    index_K = known + jnp.arange(stage.width)
    cell_BK = jax.lax.dynamic_slice_in_dim(fixed.order_BN, known, stage.width, axis=1)
    x_RKD = _asking(model, fixed, progress.tokens_BNC, known, stage, cell_BK)
    count_R = jnp.tile(fixed.count_B, branches)
    hidden_RKD, cache = model.backbone(
        x_RKD,
        fixed.base_R[:, None] + index_K[None],
        _visible(fixed.valid_RP, count_R, index_K, length + count),
        progress.cache,
        length + index_K[0],
    )
    z_RKD = model.condition(hidden_RKD, jnp.tile(cell_BK, (branches, 1)))
    x_BKC = _draw(model, fixed, z_RKD, known, count, stage, how)
    row_B1 = jnp.arange(len(cell_BK))[:, None]
    tokens_BNC = progress.tokens_BNC
    mine_BK = index_K[None] >= fixed.count_B[:, None]
    x_BKC = jnp.where(mine_BK[:, :, None], x_BKC, tokens_BNC[row_B1, cell_BK])
    return _Progress(cache, tokens_BNC.at[row_B1, cell_BK].set(x_BKC))


def _asking(
    model: UniFluid,
    fixed: _Fixed,
    tokens_BNC: Array,
    known: ArrayLike,
    stage: Stage,
    cell_BK: Array,
) -> Float[Array, "R K D"]:
    """Embeddings that ask for a group, laid out as in training (`sequence.generation`).

    Given tokens are as many groups of one; a group that some of them fall into is the rest of it.
    """
    index_K = known + jnp.arange(stage.width)
    count_B = fixed.count_B
    # The last of a group are fed the group before, from its first token `before` on.
    width_B = stage.width - jnp.maximum(count_B - known, 0)
    fed_BK = index_K[None] - width_B[:, None]
    before = known - jnp.where(known == stage.first, stage.before, stage.width)
    before_B = jnp.where(count_B < known, jnp.maximum(before, count_B), count_B - 1)
    has_BK = fed_BK >= jnp.maximum(before_B, 0)[:, None]
    fed_cell_BK = jnp.take_along_axis(fixed.order_BN, jnp.maximum(fed_BK, 0), axis=1)
    token_BKC = jnp.take_along_axis(tokens_BNC, fed_cell_BK[:, :, None], axis=1)
    content_BKD = model.embed_content(token_BKC, fed_cell_BK)
    fed_BKD = jnp.where(has_BK[:, :, None], content_BKD, fixed.boi_BD[:, None])
    asked_BKD = fed_BKD + model.embed_target(cell_BK)
    return jnp.tile(asked_BKD, (len(fixed.guidance) + 1, 1, 1))


def _visible(valid_RP: Array, count_R: Array, index_K: Array, slots: int) -> Bool[Array, "R K S"]:
    """Who sees which slots: all of a group the prefix, and what has asked for tokens up to its
    own; for given tokens, which are in the prefix, nothing has."""
    token_S = jnp.arange(slots) - valid_RP.shape[1]  # negative in the prefix
    asked_RS = (token_S[None] >= count_R[:, None]) & (token_S <= index_K[-1])[None]
    prefix_RS = jnp.pad(valid_RP, ((0, 0), (0, slots - valid_RP.shape[1])))
    seen_RS = prefix_RS | ((token_S >= 0)[None] & asked_RS)
    return jnp.broadcast_to(seen_RS[:, None], (len(count_R), len(index_K), slots))


def _draw(
    model: UniFluid,
    fixed: _Fixed,
    z_RKD: Array,
    known: ArrayLike,
    count: int,
    stage: Stage,
    how: ImageSampling,
) -> Float[Array, "B K C"]:
    """Tokens from the diffusion head. Token j of a row draws from the row's key folded with j."""
    dim, branches = model.config.head.token_dim, len(fixed.guidance) + 1
    z_GBKD = z_RKD.reshape(branches, -1, *z_RKD.shape[1:])
    key_BK = jax.vmap(
        lambda key: jax.vmap(lambda j: jax.random.fold_in(key, j))(known + jnp.arange(stage.width))
    )(fixed.key_B)

    def conditional(x_BKC: Array, t: Array) -> Array:
        return model.head(x_BKC, t, z_GBKD[0])

    predict: Predict | Within = conditional
    if branches > 1:
        fraction = (known + stage.width) / count
        scales = tuple(
            _column(guidance_at(how.schedule, scale, fraction, how.power))
            for scale in fixed.guidance
        )
        everything = guided(lambda x_1BKC, t: model.head(x_1BKC, t, z_GBKD), scales, dim)
        predict = Within(how.interval, everything, conditional)
    x_BKC = stage.sampler(key_BK, predict, dim, _column(fixed.temperature))
    if how.limit is None:
        return x_BKC
    length_BK1 = jnp.sqrt(jnp.square(x_BKC).mean(axis=-1, keepdims=True))
    return x_BKC * jnp.minimum(1, how.limit / jnp.maximum(length_BK1, 1e-6))


def _column(value: Array) -> Array:
    """A scalar, or a value per row made to broadcast over the row's tokens."""
    return value[:, None] if value.ndim else value
