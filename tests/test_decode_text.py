"""Cached decoding of text against full passes, row by row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding import (
    CONFIG,
    EOS,
    LAYOUTS,
    PROMPTS,
    entropy,
    full,
    make_model,
    make_params,
    picture,
)
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


def ask(layout, rows=(0, 1, 2), length=14):
    """Prefixes and entropy of some rows."""
    rows = list(rows)
    prefix = decode.stack([questions(layout)[row] for row in rows], length)
    return prefix, None, entropy()[np.array(rows)]


def write(model, params, layout, rows=(0, 1, 2), sampling=GREEDY, length=14, eos=EOS):
    asked = ask(layout, rows, length)
    ids = decode_text.text(model, params, *asked, sampling, eos=eos, max_tokens=6)
    return jax.device_get(ids)


def an_early_end(free):
    """A token that ends one row of answers early, and not all of them."""
    return int(next(t for t in free[:, 1:5].ravel() if 0 < (free == t).any(1).sum() < len(free)))


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
    eos = an_early_end(free)
    slow = slow_text(model, params, layout, eos)
    np.testing.assert_array_equal(write(model, params, layout, eos=eos), slow)


def test_an_answer_does_not_depend_on_the_batch_around_it(model, params):
    layout, sampling = LAYOUTS["causal"], TextSampling(temperature=1.5)
    together = write(model, params, layout, sampling=sampling)
    for row in range(len(PROMPTS)):
        alone = write(model, params, layout, [row], sampling, length=12)
        np.testing.assert_array_equal(alone[0], together[row])


def test_one_program_serves_all_ways_of_sampling(model, params):
    run = functools.partial(write, model, params, LAYOUTS["causal"])
    greedy = run()
    compiled = decode_text.begin._cache_size(), decode_text.advance._cache_size()
    hot = run(sampling=TextSampling(temperature=3.0, top_k=20, top_p=0.9))
    assert (decode_text.begin._cache_size(), decode_text.advance._cache_size()) == compiled
    assert (hot != greedy).any()
    np.testing.assert_array_equal(run(sampling=TextSampling(3.0, top_k=1)), greedy)
    np.testing.assert_array_equal(run(sampling=TextSampling(3.0, top_p=1e-6)), greedy)
    np.testing.assert_array_equal(run(sampling=TextSampling(1e-4)), greedy)


def shared_questions(layout, pictures):
    """Questions about pictures, one each: shared beginnings, the rest, and both together."""
    whole = [
        sequence.understanding(layout, picture(i), prompt, None)
        for i, prompt in zip(pictures, PROMPTS, strict=True)
    ]
    starts, rests = zip(*[decode_text.cut(s, layout.vision_tokens) for s in whole], strict=True)
    different = sorted(set(pictures))
    first = [starts[pictures.index(i)] for i in different]
    owner = np.array([different.index(i) for i in pictures])
    shared = decode_text.Shared(decode.stack(first, layout.vision_tokens), owner)
    return shared, decode.stack(list(rests), 9), decode.stack(whole, 14)


@pytest.mark.parametrize("pictures", [[7, 7, 7], [8, 7, 8]])
def test_questions_on_one_picture_share_its_keys_and_values(model, params, pictures):
    shared, rest, whole = shared_questions(LAYOUTS["causal"], pictures)
    assert len(shared.start["images"]) == len(set(pictures)) and rest["images"].size == 0

    @jax.jit
    def run(params, prefix, shared):
        bound = model.bind(params)
        hidden, state = decode_text._prefill(bound, prefix, shared, 3)
        return hidden, decode.feed(bound, bound.backbone.embed(jnp.full((3, 1), 9))[:, 0], state)[0]

    expected = run(params, whole, None)
    for found, wanted in zip(run(params, rest, shared), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    write = functools.partial(decode_text.text, model, params, eos=EOS, max_tokens=6)
    np.testing.assert_array_equal(
        write(rest, shared, entropy(), GREEDY), write(whole, None, entropy(), GREEDY)
    )


def test_a_stream_grows_to_what_text_returns(model, params):
    layout, sampling = LAYOUTS["causal"], TextSampling(temperature=1.5)
    eos = an_early_end(write(model, params, layout, sampling=sampling))
    asked = ask(layout)
    for rows, end in (((0, 1, 2), eos), ((0,), int(write(model, params, layout, [0])[0, 2]))):
        sampled = GREEDY if len(rows) == 1 else sampling
        whole = write(model, params, layout, rows, sampled, eos=end)
        asked = ask(layout, rows)
        seen = list(decode_text.stream(model, params, *asked, sampled, eos=end, max_tokens=6))
        longest = min(6, (whole != end).sum(axis=1).max() + 1)
        assert len(seen) == longest
        for count, tokens in enumerate(seen, start=1):
            np.testing.assert_array_equal(tokens[:, :count], whole[:, :count])
            assert (tokens[:, count:] == end).all()
        np.testing.assert_array_equal(seen[-1], whole)


def beams_of(model, params, asked, penalty=0.0, beams=1, eos=EOS, max_tokens=6):
    return jax.device_get(
        decode_text.beam_search(
            model, params, *asked[:2], penalty, eos=eos, max_tokens=max_tokens, beams=beams
        )
    )


def test_one_beam_is_greedy(model, params):
    layout = LAYOUTS["causal"]
    eos = an_early_end(write(model, params, layout))
    greedy = write(model, params, layout, eos=eos)
    np.testing.assert_array_equal(beams_of(model, params, ask(layout), eos=eos), greedy)


def log_p(model, params, rows):
    """Log probabilities after the last position of whole sequences, by full passes."""
    hidden = full(model, params, rows)
    last = hidden[np.arange(len(rows)), [len(row) - 1 for row in rows]]
    return np.asarray(jax.nn.log_softmax(model.bind(params).backbone.logits(last)))


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_beams_find_the_best_of_all_texts(model, params, penalty):
    layout, vocab = LAYOUTS["causal"], CONFIG.backbone.vocab_size
    found = beams_of(model, params, ask(layout), penalty, beams=vocab, max_tokens=2)
    for row, prompt in enumerate(PROMPTS):
        first = log_p(model, params, [questions(layout)[row]])[0]
        longer = [
            sequence.understanding(layout, picture(row), prompt, [token]) for token in range(vocab)
        ]
        both = (first[:, None] + log_p(model, params, longer)) / 2**penalty
        both[EOS] = -np.inf
        best = np.unravel_index(both.argmax(), both.shape)
        if first[EOS] > both.max():
            best = (EOS, EOS)
        np.testing.assert_array_equal(found[row], best)


def test_beams_find_likelier_texts_and_do_not_depend_on_the_batch(model, params):
    layout = LAYOUTS["causal"]
    found = beams_of(model, params, ask(layout), beams=4)
    greedy = write(model, params, layout)
    assert (found != greedy).any()

    def score(row, ids):
        total = 0.0
        for i, token in enumerate(ids):
            start = sequence.understanding(
                layout, picture(row), PROMPTS[row], ids[:i].tolist() or None
            )
            total += log_p(model, params, [start])[0, token]
            if token == EOS:
                break
        return total

    for row in range(len(PROMPTS)):
        assert score(row, found[row]) >= score(row, greedy[row]) - 1e-4
    alone = beams_of(model, params, ask(layout, [1]), beams=4)
    np.testing.assert_array_equal(alone[0], found[1])


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
