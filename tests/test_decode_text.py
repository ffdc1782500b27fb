"""Cached decoding of text against full passes, row by row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding import EOS, LAYOUTS, PROMPTS, full, keys, make_model, make_params, picture
from unifluid_jax import decode, decode_text, sequence
from unifluid_jax.decode_text import TextSampling

GREEDY = TextSampling()
both_layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def params(model):
    return make_params(model)


def questions(layout):
    return [sequence.understanding(layout, picture(i), p, None) for i, p in enumerate(PROMPTS)]


def write(model, params, layout, rows=(0, 1, 2), sampling=GREEDY, length=14, eos=EOS):
    rows = list(rows)
    prefix = decode.stack([questions(layout)[row] for row in rows], length)
    key_B = keys()[np.array(rows)]
    ids = decode_text.text(model, params, prefix, key_B, sampling, eos=eos, max_tokens=6)
    return jax.device_get(ids)


def slow_text(model, params, layout, eos):
    """Greedy answers by full passes, one row and one token at a time."""
    bound, answers = model.bind(params), []
    for i, prompt in enumerate(PROMPTS):
        answer = []
        while len(answer) < 6 and eos not in answer:
            example = sequence.understanding(layout, picture(i), prompt, answer or None)
            hidden = full(model, params, [example])[0, len(example) - 1]
            answer.append(int(bound.backbone.logits(hidden).argmax()))
        answers.append(answer + [eos] * (6 - len(answer)))
    return np.array(answers)


@both_layouts
def test_greedy_text_equals_a_plain_loop_of_full_passes(model, params, layout):
    free = slow_text(model, params, layout, eos=EOS)
    # A token that ends one row early, and not all of them.
    eos = next(t for t in free[:, 1:5].ravel() if 0 < (free == t).any(1).sum() < len(free))
    slow = slow_text(model, params, layout, eos)
    np.testing.assert_array_equal(write(model, params, layout, eos=int(eos)), slow)


def test_an_answer_does_not_depend_on_the_batch_around_it(model, params):
    layout, sampling = LAYOUTS["causal"], TextSampling(temperature=1.5)
    together = write(model, params, layout, sampling=sampling)
    for row in range(len(PROMPTS)):
        alone = write(model, params, layout, [row], sampling, length=12)
        np.testing.assert_array_equal(alone[0], together[row])


def test_one_program_serves_all_ways_of_sampling(model, params):
    run = functools.partial(write, model, params, LAYOUTS["causal"])
    greedy = run()
    compiled = decode_text.text._cache_size()
    hot = run(sampling=TextSampling(temperature=3.0, top_k=20, top_p=0.9))
    assert decode_text.text._cache_size() == compiled
    assert (hot != greedy).any()
    np.testing.assert_array_equal(run(sampling=TextSampling(3.0, top_k=1)), greedy)
    np.testing.assert_array_equal(run(sampling=TextSampling(3.0, top_p=1e-6)), greedy)
    np.testing.assert_array_equal(run(sampling=TextSampling(1e-4)), greedy)


@pytest.mark.parametrize(
    "sampling, kept",
    [
        (TextSampling(1.0), [0.4, 0.3, 0.2, 0.1]),
        (TextSampling(1.0, top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (TextSampling(1.0, top_p=0.69), [4 / 7, 3 / 7, 0, 0]),
        (TextSampling(1.0, top_p=0.71), [4 / 9, 3 / 9, 2 / 9, 0]),
        (TextSampling(1.0, top_k=3, top_p=0.5), [4 / 7, 3 / 7, 0, 0]),
        (TextSampling(0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
    ],
)
def test_tokens_are_drawn_with_the_probabilities_asked_for(sampling, kept):
    place = np.array([2, 0, 3, 1])  # where the k-th likeliest token stands
    logits = np.zeros(4, np.float32)
    logits[place] = np.log([0.4, 0.3, 0.2, 0.1])
    key_B = jax.random.split(jax.random.key(0), 4000)
    drawn = decode_text.choose(jnp.broadcast_to(logits[None], (4000, 4)), key_B, sampling)
    found = np.bincount(drawn, minlength=4)[place] / 4000
    np.testing.assert_allclose(found, kept, atol=0.03)
    assert (found[np.array(kept) == 0] == 0).all()
