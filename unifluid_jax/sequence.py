"""An example as one token sequence: modality, order, positions, mask, loss weights.

The heart of the model.

Layouts (UniFluid, architecture figure; editing is our choice):

    understanding [vision_1 ... vision_M] [BOS] [prompt ...] [answer ...]
                  loss on answer and EOS
    generation    [BOS] [prompt ...] [BOI] [v_1 ... v_{N-1}]
                  BOI -> v_1, v_1 -> v_2, ...
    editing       [vision(source)] [latents(source)] [BOS] [instruction ...] [BOI] [v_1 ... v_{N-1}]

The leading BOS of the generation layout is our choice: a pretrained Gemma expects it at the start
of every text.

Letters: T positions of one example, L positions of a packed row, B rows, C dims of an image token,
N image tokens of an image, M vision tokens of a picture, n pictures of one example.

Random order (UniFluid; how, is our choice). One permutation `order` of the N grid cells per image;
the targets come in that order, and the input at a target's position is the *previous* target's
latent with its own grid cell (`content_position`) and the grid cell it must predict
(`target_position`). BOI, the first input, has no content. Raster order is the identity permutation.

Queries (a switch, our choice) allow several tokens to be drawn at once. The image's tokens are then
laid out twice, interleaved: content c_i is fed the i-th token of the order, query q_i is a BOI with
the grid cell to predict, which the contents before it are all that it sees of the image:

    [BOS] [prompt ...] [q_1] [c_1] [q_2] [c_2] ... [q_N]      q_i -> v_i

Nothing sees a query but itself, and q_i stands where c_i stands (RoPE). So what q_i learns is to
predict any cell from any i - 1 others, whatever else is asked at the same time: k queries in one
step are each what training has shown, and 1 in a step is sequential decoding. RandAR's
position-instruction tokens (arXiv 2412.01827) need no mask of their own, but stay in the context:
twice the cache, and in a parallel step a context unlike the one of training. Both double the length
of an image in training.

Latents are kept with the position that *predicts* them, so that the input at position l is
`latent[l - 1]`: one array serves inputs and targets, and a sample of the posterior is drawn once
for both. With queries the same holds of c_i, whose latent is q_i's. Source latents (editing) and
given ones (inpainting) are kept where they are fed. Where pictures are encoded inside the training
step, these take the place of latents in a sequence, and `latent_index` says which belong where.

The mask is one integer vector (PaliGemma's idiom): `step` is 1 where a new causal step starts; with
c its cumulative sum, position i attends to j when c[j] <= c[i] and both are of one segment. All
ones: causal. Zeros over a prefix: prefix-LM.
"""

import dataclasses
import enum
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from unifluid_jax.errors import UserError


class Modality(enum.IntEnum):
    """What a position feeds to the backbone.

    BOI is TEXT: its embedding is a row of the vocabulary. So is that of a QUERY, a BOI which only
    itself attends to.
    """

    PAD = 0
    TEXT = 1
    VISION = 2
    LATENT = 3
    QUERY = 4


@dataclasses.dataclass(frozen=True)
class Layout:
    """The constants every sequence of a model shares.

    Attributes:
        bos, eos, boi, null, separator: ids of the text tokenizer. `null` stands at every prompt
            position of an example whose text was dropped for classifier-free guidance; `separator`
            ("\\n", PaliGemma) ends a prompt before its answer.
        vision_tokens: M, tokens of one picture from the vision tower.
        image_tokens: N, tokens of one image from the image tokenizer.
        token_dim: C, dims of an image token.
        bidirectional_prefix: whether the conditioning prefix attends to itself in both directions
            (prefix-LM) or causally. UniFluid does not say; causal is the default of the configs.
        queries: whether image tokens are asked for by queries.
    """

    bos: int
    eos: int
    boi: int
    null: int
    separator: int
    vision_tokens: int
    image_tokens: int
    token_dim: int
    bidirectional_prefix: bool = False
    queries: bool = False

    @property
    def target_length(self) -> int:
        """Positions that a whole image takes as a target."""
        return 2 * self.image_tokens - 1 if self.queries else self.image_tokens


@dataclasses.dataclass(frozen=True)
class Latents:
    """Posterior of an image under the image tokenizer, raster order, normalised per channel."""

    mean: Float[np.ndarray, "N C"]
    std: Float[np.ndarray, "N C"]


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One example, ready to be packed.

    All arrays have T rows, except `images`, those for the vision tower, and `pictures`, those whose
    latents the training step is to make.
    """

    tokens: Int[np.ndarray, "T"]
    modality: Int[np.ndarray, "T"]
    position: Int[np.ndarray, "T"]
    step: Int[np.ndarray, "T"]
    text_target: Int[np.ndarray, "T"]
    text_weight: Float[np.ndarray, "T"]
    latent_mean: Float[np.ndarray, "T C"]
    latent_std: Float[np.ndarray, "T C"]
    content_position: Int[np.ndarray, "T"]
    target_position: Int[np.ndarray, "T"]
    image_weight: Float[np.ndarray, "T"]
    images: UInt8[np.ndarray, "n H W 3"]
    pictures: UInt8[np.ndarray, "m h w 3"]

    def __len__(self) -> int:
        return len(self.tokens)


# The fields that have an entry per picture, not per position.
PICTURES = ("images", "pictures")
_NO_PICTURES = np.zeros((0, 0, 0, 3), np.uint8)


def understanding(
    layout: Layout, image: UInt8[np.ndarray, "H W 3"], prompt: list[int], answer: list[int] | None
) -> Sequence:
    """A picture, a question and its answer.

    With `answer=None` the prefix alone, to be decoded from. The separator is the last position of
    the prefix and predicts the first answer token; the last answer token predicts EOS.
    """
    prefix = [_vision(layout), _text(layout, [layout.bos, *prompt, layout.separator])]
    if answer is None:
        return _assemble(layout, prefix, [], image[None])
    sequence = _assemble(layout, prefix, [_text(layout, answer)], image[None])
    first = len(sequence) - len(answer) - 1
    sequence.text_target[first:] = [*answer, layout.eos]
    sequence.text_weight[first:] = 1.0
    return sequence


def generation(
    layout: Layout,
    prompt: list[int],
    target: Latents | None,
    order: Int[np.ndarray, "N"],
    given: int | None = None,
) -> Sequence:
    """A text and the image it describes, in the given order.

    With `target=None` the prefix to decode from, up to and with BOI.

    Args:
        given: with it, the prefix to decode from when the first tokens of the order, so many of
            `target`, are known: they are fed clean.
    """
    prefix = [_text(layout, [layout.bos, *prompt])]
    return _assemble(layout, prefix, [_targets(layout, target, order, given)], None)


def editing(
    layout: Layout,
    source: UInt8[np.ndarray, "H W 3"] | None,
    source_latents: Latents | None,
    instruction: list[int],
    target: Latents | None,
    order: Int[np.ndarray, "N"],
    given: int | None = None,
    *,
    source_dropped: bool = False,
) -> Sequence:
    """A source image in one or two views, an instruction, and the edited image.

    `target=None` and `given` as in `generation`.

    Args:
        source: the picture for the vision tower, or None to leave this view out.
        source_latents: the source's latents, clean and in raster order, or None to leave this view
            out.
        source_dropped: the null token stands at every position of both views, for guidance by the
            source (InstructPix2Pix).

    Raises:
        UserError: both views are left out.
    """
    check_views(source is not None, source_latents is not None)
    prefix = []
    if source is not None:
        prefix.append(_vision(layout))
    if source_latents is not None:
        prefix.append(_source(layout, source_latents))
    prefix.append(_text(layout, [layout.bos, *instruction]))
    images = None if source is None else source[None]
    if source_dropped:
        views = sum(map(len, prefix[:-1]))
        prefix, images = [_text(layout, [layout.null] * views), prefix[-1]], None
    return _assemble(layout, prefix, [_targets(layout, target, order, given)], images)


def check_views(vision: bool, latents: bool) -> None:
    """Makes sure that an edit sees its source.

    Raises:
        UserError: it is to be shown neither to the vision tower nor as latents.
    """
    if not (vision or latents):
        raise UserError(
            "an edit needs a view of its source: switch on config.input.edit_vision,"
            " config.input.edit_latents or both"
        )


def dropped(layout: Layout, prompt: list[int]) -> list[int]:
    """The prompt without its words, for classifier-free guidance.

    The learned null token stands at each of its positions.
    """
    return [layout.null] * len(prompt)


def raster(layout: Layout) -> Int[np.ndarray, "N"]:
    """The identity order."""
    return np.arange(layout.image_tokens, dtype=np.int32)


def _span(layout: Layout, length: int, modality: Modality) -> Sequence:
    """`length` empty positions of one modality.

    Nothing fed but what the caller fills in, no loss.
    """
    return Sequence(
        tokens=np.zeros(length, np.int32),
        modality=np.full(length, modality, np.int32),
        position=np.arange(length, dtype=np.int32),
        step=np.ones(length, np.int32),
        text_target=np.zeros(length, np.int32),
        text_weight=np.zeros(length, np.float32),
        latent_mean=np.zeros((length, layout.token_dim), np.float32),
        latent_std=np.zeros((length, layout.token_dim), np.float32),
        content_position=np.full(length, -1, np.int32),
        target_position=np.full(length, -1, np.int32),
        image_weight=np.zeros(length, np.float32),
        images=_NO_PICTURES,
        pictures=_NO_PICTURES,
    )


def _text(layout: Layout, ids: list[int]) -> Sequence:
    span = _span(layout, len(ids), Modality.TEXT)
    span.tokens[:] = ids
    return span


def _vision(layout: Layout) -> Sequence:
    return _span(layout, layout.vision_tokens, Modality.VISION)


def _source(layout: Layout, latents: Latents) -> Sequence:
    span = _span(layout, layout.image_tokens, Modality.LATENT)
    span.latent_mean[:] = latents.mean
    span.latent_std[:] = latents.std
    span.content_position[:] = raster(layout)
    return span


def _targets(
    layout: Layout, latents: Latents | None, order: Int[np.ndarray, "N"], given: int | None
) -> Sequence:
    """All of an image's tokens to be predicted, or what asks for one when some are `given`."""
    if given is None and latents is not None:
        return (
            _queried(layout, latents, order) if layout.queries else _shifted(layout, latents, order)
        )
    # The last of an image that is given whole is asked for all the same.
    given = min(given or 0, layout.image_tokens - 1)
    if not layout.queries:
        span = _shifted(layout, latents, order, given + 1)
        span.image_weight[:] = 0.0
        return span
    span = _span(layout, given + 1, Modality.LATENT)
    span.content_position[:given] = order[:given]
    if given:
        span.latent_mean[:given] = latents.mean[order[:given]]
    span.modality[given] = Modality.QUERY
    span.tokens[given] = layout.boi
    span.target_position[given] = order[given]
    return span


def _shifted(
    layout: Layout, latents: Latents | None, order: Int[np.ndarray, "N"], length: int | None = None
) -> Sequence:
    """BOI and all but the last of the image's tokens, or the first `length` of these positions.

    Each position comes with the token that it predicts.
    """
    length = length or layout.image_tokens
    span = _span(layout, length, Modality.LATENT)
    span.modality[0] = Modality.TEXT
    span.tokens[0] = layout.boi
    span.content_position[1:] = order[: length - 1]
    span.target_position[:] = order[:length]
    if latents is not None:
        span.latent_mean[:] = latents.mean[order[:length]]
        span.latent_std[:] = latents.std[order[:length]]
        span.image_weight[:] = 1.0
    return span


def _queried(layout: Layout, latents: Latents, order: Int[np.ndarray, "N"]) -> Sequence:
    """A query for each of the image's tokens, and behind each but the last the token's content."""
    span = _span(layout, layout.target_length, Modality.LATENT)
    query, content = slice(0, None, 2), slice(1, None, 2)
    span.modality[query] = Modality.QUERY
    span.tokens[query] = layout.boi
    span.target_position[query] = order
    span.latent_mean[query] = latents.mean[order]
    span.latent_std[query] = latents.std[order]
    span.image_weight[query] = 1.0
    span.content_position[content] = order[:-1]
    span.position[:] = np.arange(len(span)) // 2
    return span


def _assemble(
    layout: Layout,
    prefix: list[Sequence],
    suffix: list[Sequence],
    images: UInt8[np.ndarray, "n H W 3"] | None,
) -> Sequence:
    spans = [*prefix, *suffix]
    joined = {
        field.name: np.concatenate([getattr(span, field.name) for span in spans])
        for field in dataclasses.fields(Sequence)
        if field.name not in PICTURES
    }
    starts = np.cumsum([0, *map(len, spans)])
    for span, start in zip(spans, starts, strict=False):
        joined["position"][start : start + len(span)] += start
    if layout.bidirectional_prefix:
        # The first position starts step 1, the rest of the prefix joins it; the suffix goes on
        # causally.
        joined["step"][1 : sum(len(span) for span in prefix)] = 0
    images = _NO_PICTURES if images is None else images
    return Sequence(**joined, images=images, pictures=_NO_PICTURES)


def attention_mask(
    step_BL: Int[Array, "B L"],
    segment_BL: Int[Array, "B L"],
    modality_BL: Int[Array, "B L"] | None = None,
) -> Bool[Array, "B L L"]:
    """Who attends to whom: `mask[b, i, j]` is true when position i may look at position j.

    Args:
        step_BL: 1 where a new causal step starts, else 0.
        segment_BL: the example a position belongs to, 0 for padding. A pad attends to nothing and
            nothing attends to it.
        modality_BL: where there may be queries: nothing attends to one but itself.
    """
    causal_BL = jnp.cumsum(step_BL, axis=1)
    earlier = causal_BL[:, None, :] <= causal_BL[:, :, None]
    same = segment_BL[:, None, :] == segment_BL[:, :, None]
    valid = (segment_BL > 0)[:, :, None]
    mask_BLL = earlier & same & valid
    if modality_BL is None:
        return mask_BLL
    itself_LL = jnp.eye(step_BL.shape[1], dtype=bool)
    return mask_BLL & ((modality_BL != Modality.QUERY)[:, None, :] | itself_LL[None])


def fed_from_behind(
    modality_BL: Int[Array, "B L"], position_BL: Int[Array, "B L"], target_BL: Int[Array, "B L"]
) -> Bool[Array, "B L"]:
    """Whether the latents fed to a position are kept just before it, with what predicted them.

    So it is with targets, and with the content that follows its query. The content stands where the
    query stands; the first position of the next example does not.
    """
    queried_BL = modality_BL[:, :-1] == Modality.QUERY
    content_BL = queried_BL & (position_BL[:, 1:] == position_BL[:, :-1])
    return (target_BL >= 0) | jnp.pad(content_BL, ((0, 0), (1, 0)))


def latent_index(batch: Mapping[str, ArrayLike], image_tokens: int) -> Int[Array, "B L"]:
    """The latents that each position keeps, of those of all pictures of its row.

    Args:
        batch: packed rows that hold whole images, as in training; `modality`, `position`,
            `content_position` and `target_position` are looked at.
        image_tokens: N.

    Returns:
        k N + cell, where k counts the row's `pictures`; -1 where nothing is kept.
    """
    names = ("modality", "position", "content_position", "target_position")
    modality_BL, position_BL, content_BL, target_BL = (jnp.asarray(batch[name]) for name in names)
    behind_BL = fed_from_behind(modality_BL, position_BL, target_BL)
    fed_here_BL = (modality_BL == Modality.LATENT) & ~behind_BL
    kept_BL = (target_BL >= 0) | fed_here_BL
    # All N of a picture are kept before the first of the next one.
    picture_BL = (jnp.cumsum(kept_BL, axis=1) - 1) // image_tokens
    cell_BL = jnp.where(fed_here_BL, content_BL, target_BL)
    return jnp.where(kept_BL, picture_BL * image_tokens + cell_BL, -1)


def slots(
    weight_BL: Float[Array, "B L"], size: int
) -> tuple[Int[Array, "B K"], Float[Array, "B K"]]:
    """The positions of a row that carry a loss, in a fixed number of slots.

    Heads run on these slots only: the vocabulary never meets the whole batch.

    Args:
        weight_BL: loss weights, zero where there is no target. Packing guarantees at most `size`
            others per row.
        size: number of slots, K.

    Returns:
        Positions, and their weights; spare slots point at some position with weight zero.
    """
    index_BK = jnp.argsort(weight_BL == 0, axis=1, stable=True)[:, :size]
    return index_BK, jnp.take_along_axis(weight_BL, index_BK, axis=1)
