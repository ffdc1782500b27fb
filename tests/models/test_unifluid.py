"""The joined model and its loss on real packed sequences.

Causality, order, packing, accumulation.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unifluid_jax import losses, sequence
from unifluid_jax.diffusion import process_from
from unifluid_jax.models.functional import Functional
from unifluid_jax.models.gemma import GemmaConfig
from unifluid_jax.models.head import HeadConfig
from unifluid_jax.models.siglip import SiglipConfig
from unifluid_jax.models.unifluid import UniFluid, UniFluidConfig
from unifluid_jax.sequence import Latents, Layout

C, N, WIDTH = 3, 4, 16
CONFIG = UniFluidConfig(
    backbone=GemmaConfig(
        vocab_size=30, width=WIDTH, depth=2, mlp_dim=32, heads=2, kv_heads=1, head_dim=8,
        window=6, scan_layers=False,
    ),
    vision=SiglipConfig(image_size=8, patch_size=4, width=16, depth=1, heads=2, mlp_dim=16),
    head=HeadConfig(token_dim=C, cond_dim=WIDTH, width=16, depth=1, out_dim=C),
    image_tokens=N,
)  # fmt: skip
LAYOUT = Layout(
    bos=2, eos=1, boi=4, null=5, separator=6, vision_tokens=4, image_tokens=N, token_dim=C
)
FLOW = process_from(process="flow")
OPTIONS = {"text_slots": 8, "image_slots": 8, "text_weight": 0.5, "draws": 2}


@pytest.fixture(scope="module")
def model():
    return Functional(lambda rngs: UniFluid(CONFIG, rngs=rngs))


@pytest.fixture(scope="module")
def params(model):
    params = jax.jit(model.init)(jax.random.key(0))
    # Off the zero initialisation of the head, so that z reaches the loss.
    return jax.tree.map(
        lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), params
    )


def latents(rng):
    return Latents(
        mean=rng.normal(size=(N, C)).astype(np.float32), std=np.full((N, C), 0.1, np.float32)
    )


def examples(layout=LAYOUT, seed=0):
    rng = np.random.default_rng(seed)
    image = lambda: rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)  # noqa: E731
    order = lambda: rng.permutation(N).astype(np.int32)  # noqa: E731
    return [
        sequence.understanding(layout, image(), [10, 11], [12]),
        sequence.generation(layout, [13, 14], latents(rng), order()),
        sequence.editing(layout, image(), latents(rng), [15], latents(rng), order()),
    ]


def pack(rows, length=32, images=2):
    """Rows of sequences one after the other: the plain twin of the input pipeline's packing."""
    batch = {"segment": np.zeros((len(rows), length), np.int32)}
    fields = [f for f in dataclasses.fields(sequence.Sequence) if f.name != "pictures"]
    for field in fields:
        sample = getattr(rows[0][0], field.name)
        shape = (images, 8, 8, 3) if field.name == "images" else (length, *sample.shape[1:])
        fill = -1 if field.name in ("content_position", "target_position") else 0
        batch[field.name] = np.full((len(rows), *shape), fill, sample.dtype)
    for r, row in enumerate(rows):
        at = seen = 0
        for s, example in enumerate(row):
            here = slice(at, at + len(example))
            batch["segment"][r, here] = s + 1
            for field in fields:
                if field.name != "images":
                    batch[field.name][r, here] = getattr(example, field.name)
            count = len(example.images)
            if count:
                batch["images"][r, seen : seen + count] = example.images
            at, seen = at + len(example), seen + count
    return {name: jnp.asarray(x) for name, x in batch.items()}


def hidden(model, params, batch, latents=None):
    latents = batch["latent_mean"] if latents is None else latents
    return jax.jit(lambda p, b, x: model.bind(p).hidden(b, x))(params, batch, latents)


@pytest.mark.parametrize("groups", [(), (2, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_equals_alone(params, groups, bidirectional):
    layout = dataclasses.replace(LAYOUT, bidirectional_prefix=bidirectional)
    model = Functional(lambda rngs: UniFluid(CONFIG, rngs=rngs))
    rng = np.random.default_rng(1)
    drawn = sequence.generation(layout, [13, 14], latents(rng), rng.permutation(N), groups=groups)
    bare = sequence.editing(layout, None, latents(rng), [15], latents(rng), rng.permutation(N))
    parts = [examples(layout)[0], drawn, bare]
    packed = hidden(model, params, pack([parts], length=48))[0]
    alone = hidden(model, params, pack([[part] for part in parts], length=48))
    at = 0
    for i, part in enumerate(parts):
        np.testing.assert_allclose(packed[at : at + len(part)], alone[i, : len(part)], atol=1e-5)
        at += len(part)


def test_an_image_token_sees_only_tokens_before_it_in_its_order(model, params):
    example = examples()[1]
    batch = pack([[example]], length=16)
    start = int(np.flatnonzero(example.target_position >= 0)[0])

    def output(x, place):
        return jnp.square(model.bind(params).hidden(batch, x)[0, place]).sum()

    for i in range(N):
        gradient = jax.grad(output)(batch["latent_mean"], start + i)[0]
        seen = np.flatnonzero(np.abs(gradient).sum(-1))
        np.testing.assert_array_equal(seen, np.arange(start, start + i))


def test_the_padding_of_a_row_has_no_gradient_into_the_loss(model, params):
    batch = pack([examples()[:2]])

    def loss(x):
        changed = {**batch, "latent_mean": x}
        return unified(model, params, changed)[0]

    gradient = jax.grad(loss)(batch["latent_mean"])[0]
    assert (gradient[np.asarray(batch["segment"][0]) == 0] == 0).all()


def test_the_order_reaches_the_input(model, params):
    """Content and target positions both matter: swapping either changes what is predicted."""
    batch = pack([[examples()[1]]], length=16)
    base = hidden(model, params, batch)
    for name in ("content_position", "target_position"):
        moved = np.array(batch[name])
        moved[moved >= 0] = (moved[moved >= 0] + 1) % N
        assert (
            jnp.abs(hidden(model, params, {**batch, name: jnp.asarray(moved)}) - base).max() > 0.01
        )


def unified(model, params, batch, keys=None, total=None):
    rows = len(batch["tokens"])
    keys = jax.random.split(jax.random.key(1), rows) if keys is None else keys
    total = losses.totals(batch) if total is None else total
    return losses.unified(model.bind(params), FLOW, batch, keys, total, **OPTIONS)


def test_loss_equals_its_definition_row_by_row(model, params):
    """Twin without slots: logits at every position, the head called token by token."""
    batch = pack([examples(seed=i) for i in range(2)], length=48)
    batch["latent_std"] = jnp.zeros_like(batch["latent_std"])
    _, scalars = jax.jit(lambda p, b: unified(model, p, b))(params, batch)
    bound = model.bind(params)
    h = bound.hidden(batch, batch["latent_mean"])
    log_p = jax.nn.log_softmax(bound.backbone.logits(h))
    nats = -jnp.take_along_axis(log_p, batch["text_target"][..., None], -1)[..., 0]
    weight = batch["text_weight"]
    np.testing.assert_allclose(
        scalars["loss_text"], (nats * weight).sum() / weight.sum(), rtol=1e-5
    )
    assert scalars["text_targets"] == 4 and scalars["image_targets"] == 16
    np.testing.assert_allclose(
        scalars["loss"], scalars["loss_visual"] + 0.5 * scalars["loss_text"], rtol=1e-6
    )


def test_parts_of_a_batch_add_up_to_the_whole(model, params):
    # Rows of unlike numbers of targets: a mean of means would differ.
    batch = pack([examples(), examples(seed=1)[:1], examples(seed=2)[1:], examples()[:2]])
    keys = jax.random.split(jax.random.key(1), 4)
    total = losses.totals(batch)
    gradient = jax.jit(jax.grad(lambda p, b, k: unified(model, p, b, k, total), has_aux=True))
    whole = gradient(params, batch, keys)
    parts = [
        gradient(params, jax.tree.map(lambda x, i=i: x[i::2], batch), keys[i::2]) for i in range(2)
    ]
    added = jax.tree.map(jnp.add, *parts)
    for a, b in zip(jax.tree.leaves(added), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)


def test_a_batch_without_a_modality_has_loss_zero_there(model, params):
    _, scalars = unified(model, params, pack([examples()[:1]]))
    assert scalars["loss_visual"] == 0 and scalars["loss_text"] > 0
    _, scalars = unified(model, params, pack([examples()[1:2]]))
    assert scalars["loss_text"] == 0 and scalars["loss_visual"] > 0


def test_every_parameter_learns_from_a_mixed_batch(model, params):
    gradient = jax.grad(lambda p: unified(model, p, pack([examples()], 48))[0])(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert jnp.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_fresh_positions_tell_rows_and_columns_apart():
    """4 x 4 cells: a cell is most like itself, half alike in its own row, unlike elsewhere."""
    backbone = dataclasses.replace(CONFIG.backbone, width=64)
    config = dataclasses.replace(CONFIG, backbone=backbone, image_tokens=16, position_init=2.0)
    fresh = jax.jit(Functional(lambda rngs: UniFluid(config, rngs=rngs)).init)(jax.random.key(0))
    content, target = (np.asarray(fresh[f"{name}_embed"]) for name in ("content", "target"))
    # One input carries both: they have no dim in common.
    assert not (content * target).any() and (content @ content.T == target @ target.T).all()
    alike = (content @ content.T / np.sum(content[0] ** 2)).reshape(4, 4, 4, 4)
    for row, column in np.ndindex(4, 4):
        here = alike[row, column]
        np.testing.assert_allclose(here[row, column], 1, atol=1e-5)
        elsewhere = np.delete(np.delete(here, row, 0), column, 1)
        beside = np.append(np.delete(here[row], column), np.delete(here[:, column], row))
        assert abs(beside - 0.5).max() < 0.15 and abs(elsewhere).max() < 0.25
    np.testing.assert_allclose(np.abs(content).max(), 2.0, rtol=1e-3)


@pytest.mark.parametrize("groups", [(1, 1, 1, 1), (2, 2), (1, 3)], ids=str)
def test_a_group_sees_all_tokens_before_it_and_none_of_its_own(params, groups):
    model = Functional(lambda rngs: UniFluid(CONFIG, rngs=rngs))
    rng = np.random.default_rng(0)
    example = sequence.generation(LAYOUT, [13, 14], latents(rng), rng.permutation(N), groups=groups)
    batch = pack([[example]], length=16)
    asking = np.flatnonzero(example.target_position >= 0)
    ends = np.repeat(np.cumsum(groups), groups)

    @jax.jit
    def outputs(x, target):
        hidden = model.bind(params).hidden({**batch, "target_position": target}, x)
        return jnp.square(hidden[0, asking]).sum(axis=-1)

    target = batch["target_position"]
    jacobian = jax.jit(jax.jacrev(outputs))(batch["latent_mean"], target)[:, 0]
    base = outputs(batch["latent_mean"], target)
    for i in range(N):
        # A latent is kept where it is predicted, and fed a group later.
        seen = np.flatnonzero(np.abs(jacobian[i]).sum(-1))
        np.testing.assert_array_equal(seen, asking[: ends[i] - np.repeat(groups, groups)[i]])
        # What is asked for is known to all of the group, and to those after it.
        other = target.at[0, asking[i]].set((target[0, asking[i]] + 1) % N)
        changed = np.abs(outputs(batch["latent_mean"], other) - base) > 1e-6
        np.testing.assert_array_equal(changed, ends >= ends[i])
