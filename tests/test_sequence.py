"""Layouts, masks and slots against the paper's figure, by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unifluid_jax import sequence
from unifluid_jax.errors import UserError
from unifluid_jax.sequence import Latents, Layout, Modality

LAYOUT = Layout(
    bos=2, eos=1, boi=4, null=5, separator=6, vision_tokens=3, image_tokens=4, token_dim=2
)
IMAGE = np.full((8, 8, 3), 7, np.uint8)
ORDER = np.array([2, 0, 3, 1], np.int32)


def latents(start=0.0):
    mean = start + np.arange(8, dtype=np.float32).reshape(4, 2)
    return Latents(mean=mean, std=mean / 100)


def test_understanding_supervises_the_answer_and_eos():
    s = sequence.understanding(LAYOUT, IMAGE, prompt=[10, 11], answer=[20, 21])
    np.testing.assert_array_equal(s.tokens, [0, 0, 0, 2, 10, 11, 6, 20, 21])
    np.testing.assert_array_equal(s.modality, [Modality.VISION] * 3 + [Modality.TEXT] * 6)
    supervised = s.text_weight > 0
    np.testing.assert_array_equal(np.flatnonzero(supervised), [6, 7, 8])
    np.testing.assert_array_equal(s.text_target[supervised], [20, 21, LAYOUT.eos])
    assert not s.image_weight.any() and s.images.shape == (1, 8, 8, 3)


def test_understanding_prefix_is_the_start_of_the_whole():
    whole = sequence.understanding(LAYOUT, IMAGE, [10, 11], [20, 21])
    prefix = sequence.understanding(LAYOUT, IMAGE, [10, 11], None)
    np.testing.assert_array_equal(prefix.tokens, whole.tokens[: len(prefix)])
    assert prefix.tokens[-1] == LAYOUT.separator and not prefix.text_weight.any()


def test_generation_has_n_inputs_for_n_tokens_in_order():
    s = sequence.generation(LAYOUT, [10, 11], latents(), ORDER)
    np.testing.assert_array_equal(s.tokens[:4], [2, 10, 11, LAYOUT.boi])
    assert len(s) == 3 + 4
    np.testing.assert_array_equal(s.modality[3:], [Modality.TEXT] + [Modality.LATENT] * 3)
    np.testing.assert_array_equal(s.target_position, [-1, -1, -1, 2, 0, 3, 1])
    np.testing.assert_array_equal(s.content_position, [-1, -1, -1, -1, 2, 0, 3])
    np.testing.assert_array_equal(s.latent_mean[3:], latents().mean[ORDER])
    np.testing.assert_array_equal(s.latent_std[3:], latents().std[ORDER])
    np.testing.assert_array_equal(s.image_weight, [0, 0, 0, 1, 1, 1, 1])


def test_raster_is_the_identity_order():
    np.testing.assert_array_equal(sequence.raster(LAYOUT), [0, 1, 2, 3])


def test_generation_prefix_ends_with_boi_and_its_first_target():
    s = sequence.generation(LAYOUT, [10], None, ORDER)
    np.testing.assert_array_equal(s.tokens, [2, 10, LAYOUT.boi])
    np.testing.assert_array_equal(s.target_position, [-1, -1, 2])
    assert not s.image_weight.any()


@pytest.mark.parametrize("target", [None, latents()], ids=["prefix", "whole"])
@pytest.mark.parametrize("views", [None, (IMAGE, None), (None, latents(50)), (IMAGE, latents(50))])
def test_a_dropped_prompt_is_as_many_null_tokens(views, target):
    def make(prompt):
        if views is None:
            return sequence.generation(LAYOUT, prompt, target, ORDER)
        return sequence.editing(LAYOUT, *views, prompt, target, ORDER)

    whole = make([10, 11, 12])
    null, expected = sequence.dropped(LAYOUT, whole), make([LAYOUT.null] * 3)
    for field in dataclasses.fields(null):
        np.testing.assert_array_equal(getattr(null, field.name), getattr(expected, field.name))
    assert 10 in whole.tokens  # it is left as it was


def test_a_text_to_be_made_has_none_to_drop():
    with pytest.raises(ValueError, match="no text before an image"):
        sequence.dropped(LAYOUT, sequence.understanding(LAYOUT, IMAGE, [10], [20]))


def test_editing_feeds_the_source_clean_and_supervises_the_target_alone():
    s = sequence.editing(LAYOUT, IMAGE, latents(50), [10], latents(), ORDER)
    # vision 3, source 4, BOS and one word, BOI and three tokens
    assert len(s) == 3 + 4 + 2 + 4
    source = slice(3, 7)
    np.testing.assert_array_equal(s.content_position[source], [0, 1, 2, 3])
    np.testing.assert_array_equal(s.target_position[source], [-1] * 4)
    np.testing.assert_array_equal(s.latent_mean[source], latents(50).mean)
    np.testing.assert_array_equal(np.flatnonzero(s.image_weight), [9, 10, 11, 12])


@pytest.mark.parametrize("vision", [True, False])
def test_editing_with_one_view(vision):
    s = sequence.editing(
        LAYOUT, IMAGE if vision else None, None if vision else latents(), [10], latents(), ORDER
    )
    assert len(s) == (3 if vision else 4) + 2 + 4
    assert len(s.images) == int(vision)


def test_editing_without_a_view_of_its_source_is_refused():
    with pytest.raises(UserError, match="input.edit_vision,.*input.edit_latents or both"):
        sequence.editing(LAYOUT, None, None, [10], latents(), ORDER)


def test_bidirectional_prefix_is_one_causal_step():
    layout = Layout(**{**vars(LAYOUT), "bidirectional_prefix": True})
    s = sequence.generation(layout, [10, 11], latents(), ORDER)
    np.testing.assert_array_equal(s.step, [1, 0, 0, 1, 1, 1, 1])
    mask = sequence.attention_mask(jnp.asarray(s.step[None]), jnp.ones((1, len(s)), int))[0]
    assert mask[:3, :3].all() and not mask[0, 3]


def slow_mask(step, segment):
    causal = np.cumsum(step)
    return [
        [
            bool(causal[j] <= causal[i] and segment[i] == segment[j] and segment[i] > 0)
            for j in range(len(step))
        ]
        for i in range(len(step))
    ]


def test_mask_equals_its_definition():
    rng = np.random.default_rng(0)
    step = rng.integers(0, 2, (3, 12)).astype(np.int32)
    segment = np.sort(rng.integers(0, 4, (3, 12)), axis=1)[:, ::-1].astype(np.int32).copy()
    mask = sequence.attention_mask(jnp.asarray(step), jnp.asarray(segment))
    np.testing.assert_array_equal(
        mask, [slow_mask(*row) for row in zip(step, segment, strict=True)]
    )


def test_slots_hold_every_target_once():
    weight = np.array([[0, 1, 0, 2, 0], [0, 0, 0, 0, 0], [3, 0, 0, 0, 1]], np.float32)
    index, weights = jax.jit(sequence.slots, static_argnums=1)(jnp.asarray(weight), 3)
    np.testing.assert_array_equal(weights, [[1, 2, 0], [0, 0, 0], [3, 1, 0]])
    np.testing.assert_array_equal(index[0, :2], [1, 3])
    np.testing.assert_array_equal(index[2, :2], [0, 4])


@pytest.mark.parametrize(
    "groups, step, behind, content",
    [
        ([1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [-1, 2, 0, 3]),
        ([2, 2], [1, 0, 1, 0], [0, 0, 2, 2], [-1, -1, 2, 0]),
        ([4], [1, 0, 0, 0], [0, 0, 0, 0], [-1, -1, -1, -1]),
        # A longer group than the one before: its last positions are fed.
        ([1, 3], [1, 1, 0, 0], [0, 0, 0, 3], [-1, -1, -1, 2]),
        ([1, 1, 2], [1, 1, 1, 0], [0, 1, 0, 2], [-1, 2, -1, 0]),
    ],
)
def test_groups_are_steps_fed_the_group_before(groups, step, behind, content):
    s = sequence.generation(LAYOUT, [10, 11], latents(), ORDER, groups=groups)
    assert len(s) == 3 + 4
    np.testing.assert_array_equal(s.step[3:], step)
    np.testing.assert_array_equal(s.behind[3:], behind)
    np.testing.assert_array_equal(s.content_position[3:], content)
    is_boi = np.array(content) < 0
    np.testing.assert_array_equal(s.modality[3:] == Modality.TEXT, is_boi)
    np.testing.assert_array_equal(s.tokens[3:], np.where(is_boi, LAYOUT.boi, 0))
    # All else is as with one token at a time.
    alone = sequence.generation(LAYOUT, [10, 11], latents(), ORDER)
    for name in ("position", "target_position", "latent_mean", "latent_std", "image_weight"):
        np.testing.assert_array_equal(getattr(s, name), getattr(alone, name))
    # What is fed is the latent of the cell that it is said to be.
    at = np.flatnonzero(s.modality == Modality.LATENT)
    fed = s.latent_mean[at - s.behind[at]]
    np.testing.assert_array_equal(fed, latents().mean[s.content_position[at]])


def test_all_of_a_group_see_each_other_and_nothing_after():
    s = sequence.generation(LAYOUT, [10], latents(), ORDER, groups=[2, 2])
    mask = sequence.attention_mask(jnp.asarray(s.step[None]), jnp.ones((1, len(s)), int))[0]
    np.testing.assert_array_equal(mask.sum(axis=1), [1, 2, 4, 4, 6, 6])


def test_group_sizes():
    sizes = sequence.group_sizes
    assert sizes(16, 1, "constant") == sizes(16, 1, "cosine") == [1] * 16
    assert sizes(16, 4, "constant") == [4, 4, 4, 4]
    assert sizes(16, 5, "constant") == [1, 5, 5, 5]
    assert sizes(4, 9, "constant") == sizes(4, 9, "cosine") == [4]
    assert sizes(256, 32, "cosine") == [5, 14, 24, 32, 39, 44, 48, 50]
    for count in (1, 7, 16, 256):
        for parallel in (1, 2, 3, 5, 8, 300):
            for growth in ("constant", "cosine"):
                found = sizes(count, parallel, growth)
                assert sum(found) == count and min(found) >= 1
                assert found == sorted(found) and len(found) == -(-count // min(parallel, count))


@pytest.mark.parametrize("given", [0, 1, 3, 4])
def test_given_tokens_are_part_of_the_prefix(given):
    shifted = sequence.generation(LAYOUT, [10], latents(), ORDER, given)
    whole = sequence.generation(LAYOUT, [10], latents(), ORDER)
    known = min(given, 3)  # the last place asks for the last token, given or not
    assert len(shifted) == 2 + known + 1 and not shifted.image_weight.any()
    for name in (
        "tokens", "modality", "position", "behind", "content_position", "target_position"
    ):  # fmt: skip
        np.testing.assert_array_equal(getattr(shifted, name), getattr(whole, name)[: len(shifted)])
    np.testing.assert_array_equal(shifted.latent_mean[2 : 2 + known], latents().mean[ORDER[:known]])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_dropped_source_leaves_null_tokens_in_its_place(bidirectional):
    layout = dataclasses.replace(LAYOUT, bidirectional_prefix=bidirectional)
    kept = sequence.editing(layout, IMAGE, latents(50), [10], latents(), ORDER)
    s = sequence.dropped(layout, kept, source=True)
    assert len(s) == len(kept) and len(s.images) == 0
    np.testing.assert_array_equal(s.tokens[:9], [LAYOUT.null] * 7 + [LAYOUT.bos, LAYOUT.null])
    assert (s.modality[:9] == Modality.TEXT).all() and (s.content_position[:9] == -1).all()
    assert not s.latent_mean[:9].any() and not s.latent_std[:9].any()
    for name in ("position", "step"):
        np.testing.assert_array_equal(getattr(s, name), getattr(kept, name))
    for name in ("tokens", "modality", "latent_mean", "target_position", "image_weight"):
        np.testing.assert_array_equal(getattr(s, name)[9:], getattr(kept, name)[9:])


@pytest.mark.parametrize("groups", [(), (2, 2), (1, 3)], ids=str)
def test_latents_go_where_a_sequence_keeps_them(groups):
    """From the moments of all pictures of a row, each position is given what it holds."""
    images = [latents(100.0 * i) for i in range(4)]
    order = np.roll(ORDER, 1)
    parts = [
        sequence.generation(LAYOUT, [10], images[0], ORDER, groups=groups),
        sequence.understanding(LAYOUT, IMAGE, [10], [20]),
        sequence.editing(LAYOUT, None, images[1], [11], images[2], order, groups=groups),
        sequence.dropped(
            LAYOUT, sequence.editing(LAYOUT, IMAGE, images[3], [11], images[3], ORDER), source=True
        ),
    ]
    names = ("modality", "behind", "content_position", "target_position", "latent_mean")
    row = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    mean = row.pop("latent_mean")
    index = np.asarray(sequence.latent_index({name: x[None] for name, x in row.items()}, 4))[0]
    kept = np.concatenate([image.mean for image in images])[np.maximum(index, 0)]
    np.testing.assert_array_equal(np.where(index[:, None] >= 0, kept, 0), mean)
    assert sorted(index[index >= 0]) == list(range(16))
