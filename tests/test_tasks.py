"""The tasks: what they take from a config, count in a batch, and hand to evaluations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny, worlds
from unifluid_jax import tasks, trees
from unifluid_jax.contrastive import Contrastive
from unifluid_jax.errors import UserError
from unifluid_jax.image_tokenizer import ImageTokenizer
from unifluid_jax.inference import Model

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny.build(folder)
    return folder


@pytest.fixture(scope="module")
def unifluid(world):
    return tasks.make(tiny.unifluid(world))


@pytest.fixture(scope="module")
def tokenizer(world):
    return tasks.make(tiny.tokenizer(world))


@pytest.fixture(scope="module")
def siglip(world):
    return tasks.make(tiny.siglip(world))


def test_the_config_names_the_task(unifluid, tokenizer, siglip):
    assert isinstance(unifluid, tasks.UniFluidTask)
    assert isinstance(tokenizer, tasks.TokenizerTask)
    assert isinstance(siglip, tasks.SiglipTask)
    assert all(isinstance(task, tasks.Task) for task in (unifluid, tokenizer, siglip))


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (tiny.unifluid, {"task": "unifuild"}, 'config.task is "unifuild".*unifluid'),
        (tiny.unifluid, {"model.head": {"widht": 8, "depth": 1}}, 'no option "widht".*width'),
        (
            tiny.unifluid,
            {"model.vision": {"image_size": 16, "patch_size": 8}},
            "model.vision: .*missing",
        ),
        (
            tiny.unifluid,
            {"model.vision": {"patch_size": 8}},
            'config.model.vision: "image_size" is missing',
        ),
        (
            tiny.unifluid,
            {"loss": {"text_wieght": 0.1, "draws": 2}},
            'config.loss has no option "text_wieght" .did you mean "text_weight"',
        ),
        (tiny.unifluid, {"loss": {"draws": 2}}, 'config.loss: "text_weight" is missing'),
        (tiny.unifluid, {"loss": {"text_slots": 2}}, 'config.loss has no option "text_slots"'),
        (tiny.tokenizer, {"loss": {"kl": 0.1}}, 'config.loss has no option "kl".*kl_weight'),
        (
            tiny.unifluid,
            {"tokenizer": {"pth": "x"}},
            'config.tokenizer has no option "pth".*"path"',
        ),
        (tiny.unifluid, {"diffusion": {"process": "ddmp"}}, "no diffusion process called 'ddmp'"),
        (tiny.unifluid, {"input.order": "spiral"}, 'config.input.order is "spiral"'),
        (tiny.unifluid, {"tokenizer": {"path": "nowhere"}}, "no such file; set config.tokenizer"),
        (tiny.tokenizer, {"model": {"chanels": 8}}, 'config.model has no option "chanels"'),
        (
            tiny.siglip,
            {"train.accumulate": 2},
            "accumulate is 2: a picture is compared with the captions of its batch, .* set 1",
        ),
        (tiny.siglip, {"model.text": {"token": 8}}, 'config.model.text has no option "token"'),
    ],
)
def test_a_config_that_does_not_fit_is_named(world, make, changes, message):
    config = make(world).unlock()
    for key, value in changes.items():
        *groups, field = key.split(".")
        node = config
        for group in groups:
            node = node[group]
        del node[field]
        node[field] = value
    with pytest.raises(UserError, match=message):
        tasks.make(config.lock())


def test_counts_of_a_packed_batch(unifluid):
    batch = tiny.batch(unifluid._parts.sequencer.layout)
    # Rows hold 1, 2, 3, 1, ... of: 4 + 4 + 2 positions with 3 text targets; 5 + 4 with 4 image
    # targets; 4 + 4 + 5 + 4 with 4.
    assert unifluid.count(jax.tree.map(jnp.asarray, batch)) == {
        "examples": 3 * 1 + 3 * 2 + 2 * 3,
        "tokens": 8 * 10 + 5 * 9 + 2 * 17,
        "text_tokens": 8 * 6 + 5 * 6 + 2 * 6,
        "image_tokens": 5 * 3 + 2 * (4 + 3),
        "images_read": 8 + 2,
        "images_drawn": 5 + 2,
    }


def test_counts_of_the_pipelines_batches(unifluid, tokenizer):
    batch = next(unifluid.batches())
    counts = unifluid.count(jax.tree.map(jnp.asarray, batch))
    assert counts["examples"] == np.count_nonzero(batch["example_id"][..., 0] >= 0)
    assert counts["tokens"] == np.count_nonzero(batch["segment"])
    assert counts["images_drawn"] == batch["image_weight"].sum() / 4
    assert tokenizer.count(jax.tree.map(jnp.asarray, next(tokenizer.batches()))) == {"examples": 8}


def test_a_process_gets_its_rows_of_a_batch(unifluid, tokenizer, siglip):
    for task, name in ((unifluid, "tokens"), (tokenizer, "images"), (siglip, "images")):
        config = task._config.copy_and_resolve_references()
        with config.unlocked():
            config.input.streams = 2
        task = tasks.make(config.lock())
        whole = next(task.batches())[name]
        shares = [next(task.batches(rows))[name] for rows in (range(4), range(4, 8))]
        np.testing.assert_array_equal(np.concatenate(shares), whole)


def test_batches_go_on_from_a_state(unifluid):
    batches = unifluid.batches()
    next(batches)
    state = batches.get_state()
    expected = next(batches)
    again = unifluid.batches()
    again.set_state(state)
    found = next(again)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_totals(unifluid, tokenizer):
    batch = tiny.batch(unifluid._parts.sequencer.layout)
    total = unifluid.totals(jax.tree.map(jnp.asarray, batch))
    assert (total["text"], total["image"]) == (24, 28)
    assert tokenizer.totals({"images": jnp.zeros((8, 16, 16, 3), jnp.uint8)}) == 8 * 16 * 16 * 3


def test_the_tokenizers_loss_adds_up_over_the_parts_of_a_batch(tokenizer):
    params = tiny.vae_params()
    images = jnp.stack([tiny.picture(i) for i in range(4)])
    keys = jax.random.split(jax.random.key(0), 4)
    total = tokenizer.totals({"images": images})
    # Every part has two rows: one program for all.
    loss = jax.jit(
        lambda images, keys: tokenizer.loss(params, {}, {"images": images}, keys, total)[1]
    )
    halves = [loss(images[i::2], keys[i::2]) for i in range(2)]
    pairs = [loss(images[i : i + 2], keys[i : i + 2]) for i in (0, 2)]
    for name in ("loss", "mse", "kl"):
        added = [float(sum(part[name] for part in parts)) for parts in (halves, pairs)]
        assert added[0] == pytest.approx(added[1], rel=1e-5)
        assert added[0] > 0


def test_axes_name_every_dimension_of_every_parameter(unifluid, tokenizer, siglip):
    for task in (unifluid, tokenizer, siglip):
        shapes = jax.eval_shape(task.model.init, jax.random.key(0))
        axes = jax.tree.map(len, task.model.axes, is_leaf=lambda x: isinstance(x, tuple))
        assert axes == jax.tree.map(lambda leaf: leaf.ndim, shapes)


def test_a_siglip_learns_its_batch(siglip):
    """Every parameter has a gradient, and the loss falls along it."""
    batch = next(siglip.batches())
    assert batch["images"].shape == (8, 16, 16, 3) and batch["tokens"].shape == (8, 8)
    batch = jax.device_put(batch)
    assert siglip.count(batch) == {"examples": 8}
    total = siglip.totals(batch)
    assert total == 8
    params = worlds.make_params(siglip.model)

    @jax.jit
    def step(params):
        losses = lambda params: siglip.loss(params, {}, batch, jax.random.split(KEY, 8), total)  # noqa: E731
        (loss, scalars), gradient = jax.value_and_grad(losses, has_aux=True)(params)
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
        moved = jax.tree.map(lambda x, g: x - 0.1 * g / norm, params, gradient)
        return moved, loss, scalars, gradient

    params, first, scalars, gradient = step(params)
    assert np.isfinite(first) and all(np.isfinite(x) for x in scalars.values())
    for name, leaf in trees.flatten(gradient).items():
        assert np.abs(leaf).max() > 0, name
    for _ in range(10):
        params, last, _, _ = step(params)
    assert last < 0.9 * first


def test_a_siglip_knows_no_adapters(world):
    config = tiny.siglip(world).unlock()
    config.lora = {"rank": 2}
    with pytest.raises(UserError, match='config.lora is for the task "unifluid"'):
        tasks.make(config.lock())


def test_logits_of_a_siglip_are_those_of_its_model(siglip):
    """In chunks, for any number of pictures and captions, those of the training loss."""
    params = worlds.make_params(siglip.model)
    subject = siglip.subject(params)
    assert isinstance(subject, Contrastive) and subject.image_size == tiny.SIZE
    batch = next(siglip.batches())
    captions = ["a red", "green", "a a blue"]
    found = dataclasses.replace(subject, batch=2).logits(batch["images"][:5], captions)
    pair = siglip.model.bind(params)
    tokens = np.stack([subject.text.padded(caption, 8) for caption in captions])
    images, texts = jnp.asarray(batch["images"][:5] / 127.5 - 1), jnp.asarray(tokens)
    wanted = pair.logits(pair.embed_images(images), pair.embed_texts(texts))
    assert found.shape == (5, 3)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_what_evaluations_score(unifluid, tokenizer):
    assert isinstance(unifluid.subject(worlds.make_params(unifluid.model)), Model)
    params = tiny.vae_params()
    subject = tokenizer.subject(params)
    assert isinstance(subject, ImageTokenizer)
    assert subject.config == tiny.VAE and subject.params is params
    np.testing.assert_array_equal(subject.channel_mean, np.zeros(32))
    np.testing.assert_array_equal(subject.channel_std, np.ones(32))
