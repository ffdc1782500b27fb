"""Cached decoding against full passes, row by row, and against plain Python loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding import (
    LAYOUTS,
    PROMPTS,
    C,
    N,
    full,
    keys,
    latents,
    make_model,
    make_params,
    order,
    sequences,
)
from unifluid_jax import decode
from unifluid_jax.diffusion import guidance_at, guided, process_from, sampler_from

SAMPLER = sampler_from(process_from(process="flow"), steps=3)
CASES = [(LAYOUTS["causal"], "generate"), (LAYOUTS["bidirectional"], "edit")]
cases = pytest.mark.parametrize("layout, task", CASES, ids=["causal", "bidirectional"])


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def params(model):
    return make_params(model)


def draw(model, params, layout, task, rows=(0, 1, 2), guidance=2.5, length=20, **settings):
    rows = list(rows)
    prefix, twin = (
        [sequences(layout, task, drop=drop)[row] for row in rows] for drop in (False, True)
    )
    settings = {"sampler": SAMPLER, "schedule": "linear", **settings}
    return jax.device_get(
        decode.images(
            model,
            params,
            decode.stack(prefix, length),
            None if guidance is None else decode.stack(twin, length),
            np.stack([order(row) for row in rows]),
            keys()[np.array(rows)],
            1.0 if guidance is None else guidance,
            0.9,
            **settings,
        )
    )


@cases
def test_the_cache_gives_the_hidden_states_of_the_full_pass(model, params, layout, task):
    targets = np.stack([latents(10 + i).mean for i in range(len(PROMPTS))])
    rows = sequences(layout, task, targets)
    expected = full(model, params, rows)
    starts = [len(row) - N for row in rows]

    @jax.jit
    def run(params, prefix):
        bound = model.bind(params)
        hidden, state = decode.prefill(bound, prefix, N - 1)
        found = [hidden]
        for i in range(N - 1):
            cells = np.stack([order(row) for row in range(len(rows))])
            fed = targets[np.arange(len(rows)), cells[:, i]][:, None]
            x = bound.embed_content(jnp.asarray(fed), jnp.asarray(cells[:, i : i + 1]))
            x += bound.embed_target(jnp.asarray(cells[:, i + 1 : i + 2]))
            hidden, state = decode.feed(bound, x[:, 0], state)
            found.append(hidden)
        return jnp.stack(found, axis=1)

    found = run(params, decode.stack(sequences(layout, task), 20))
    for row, start in enumerate(starts):
        np.testing.assert_allclose(found[row], expected[row, start : start + N], atol=1e-4)


def slow_images(model, params, layout, task, guidance):
    """The image loop without cache, padding or batch: full passes over what is known so far."""
    bound = model.bind(params)
    pictures = []
    for row, key in enumerate(keys()):
        tokens = np.zeros((len(PROMPTS), N, C), np.float32)
        for i, cell in enumerate(order(row)):
            z = []
            for drop in (False, True):
                example = sequences(layout, task, tokens, drop)[row]
                place = len(example) - N + i
                hidden = full(model, params, [example])[:, place : place + 1]
                z.append(bound.condition(hidden, jnp.full((1, 1), cell))[:, 0])
            scale = guidance_at("linear", guidance, (i + 1) / N)
            z = jnp.stack(z)
            predict = guided(lambda x, t, z=z: bound.head(x, t, z), scale, C)
            tokens[row, cell] = SAMPLER(jax.random.fold_in(key, i)[None], predict, C, 0.9)[0]
        pictures.append(tokens[row])
    return np.stack(pictures)


@cases
def test_images_equal_a_plain_loop_of_full_passes(model, params, layout, task):
    fast = draw(model, params, layout, task)
    slow = slow_images(model, params, layout, task, guidance=2.5)
    assert np.abs(slow).max() > 0.5
    np.testing.assert_allclose(fast, slow, atol=1e-4)


@cases
def test_a_picture_does_not_depend_on_the_batch_around_it(model, params, layout, task):
    together = draw(model, params, layout, task)
    for row in range(len(PROMPTS)):
        alone = draw(model, params, layout, task, rows=[row])
        np.testing.assert_allclose(alone[0], together[row], atol=1e-4)


def test_padding_makes_no_difference(model, params):
    short, long = (draw(model, params, LAYOUTS["causal"], "generate", length=n) for n in (7, 13))
    np.testing.assert_allclose(short, long, atol=1e-4)


def test_layers_under_scan_give_the_same(model, params):
    scanned = make_model(scan_layers=True)
    unrolled, scanned = (draw(m, params, *CASES[0]) for m in (model, scanned))
    np.testing.assert_allclose(unrolled, scanned, atol=1e-4)


def test_guidance_of_one_equals_decoding_without_a_twin(model, params):
    one, none = (draw(model, params, *CASES[0], guidance=w) for w in (1.0, None))
    np.testing.assert_allclose(one, none, atol=1e-4)


def test_guidance_keys_and_schedule_matter(model, params):
    run = functools.partial(draw, model, params, *CASES[0])
    base = run()
    assert np.abs(run(guidance=1.0) - base).max() > 0.01
    assert np.abs(run(schedule="constant") - base).max() > 0.01
    assert np.abs(base[0] - base[1]).max() > 0.01


def test_one_program_serves_all_prompts_keys_and_settings(model, params):
    run = functools.partial(draw, model, params, *CASES[0])
    run()
    compiled = decode.images._cache_size()
    run(guidance=7.0)
    run(rows=[2, 0, 1])
    assert decode.images._cache_size() == compiled


def test_a_prefix_too_long_for_its_rows_is_refused():
    with pytest.raises(ValueError, match="7 positions for rows of 6"):
        decode.stack(sequences(LAYOUTS["causal"], "generate"), 6)
