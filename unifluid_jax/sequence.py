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

Latents are kept with the position that *predicts* them, so that the input at position l is
`latent[l - 1]`: one array serves inputs and targets, and a sample of the posterior is drawn once
for both. Source latents (editing) are kept where they are fed.

The mask is one integer vector (PaliGemma's idiom): `step` is 1 where a new causal step starts; with
c its cumulative sum, position i attends to j when c[j] <= c[i] and both are of one segment. All
ones: causal. Zeros over a prefix: prefix-LM.
"""

import dataclasses
import enum

import jax.numpy as jnp
import numpy as np
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
    """One example, ready to be packed. All arrays have T rows, except `images`."""

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

    def __len__(self) -> int:
        return len(self.tokens)


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
    layout: Layout, prompt: list[int], target: Latents | None, order: Int[np.ndarray, "N"]
) -> Sequence:
    """A text and the image it describes, in the given order.

    With `target=None` the prefix up to and with BOI.
    """
    prefix = [_text(layout, [layout.bos, *prompt])]
    return _assemble(layout, prefix, [_targets(layout, target, order)], None)


def editing(
    layout: Layout,
    source: UInt8[np.ndarray, "H W 3"] | None,
    source_latents: Latents | None,
    instruction: list[int],
    target: Latents | None,
    order: Int[np.ndarray, "N"],
) -> Sequence:
    """A source image in one or two views, an instruction, and the edited image.

    `target=None` as in `generation`.

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
    prefix.append(_text(layout, [layout.bos, *instruction]))
    images = None if source is None else source[None]
    return _assemble(layout, prefix, [_targets(layout, target, order)], images)


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
        position=np.zeros(length, np.int32),
        step=np.ones(length, np.int32),
        text_target=np.zeros(length, np.int32),
        text_weight=np.zeros(length, np.float32),
        latent_mean=np.zeros((length, layout.token_dim), np.float32),
        latent_std=np.zeros((length, layout.token_dim), np.float32),
        content_position=np.full(length, -1, np.int32),
        target_position=np.full(length, -1, np.int32),
        image_weight=np.zeros(length, np.float32),
        images=np.zeros((0, 0, 0, 3), np.uint8),
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


def _targets(layout: Layout, latents: Latents | None, order: Int[np.ndarray, "N"]) -> Sequence:
    """BOI and all but the last of the image's tokens.

    Each position comes with the token that it predicts.
    """
    length = layout.image_tokens if latents is not None else 1
    span = _span(layout, length, Modality.LATENT)
    span.modality[0] = Modality.TEXT
    span.tokens[0] = layout.boi
    span.content_position[1:] = order[: length - 1]
    span.target_position[:] = order[:length]
    if latents is not None:
        span.latent_mean[:] = latents.mean[order]
        span.latent_std[:] = latents.std[order]
        span.image_weight[:] = 1.0
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
        if field.name != "images"
    }
    joined["position"] = np.arange(len(joined["tokens"]), dtype=np.int32)
    if layout.bidirectional_prefix:
        # The first position starts step 1, the rest of the prefix joins it; the suffix goes on
        # causally.
        joined["step"][1 : sum(len(span) for span in prefix)] = 0
    return Sequence(**joined, images=np.zeros((0, 0, 0, 3), np.uint8) if images is None else images)


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
    valid = (segment_BL > 0)[:, :, None]
    return earlier & same & valid


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
