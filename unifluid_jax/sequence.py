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

Groups (our choice) are what several tokens are drawn at once with. The order is cut into runs of k
tokens, each of which is one causal step: its positions ask for the run's k tokens, are fed the k
tokens of the run before, and see each other.

    [BOS] [prompt ...] [BOI BOI] [v_1 v_2] [v_3 v_4] ...      BOI -> v_1, BOI -> v_2, v_1 -> v_3

Groups of one are next-token prediction. One model learns several k, a random one of
`config.input.parallel` for each image, in rows no longer than before: what RandAR's
position-instruction tokens (arXiv 2412.01827) add to the sequence, `target_position` says here.
What k above 1 costs is that the tokens of a group do not know of each other, only of their cells.

Latents are kept with the position that *predicts* them, and the input at position l is
`latent[l - behind[l]]`: one array serves inputs and targets, and a sample of the posterior is drawn
once for both. Source latents (editing) are kept where they are fed, `behind` being 0. Where
pictures are encoded inside the training step, these take the place of latents in a sequence, and
`latent_index` says which belong where.

The mask is one integer vector (PaliGemma's idiom): `step` is 1 where a new causal step starts; with
c its cumulative sum, position i attends to j when c[j] <= c[i] and both are of one segment. All
ones: causal. Zeros over a prefix: prefix-LM. Zeros over a group but its first: its tokens at once.
"""

import dataclasses
import enum
import functools
import itertools
import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from unifluid_jax.errors import UserError


class Modality(enum.IntEnum):
    """What a position feeds to the backbone.

    BOI is TEXT: its embedding is a row of the vocabulary.
    """

    PAD = 0
    TEXT = 1
    VISION = 2
    LATENT = 3


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
    behind: Int[np.ndarray, "T"]
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
    prefix = [_vision(layout), _text([layout.bos, *prompt, layout.separator])]
    if answer is None:
        return _assemble(layout, prefix, [], image[None])
    sequence = _assemble(layout, prefix, [_text(answer)], image[None])
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
    groups: Collection[int] = (),
) -> Sequence:
    """A text and the image it describes, in the given order.

    With `target=None` the prefix to decode from, up to and with BOI.

    Args:
        given: with it, the prefix to decode from when the first tokens of the order, so many of
            `target`, are known: they are fed clean.
        groups: numbers of tokens that are asked for at once, never falling, N together; one at a
            time by default.
    """
    prefix = [_text([layout.bos, *prompt])]
    return _assemble(layout, prefix, [_targets(layout, target, order, given, groups)], None)


def editing(
    layout: Layout,
    source: UInt8[np.ndarray, "H W 3"] | None,
    source_latents: Latents | None,
    instruction: list[int],
    target: Latents | None,
    order: Int[np.ndarray, "N"],
    given: int | None = None,
    groups: Collection[int] = (),
) -> Sequence:
    """A source image in one or two views, an instruction, and the edited image.

    `target=None`, `given` and `groups` as in `generation`.

    Args:
        source: the picture for the vision tower, or None to leave this view out.
        source_latents: the source's latents, clean and in raster order, or None to leave this view
            out.

    Raises:
        UserError: both views are left out.
    """
    check_views(source is not None, source_latents is not None)
    prefix = []
    if source is not None:
        prefix.append(_vision(layout))
    if source_latents is not None:
        prefix.append(_source(layout, source_latents))
    prefix.append(_text([layout.bos, *instruction]))
    images = None if source is None else source[None]
    return _assemble(layout, prefix, [_targets(layout, target, order, given, groups)], images)


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


def dropped(layout: Layout, whole: Sequence, source: bool = False) -> Sequence:
    """An image to be made, without what it is to show, for classifier-free guidance.

    The learned null token stands at each position of the prompt.

    Args:
        whole: from `generation` or `editing`.
        source: also at each position of the source's views (InstructPix2Pix).
    """
    bos = int(np.argmax(whole.modality == Modality.TEXT))  # views of a source come before it
    first = int(np.argmax(whole.target_position >= 0))
    if not bos < first:
        raise ValueError("there is no text before an image to be made")
    made = dataclasses.replace(whole, tokens=whole.tokens.copy())
    made.tokens[bos + 1 : first] = layout.null
    if not source:
        return made
    made.tokens[:bos] = layout.null
    nothing = {"modality": Modality.TEXT, "latent_mean": 0, "latent_std": 0, "content_position": -1}
    cleared = {name: getattr(whole, name).copy() for name in nothing}
    for name, value in nothing.items():
        cleared[name][:bos] = value
    return dataclasses.replace(made, **cleared, images=_NO_PICTURES)


def raster(layout: Layout) -> Int[np.ndarray, "N"]:
    """The identity order."""
    return np.arange(layout.image_tokens, dtype=np.int32)


class _Span(NamedTuple):
    """Some positions of one modality, and what they hold where it is not what `_assemble` puts."""

    length: int
    modality: Modality | Int[np.ndarray, "T"]
    fields: Mapping[str, ArrayLike] = {}


def _text(ids: list[int]) -> _Span:
    return _Span(len(ids), Modality.TEXT, {"tokens": ids})


def _vision(layout: Layout) -> _Span:
    return _Span(layout.vision_tokens, Modality.VISION)


def _source(layout: Layout, latents: Latents) -> _Span:
    fields = {"latent_mean": latents.mean, "latent_std": latents.std}
    fields["content_position"] = raster(layout)
    return _Span(layout.image_tokens, Modality.LATENT, fields)


def _targets(
    layout: Layout,
    latents: Latents | None,
    order: Int[np.ndarray, "N"],
    given: int | None,
    groups: Collection[int],
) -> _Span:
    """All of an image's tokens to be predicted, or what asks for one when some are `given`."""
    if given is None and latents is not None:
        return _asked(layout, latents, order, groups or [1] * layout.image_tokens, 1.0)
    # The last of an image that is given whole is asked for all the same.
    known = min(given or 0, layout.image_tokens - 1)
    return _asked(layout, latents, order, [1] * (known + 1), 0.0)


def _asked(
    layout: Layout,
    latents: Latents | None,
    order: Int[np.ndarray, "N"],
    groups: Collection[int],
    weight: float,
) -> _Span:
    """Positions that ask for the first tokens of the order, a group at a time.

    Each position comes with the token that it predicts.
    """
    step, behind, is_fed = _fed(tuple(groups))
    order = order[: len(step)]
    fields = {
        "step": step,
        "tokens": np.where(is_fed, 0, layout.boi),
        "behind": behind,
        "content_position": np.where(is_fed, order[np.arange(len(step)) - behind], -1),
        "target_position": order,
        "image_weight": weight,
    }
    if latents is not None:
        fields |= {"latent_mean": latents.mean[order], "latent_std": latents.std[order]}
    return _Span(len(step), np.where(is_fed, Modality.LATENT, Modality.TEXT), fields)


@functools.lru_cache(maxsize=256)
def _fed(
    groups: tuple[int, ...],
) -> tuple[Int[np.ndarray, "T"], Int[np.ndarray, "T"], Bool[np.ndarray, "T"]]:
    """Where groups start, how far behind the token was asked for that a position is fed, if it is.

    The last of a group are fed the tokens of the group before; where this one is longer, or the
    first, the others are BOI.
    """
    widths = np.array(groups, np.int32)
    first = np.cumsum(widths) - widths
    step = np.zeros(widths.sum(), np.int32)
    step[first] = 1
    behind = np.repeat(widths, widths)
    before = np.repeat(np.append(0, first[:-1]), widths)  # where the group before begins
    is_fed = np.arange(len(step)) - behind >= before
    return step, np.where(is_fed, behind, 0), is_fed


GROWTHS = ("constant", "cosine")


def group_sizes(count: int, parallel: int, growth: str = "constant") -> list[int]:
    """Sizes of groups, `parallel` tokens on average, never falling; they add up to `count`.

    A remainder goes first, where the least is known.

    Args:
        growth: one of `GROWTHS`: "constant", or "cosine" for few tokens in the first groups and
            many in the last (MaskGIT).
    """
    parallel = min(parallel, count)
    steps = -(-count // parallel)
    if growth == "constant":
        rest = count - (steps - 1) * parallel
        return [rest] + [parallel] * (steps - 1)
    known = [count * (1 - math.cos(math.pi / 2 * s / steps)) for s in range(steps + 1)]
    sizes = sorted(max(1, round(b) - round(a)) for a, b in itertools.pairwise(known))
    sizes[-1] += max(count - sum(sizes), 0)
    while sum(sizes) > count:  # at least one in each: taken back from the largest
        sizes[sizes.index(max(sizes))] -= 1
    return sorted(sizes)


def _assemble(
    layout: Layout,
    prefix: list[_Span],
    suffix: list[_Span],
    images: UInt8[np.ndarray, "n H W 3"] | None,
) -> Sequence:
    """The spans one behind the other: nothing fed but what they hold, no other loss."""
    length = sum(span.length for span in (*prefix, *suffix))
    whole = Sequence(
        tokens=np.zeros(length, np.int32),
        modality=np.empty(length, np.int32),
        position=np.arange(length, dtype=np.int32),
        step=np.ones(length, np.int32),
        text_target=np.zeros(length, np.int32),
        text_weight=np.zeros(length, np.float32),
        latent_mean=np.zeros((length, layout.token_dim), np.float32),
        latent_std=np.zeros((length, layout.token_dim), np.float32),
        behind=np.zeros(length, np.int32),
        content_position=np.full(length, -1, np.int32),
        target_position=np.full(length, -1, np.int32),
        image_weight=np.zeros(length, np.float32),
        images=_NO_PICTURES if images is None else images,
        pictures=_NO_PICTURES,
    )
    start = 0
    for span in (*prefix, *suffix):
        stop = start + span.length
        whole.modality[start:stop] = span.modality
        for name, values in span.fields.items():
            getattr(whole, name)[start:stop] = values
        start = stop
    if layout.bidirectional_prefix:
        # The first position starts step 1, the rest of the prefix joins it; the suffix goes on
        # causally.
        whole.step[1 : sum(span.length for span in prefix)] = 0
    return whole


def attention_mask(
    step_BL: Int[Array, "B L"], segment_BL: Int[Array, "B L"]
) -> Bool[Array, "B L L"]:
    """Who attends to whom: `mask[b, i, j]` is true when position i may look at position j.

    Args:
        step_BL: 1 where a new causal step starts, else 0.
        segment_BL: the example a position belongs to, 0 for padding. A pad attends to nothing and
            nothing attends to it.
    """
    causal_BL = jnp.cumsum(step_BL, axis=1)
    earlier = causal_BL[:, None, :] <= causal_BL[:, :, None]
    same = segment_BL[:, None, :] == segment_BL[:, :, None]
    return earlier & same & (segment_BL > 0)[:, :, None]


def latent_index(batch: Mapping[str, ArrayLike], image_tokens: int) -> Int[Array, "B L"]:
    """The latents that each position keeps, of those of all pictures of its row.

    Args:
        batch: packed rows that hold whole images, as in training; `modality`, `behind`,
            `content_position` and `target_position` are looked at.
        image_tokens: N.

    Returns:
        k N + cell, where k counts the row's `pictures`; -1 where nothing is kept.
    """
    names = ("modality", "behind", "content_position", "target_position")
    modality_BL, behind_BL, content_BL, target_BL = (jnp.asarray(batch[name]) for name in names)
    fed_here_BL = (modality_BL == Modality.LATENT) & (behind_BL == 0)
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
