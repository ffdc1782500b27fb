"""The Python interface: what goes in, what comes out, what it depends on, what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import unifluid_jax
from tests import worlds
from unifluid_jax import checkpoint, decode, decode_image, inference, sharding
from unifluid_jax import config as configs
from unifluid_jax.decode_text import TextSampling
from unifluid_jax.errors import UserError
from unifluid_jax.input.examples import make_sequencer
from unifluid_jax.input.records import resized
from unifluid_jax.requests import texts_of
from unifluid_jax.settings import Writing


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return worlds.make_model(tmp_path_factory.mktemp("model"))


def changed(model, **changes):
    """The model under another config, with the compiled programs of the first."""
    config = configs.from_json(configs.to_json(model.config)).unlock()
    config.update_from_flattened_dict(changes)
    sequencer = make_sequencer(config, model.parts.images)
    parts = dataclasses.replace(model.parts, config=config.lock(), sequencer=sequencer)
    return inference.Model(parts, model.params)


@pytest.fixture
def draws(model, monkeypatch):
    """Replaces the decoding of images by a function of entropy and order; keeps its arguments."""
    calls = []

    def images(functional, params, rows, order, entropy, guidance, temperature, given, **how):
        branches = [
            {name: x[i : i + len(order)] for name, x in rows.items() if name != "images"}
            for i in range(0, len(rows["tokens"]), len(order))
        ]
        prefix, twin = (*branches, None)[:2]
        prefix["images"] = rows["images"]
        calls.append(
            {
                "prefix": prefix,
                "twin": twin,
                "order": order,
                "guidance": guidance,
                "given": given,
                **how,
            }
        )
        draw = jax.vmap(lambda k: jax.random.normal(k, (4, worlds.VAE.token_dim)))
        return draw(decode.keys_of(entropy)) + 0.1 * order[..., None]

    monkeypatch.setattr(decode_image, "images", images)
    return calls


def picture(seed, height=20, width=12):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def arrays(pictures):
    return [np.asarray(picture) for picture in pictures]


def assert_same(a, b, tolerance=0):
    """The same pictures; programs for other numbers of rows may round a byte the other way."""
    assert len(a) == len(b)
    for x, y in zip(arrays(a), arrays(b), strict=True):
        assert x.shape == (16, 16, 3) and x.dtype == np.uint8
        assert np.abs(x.astype(int) - y).max() <= tolerance


def assert_unlike(a, b):
    assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).mean() > 5


# --- pictures ---


def test_a_picture_depends_on_seed_prompt_and_number_and_not_on_the_batch(model):
    together = model.generate(["a red circle", "a blue square", "a"], n=2, seed=3)
    assert len(together) == 6
    alone = model.generate("a blue square", n=2, seed=3)
    assert_same(alone, together[2:4], tolerance=1)
    assert_same(model.generate("a blue square", seed=3), together[2:3], tolerance=1)
    assert_unlike(together[2], together[3])
    assert_unlike(together[0], together[2])
    assert_unlike(model.generate("a blue square", seed=4)[0], together[2])


def test_the_same_call_gives_the_same_pictures(model):
    assert_same(model.generate(["a", "b"], seed=1), model.generate(["a", "b"], seed=1))
    assert_same(model.generate(["a", "b"]), model.generate(["a", "b"], seed=0))


def test_the_numbers_of_equal_prompts_go_on(model, draws):
    first, between, second = model.generate(["a", "b", "a"])
    assert_same([first, second], model.generate("a", n=2))
    assert_same([between], model.generate("b"))
    assert_unlike(first, second)


def test_edits_depend_on_picture_and_instruction(model):
    first, second = picture(0), picture(1)
    both = model.edit([first, second], "make it blue", seed=5)
    assert_same(model.edit(second, "make it blue", seed=5), both[1:], tolerance=1)
    assert_unlike(*both)
    assert_unlike(model.edit(first, "make it red", seed=5)[0], both[0])


@pytest.mark.parametrize(("vision", "latents"), [(True, True), (True, False), (False, True)])
def test_an_edit_sees_its_source_as_the_config_says(model, draws, vision, latents):
    some = changed(model, **{"input.edit_vision": vision, "input.edit_latents": latents})
    some.edit(picture(0), "make it blue")
    (call,) = draws
    source = resized(picture(0), 16)
    assert call["prefix"]["images"].shape[1] == vision
    assert all(np.array_equal(image, source) for image in call["prefix"]["images"][0])
    images = model.parts.images
    seen = (images.encode(source[None])[0][0] - images.channel_mean) / images.channel_std
    fed = call["prefix"]["latent_mean"][0]
    start = 4 * vision
    np.testing.assert_allclose(fed[start : start + 4 * latents], seen[: 4 * latents], rtol=1e-5)
    assert not fed[start + 4 * latents :].any()


def test_pictures_are_the_decoded_raw_tokens(model, draws, monkeypatch):
    tokens = np.random.default_rng(0).normal(size=(2, 4, 32)).astype(np.float32)
    monkeypatch.setattr(decode_image, "images", lambda *args, **kwargs: jnp.asarray(tokens))
    images = model.parts.images
    expected = images.decode(tokens * images.channel_std + images.channel_mean)
    assert_same(model.generate(["a", "b"]), list(expected))


def test_few_programs_serve_any_number(model, draws):
    assert len(model.generate("a", n=5)) == 5
    assert len(model.generate(["a"])) == 1
    assert [len(call["order"]) for call in draws] == [2, 2, 2, 1]
    assert {call["prefix"]["tokens"].shape[1] for call in draws} == {18}
    assert model.generate([]) == [] and model.edit([], []) == [] and model.caption([]) == []


def test_random_order_is_a_fresh_one_for_each_picture_and_raster_is_none(model, draws):
    drawn = model.generate("a", n=8)
    orders = np.concatenate([call["order"] for call in draws])
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(4), (8, 1)))
    assert len({tuple(order) for order in orders}) > 3
    draws.clear()
    raster = model.generate("a", n=8, order="raster")
    np.testing.assert_array_equal(draws[0]["order"], [[0, 1, 2, 3]] * 2)
    for call in draws:
        np.testing.assert_array_equal(call["prefix"]["target_position"].max(axis=1), [0, 0])
    # The noise is that of the random order.
    assert max(np.abs(a.astype(int) - b).mean() for a, b in zip(
        arrays(drawn), arrays(raster), strict=True)) < 60  # fmt: skip


def test_guidance_1_needs_no_twin(model, draws):
    model.generate("a red circle", guidance=1.0)
    model.generate("a red circle", guidance=3.0)
    free, guided = draws
    assert free["twin"] is None and guided["guidance"] == (3,)
    null = model.parts.sequencer.layout.null
    assert (guided["prefix"]["tokens"] != null).all()
    count = len(model.parts.sequencer.text.encode("a red circle"))
    assert (guided["twin"]["tokens"] == null).sum() == count
    np.testing.assert_array_equal(guided["twin"]["segment"], guided["prefix"]["segment"])


def test_guidance_and_temperature_change_the_picture(model):
    plain = model.generate("a red circle", guidance=1.0)
    assert_same(plain, model.generate("a red circle", guidance=1.0))
    assert np.any(np.asarray(model.generate("a red circle", guidance=8.0)[0]) != plain[0])


def test_settings_left_out_come_from_the_config(model):
    assert model.drawing() == model.drawing(guidance=2.0, steps=2, temperature=1.0, order="random")
    other = changed(model, **{"sampling.order": "raster", "sampling.guidance": 1.0})
    assert other.drawing().order == "raster" and other.drawing().guidance == 1
    assert model.drawing(steps=5).how.sampler.steps == 5
    assert model.writing() == Writing(TextSampling(0.0, 0, 1.0), 1, 1.0)
    hot = model.writing(temperature=1.0, top_k=2)
    assert hot == Writing(TextSampling(1.0, 2, 1.0), 1, 1.0)


# --- text ---


def test_texts_do_not_depend_on_the_batch(model):
    images = [picture(i) for i in range(3)]
    captions = model.caption(images)
    assert [model.caption(image) for image in images] == [[caption] for caption in captions]
    questions = ["what?", "which color is it?", "is it red?"]
    answers = model.answer(images[0], questions)
    assert len(set(answers)) > 1
    assert answers == [model.answer(images[0], question)[0] for question in questions]
    assert model.answer(images, "what?")[0] == answers[0]


def test_sampled_texts_depend_on_the_seed_alone(model):
    images = [picture(i) for i in range(3)]
    hot = [model.caption(images, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    assert hot[0][2:] == model.caption(images[2], temperature=2.0, seed=1)
    # Greedy whatever the seed, and so is the likeliest token alone.
    assert model.caption(images, seed=2) == model.caption(images)
    assert model.caption(images, temperature=2.0, top_k=1) == model.caption(images)
    assert model.caption(images, temperature=2.0, top_p=1e-6) == model.caption(images)


# --- pictures that go in ---


def test_images_paths_and_arrays_are_one(model, tmp_path):
    array = picture(0)
    path = tmp_path / "picture.png"
    Image.fromarray(array).save(path)
    expected = model.caption(array)
    for given in (Image.fromarray(array), path, str(path), [path], (array,), array[None]):
        assert model.caption(given) == expected
    assert len(model.caption(np.stack([array, array]))) == 2


# --- inpainting ---

MASK = np.kron(np.array([[False, True], [False, False]]), np.ones((8, 8), bool))


def test_inpainting_keeps_what_is_not_masked_to_the_bit(model):
    source = picture(0)
    first, second = model.inpaint(source, MASK, "a red circle", n=2, seed=1)
    shown = resized(source, 16)
    for drawn in (first, second):
        np.testing.assert_array_equal(np.asarray(drawn)[~MASK], shown[~MASK])
    assert np.any(np.asarray(first)[MASK] != np.asarray(second)[MASK])
    assert np.any(np.asarray(first)[MASK] != shown[MASK])
    (again,) = model.inpaint([source], [MASK], ["a red circle"], seed=1)
    assert_same([again], [first], tolerance=1)


def test_what_is_kept_is_given_to_the_model_first(model, draws):
    model.inpaint(picture(0), [MASK, MASK | MASK.T], "a")
    (call,) = draws
    given, order = call["given"], call["order"]
    np.testing.assert_array_equal(given.count_B, [3, 2])
    for row, redrawn in enumerate(({1}, {1, 2})):
        assert set(order[row, int(given.count_B[row]) :].tolist()) == redrawn
    images, source = model.parts.images, resized(picture(0), 16)
    tokens = (images.encode(source[None])[0][0] - images.channel_mean) / images.channel_std
    np.testing.assert_allclose(given.tokens_BNC[0], tokens, rtol=1e-5)
    fed = call["prefix"]["latent_mean"][0]
    start = int((call["prefix"]["segment"][0] > 0).sum()) - 4
    np.testing.assert_allclose(fed[start : start + 3], tokens[order[0, :3]], rtol=1e-5)


# --- streams ---


def test_a_stream_of_pictures_ends_with_the_pictures(model):
    frames = list(model.stream("generate", ["a red circle", "a"], n=1, seed=3))
    assert len(frames) == 5 and {len(frame) for frame in frames} == {2}
    assert_same(frames[-1], model.generate(["a red circle", "a"], seed=3), tolerance=1)
    grey = [sum(np.isin(x, (225, 200)).all(axis=2).sum() // 64 for x in arrays(frame))
            for frame in frames]  # fmt: skip
    assert grey == [8, 6, 4, 2, 0]
    # What is once made stays, but for what the image tokenizer makes of its neighbours.
    (start, *_, end) = model.stream("inpaint", picture(0), MASK, "a", seed=1)
    assert np.isin(np.asarray(start[0])[MASK], (225, 200)).all()
    np.testing.assert_array_equal(np.asarray(start[0])[~MASK], np.asarray(end[0])[~MASK])
    assert_same(end, model.inpaint(picture(0), MASK, "a", seed=1), tolerance=1)


def test_pieces_of_text_join_to_the_text(model):
    image = picture(1)
    pieces = list(model.stream("answer", image, "what?", temperature=2.0, seed=3))
    assert "".join(pieces) == model.answer(image, "what?", temperature=2.0, seed=3)[0]
    assert len(pieces) > 1 and all(pieces)
    assert list(model.stream("generate", [])) == []
    with pytest.raises(UserError, match="a stream of text is of one picture and one question"):
        model.stream("caption", [image, image])
    with pytest.raises(UserError, match='no method "captoin" .did you mean "caption"'):
        model.stream("captoin", image)


# --- devices ---


def test_eight_devices_give_what_one_gives(model):
    mesh = sharding.make_mesh(ConfigDict({"data": 2, "fsdp": 2, "tensor": 2}))
    where = sharding.shardings(model.parts.model.axes, model.params, mesh)
    parts = dataclasses.replace(
        model.parts, images=model.parts.images.placed(sharding.replicated(mesh))
    )
    spread = inference.Model(parts, jax.device_put(model.params, where))
    prompts = ["a red circle", "a", "a blue square"]
    for how in ({}, {"guided": 0.5}):
        alone = model.generate(prompts, seed=2, **how)
        assert_same(spread.generate(prompts, seed=2, **how), alone, tolerance=1)
    questions = ["what?", "which color is it?", "is it red?"]
    for image in (picture(0), [picture(0), picture(1), picture(2)]):
        assert spread.answer(image, questions) == model.answer(image, questions)


# --- mistakes ---

LONG = "one two three four five six seven eight nine ten eleven twelve"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate(""), "the prompt of the task generate is empty: say"),
        (lambda m: m.generate(["a", " \n"]), "the prompt of the task generate is empty: say"),
        (lambda m: m.edit(picture(0), ""), "the prompt of the task edit is empty"),
        (lambda m: m.answer(picture(0), ""), "the prompt of the task vqa is empty"),
        (lambda m: m.generate(LONG), r'"one two .*\.\.\.": \d\d tokens, more than .*_tokens=16: s'),
        (lambda m: m.generate("a", seed=-1), "seed is -1: set it to 0 or more"),
        (lambda m: m.caption(picture(0), seed=-1), "seed is -1: set it to 0 or more"),
        (lambda m: m.generate("a", n=0), "n is 0: ask for 1 picture or more"),
        (lambda m: m.generate("a", guidance=float("nan")), "guidance is nan: set it to 0 or more"),
        (lambda m: m.generate("a", guidance=-1.0), "guidance is -1.0: set"),
        (lambda m: m.generate("a", temperature=float("inf")), "temperature is inf: set it to 0"),
        (lambda m: m.generate("a", order="spiral"), 'order is "spiral": set it to random or'),
        (lambda m: m.caption(picture(0), temperature=-1.0), "temperature is -1.0: set it to 0"),
        (lambda m: m.caption(picture(0), beams=0), "beams is 0: set it to 1 or more"),
        (lambda m: m.caption(picture(0), beams=2, temperature=1.0), "beam search draws nothing at"),
        (lambda m: m.caption(picture(0), beams=9999), "beams is 9999, the vocabulary has 1536"),
        (lambda m: m.caption(picture(0), length_penalty=-1.0), "length_penalty is -1.0: set it to"),
        (lambda m: m.generate("a", colour="red"), 'no setting "colour" of pictures: there are'),
        (lambda m: texts_of(["a", 3]), "prompts, instructions and questions are texts, got 3"),
        (lambda m: m.edit(picture(0), "a", image_guidance=2.0), "image_guidance 2.0 needs a model"),
        (lambda m: m.inpaint(picture(0), MASK & False, "a"), "the mask is black everywhere"),
        (lambda m: m.inpaint([picture(0)] * 3, [MASK] * 2, "a"), "3 pictures and 2 masks and 1 te"),
        (lambda m: m.caption(picture(0), top_k=-1), "top_k is -1: set it to 1 or more, or to 0"),
        (lambda m: m.caption(picture(0), top_p=0.0), "top_p is 0.0: set it above 0"),
        (lambda m: m.caption(picture(0), top_p=float("nan")), "top_p is nan: set it above 0"),
        (
            lambda m: m.answer([picture(0)] * 2, ["a"] * 3),
            "2 pictures and 3 texts: give as many of each, or one",
        ),
    ],
)
def test_mistakes_are_named_in_one_line(model, draws, call, message):
    with pytest.raises(UserError, match=message) as error:
        call(model)
    assert "\n" not in str(error.value)
    assert not draws, "refused before anything is drawn"


def test_too_few_steps_are_named(model):
    with pytest.raises(UserError, match="0 sampling steps: set 1 or more"):
        model.generate("a", steps=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input.text_drop": 0.0}, r"guidance 2.0 needs .* config.input.text_drop above 0: set"),
        ({"sampling.sampler.name": "ddim"}, "no sampler called 'ddim' here: choose one of euler"),
        ({"sampling.sampler.eta": 1.0}, "sampler 'euler' has no option eta"),
        ({"sampling.schedule": "steep"}, "no guidance schedule called 'steep': choose"),
        ({"sampling.batch_size": 0}, "config.sampling.batch_size is 0: set it to 1"),
    ],
)
def test_mistakes_in_the_config_are_named(model, draws, changes, message):
    broken = changed(model, **changes)
    with pytest.raises(UserError, match=message):
        broken.generate("a")
    assert not draws


def test_without_text_drop_guidance_1_works(model, draws):
    changed(model, **{"input.text_drop": 0.0}).generate("a", guidance=1.0)
    assert draws[0]["twin"] is None


def test_no_room_for_text_is_named(model):
    with pytest.raises(UserError, match="sampling.text.max_tokens is 0: set it to 1"):
        changed(model, **{"sampling.text.max_tokens": 0}).caption(picture(0))


# --- checkpoints ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with a checkpoint, the config, parameters and averages in it."""
    folder = tmp_path_factory.mktemp("run")
    config = worlds.make_config(folder)
    return folder / "run", config, *worlds.save_checkpoint(folder / "run", config)


def test_load_takes_averaged_or_raw_weights_of_a_step(run):
    workdir, config, params, ema = run
    for loaded, expected in (
        (unifluid_jax.load(workdir), ema),
        (unifluid_jax.load(str(workdir / "checkpoints" / "3"), which="params", step=3), params),
    ):
        jax.tree.map(np.testing.assert_array_equal, loaded.params, expected)
        assert configs.to_json(loaded.config) == configs.to_json(config)
    with pytest.raises(UserError, match="no checkpoint of step 4"):
        unifluid_jax.load(workdir, step=4)
    with pytest.raises(UserError, match='no model ".*nothing": no such folder'):
        unifluid_jax.load(workdir.parent / "nothing")
    with pytest.raises(UserError, match="no checkpoint in .*: give the workdir"):
        unifluid_jax.load(workdir.parent)


def test_a_config_that_does_not_fit_the_checkpoint_is_named(run):
    stored = checkpoint.stored_config(run[0]).unlock()
    stored.model.head.width = 32
    with pytest.raises(UserError, match=r"does not fit: ema/head/.*wanted float32\["):
        unifluid_jax.load(run[0], config=stored)
    stored.model.head.breadth = 32
    with pytest.raises(UserError, match='config.model.head has no option "breadth"'):
        unifluid_jax.load(run[0], config=stored)
