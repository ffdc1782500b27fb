"""What each task takes from a record, and how it is laid out."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from unifluid_jax.errors import UserError
from unifluid_jax.input import examples
from unifluid_jax.input.examples import Example, LatentScale, Unfit, draw, take
from unifluid_jax.input.records import Record
from unifluid_jax.sequence import Latents, Modality

PICTURE = np.zeros((16, 16, 3), np.uint8)
SCALE = LatentScale(np.array([1.0, 2.0, 3.0], np.float32), np.array([2.0, 4.0, 8.0], np.float32))


def png(value, size=16):
    file = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


RECORD = Record(
    id="r",
    images=[png(10), png(20), png(30)],
    captions=[(0, "ten"), (1, "twenty")],
    questions=[(1, "how many?", "one"), (2, "why?", "so")],
    edits=[(0, 2, "make it thirty")],
    extra={},
)


@pytest.fixture
def toy_sequencer(toys, world):
    def make(**fields):
        return world(toys, **fields).sequencer

    return make


def rng(seed=0):
    return np.random.default_rng(seed)


def random_latents(seed=0):
    values = rng(seed).normal(size=(2, 4, 3)).astype(np.float32)
    return Latents(values[0], np.abs(values[1]))


def an_example(task, prompt="a red circle"):
    if task in ("caption", "vqa"):
        return Example(task, prompt, answer="a teal triangle", image=PICTURE)
    latents = {"source_latents": random_latents(1)} if task == "edit" else {}
    image = PICTURE if task == "edit" else None
    return Example(task, prompt, image=image, target_latents=random_latents(), **latents)


def test_what_is_taken_from_a_record():
    caption, vqa = take("caption", RECORD, 1), take("vqa", RECORD, 1)
    assert (caption.prompt, caption.answer, caption.image[0, 0, 0]) == ("", "twenty", 20)
    assert (vqa.prompt, vqa.answer, vqa.image[0, 0, 0]) == ("why?", "so", 30)
    generate, edit = take("generate", RECORD, 0), take("edit", RECORD, 0)
    assert (generate.prompt, generate.target[0, 0, 0]) == ("ten", 10)
    assert generate.image is None and generate.answer is None
    assert (edit.prompt, edit.image[0, 0, 0], edit.target[0, 0, 0]) == ("make it thirty", 10, 30)
    assert all(e.record is RECORD for e in (caption, vqa, generate, edit))


def raw(tokens):
    """The model's tokens on the image tokenizer's own scale."""
    return tokens * SCALE.std + SCALE.mean


def test_drawn_examples_carry_the_latents_of_their_own_pictures():
    mean = np.array([10.0, 20.0, 30.0], np.float32)[:, None, None].repeat(4, 1).repeat(3, 2)
    moments = np.stack([mean, mean / 10])
    generate = draw("generate", RECORD, moments, SCALE, rng())
    value = {"ten": 10.0, "twenty": 20.0}[generate.prompt]
    np.testing.assert_allclose(raw(generate.target_latents.mean), value)
    np.testing.assert_allclose(generate.target_latents.std * SCALE.std, value / 10)
    edit = draw("edit", RECORD, moments, SCALE, rng())
    np.testing.assert_allclose(raw(edit.source_latents.mean), 10)
    np.testing.assert_allclose(raw(edit.target_latents.mean), 30)
    assert (edit.image == 10).all()


def test_normalised_latents_are_those_of_the_statistics():
    found = SCALE.normalised(np.array([[3.0, 2.0, -5.0]]), np.array([[2.0, 2.0, 2.0]]))
    np.testing.assert_allclose(found.mean, [[1, 0, -1]])
    np.testing.assert_allclose(found.std, [[1, 0.5, 0.25]])


def test_every_choice_of_a_record_is_drawn():
    random = rng()
    prompts = [draw("vqa", RECORD, None, SCALE, random).prompt for _ in range(100)]
    assert 25 < prompts.count("why?") < 75 and set(prompts) == {"why?", "how many?"}


def test_a_record_without_anything_for_a_task_is_unfit():
    bare = Record("r", [png(1)], [(0, "one")], [], [], {})
    with pytest.raises(Unfit, match="nothing for the task vqa"):
        draw("vqa", bare, None, SCALE, rng())


def test_a_record_that_names_a_picture_it_lacks_is_corrupt():
    wrong = Record("r", [png(1)], [(3, "three")], [(3, "q", "a")], [(0, -1, "x")], {})
    moments = np.zeros((2, 1, 4, 3), np.float32)
    for task, message in [("vqa", "no image 3"), ("generate", "no latents of image 3, there are")]:
        with pytest.raises(ValueError, match=message):
            draw(task, wrong, moments, SCALE, rng())
    with pytest.raises(ValueError, match="no latents of image -1"):
        draw("edit", wrong, moments, SCALE, rng())


def targets(sequence):
    return sequence.target_position >= 0


@pytest.mark.parametrize("task", ["generate", "edit"])
def test_random_order_is_a_permutation_that_the_latents_follow(toy_sequencer, task):
    sequencer, random, orders = toy_sequencer(text_drop=0.0), rng(), set()
    example = an_example(task)
    for _ in range(20):
        sequence = sequencer.train(example, random)
        at = targets(sequence)
        order = sequence.target_position[at]
        assert sorted(order) == [0, 1, 2, 3]
        np.testing.assert_array_equal(sequence.content_position[at], [-1, *order[:-1]])
        np.testing.assert_array_equal(sequence.latent_mean[at], example.target_latents.mean[order])
        np.testing.assert_array_equal(sequence.latent_std[at], example.target_latents.std[order])
        orders.add(tuple(order.tolist()))
    assert len(orders) > 8  # of 24


@pytest.mark.parametrize("task", ["generate", "edit"])
def test_raster_order_is_the_identity(toy_sequencer, task):
    sequencer, random = toy_sequencer(order="raster"), rng()
    example = an_example(task)
    for _ in range(3):
        sequence = sequencer.train(example, random)
        at = targets(sequence)
        np.testing.assert_array_equal(sequence.target_position[at], [0, 1, 2, 3])
        np.testing.assert_array_equal(sequence.latent_mean[at], example.target_latents.mean)


@pytest.mark.parametrize("task", ["generate", "edit"])
def test_text_is_dropped_at_the_configured_rate(toy_sequencer, task):
    layout = toy_sequencer().layout
    kept = toy_sequencer(text_drop=0.0).train(an_example(task), rng()).tokens
    rates = {}
    for rate in (0.0, 0.3, 1.0):
        sequencer, random, count = toy_sequencer(text_drop=rate), rng(), 0
        for _ in range(300):
            tokens = sequencer.train(an_example(task), random).tokens
            if layout.null in tokens:
                count += 1
                # Words only: BOS, BOI and what is no text stay where they are.
                words = ~np.isin(kept, [0, layout.bos, layout.boi])
                np.testing.assert_array_equal(tokens, np.where(words, layout.null, kept))
            else:
                np.testing.assert_array_equal(tokens, kept)
        rates[rate] = count / 300
    assert rates[0.0] == 0 and rates[1.0] == 1 and 0.22 < rates[0.3] < 0.38


@pytest.mark.parametrize("task", ["generate", "edit"])
def test_images_are_asked_for_in_groups_of_the_configured_sizes(toy_sequencer, task):
    sequencer, random = toy_sequencer(parallel=(1, 1, 2, 4)), rng()
    found = []
    for _ in range(200):
        laid_out = sequencer.train(an_example(task), random)
        at = targets(laid_out)
        order = laid_out.target_position[at]
        np.testing.assert_array_equal(
            laid_out.latent_mean[at], an_example(task).target_latents.mean[order]
        )
        found.append(-(-4 // int(laid_out.step[at].sum())))
    rates = {k: found.count(k) / 200 for k in (1, 2, 4)}
    assert rates == pytest.approx({1: 0.5, 2: 0.25, 4: 0.25}, abs=0.1)


@pytest.mark.parametrize("parallel", [(), (1, 0)])
def test_sizes_of_groups_that_make_no_sense_are_refused(toy_sequencer, parallel):
    with pytest.raises(UserError, match=r"config.input.parallel is .*give numbers of image tokens"):
        toy_sequencer(parallel=parallel)


def test_text_and_source_of_edits_are_dropped_together_at_a_rate_of_their_own(toy_sequencer):
    sequencer = toy_sequencer(text_drop=0.3, source_drop=0.2)
    layout, random, found = sequencer.layout, rng(), []
    for _ in range(400):
        sequence = sequencer.train(an_example("edit"), random)
        source = len(sequence.images) > 0
        assert source == (sequence.modality == Modality.VISION).any()
        assert source == ((sequence.modality == Modality.LATENT) & ~targets(sequence)).any()
        found.append((layout.null in sequence.tokens, source))
    rates = {kind: found.count(kind) / 400 for kind in set(found)}
    assert rates == pytest.approx(
        {(False, True): 0.5, (True, True): 0.3, (True, False): 0.2}, abs=0.06
    )
    generated = [sequencer.train(an_example("generate"), random).tokens for _ in range(200)]
    assert np.mean([layout.null in tokens for tokens in generated]) == pytest.approx(0.3, abs=0.1)
    with pytest.raises(UserError, match="text_drop=0.9 and source_drop=0.2 are shares"):
        toy_sequencer(text_drop=0.9, source_drop=0.2)


@pytest.mark.parametrize("task", ["caption", "vqa"])
def test_what_is_to_be_understood_keeps_its_text(toy_sequencer, task):
    sequencer = toy_sequencer(text_drop=1.0)
    sequence = sequencer.train(an_example(task, "what is it?"), rng())
    assert sequencer.layout.null not in sequence.tokens
    text = sequencer.text
    prompt = sequence.tokens[(sequence.modality == Modality.TEXT) & (sequence.text_weight == 0)]
    assert text.decode(prompt) == {"caption": "caption en", "vqa": "answer en what is it?"}[task]
    target = sequence.text_target[sequence.text_weight > 0]
    assert text.decode(target) == "a teal triangle" and target[-1] == text.eos
    np.testing.assert_array_equal(sequence.images, PICTURE[None])


@pytest.mark.parametrize(
    ("vision", "latents"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_views_of_an_edits_source_are_switched_by_flags(toy_sequencer, vision, latents):
    sequencer = toy_sequencer(edit_vision=vision, edit_latents=latents)
    example = an_example("edit")
    if not (vision or latents):
        with pytest.raises(UserError, match="input.edit_vision,.*input.edit_latents or both"):
            sequencer.train(example, rng())
        return
    sequence = sequencer.train(example, rng())
    source = (sequence.modality == Modality.LATENT) & ~targets(sequence)
    assert np.count_nonzero(sequence.modality == Modality.VISION) == 4 * vision
    assert len(sequence.images) == vision
    assert np.count_nonzero(source) == 4 * latents
    if latents:
        np.testing.assert_array_equal(sequence.latent_mean[source], example.source_latents.mean)


def test_an_edit_that_needs_latents_says_so(toy_sequencer):
    example = Example("edit", "a", image=PICTURE, target_latents=random_latents())
    with pytest.raises(ValueError, match="source's latents: encode"):
        toy_sequencer().train(example, rng())
    assert len(toy_sequencer(edit_latents=False).train(example, rng()))


def test_pictures_are_brought_to_the_vision_towers_size(toy_sequencer):
    large = np.full((40, 30, 3), 9, np.uint8)
    example = Example("vqa", "why?", answer="so", image=large)
    sequence = toy_sequencer().train(example, rng())
    assert sequence.images.shape == (1, 16, 16, 3) and (sequence.images == 9).all()


def test_texts_that_are_empty_or_too_long_are_unfit(toy_sequencer):
    sequencer = toy_sequencer(max_prompt_tokens=8)
    for task, prompt, answer in [
        ("generate", "", None),
        ("caption", "", ""),
        ("caption", "", " \n<boi>"),
    ]:
        example = Example(task, prompt, answer, PICTURE, target_latents=random_latents())
        with pytest.raises(Unfit, match="an empty text"):
            sequencer.train(example, rng())
    for task, prompt, answer in [("generate", "word " * 9, None), ("caption", "", "word " * 9)]:
        example = Example(task, prompt, answer, PICTURE, target_latents=random_latents())
        with pytest.raises(Unfit, match="more than config.input.max_prompt_tokens=8: shorten"):
            sequencer.train(example, rng())


@pytest.mark.parametrize("task", examples.TASKS)
@pytest.mark.parametrize("views", [(True, True), (False, True), (True, False)])
def test_the_largest_example_is_as_large_as_announced(toy_sequencer, task, views):
    vision, latents = views
    fields = {"edit_vision": vision, "edit_latents": latents, "text_drop": 0.0}
    text = toy_sequencer().text
    words = "a red circle and a teal triangle on a blue square"
    prompt = text.prompt(task, words)
    limit = len(text.encode(prompt))
    sequencer = toy_sequencer(max_prompt_tokens=limit, **fields)
    answer = "?" * 60
    while len(text.encode(answer)) > limit:
        answer = answer[:-1]
    assert len(text.encode(answer)) == limit
    example = an_example(task, words)
    example = Example(**{**vars(example), "answer": answer if task in ("caption", "vqa") else None})
    sequence, largest = sequencer.train(example, rng()), sequencer.largest(task)
    assert len(sequence) == largest["seq_len"]
    assert len(sequence.images) == largest["max_images"]
    assert np.count_nonzero(sequence.text_weight) == largest.get("max_text_targets", 0)
    assert np.count_nonzero(sequence.image_weight) == largest.get("max_image_targets", 0)


@pytest.mark.parametrize("task", examples.TASKS)
def test_the_prefix_to_decode_from_is_the_start_of_what_was_trained(toy_sequencer, task):
    sequencer = toy_sequencer(text_drop=0.0)
    example = an_example(task)
    whole = sequencer.train(example, rng())
    order = whole.target_position[targets(whole)]  # none, and not looked at, where text is made
    prefix = sequencer.prefix(example, order)
    for name in ("tokens", "modality", "position", "step", "content_position", "target_position"):
        np.testing.assert_array_equal(
            getattr(prefix, name), getattr(whole, name)[: len(prefix)], err_msg=name
        )
    assert not prefix.text_weight.any() and not prefix.image_weight.any()
    assert len(prefix) <= sequencer.prefix_length(task)
    if task in ("generate", "edit"):
        whole = sequencer.prefix(example, order, given=4)
        assert len(prefix) + 3 == len(whole) <= sequencer.prefix_length(task, inpainting=True)


def test_prompts_of_a_user_are_refused_in_plain_words(toy_sequencer):
    sequencer, order = toy_sequencer(), np.arange(4, dtype=np.int32)
    with pytest.raises(UserError, match="prompt of the task generate is empty"):
        sequencer.prefix(Example("generate", " "), order)
    with pytest.raises(UserError, match='prompt "word word .*\\.\\.\\.": .*max_prompt_tokens=16'):
        sequencer.prefix(Example("vqa", "word " * 20, image=PICTURE), order)
    assert len(sequencer.prefix(Example("caption", "", image=PICTURE), order))


def test_an_unknown_order_is_refused(toy_sequencer):
    with pytest.raises(UserError, match='config.input.order is "spiral".*random or raster'):
        toy_sequencer(order="spiral")


def test_the_sequencer_is_made_of_config_and_image_tokenizer(toys, world, stand_in):
    made = world(toys)
    made.config.model.bidirectional_prefix = True
    sequencer = examples.make_sequencer(made.config, stand_in("other"))
    assert sequencer.layout.vision_tokens == (16 // 8) ** 2
    assert (sequencer.layout.image_tokens, sequencer.layout.token_dim) == (4, 3)
    assert sequencer.layout.bidirectional_prefix
    assert sequencer.fingerprint == stand_in("other").fingerprint != stand_in().fingerprint


def test_it_travels_to_worker_processes(toy_sequencer):
    sequencer = toy_sequencer()
    copy = pickle.loads(pickle.dumps(sequencer))
    for task in examples.TASKS:
        one, other = (vars(s.train(an_example(task), rng(3))) for s in (sequencer, copy))
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
